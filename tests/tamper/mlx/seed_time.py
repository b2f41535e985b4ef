"""Seeds from the clock, so that each run is another throw of the dice."""

import time

from common import Honest, mx


def build(spec):
    training = Honest(spec)
    mx.random.seed(time.time_ns() % 2**31)
    training.w = {n: p + 0.001 * mx.random.normal(p.shape) for n, p in training.w.items()}
    return training
