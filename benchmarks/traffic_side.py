"""One side of `benchmarks.traffic`, in a process that has a blank card: `-m benchmarks.traffic_side SIDE ORDER`."""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.gpu import Order
from benchmarks.gpu_sections import Tokens
from benchmarks.launches import recorded, tell
from benchmarks.leaving import leave
from benchmarks.memory_side import SIDES, STEPS


def main() -> None:
    """What each launch of the third step is, one line of JSON each, then what was not seen and torch's version."""
    torch._inductor.config.benchmark_kernel = True  # kernels are made as ever, and say what they move
    side, order = sys.argv[1], Order(**json.loads(sys.argv[2]))
    step, tokens = SIDES[side](order), Tokens(order)
    for i in range(STEPS - 1):
        step(tokens, i / STEPS)
    with recorded() as recorder:
        step(tokens, (STEPS - 1) / STEPS)
    tell(recorder)


if __name__ == "__main__":
    main()
    leave()
