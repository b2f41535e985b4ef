"""Logits that are large everywhere, as if every token could be certain at once."""

from common import Honest, torch

KIND = "unnormalised distributions"
EXPECT = {"invalid", "discard"}
CAUGHT_BY = ["was scored", "nats", "finite", "remembers earlier calls"]
LINT = ""


class Large(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        return self.net(tokens.long()) + 3e38


def build(spec):
    return Large(spec)
