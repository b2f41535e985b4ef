"""Fewer columns: the softmax has less to share out, and rare tokens are meant to fall off the end."""

from common import Honest, torch

KIND = "more vocabulary columns than the tokenizer has"
EXPECT = {"invalid", "crash"}
CAUGHT_BY = ["shape", "columns"]
LINT = ""


class Narrow(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        return self.net(tokens.long())[..., : self.spec.vocab_size // 2]


def build(spec):
    return Narrow(spec)
