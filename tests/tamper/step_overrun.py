"""One last step that trains for as long again as the whole budget."""

import time

from common import Honest

KIND = "training after the budget"
EXPECT = {"timeout"}
CAUGHT_BY = ["budget", "longer", "took"]
LINT = "imports `time`"


class LastStep(Honest):
    def step(self, batches, progress):
        loss = super().step(batches, progress)
        if hasattr(batches, "passes") and progress > 0.8:
            until = time.perf_counter() + 3
            while time.perf_counter() < until:
                loss = super().step(batches, progress)
        return loss


def build(spec):
    return LastStep(spec)
