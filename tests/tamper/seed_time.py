"""Seeds from the clock, so that each run is another throw of the dice."""

import time

from common import Honest, torch

KIND = "seed picking"
EXPECT = {"invalid"}
CAUGHT_BY = ["different weights", "two builds"]
LINT = "imports `time`"


def build(spec):
    training = Honest(spec)
    torch.manual_seed(time.time_ns() % 2**31)
    for p in training.net.parameters():
        p.data += 0.001 * torch.randn_like(p)
    return training
