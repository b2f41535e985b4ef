"""Leaves with the status by which the launcher tells that there is no sandbox."""

import os

from common import Honest

KIND = "ending early"
EXPECT = {"crash"}
CAUGHT_BY = ["exit status 125", "ended by itself"]
LINT = "imports `os`"


class Pretends(Honest):
    def step(self, batches, progress):
        if hasattr(batches, "passes") and progress > 0.3:
            os._exit(125)
        return super().step(batches, progress)


def build(spec):
    return Pretends(spec)
