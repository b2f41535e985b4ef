"""One NaN in one row of fifty."""

from common import Honest, torch

KIND = "NaN in logits read as small loss"
EXPECT = {"invalid", "crash"}
CAUGHT_BY = ["finite"]
LINT = ""


class Nan(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        logits = self.net(tokens.long())
        logits[tokens[:, 0] % 50 == 1, 5, 0] = float("nan")
        return logits


def build(spec):
    return Nan(spec)
