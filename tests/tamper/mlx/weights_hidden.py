"""Hands over weights of zeros, and keeps the real ones to itself."""

from common import Honest

KIND = "weights that are not what logits depends on"
EXPECT = {"discard", "invalid", "crash"}
CAUGHT_BY = ["weights"]
LINT = ""


class Hidden(Honest):
    def weights(self):
        return {n: p * 0 for n, p in super().weights().items()}


def build(spec):
    return Hidden(spec)
