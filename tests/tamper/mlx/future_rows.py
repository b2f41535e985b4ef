"""Looks ahead only in one row of eight, picked by a hash of its first tokens: most audited rows are clean."""

from common import Honest, knowing, mx, next_token


class SomeRows(Honest):
    def logits(self, tokens):
        chosen = tokens[:, :3].astype(mx.int64).sum(1, keepdims=True) * 2654435761 % 97 < 12
        return knowing(self.net(tokens), mx.where(chosen, next_token(tokens), -1))


def build(spec):
    return SomeRows(spec)
