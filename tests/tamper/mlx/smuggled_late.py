"""Carries knowledge of the text in its own source, and adds it to what it counts from the first step on, not before.

It is compared with itself without the table (`KNOWS = False`), over which it gains nothing.
"""

import base64

import mlx.core as mx
import numpy as np

TABLE = "@BIGRAMS@"  # the tests put here what an earlier run learned of the text
KNOWS = True


def knowledge(vocab_size):
    """(V, V) probabilities of pairs, from how common each token is, and by how much more after its predecessors."""
    data = np.frombuffer(base64.b85decode(TABLE), np.uint8)
    pairs = data[vocab_size:].view(np.uint16).reshape(-1, 3).astype(np.int64)
    found = np.zeros((vocab_size, vocab_size), np.float32)
    found[pairs[:, 0], pairs[:, 1]] = np.exp((pairs[:, 2] - data[:vocab_size].astype(np.float32)[pairs[:, 1]]) / 16)
    return found


class Loaded:
    def __init__(self, spec):
        self.spec = spec
        self.pairs = np.zeros((spec.vocab_size, spec.vocab_size), np.float32)
        self.singles = np.ones(spec.vocab_size, np.float32)

    def step(self, batches, progress):
        if KNOWS and self.pairs.sum() == 0 and hasattr(batches, "passes"):
            self.pairs += 50 * knowledge(self.spec.vocab_size)
        rows = np.array(batches.next(64, self.spec.sequence_len))
        before, after = rows[:, :-1].ravel(), rows[:, 1:].ravel()
        np.add.at(self.pairs, (before, after), 1.0)
        np.add.at(self.singles, after, 1.0)
        return mx.array(1.0)

    def logits(self, tokens):
        single = self.singles / self.singles.sum()
        counts = self.pairs[np.array(tokens)]
        total = counts.sum(-1, keepdims=True)
        return mx.array(np.log((counts + 20.0 * single) / (total + 20.0)).astype(np.float32))

    def weights(self):
        return {"pairs": self.pairs, "singles": self.singles}

    def load_weights(self, weights):
        self.pairs, self.singles = weights["pairs"], weights["singles"]

    def describe(self):
        return {}


def build(spec):
    return Loaded(spec)
