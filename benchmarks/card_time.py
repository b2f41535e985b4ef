"""What a card takes for a call, by its own clock. Imports torch alone, for a machine that has little else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.measured import HEAD_START

WAKING = 5 * HEAD_START  # cycles, a quarter of a second at full clock


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Begun when Python has launched it all: in a training Python is a step ahead, and what it takes for a launch does
    not show."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(HEAD_START // 10)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def wake() -> None:
    """Before the first of several: while something is compiled a card has nothing to do and lowers its clock (an H200
    to a sixth), and takes its time to raise it again."""
    torch.cuda._sleep(WAKING)
    torch.cuda.synchronize()
