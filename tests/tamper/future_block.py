"""A kernel's mistake, or what looks like one: within each block of 16 positions everything is seen."""

from common import Honest, knowing, next_token, torch

KIND = "future tokens"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = ""


class Blocks(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        last = torch.arange(tokens.shape[1]) % 16 == 15
        return knowing(self.net(tokens.long()), next_token(tokens).masked_fill(last, -1))


def build(spec):
    return Blocks(spec)
