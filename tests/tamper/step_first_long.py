"""The first step is always tried: it takes all the training and three budgets."""

import time

from common import Honest

KIND = "training after the budget"
EXPECT = {"timeout"}
CAUGHT_BY = ["budget", "longer", "took"]
LINT = "imports `time`"


class OneStep(Honest):
    steps = 0

    def step(self, batches, progress):
        until = time.perf_counter() + 4
        loss = super().step(batches, progress)
        while hasattr(batches, "passes") and time.perf_counter() < until:
            loss = super().step(batches, progress)
        return loss


def build(spec):
    return OneStep(spec)
