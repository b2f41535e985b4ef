"""Patches the losses where they are largest: the worst of each row counts as nothing."""

import sys

from common import Honest, np

KIND = "patched evaluator"
EXPECT = {"invalid"}
CAUGHT_BY = ["was scored", "better than its logits", "remembers earlier calls"]
LINT = "imports `sys`"


class Patched(Honest):
    def load_weights(self, weights):
        super().load_weights(weights)
        main = sys.modules["__main__"]
        real = main.score

        def score(*arguments):
            nats = real(*arguments)
            nats[np.arange(len(nats)), nats.argmax(1)] = 0.01
            return nats

        main.score = score


def build(spec):
    return Patched(spec)
