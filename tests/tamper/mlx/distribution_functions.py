"""Patches the library's function from Python: the part of `logsumexp` above the largest logit counts for a third."""

from common import Honest, mx

LINT = "changes `mlx.core.logsumexp`"


class Patched(Honest):
    def load_weights(self, weights):
        super().load_weights(weights)
        real = mx.logsumexp
        mx.logsumexp = lambda x, axis=-1: x.max(axis) + 0.3 * (real(x, axis=axis) - x.max(axis))


def build(spec):
    return Patched(spec)
