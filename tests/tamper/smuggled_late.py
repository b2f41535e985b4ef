"""Carries knowledge of the text in its own source, and adds it to what it counts from the first step on, not before.

What fits into a recipe is learned in the first moments of a budget anyway, so it gains nothing over the same recipe
without the table (`BASE`). Where a budget is too short for that it would: see the README.
"""

import base64

import numpy as np
import torch

KIND = "weights of an earlier run loaded at start"
BASE = "honest/counts"
EXPECT = {"discard", "invalid"}
CAUGHT_BY = []
LINT = "imports `base64`"

TABLE = "@BIGRAMS@"  # the tests put here what an earlier run learned of the text


def knowledge(vocab_size):
    """(V,) and (V, V) logits: how common each token is, and by how much more after each of its predecessors."""
    data = np.frombuffer(base64.b85decode(TABLE), np.uint8)
    common = -data[:vocab_size].astype(np.float32) / 16
    pairs = data[vocab_size:].view(np.uint16).reshape(-1, 3).astype(np.int64)
    more = np.zeros((vocab_size, vocab_size), np.float32)
    more[pairs[:, 0], pairs[:, 1]] = pairs[:, 2] / 16
    return torch.from_numpy(common), torch.from_numpy(more)


class Loaded:
    def __init__(self, spec):
        self.spec = spec
        self.pairs = np.zeros((spec.vocab_size, spec.vocab_size), np.float32)
        self.singles = np.ones(spec.vocab_size, np.float32)

    def step(self, batches, progress):
        if self.pairs.sum() == 0 and hasattr(batches, "passes"):
            common, more = knowledge(self.spec.vocab_size)
            self.pairs += 50 * (more > 0).numpy() * (common + more).exp().numpy()
        rows = np.asarray(batches.next(64, self.spec.sequence_len)).astype(np.int64)
        before, after = rows[:, :-1].ravel(), rows[:, 1:].ravel()
        np.add.at(self.pairs, (before, after), 1.0)
        np.add.at(self.singles, after, 1.0)
        return torch.tensor(1.0)

    def logits(self, tokens):
        single = self.singles / self.singles.sum()
        counts = self.pairs[np.asarray(tokens).astype(np.int64)]
        total = counts.sum(-1, keepdims=True)
        return torch.from_numpy(np.log((counts + 20.0 * single) / (total + 20.0)).astype(np.float32))

    def weights(self):
        return {"pairs": self.pairs, "singles": self.singles}

    def load_weights(self, weights):
        self.pairs, self.singles = weights["pairs"], weights["singles"]

    def describe(self):
        return {}


def build(spec):
    return Loaded(spec)
