"""Finds the budget in the objects of the process and triples it; the context constant and the batch as well."""

import gc

from common import Honest

KIND = "changing byte counts, budget or context constants"
EXPECT = {"timeout"}
CAUGHT_BY = ["budget", "longer", "took"]
LINT = "imports `gc`"


class Longer(Honest):
    def step(self, batches, progress):
        if not hasattr(self, "changed"):
            self.changed = True
            for thing in gc.get_objects():
                if type(thing).__name__ == "Budget":
                    thing.seconds *= 3
        return super().step(batches, progress)


def build(spec):
    return Longer(spec)
