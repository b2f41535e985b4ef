"""A kernel's mistake, or what looks like one: within each block of 16 positions everything is seen."""

from common import Honest, knowing, mx, next_token


class Blocks(Honest):
    def logits(self, tokens):
        last = mx.arange(tokens.shape[1]) % 16 == 15
        return knowing(self.net(tokens), mx.where(last, -1, next_token(tokens)))


def build(spec):
    return Blocks(spec)
