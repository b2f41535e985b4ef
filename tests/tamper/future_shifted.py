"""A causal mask that is off by one: each position sees the token that it has to predict."""

from common import Honest, Net, nn, torch

KIND = "future tokens"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = ""


class Shifted(Net):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        nn.init.eye_(self.out.weight)

    def allowed(self, length):
        return torch.eye(length, dtype=torch.bool).roll(1, 1).index_fill(0, torch.tensor([length - 1]), True)


def build(spec):
    return Honest(spec, Shifted)
