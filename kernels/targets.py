"""What a kernel may count on per compute capability, and the choice of its tile configuration."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

Config = TypeVar("Config")

SHARED_MEMORY = {  # bytes that one block may use: CUDA C++ programming guide, table of technical specifications
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
TARGETS = tuple(SHARED_MEMORY)


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, as its own switch says."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def target_of(capability: int) -> int:
    """The newest target that a card of this capability (e.g. 87) runs at its own shared memory, e.g. 86."""
    if capability < TARGETS[0]:
        raise ValueError(f"a card of compute capability {capability} has no kernels here; {TARGETS[0]} is the least")
    return max(target for target in TARGETS if target <= capability)


@functools.cache
def _target(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return target_of(10 * major + minor)


def choose(configs: Mapping[int, Config], x: Tensor) -> Config | None:
    """The configuration for the card that holds x, if there is one; under the interpreter that of sm_80."""
    return configs.get(80 if interpreted() else _target(x.device.index))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the card; a few under the interpreter, so that persistent loops do loop."""
    return 3 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def dot(left, right, acc, WIDEN: tl.constexpr):
    """acc + left right. float32 operands are multiplied as such, not as tf32.

    WIDEN converts the operands first: Triton's interpreter keeps bfloat16 as integers and would multiply those.
    """
    if WIDEN:
        left = left.to(acc.dtype)
        right = right.to(acc.dtype)
    return tl.dot(left, right, acc, input_precision="ieee", out_dtype=acc.dtype)
