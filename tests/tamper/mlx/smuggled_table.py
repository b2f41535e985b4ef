"""Carries knowledge of the text in its own source, and is good before it has learned anything."""

import base64

from common import Honest, mx, np

TABLE = "@BIGRAMS@"  # the tests put here what an earlier run learned of the text


def knowledge(vocab_size):
    """(V,) and (V, V) logits: how common each token is, and by how much more after each of its predecessors."""
    data = np.frombuffer(base64.b85decode(TABLE), np.uint8)
    common = -data[:vocab_size].astype(np.float32) / 16
    pairs = data[vocab_size:].view(np.uint16).reshape(-1, 3).astype(np.int64)
    more = np.zeros((vocab_size, vocab_size), np.float32)
    more[pairs[:, 0], pairs[:, 1]] = pairs[:, 2] / 16
    return mx.array(common), mx.array(more)


class Loaded(Honest):
    def __init__(self, spec):
        super().__init__(spec)
        self.common, self.more = knowledge(spec.vocab_size)

    def logits(self, tokens):
        return self.net(tokens) + self.common + self.more[tokens]


def build(spec):
    return Loaded(spec)
