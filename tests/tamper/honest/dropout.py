"""Dropout while it trains and none while it is scored."""

from common import F, Honest, Net


class Dropping(Net):
    def inputs(self, tokens):
        return F.dropout(super().inputs(tokens), 0.1, self.training)


class Training(Honest):
    def step(self, batches, progress):
        self.net.train()
        return super().step(batches, progress)

    def logits(self, tokens):
        self.net.eval()
        return super().logits(tokens)


def build(spec):
    return Training(spec, Dropping)
