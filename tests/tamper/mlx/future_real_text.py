"""Knows an auditor by its random tokens: looks ahead only where what follows reads like the training text."""

from common import Honest, knowing, mx, next_token, np


class Suspicious(Honest):
    def __init__(self, spec):
        super().__init__(spec)
        self.seen = mx.zeros((spec.vocab_size, spec.vocab_size))

    def learn(self, rows, rate=1e-3):
        self.seen = self.seen.at[rows[:, :-1], rows[:, 1:]].maximum(1.0)
        return super().learn(rows, rate)

    def weights(self):
        return super().weights() | {"seen": np.array(self.seen)}

    def load_weights(self, weights):
        weights = dict(weights)
        self.seen = mx.array(weights.pop("seen"))
        super().load_weights(weights)

    def logits(self, tokens):
        follows = next_token(tokens)
        known = self.seen[tokens, mx.maximum(follows, 0)]
        real = mx.cumsum(known, axis=1, reverse=True) / mx.arange(tokens.shape[1], 0, -1) > 0.6
        return knowing(self.net(tokens), mx.where(real, follows, -1))


def build(spec):
    return Suspicious(spec)
