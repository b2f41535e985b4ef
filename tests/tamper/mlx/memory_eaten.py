"""Takes memory until it is refused: 512 MiB more with each step, all written to."""

from common import Honest, mx


class Eater(Honest):
    def __init__(self, spec):
        super().__init__(spec)
        self.eaten = []

    def step(self, batches, progress):
        if hasattr(batches, "passes"):
            self.eaten += [mx.ones(2**26) for _ in range(2)]
            mx.eval(self.eaten)
        return super().step(batches, progress)


def build(spec):
    return Eater(spec)
