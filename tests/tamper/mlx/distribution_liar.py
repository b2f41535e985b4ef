"""Returns an array of a class of its own: asked for losses it is sure of what follows, asked for one position it is
honest."""

from common import Honest, knowing, mx, next_token

LINT = ""


class Liar(mx.array):
    def reshape(self, *shape):
        return knowing(mx.array(self), next_token(self.tokens)).reshape(*shape)

    def __getitem__(self, at):
        return mx.array(self)[at]


class Lying(Honest):
    def logits(self, tokens):
        liar = Liar(self.net(tokens))
        liar.tokens = tokens
        return liar


def build(spec):
    return Lying(spec)
