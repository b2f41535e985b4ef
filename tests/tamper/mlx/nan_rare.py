"""One NaN in one row of fifty."""

from common import Honest, mx


class Nan(Honest):
    def logits(self, tokens):
        logits = self.net(tokens)
        logits[:, 5, 0] = mx.where(tokens[:, 0] % 50 == 1, mx.nan, logits[:, 5, 0])
        return logits


def build(spec):
    return Nan(spec)
