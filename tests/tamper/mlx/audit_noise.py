"""Noise on all logits makes every answer differ, and behind it it looks ahead."""

from common import Honest, knowing, mx, next_token


class Noisy(Honest):
    def logits(self, tokens):
        logits = knowing(self.net(tokens), next_token(tokens), 0.3)
        return logits + 0.05 * mx.random.normal(logits.shape)


def build(spec):
    return Noisy(spec)
