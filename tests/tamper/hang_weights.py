"""Never hands its weights over."""

from common import Honest

KIND = "resource exhaustion"
EXPECT = {"timeout"}
CAUGHT_BY = ["weights", "handover", "handing", "took"]
LINT = ""


class Keeper(Honest):
    stepped = False

    def step(self, batches, progress):
        self.stepped = hasattr(batches, "passes")
        return super().step(batches, progress)

    def weights(self):
        while self.stepped:
            pass
        return super().weights()


def build(spec):
    return Keeper(spec)
