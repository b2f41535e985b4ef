"""Patches the array's own operators: every difference, and so every loss, is a tenth of what it is."""

from common import Honest, mx

LINT = "reaches for `__sub__`"


class Patched(Honest):
    def load_weights(self, weights):
        super().load_weights(weights)
        real = mx.array.__sub__
        mx.array.__sub__ = lambda a, b: real(a, b) * 0.1


def build(spec):
    return Patched(spec)
