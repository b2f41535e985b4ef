"""What an operand of PTX is: arrays of all threads, constants, addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ptx.machine import PARAMETERS, Machine
from benchmarks.ptx.memory import SHARED_BASE

Array = NDArray[Any]
TYPES: dict[str, Any] = {
    "s16": np.int16, "s32": np.int32, "s64": np.int64, "u8": np.uint8, "s8": np.int8,
    "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "bf16x2": np.uint32,
    "f16x2": np.uint32, "f32x2": np.uint64, "pred": np.bool_,
}  # fmt: skip


def constant(text: str, dtype: Any) -> Any:
    """0f3F800000 is float32, 0d.. float64; 0x.., with U behind, and decimals are integers."""
    if text.startswith(("0f", "0d")):
        raw = np.dtype(np.uint32 if text[1] == "f" else np.uint64).type(int(text[2:], 16))
        number = raw.view(np.float32 if text[1] == "f" else np.float64)
        return number.astype(dtype) if np.dtype(dtype).kind == "f" else raw.view(dtype)
    number = int(text.rstrip("U"), 0)
    bits = np.dtype(dtype).itemsize * 8
    if dtype is np.bool_:
        return np.bool_(number != 0)
    raw = np.array(number & ((1 << bits) - 1), np.dtype(f"u{bits // 8}"))
    return raw.view(dtype)[()]


def value(machine: Machine, text: str, dtype: Any) -> Any:
    """A view of a register (N,), or a constant."""
    if text in machine.registers:
        return _as(machine.registers[text], dtype, text)
    if text == "global_smem":
        return np.array(SHARED_BASE).astype(dtype)[()]
    if text in machine.program.parameters:
        return np.array(PARAMETERS + 4096 * list(machine.program.parameters).index(text)).astype(dtype)[()]
    return constant(text, dtype)


def target(machine: Machine, text: str, dtype: Any) -> Array:
    """Of an instruction's result; `_` is nowhere."""
    if text == "_":
        return np.zeros(machine.threads, dtype)
    return _as(machine.registers[text], dtype, text)


def _as(register: Array, dtype: Any, name: str) -> Array:
    if register.itemsize != np.dtype(dtype).itemsize:
        raise NotImplementedError(f"{name} is no register of {8 * np.dtype(dtype).itemsize} bits")
    return register if register.dtype == dtype else register.view(dtype)


def several(text: str) -> list[str]:
    """The parts of a vector, or the one."""
    return text.strip("{}").split(",")


def special(machine: Machine, text: str) -> Callable[[], Any] | None:
    """%tid.x, %ctaid.y, ...; None for what is none."""
    found = re.fullmatch(r"%(tid|ntid|ctaid|nctaid|laneid|warpid)(?:\.([xyz]))?", text)
    if found is None:
        return None
    name, axis = found[1], "xyz".index(found[2] or "x")
    lanes = {"tid": machine.thread, "laneid": machine.thread % 32, "warpid": machine.thread // 32}
    if name in lanes:
        array = (lanes[name] if not axis else lanes[name] * 0).astype(np.uint32)
        return lambda: array
    if name == "ntid":
        return lambda: np.uint32(machine.threads if not axis else 1)
    return lambda: np.uint32((machine.block if name == "ctaid" else machine.grid)[axis])


def address(machine: Machine, text: str) -> Callable[[], Array]:
    """[register + offset] as int64 (N,)."""
    found = re.fullmatch(r"\[([%\w]+)(?:\+(-?\w+))?\]", text)
    if found is None:
        raise ValueError(f"not an address: {text}")
    offset = int(found[2], 0) if found[2] else 0
    if found[1] in machine.registers:
        base = machine.registers[found[1]]
        return lambda: base.astype(np.int64) + offset
    fixed = np.full(machine.threads, int(value(machine, found[1], np.int64)) + offset, np.int64)
    return lambda: fixed
