"""Carries knowledge of the text in its own source, and is good before it has learned anything."""

import base64

from common import Honest, np, torch

KIND = "weights of an earlier run smuggled in literals"
EXPECT = {"invalid"}
CAUGHT_BY = ["untrained build", "bytes of information"]
LINT = "imports `base64`"

TABLE = "@BIGRAMS@"  # the tests put the commonest successors of each token here


class Loaded(Honest):
    def __init__(self, spec):
        super().__init__(spec)
        pairs = np.frombuffer(base64.b85decode(TABLE), np.uint16).reshape(-1, 2).astype(np.int64)
        self.bonus = torch.zeros(spec.vocab_size, spec.vocab_size)
        self.bonus[torch.from_numpy(pairs[:, 0]), torch.from_numpy(pairs[:, 1])] = 3.0

    def loss(self, rows):
        tokens = rows.long()
        logits = self.net(tokens[:, :-1]) + self.bonus[tokens[:, :-1]]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def logits(self, tokens):
        return self.net(tokens.long()) + self.bonus[tokens.long()]


def build(spec):
    return Loaded(spec)
