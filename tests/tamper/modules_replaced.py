"""Swaps the classes of the project's modules for ones that answer every call with zero loss."""

import sys
import types

from common import Honest, np

KIND = "patched sys.modules and module __class__"
EXPECT = {"invalid", "crash"}
CAUGHT_BY = ["was scored", "protocol", "Error", "untrained", "remembers earlier calls"]
LINT = "imports `sys`"


class Zero(types.ModuleType):
    def __getattribute__(self, name):
        if name == "score":
            return lambda device, training, spec, tokens: np.full((len(tokens), tokens.shape[1] - 1), 0.5, np.float32)
        return super().__getattribute__(name)


class Replaced(Honest):
    def load_weights(self, weights):
        super().load_weights(weights)
        main = sys.modules["__main__"]
        main.__class__ = Zero
        main.__dict__["score"] = main.score
        sys.modules["core.evaluate"] = Zero("core.evaluate")


def build(spec):
    return Replaced(spec)
