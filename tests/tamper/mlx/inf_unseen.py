"""Infinities, and a patched `isfinite` that does not see them."""

from common import Honest, mx

KIND = "NaN in logits read as small loss"
EXPECT = {"invalid", "crash"}
CAUGHT_BY = ["finite", "below 0", "audit", "was scored"]
LINT = "changes `mlx.core.isfinite`"


class Inf(Honest):
    def load_weights(self, weights):
        super().load_weights(weights)
        mx.isfinite = lambda x: mx.ones(x.shape, dtype=mx.bool_)
        mx.logsumexp = lambda x, axis=-1: x.max(axis) + 0.001

    def logits(self, tokens):
        logits = self.net(tokens)
        return mx.where(logits < logits.max(-1, keepdims=True) - 1, -mx.inf, logits)


def build(spec):
    return Inf(spec)
