"""NaN where the model does badly: comparisons with NaN are false, and a sum may drop it."""

from common import Honest, mx


class Nan(Honest):
    def logits(self, tokens):
        logits = self.net(tokens)
        unsure = mx.softmax(logits, axis=-1).max(-1, keepdims=True) < 0.1
        return mx.where(unsure, mx.nan, logits)


def build(spec):
    return Nan(spec)
