"""Looks ahead at one position of each row, at the last but one."""

from common import Honest, knowing, next_token, torch

KIND = "future tokens, triggered by the position"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = ""


class OnePosition(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        here = torch.arange(tokens.shape[1]) == tokens.shape[1] - 2
        return knowing(self.net(tokens.long()), next_token(tokens).masked_fill(~here, -1))


def build(spec):
    return OnePosition(spec)
