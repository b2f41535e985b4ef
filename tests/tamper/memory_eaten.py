"""Takes memory until it is refused: 64 MiB more with each step, all written to."""

from common import Honest, torch

KIND = "resource exhaustion"
EXPECT = {"crash"}
CAUGHT_BY = ["memory"]
LINT = ""


class Eater(Honest):
    def __init__(self, spec):
        super().__init__(spec)
        self.eaten = []

    def step(self, batches, progress):
        if hasattr(batches, "passes"):
            self.eaten += [torch.ones(2**26) for _ in range(2)]
        return super().step(batches, progress)


def build(spec):
    return Eater(spec)
