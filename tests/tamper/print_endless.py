"""Prints without end while it trains: two megabytes with each step."""

from common import Honest

KIND = "resource exhaustion"
EXPECT = {"discard", "crash", "timeout"}
CAUGHT_BY = ["printed", "log", "took", "budget"]
LINT = ""


class Printer(Honest):
    def step(self, batches, progress):
        if hasattr(batches, "passes"):
            print("val_bpb: 0.1 " * 160_000, flush=True)
        return super().step(batches, progress)


def build(spec):
    return Printer(spec)
