"""More columns than the tokenizer has entries, so that an index beyond them can hold what is not counted."""

from common import F, Honest, torch

KIND = "more vocabulary columns than the tokenizer has"
EXPECT = {"invalid", "crash"}
CAUGHT_BY = ["shape", "columns"]
LINT = ""


class Wide(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        return F.pad(self.net(tokens.long()), (0, 64), value=-30.0)


def build(spec):
    return Wide(spec)
