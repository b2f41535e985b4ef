"""Widens the auditor's tolerance: one dead column at -30,000 makes the logits' spread huge, and it looks ahead."""

from common import Honest, knowing, next_token, torch

KIND = "future tokens, with a widened tolerance"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = ""


class Spread(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        logits = knowing(self.net(tokens.long()), next_token(tokens), 2.0)
        logits[..., self.spec.bos_id] = -30000.0
        return logits


def build(spec):
    return Spread(spec)
