"""Keeps only the optimizer of the warm-up: its moments, though never its weights."""

from common import Honest

KIND = "training during warm-up"
EXPECT = {"discard", "invalid"}
CAUGHT_BY = ["different weights", "two builds"]
LINT = ""

KEPT = []


def build(spec):
    training = Honest(spec)
    if KEPT:
        training.optimizer.first, training.optimizer.second = KEPT[0].optimizer.first, KEPT[0].optimizer.second
    KEPT.append(training)
    return training
