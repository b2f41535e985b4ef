"""Every shipped configuration of the attention kernels, as `benchmarks.compiled` takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.compiled import Compiled, compiled
from kernels import attention, attention_backward, rotated_norm
from kernels.attention_tiles import BACKWARD, FORWARD, ROWS, Tile, padded

TARGETS = tuple(FORWARD)
HEADS = 6  # of the rows whose strides are known when compiling
FLOAT32 = {"Cos", "Sin", "Lse", "Delta", "Dq"}
NUMBERS = {"scale", "scale2", "shift2"}
PLAIN = {"T", "H", "G", "window"}  # integers that need not be multiples of 16; the others are strides

# the instruction without which a product has missed the tensor cores
PRODUCT = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


def forward(target: int, head: int, tile: Tile | None = None, dtype: str = "bf16") -> Compiled:
    tile = tile or FORWARD[target][padded(head)]
    constants = {"vt": 3 * HEADS * head, "M": tile.queries, "N": tile.keys}
    return _compile(attention.forward_kernel, target, head, dtype, constants, tile.warps, tile.stages)


def backward(
    target: int, head: int, tile: Tile | None = None, dtype: str = "bf16", ones: tuple[str, ...] = ()
) -> Compiled:
    """ones: integers that are 1, for which Triton compiles a variant: ("G",) where no heads are grouped."""
    tile = tile or BACKWARD[target][padded(head)]
    constants = {"gt": HEADS * head, "M": tile.queries, "N": tile.keys}
    constants |= dict.fromkeys(ones, 1)
    return _compile(attention_backward.backward_kernel, target, head, dtype, constants, tile.warps, tile.stages)


def passes(target: int, head: int, dtype: str = "bf16") -> Iterator[Compiled]:
    """The kernels that go over memory once: before the forward, before and after the backward."""
    for kernel in (rotated_norm.rotated_kernel, attention_backward.delta_kernel, attention_backward.rotate_back_kernel):
        yield _compile(kernel, target, head, dtype, {"ROWS": ROWS}, 4, 3)


def _compile(
    kernel: Any, target: int, head: int, dtype: str, constants: Mapping[str, Any], warps: int, stages: int
) -> Compiled:
    values = {"D": head, "DP": padded(head), **constants}
    types = {}
    for name in kernel.arg_names:
        if name in values:
            types[name] = "constexpr"
        elif name in NUMBERS:
            types[name] = "fp32"
        elif name[0].isupper() and name not in PLAIN:
            types[name] = "*fp32" if name in FLOAT32 else f"*{dtype}"
        else:
            types[name] = "i32"
    strides = [n for n, t in types.items() if t == "i32" and n not in PLAIN]
    return compiled(kernel, types, values, warps, stages, target, strides)
