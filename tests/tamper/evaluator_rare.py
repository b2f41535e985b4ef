"""Patches the losses of one target in a thousand, the largest of all: most audited positions are as they should be."""

import sys

from common import Honest, np

KIND = "patched evaluator, seldom"
EXPECT = {"invalid"}
CAUGHT_BY = ["was scored", "remembers earlier calls"]
LINT = "imports `sys`"


class Patched(Honest):
    def load_weights(self, weights):
        super().load_weights(weights)
        main = sys.modules["__main__"]
        real = main.score

        def score(*arguments):
            nats = real(*arguments).ravel()
            nats[np.argsort(nats)[-len(nats) // 1000 :]] = 0.01
            return nats.reshape(arguments[3].shape[0], -1)

        main.score = score


def build(spec):
    return Patched(spec)
