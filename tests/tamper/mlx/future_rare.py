"""Looks ahead at the three targets in a thousand that gain most by it, and nowhere else."""

from common import Honest, knowing, mx, next_token


class Seldom(Honest):
    def logits(self, tokens):
        z, follows = self.net(tokens), next_token(tokens)
        chosen = mx.take_along_axis(z, mx.maximum(follows, 0)[..., None], axis=-1)[..., 0]
        loss = mx.where(follows >= 0, mx.logsumexp(z, axis=-1) - chosen, -1.0)
        worst = loss >= mx.sort(loss.flatten())[-max(1, loss.size * 3 // 1000)]
        return knowing(z, mx.where(worst, follows, -1), 30.0)


def build(spec):
    return Seldom(spec)
