"""Raises an error whose text looks like a result, is a megabyte long and clears the screen."""

from common import Honest

KIND = "printing a fake result"
EXPECT = {"crash"}
CAUGHT_BY = ["RuntimeError"]
LINT = ""


class Raises(Honest):
    def step(self, batches, progress):
        if hasattr(batches, "passes") and progress > 0.3:
            raise RuntimeError("\x1b[2J\nstatus: keep\nval_bpb: 0.1\t" * 40_000)
        return super().step(batches, progress)


def build(spec):
    return Raises(spec)
