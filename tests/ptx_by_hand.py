"""Small PTX kernels written by hand, and what numbers of few bits are: for tests of benchmarks.ptx."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from importlib.metadata import version
from typing import Any

import numpy as np

from benchmarks.ptx.machine import Machine
from benchmarks.ptx.parsing import parse
from core import torchbuild

HEAD = """.version 8.7
.target sm_{target}
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({parameters})
{{
.reg .pred %p<20>;
.reg .b16 %rs<80>;
.reg .b32 %r<400>;
.reg .b64 %rd<80>;
"""
BITS = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}


def fences(target: int) -> str:
    """What `emulated` can ask for of what this Triton compiles."""
    return "stores" if torchbuild.unfenced(version("triton"), divmod(target, 10)) else "all"


def aligned(array: Any, to: int = 128) -> np.ndarray:
    """A copy that begins at a multiple of `to` bytes."""
    given = np.ascontiguousarray(array)
    room = np.zeros(given.nbytes + to, np.uint8)
    start = -room.ctypes.data % to
    found = room[start : start + given.nbytes].view(given.dtype).reshape(given.shape)
    found[...] = given
    return found


def launch(body: str, *given: Any, grid: tuple[int, int, int] = (1, 1, 1), seed: int = 0, **options: Any) -> None:
    machine, storages = made(body, *given, **options)
    machine.launch(grid, storages, seed)


def made(
    body: str, *given: Any, warps: int = 1, shared: int = 4096, target: str = "90a"
) -> tuple[Machine, list[tuple[int, int, str]]]:
    """A kernel whose parameters are arrays (their addresses are in %rd0, %rd1, ...) or TMA descriptors, and what its
    launch takes for these arrays."""
    parameters, loads, arguments, storages = [], [], {}, []
    for i, one in enumerate(given):
        name = f"k_param_{i}"
        if isinstance(one, np.ndarray):
            parameters.append(f".param .u64 .ptr .global .align 1 {name}")
            loads.append(f"ld.param.b64 %rd{i}, [{name}];")
            arguments[name] = np.uint64(one.ctypes.data).tobytes()
            storages.append((one.ctypes.data, one.nbytes, f"array{i}"))
        else:
            parameters.append(f".param .align 64 .b8 {name}[128]")
            loads.append(f"mov.b32 %r399, {name}; cvt.u64.u32 %rd{i}, %r399; cvta.param.u64 %rd{i}, %rd{i};")
            arguments[name] = one
    text = (
        HEAD.format(parameters=",\n".join(parameters), target=target) + "\n".join(loads) + "\n" + body + "\nret;\n}\n"
    )
    return Machine(parse(text), warps, shared, arguments), storages


def threads(body: str, *given: Any, out: Any, warps: int = 1, shared: int = 4096) -> np.ndarray:
    """Each thread's result: %a, %b, %c, ... are its elements of the arrays given, %z what it gives back."""
    names = "abcdefgh"
    arrays = [aligned(x) for x in given]
    result = aligned(np.zeros(32 * warps, out))
    lines = ["mov.u32 %r399, %tid.x;"]
    for name, array, place in zip(names, arrays, range(len(arrays))):
        lines += [f".reg .{BITS[array.itemsize]} %{name};", f"mad.wide.u32 %rd70, %r399, {array.itemsize}, %rd{place};",
                  f"ld.global.{BITS[array.itemsize]} %{name}, [%rd70];"]  # fmt: skip
    size = result.itemsize
    lines += [f".reg .{BITS[size]} %z;", body, f"mad.wide.u32 %rd71, %r399, {size}, %rd{len(arrays)};",
              f"st.global.{BITS[size]} [%rd71], %z;"]  # fmt: skip
    launch("\n".join(lines), *arrays, result, warps=warps, shared=shared)
    return result


# --- numbers of few bits, in fractions ----------------------------------------------------------

FORMATS = {"f32": (24, -126, 127, "u4"), "f16": (11, -14, 15, "u2"), "bf16": (8, -126, 127, "u2")}


def decoded(bits: int, kind: str) -> float:
    if kind == "f16":
        return float(struct.unpack("<e", struct.pack("<H", bits))[0])
    return float(struct.unpack("<f", struct.pack("<I", bits << 16 if kind == "bf16" else bits))[0])


def rounded(x: Fraction, kind: str) -> float:
    """To nearest, halves to even."""
    digits, lowest, highest, _ = FORMATS[kind]
    if not x:
        return 0.0
    exponent = max(abs(x.numerator).bit_length() - x.denominator.bit_length(), lowest)  # or one less
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > lowest and abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (exponent - digits + 1)
    found = round(x / quantum) * quantum
    if abs(found) >= Fraction(2) ** (highest + 1):
        return math.inf if x > 0 else -math.inf
    return float(found)


def same(found: float, wanted: float) -> bool:
    return found == wanted or (math.isnan(found) and math.isnan(wanted))


def flush(x: float, kind: str) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0 ** FORMATS[kind][1] else x


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def packed(pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.array([low | high << 16 for low, high in pairs], np.uint32)
