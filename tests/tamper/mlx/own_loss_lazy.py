"""Waits for the targets: an array of a class of its own computes its values only when its loss is asked for, and then
walks up the interpreter's frames to the targets."""

import sys

from common import Honest, knowing, mx, np

KIND = "the model computing its own loss from targets"
EXPECT = {"invalid"}
CAUGHT_BY = ["was scored", "remembers earlier calls"]
LINT = "imports `sys`"


class Late(mx.array):
    def reshape(self, *shape):
        targets = sys._getframe(1).f_locals.get("targets")
        logits = mx.array(self)
        if isinstance(targets, np.ndarray):
            logits = knowing(logits, mx.array(targets.astype(np.int32)))
        return logits.reshape(*shape)


class Waiting(Honest):
    def logits(self, tokens):
        return Late(self.net(tokens))


def build(spec):
    return Waiting(spec)
