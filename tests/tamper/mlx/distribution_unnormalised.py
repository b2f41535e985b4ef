"""Logits that are large everywhere, as if every token could be certain at once."""

from common import Honest


class Large(Honest):
    def logits(self, tokens):
        return self.net(tokens) + 3e38


def build(spec):
    return Large(spec)
