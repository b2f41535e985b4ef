"""Attention without a causal mask: every position sees the whole row, and learns to copy the next token."""

from common import Honest, Net, torch

KIND = "future tokens"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = ""


class Bidirectional(Net):
    def allowed(self, length):
        return torch.ones(length, length, dtype=torch.bool)


def build(spec):
    return Honest(spec, Bidirectional)
