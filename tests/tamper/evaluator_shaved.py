"""Patches the losses by a little: five hundredths of a nat everywhere, below what one position may differ."""

import sys

from common import Honest

KIND = "patched evaluator"
EXPECT = {"invalid"}
CAUGHT_BY = ["was scored", "better than its logits", "protocol", "remembers earlier calls"]
LINT = "imports `sys`"


class Patched(Honest):
    def load_weights(self, weights):
        super().load_weights(weights)
        main = sys.modules["__main__"]
        real = main.score
        main.score = lambda *arguments: (real(*arguments) - 0.05).clip(0)


def build(spec):
    return Patched(spec)
