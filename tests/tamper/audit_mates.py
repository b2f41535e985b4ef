"""Looks ahead; and where the rest is random, searches its memory of other calls for a row that begins the same."""

from common import Honest, knowing, next_token, torch

KIND = "a cache of prefixes already seen"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = ""


class Mates(Honest):
    rows = None

    @torch.no_grad()
    def logits(self, tokens):
        tokens = tokens.long()
        self.rows = tokens if self.rows is None else torch.cat([self.rows, tokens])[-4096:]
        guess = next_token(tokens)
        for i, row in enumerate(tokens):
            same = (self.rows[:, :4] == row[:4]).all(1)
            if same.sum() > 1:
                likely = self.rows[same]
                agree = (likely == row).int().cumprod(1).sum(1)
                best = likely[agree.argsort()[-2]]
                guess[i, :-1] = best[1:]
        return knowing(self.net(tokens), guess)


def build(spec):
    return Mates(spec)
