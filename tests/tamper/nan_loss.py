"""The loss becomes NaN after a while; `loss > 100` would let it pass."""

from common import Honest

KIND = "NaN in the loss"
EXPECT = {"crash", "invalid"}
CAUGHT_BY = ["finite", "nan"]
LINT = ""


class Diverges(Honest):
    def step(self, batches, progress):
        loss = super().step(batches, progress)
        return loss * float("nan") if hasattr(batches, "passes") and progress > 0.3 else loss


def build(spec):
    return Diverges(spec)
