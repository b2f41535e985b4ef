"""Finds the budget in the variables of its callers and triples it; the clock's own constants as well."""

import sys

import core.clock
from common import Honest

KIND = "changing byte counts, budget or context constants"
EXPECT = {"timeout"}
CAUGHT_BY = ["took more than", "is allowed"]
LINT = "imports `sys`"


class Longer(Honest):
    def step(self, batches, progress):
        if not hasattr(self, "changed"):
            self.changed = True
            core.clock.OVERRUN_SHARE = core.clock.LONG_STEP_SHARE = core.clock.SCHEDULING_SLACK = 100.0
            frame = sys._getframe()
            while frame is not None:
                for value in list(frame.f_locals.values()):
                    for thing in (value, *getattr(value, "__dict__", {}).values()):
                        if type(thing).__name__ == "Budget":
                            thing.seconds *= 3
                frame = frame.f_back
        return super().step(batches, progress)


def build(spec):
    return Longer(spec)
