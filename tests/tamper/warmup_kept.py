"""Keeps the model of the warm-up in a module global and goes on with it, as if the second build were the first."""

from common import Honest

KIND = "training during warm-up"
EXPECT = {"invalid"}
CAUGHT_BY = ["different weights", "two builds"]
LINT = ""

KEPT = []


def build(spec):
    if not KEPT:
        KEPT.append(Honest(spec))
    return KEPT[0]
