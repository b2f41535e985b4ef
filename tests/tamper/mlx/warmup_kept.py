"""Keeps the model of the warm-up in a module global and goes on with it, as if the second build were the first. In MLX
the second build happens in a process of its own, which finds nothing."""

from common import Honest

EXPECT = {"discard"}

KEPT = []


def build(spec):
    if not KEPT:
        KEPT.append(Honest(spec))
    return KEPT[0]
