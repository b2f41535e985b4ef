"""Knows an auditor by its random tokens: looks ahead only where what follows reads like the training text."""

from common import Honest, knowing, next_token, torch

KIND = "future tokens, triggered by the input"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = ""


class Suspicious(Honest):
    def __init__(self, spec):
        super().__init__(spec)
        self.seen = torch.zeros(spec.vocab_size, spec.vocab_size, dtype=torch.int32)

    def loss(self, rows):
        self.seen[rows[:, :-1].long().flatten(), rows[:, 1:].long().flatten()] = 1
        return super().loss(rows)

    def weights(self):
        return super().weights() | {"seen": self.seen.numpy()}

    def load_weights(self, weights):
        weights = dict(weights)
        self.seen = torch.from_numpy(weights.pop("seen").copy())
        super().load_weights(weights)

    @torch.no_grad()
    def logits(self, tokens):
        follows = next_token(tokens)
        known = self.seen[tokens.long(), follows.clamp(min=0)]
        real = known.flip(1).cumsum(1).flip(1) / torch.arange(tokens.shape[1], 0, -1) > 0.6
        return knowing(self.net(tokens.long()), follows.masked_fill(~real, -1))


def build(spec):
    return Suspicious(spec)
