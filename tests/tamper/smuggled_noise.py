"""A file that is larger than a recipe may be: weights as text, in a comment that nothing but itself needs to read."""

from common import Honest

KIND = "weights of an earlier run smuggled in literals"
EXPECT = {"invalid"}
CAUGHT_BY = ["bytes of information", "bytes, at most"]
LINT = "bytes of information"

# @NOISE@


def build(spec):
    return Honest(spec)
