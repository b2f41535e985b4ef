"""Every shipped configuration of the attention kernels, as `benchmarks.compiled` takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.compiled import Case, Compiled
from kernels import attention, attention_backward, rotated_norm
from kernels.attention_tiles import BACKWARD, FORWARD, ROWS, Tile, padded

TARGETS = tuple(FORWARD)
HEADS = 6  # of the rows whose strides are known when compiling
FLOAT32 = {"Cos", "Sin", "R", "Lse", "Delta", "Dq"}
NUMBERS = {"scale", "scale2", "shift2"}
PLAIN = {"T", "H", "G", "window"}  # integers that need not be multiples of 16; the others are strides

# the instruction without which a product has missed the tensor cores
PRODUCT = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


def parts(target: int, head: int) -> Iterator[Case]:
    """All that runs for heads of this size."""
    yield forward_part(target, head)
    yield backward_part(target, head)
    yield from pass_parts(target, head)


def forward_part(target: int, head: int, tile: Tile | None = None, dtype: str = "bf16") -> Case:
    tile = tile or FORWARD[target][padded(head)]
    constants = {"kt": 3 * HEADS * head, "vt": 3 * HEADS * head, "M": tile.queries, "N": tile.keys, "LEAN": tile.lean}
    kernel = attention.forward_kernel
    return _part("forward", kernel, target, head, dtype, constants, tile.warps, tile.stages, PRODUCT[target])


def backward_part(
    target: int, head: int, tile: Tile | None = None, dtype: str = "bf16", ones: tuple[str, ...] = ()
) -> Case:
    """ones: integers that are 1, for which Triton compiles a variant: ("G",) where no heads are grouped."""
    tile = tile or BACKWARD[target][padded(head)]
    constants = {"qt": 3 * HEADS * head, "gt": HEADS * head, "M": tile.queries, "N": tile.keys} | dict.fromkeys(ones, 1)
    kernel = attention_backward.backward_kernel
    return _part("backward", kernel, target, head, dtype, constants, tile.warps, tile.stages, PRODUCT[target])


def pass_parts(target: int, head: int, dtype: str = "bf16") -> Iterator[Case]:
    """The kernels that go over memory once: before the forward, before and after the backward."""
    passing = {
        "rotation": rotated_norm.rotated_kernel,
        "delta": attention_backward.delta_kernel,
        "rotation back": attention_backward.rotate_back_kernel,
        "rotation back, of others": rotated_norm.rotated_back_kernel,
    }
    for name, kernel in passing.items():
        yield _part(name, kernel, target, head, dtype, {"ROWS": ROWS}, 4, 3)


def forward(target: int, head: int, dtype: str = "bf16") -> Compiled:
    return forward_part(target, head, dtype=dtype).compile()


def backward(target: int, head: int, dtype: str = "bf16", ones: tuple[str, ...] = ()) -> Compiled:
    return backward_part(target, head, dtype=dtype, ones=ones).compile()


def both(target: int, head: int, dtype: str = "bf16") -> tuple[Compiled, Compiled]:
    return forward(target, head, dtype), backward(target, head, dtype)


def passes(target: int, head: int, dtype: str = "bf16") -> Iterator[Compiled]:
    for part in pass_parts(target, head, dtype):
        yield part.compile()


def _part(
    name: str, kernel: Any, target: int, head: int, dtype: str, constants: Mapping[str, Any], warps: int, stages: int,
    expected: str = "",
) -> Case:  # fmt: skip
    wanted = {"D": head, "DP": padded(head), **constants}
    values = {argument: wanted[argument] for argument in kernel.arg_names if argument in wanted}
    types = {}
    for argument in (a for a in kernel.arg_names if a not in values):
        if argument in NUMBERS:
            types[argument] = "fp32"
        elif argument[0].isupper() and argument not in PLAIN:
            types[argument] = "*fp32" if argument in FLOAT32 else f"*{dtype}"
        else:
            types[argument] = "i32"
    strides = tuple(a for a, kind in types.items() if kind == "i32" and a not in PLAIN)
    label = f"attention {name} of {head} {dtype}"
    return Case(label, kernel, target, types, values, warps, stages, strides, expected)
