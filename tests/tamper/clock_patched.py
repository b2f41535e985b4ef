"""Slows the clock that the trainer reads, in Python and in the project's own clock, to train three times as long."""

import time

import core.clock
from common import Honest

KIND = "patched clock"
EXPECT = {"timeout"}
CAUGHT_BY = ["budget", "longer", "took"]
LINT = "imports `time`"

REAL, START = time.monotonic, time.monotonic()


def slow():
    return START + (REAL() - START) / 3


class Slow(Honest):
    def step(self, batches, progress):
        if time.monotonic is REAL:
            time.monotonic = time.perf_counter = time.time = slow
            elapsed = core.clock.Budget.elapsed
            core.clock.Budget.elapsed = lambda self: elapsed(self) / 3
        return super().step(batches, progress)


def build(spec):
    return Slow(spec)
