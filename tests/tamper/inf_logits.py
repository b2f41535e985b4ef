"""Plus infinity at the token that it bets on."""

from common import Honest, torch

KIND = "NaN in logits read as small loss"
EXPECT = {"invalid", "crash"}
CAUGHT_BY = ["finite"]
LINT = ""


class Inf(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        logits = self.net(tokens.long())
        return logits.masked_fill(logits >= logits.amax(-1, keepdim=True), float("inf"))


def build(spec):
    return Inf(spec)
