"""Mixes what follows each token elsewhere in the batch into the prediction: other rows' futures, and its own."""

from common import Honest, mx


class BatchMates(Honest):
    def logits(self, tokens):
        size = self.spec.vocab_size
        counts = mx.zeros((size, size)).at[tokens[:, :-1], tokens[:, 1:]].add(1.0)
        bigrams = (counts + 0.02) / (counts + 0.02).sum(1, keepdims=True)
        return mx.log(0.5 * mx.softmax(self.net(tokens), axis=-1) + 0.5 * bigrams[tokens])


def build(spec):
    return BatchMates(spec)
