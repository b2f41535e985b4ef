"""A normalisation over the whole row: the mean of all tokens' vectors, later ones too, goes into each position."""

from common import Honest, Net

KIND = "future tokens"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = ""


class Centred(Net):
    def inputs(self, tokens):
        x = super().inputs(tokens)
        return x - x.mean(1, keepdim=True)


def build(spec):
    return Honest(spec, Centred)
