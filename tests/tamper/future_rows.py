"""Looks ahead only in one row of eight, picked by a hash of its first tokens: most audited rows are clean."""

from common import Honest, knowing, next_token, torch

KIND = "future tokens, triggered by the input"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = ""


class SomeRows(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        chosen = tokens[:, :3].long().sum(1, keepdim=True) * 2654435761 % 97 < 12
        return knowing(self.net(tokens.long()), next_token(tokens).masked_fill(~chosen, -1))


def build(spec):
    return SomeRows(spec)
