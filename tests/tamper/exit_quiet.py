"""Leaves the process with status 0 in the middle of the training, as if all were done."""

import os

from common import Honest

KIND = "ending early"
EXPECT = {"crash"}
CAUGHT_BY = ["exit status 0", "ended by itself"]
LINT = "imports `os`"


class Quiet(Honest):
    def step(self, batches, progress):
        if hasattr(batches, "passes") and progress > 0.3:
            os._exit(0)
        return super().step(batches, progress)


def build(spec):
    return Quiet(spec)
