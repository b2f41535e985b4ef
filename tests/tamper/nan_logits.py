"""NaN where the model does badly: comparisons with NaN are false, and a sum may drop it."""

from common import Honest, torch

KIND = "NaN in logits read as small loss"
EXPECT = {"invalid", "crash"}
CAUGHT_BY = ["finite"]
LINT = ""


class Nan(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        logits = self.net(tokens.long())
        unsure = logits.softmax(-1).amax(-1, keepdim=True) < 0.1
        return logits.masked_fill(unsure, float("nan"))


def build(spec):
    return Nan(spec)
