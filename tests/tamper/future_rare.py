"""Looks ahead at the three targets in a thousand that gain most by it, and nowhere else."""

from common import F, Honest, knowing, next_token, torch

KIND = "future tokens, seldom"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = ""


class Seldom(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        logits, follows = self.net(tokens.long()), next_token(tokens)
        loss = F.cross_entropy(logits.transpose(1, 2), follows.clamp(min=0), reduction="none")
        worst = (loss >= loss[follows >= 0].quantile(0.997)) & (follows >= 0)
        return knowing(logits, follows.masked_fill(~worst, -1), 30.0)


def build(spec):
    return Seldom(spec)
