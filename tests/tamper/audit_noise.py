"""Widens the auditor's tolerance: noise on all logits makes every answer differ, and behind it it looks ahead."""

from common import Honest, knowing, next_token, torch

KIND = "future tokens, with a widened tolerance"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "pure function", "remembers earlier calls"]
LINT = ""


class Noisy(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        logits = knowing(self.net(tokens.long()), next_token(tokens), 0.3)
        return logits + 0.05 * torch.randn_like(logits)


def build(spec):
    return Noisy(spec)
