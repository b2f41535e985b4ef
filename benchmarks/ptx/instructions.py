"""What each instruction does: its name and operands become a function of the threads that take part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ptx import copying, loading, tensor
from benchmarks.ptx.machine import Machine, Run, Where
from benchmarks.ptx.operands import TYPES, several, special, target, value
from benchmarks.ptx.parsing import Instruction
from benchmarks.ptx.warp import to_bf16

Array = NDArray[Any]
NARROW: dict[str, type] = {"f16": np.float32, "bf16": np.float32, "f32": np.float64}


def translate(machine: Machine, instruction: Instruction) -> Run:
    """Raises NotImplementedError for what is not known."""
    parts = instruction.op.split(".")
    for table in (loading.FAMILIES, copying.FAMILIES, tensor.FAMILIES):
        for prefix, make in table.items():
            if instruction.op.startswith(prefix):
                return make(machine, instruction)
    if parts[0] not in ARITHMETIC:
        raise NotImplementedError("not known")
    return ARITHMETIC[parts[0]](machine, instruction, parts)


def put(out: Array, found: Any, where: Where) -> None:
    if where is True:
        out[...] = found
    else:
        np.copyto(out, found, where=where)


# --- numbers of one kind ------------------------------------------------------------------------


def wide(machine: Machine, text: str, kind: str) -> Callable[[], Array]:
    """An operand as numbers in which sums and products of its kind round once: (N,) or (N, 2) for packed ones."""
    one = kind.removesuffix("x2")
    raw = value(machine, text, TYPES[kind])
    if one == "bf16":
        return lambda: _pairs((_parts(raw, np.uint16).astype(np.uint32) << 16).view(np.float32), kind)
    dtype = TYPES[one]
    return lambda: _pairs(_parts(raw, dtype).astype(NARROW.get(one, np.float64)), kind)


def _parts(raw: Any, dtype: Any) -> Array:
    return np.ascontiguousarray(raw).reshape(-1).view(dtype)


def _pairs(x: Array, kind: str) -> Array:
    return x.reshape(-1, 2) if kind.endswith("x2") else x


def narrow(x: Array, kind: str) -> Array:
    """Rounded to its kind, as the register's bits (N,)."""
    one = kind.removesuffix("x2")
    found = to_bf16(np.asarray(x, np.float32)) if one == "bf16" else np.asarray(x).astype(TYPES[one])
    return np.ascontiguousarray(found).reshape(-1).view(TYPES[kind]) if kind.endswith("x2") else found


def floats(function: Callable[..., Array]) -> Callable[[Machine, Instruction, list[str]], Run]:
    def make(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
        kinds = [part for part in parts if part in TYPES]
        kind, given = kinds[0], kinds[-1]  # two in add.rn.f32.bf16 d, a, c and fma.rn.f32.bf16 d, a, b, c: c is of d's
        out = target(machine, instruction.operands[0], TYPES[kind])
        if kind == given == "f32" and isinstance(function, np.ufunc):  # which rounds once in float32 itself
            return _at_once(machine, instruction, function)
        *first, last = instruction.operands[1:]
        taken = [*(wide(machine, text, given) for text in first), wide(machine, last, kind)]

        def run(where: Where) -> None:
            with np.errstate(all="ignore"):
                put(out, narrow(function(*(take() for take in taken)), kind), where)

        return run

    return make


def _at_once(machine: Machine, instruction: Instruction, function: np.ufunc) -> Run:
    out = target(machine, instruction.operands[0], np.float32)
    taken = [value(machine, text, np.float32) for text in instruction.operands[1:]]

    def run(where: Where) -> None:
        with np.errstate(all="ignore"):
            function(*taken, out=out, where=where)

    return run


def integers(function: Any) -> Callable[[Machine, Instruction, list[str]], Run]:
    def make(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
        dtype = TYPES[parts[-1]]
        out = target(machine, instruction.operands[0], dtype)
        taken = [value(machine, text, dtype) for text in instruction.operands[1:]]

        def run(where: Where) -> None:
            with np.errstate(all="ignore"):
                function(*taken, out=out, where=where)

        return run

    return make


def either(of_integers: Any, of_floats: Callable[..., Array]) -> Callable[[Machine, Instruction, list[str]], Run]:
    """By the type at the end of its name."""

    def make(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
        is_float = parts[-1].removesuffix("x2") in ("f16", "f32", "f64", "bf16")
        if is_float:
            return floats(of_floats)(machine, instruction, parts)
        return integers(of_integers)(machine, instruction, parts)

    return make


def fused(a: Array, b: Array, c: Array) -> Array:
    return a.astype(np.float64) * b + c


def approximate(function: Callable[[Array], Array]) -> Callable[..., Array]:
    return lambda x: function(x.astype(np.float64))


# --- integers -----------------------------------------------------------------------------------


def multiply(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    if parts[-1].startswith(("f", "b")):
        return floats(np.multiply)(machine, instruction, parts)
    return _product(machine, instruction, parts, None)


def multiply_add(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    if parts[-1].startswith(("f", "b")):
        return floats(fused)(machine, instruction, parts)
    return _product(machine, instruction, parts, instruction.operands[3])


def _product(machine: Machine, instruction: Instruction, parts: list[str], more: str | None) -> Run:
    """mul and mad of integers: lo, wide and hi."""
    dtype = np.dtype(TYPES[parts[-1]])
    double = np.dtype(f"{dtype.kind}{min(dtype.itemsize * 2, 8)}")
    result = double if "wide" in parts else dtype
    out = target(machine, instruction.operands[0], result)
    a, b = (value(machine, text, dtype) for text in instruction.operands[1:3])
    c = value(machine, more, result) if more is not None else result.type(0)

    def run(where: Where) -> None:
        with np.errstate(all="ignore"):
            if "hi" in parts:
                if dtype.itemsize == 8:
                    both = [int(x) * int(y) >> 64 for x, y in zip(*np.broadcast_arrays(a, b))]
                    put(out, np.array([x & (2**64 - 1) for x in both], np.uint64).view(dtype), where)
                else:
                    high = (np.asarray(a).astype(double) * np.asarray(b).astype(double)) >> double.type(
                        dtype.itemsize * 8
                    )
                    put(out, high.astype(dtype) + c, where)
            elif "wide" in parts:
                put(out, np.asarray(a).astype(double) * np.asarray(b).astype(double) + c, where)
            else:
                put(out, np.asarray(a) * np.asarray(b) + c, where)

    return run


def divide(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    if parts[-1].startswith("f"):
        return floats(np.divide)(machine, instruction, parts)
    dtype = TYPES[parts[-1]]
    out = target(machine, instruction.operands[0], dtype)
    a, b = (value(machine, text, dtype) for text in instruction.operands[1:])
    rest = parts[0] == "rem"

    def run(where: Where) -> None:
        x, y = (np.asarray(v).astype(object) for v in np.broadcast_arrays(a, b))
        y = np.where(y == 0, 1, y)
        quotient = np.where((x < 0) ^ (y < 0), -(abs(x) // abs(y)), abs(x) // abs(y))
        put(out, (x - quotient * y if rest else quotient).astype(dtype), where)

    return run


def shift(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    dtype = np.dtype(TYPES[parts[-1]])
    bits = dtype.itemsize * 8
    out = target(machine, instruction.operands[0], dtype)
    a, by = value(machine, instruction.operands[1], dtype), value(machine, instruction.operands[2], np.uint32)
    left = parts[0] == "shl"

    def run(where: Where) -> None:
        far = np.asarray(by) >= bits
        amount = np.minimum(by, bits - 1).astype(dtype)
        found = np.left_shift(a, amount) if left else np.right_shift(a, amount)
        if far.any():
            edge = dtype.type(0) if left or dtype.kind == "u" else np.where(np.asarray(a) < 0, -1, 0).astype(dtype)
            found = np.where(far, edge, found)
        put(out, found, where)

    return run


def funnel(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    """shf.l.wrap.b32: the upper word of b:a shifted left; shf.r: the lower one."""
    out = target(machine, instruction.operands[0], np.uint32)
    low, high, by = (value(machine, text, np.uint32) for text in instruction.operands[1:])

    def run(where: Where) -> None:
        both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | np.asarray(low).astype(np.uint64)
        amount = (np.asarray(by) & 31).astype(np.uint64)
        found = (both << amount) >> np.uint64(32) if parts[1] == "l" else both >> amount
        put(out, found.astype(np.uint32), where)

    return run


def extract(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    dtype = np.dtype(TYPES[parts[-1]])
    out = target(machine, instruction.operands[0], dtype)
    a = value(machine, instruction.operands[1], dtype)
    start, length = (int(value(machine, text, np.int64)) for text in instruction.operands[2:])
    up = dtype.itemsize * 8 - start - length
    return lambda where: put(out, np.right_shift(np.left_shift(a, dtype.type(up)), dtype.type(up + start)), where)


def permute(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    out = target(machine, instruction.operands[0], np.uint32)
    a, b, selector = (value(machine, text, np.uint32) for text in instruction.operands[1:])

    def run(where: Where) -> None:
        pool = (np.asarray(b).astype(np.uint64) << np.uint64(32)) | np.asarray(a).astype(np.uint64)
        found: Any = np.uint64(0)
        for i in range(4):
            nibble = (np.asarray(selector).astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
            byte = (pool >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), 255, 0).astype(np.uint64), byte)
            found = found | (byte << np.uint64(8 * i))
        put(out, found.astype(np.uint32), where)

    return run


# --- moves, choices, comparisons ----------------------------------------------------------------


def move(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    to, given = instruction.operands
    dtype = TYPES[parts[-1]]
    if to.startswith("{"):
        outs = [machine.registers[name] if name != "_" else None for name in several(to)]
        size = np.dtype(dtype).itemsize // len(outs)
        whole = value(machine, given, dtype)

        def split(where: Where) -> None:
            pieces = np.ascontiguousarray(np.broadcast_to(whole, machine.threads)).view(np.dtype(f"u{size}"))
            for i, out in enumerate(outs):
                if out is not None:
                    put(out, pieces.reshape(machine.threads, -1)[:, i], where)

        return split
    out = target(machine, to, dtype)
    if given.startswith("{"):
        names = several(given)
        small = np.dtype(f"u{np.dtype(dtype).itemsize // len(names)}")
        pieces = [value(machine, name, small) for name in names]

        def join(where: Where) -> None:
            stacked = np.stack([np.broadcast_to(p, machine.threads) for p in pieces], axis=1)
            put(out, np.ascontiguousarray(stacked).view(out.dtype).reshape(-1), where)

        return join
    if (of_thread := special(machine, given)) is not None:
        return lambda where: put(out, of_thread(), where)
    taken = value(machine, given, dtype)
    return lambda where: put(out, taken, where)


def select(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    dtype = TYPES[parts[-1]]
    out = target(machine, instruction.operands[0], dtype)
    a, b = (value(machine, text, dtype) for text in instruction.operands[1:3])
    chosen = machine.registers[instruction.operands[3]]
    return lambda where: put(out, np.where(chosen, a, b), where)


COMPARISONS: dict[str, Any] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "neu": lambda a, b: (a != b) | np.isnan(a) | np.isnan(b), "equ": lambda a, b: (a == b) | np.isnan(a) | np.isnan(b),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}  # fmt: skip


def compare(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    kind = parts[-1]
    out = machine.registers[instruction.operands[0]]
    if kind in ("bf16", "f16"):
        taken = [wide(machine, text, kind) for text in instruction.operands[1:3]]
    else:
        views = [value(machine, text, TYPES[kind]) for text in instruction.operands[1:3]]
        taken = [lambda v=v: v for v in views]  # type: ignore[misc]
    test = COMPARISONS[parts[1]]
    ordered = parts[1] == "ne" and kind.startswith(("f", "bf"))
    with_ = parts[2] if parts[2] in ("and", "or") else None
    third = machine.registers[instruction.operands[3].lstrip("!")] if with_ else None

    def run(where: Where) -> None:
        a, b = (take() for take in taken)
        with np.errstate(all="ignore"):
            found = test(a, b)
        if ordered:
            found = found & ~np.isnan(a) & ~np.isnan(b)
        if third is not None:
            other = ~third if instruction.operands[3].startswith("!") else third
            found = found & other if with_ == "and" else found | other
        put(out, found, where)

    return run


def convert(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    to, given = [part for part in parts if part in TYPES][-2:]
    out = target(machine, instruction.operands[0], TYPES[to])
    sources = instruction.operands[1:]
    if to.endswith("x2"):  # cvt.rn.bf16x2.f32 d, upper, lower
        upper, lower = (value(machine, text, TYPES[given]) for text in sources)

        def pack(where: Where) -> None:
            both = np.stack(np.broadcast_arrays(lower, upper, machine.thread)[:2], axis=1)
            with np.errstate(all="ignore"):
                put(out, narrow(np.ascontiguousarray(both), to), where)

        return pack
    source = instruction.operands[1]
    if given in ("f16", "bf16", "f32", "f64"):
        if (given, to) == ("bf16", "f32"):
            bits, raw = target(machine, instruction.operands[0], np.uint32), value(machine, source, np.uint16)
            return lambda where: put(bits, np.asarray(raw).astype(np.uint32) << 16, where)
        taken = wide(machine, source, given)
        if to in ("f16", "bf16", "f32", "f64"):
            return lambda where: put(out, _quiet(narrow, taken(), to), where)
        whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        rounding = next(function for name, function in whole.items() if name in parts)
        limits = np.iinfo(TYPES[to])

        def to_integer(where: Where) -> None:
            x = np.nan_to_num(np.clip(rounding(taken()), float(limits.min), float(limits.max)))
            put(out, np.array([int(v) for v in x]).clip(limits.min, limits.max).astype(TYPES[to]), where)

        return to_integer
    register = value(machine, source, _same_size(machine, source, given))
    if to in ("f16", "bf16", "f32", "f64"):
        return lambda where: put(out, narrow(register.astype(np.float64), to), where)
    return lambda where: put(out, register.astype(TYPES[given]).astype(out.dtype), where)


def _same_size(machine: Machine, text: str, kind: str) -> Any:
    """cvt.u16.u32 may read a register that is wider than its type: then all of it is read, and cut."""
    size = machine.registers[text].dtype.itemsize
    wanted = np.dtype(TYPES[kind])
    return wanted if wanted.itemsize == size else np.dtype(f"{wanted.kind}{size}")


def _quiet(function: Callable[..., Array], *given: Any) -> Array:
    with np.errstate(all="ignore"):
        return function(*given)


# --- threads of a warp --------------------------------------------------------------------------


def shuffle(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    name = instruction.operands[0].split("|")[0]
    out = target(machine, name, np.uint32)
    a, lane = (value(machine, text, np.uint32) for text in instruction.operands[1:3])
    mode, lanes, warp = parts[2], machine.thread % 32, machine.thread // 32 * 32
    if instruction.operands[3:] != ("31", "-1"):
        raise NotImplementedError("shuffles within parts of a warp")

    def run(where: Where) -> None:
        _whole_warps(where, machine)
        wanted = {"bfly": lambda: lanes ^ lane, "idx": lambda: lane & 31,
                  "up": lambda: np.where(lanes < lane, lanes, lanes - lane),
                  "down": lambda: np.where(lanes + lane > 31, lanes, lanes + lane)}[mode]()  # fmt: skip
        source = warp + np.broadcast_to(wanted, machine.threads).astype(np.int64)
        put(out, np.broadcast_to(a, machine.threads)[source], where)

    return run


def _whole_warps(where: Where, machine: Machine) -> None:
    from benchmarks.ptx.memory import Fault

    if where is not True:
        counts = where.reshape(-1, 32).sum(1)
        if ((counts != 0) & (counts != 32)).any():
            raise Fault("threads of a warp are missing")


def elect(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    name, predicate = instruction.operands[0].split("|")
    out, chosen = target(machine, name, np.uint32), machine.registers[predicate]
    lanes = machine.thread % 32

    def run(where: Where) -> None:
        _whole_warps(where, machine)
        put(out, np.uint32(0), where)
        put(chosen, lanes == 0, where)

    return run


def logic(function: Any) -> Callable[[Machine, Instruction, list[str]], Run]:
    return integers(function)


ARITHMETIC: dict[str, Callable[[Machine, Instruction, list[str]], Run]] = {
    "add": either(np.add, np.add),
    "sub": either(np.subtract, np.subtract),
    "mul": multiply,
    "mad": multiply_add,
    "fma": floats(fused),
    "div": divide,
    "rem": divide,
    "min": either(np.minimum, np.fmin),
    "max": either(np.maximum, np.fmax),
    "neg": either(np.negative, np.negative),
    "abs": either(np.abs, np.abs),
    "not": logic(np.invert),
    "and": logic(np.bitwise_and),
    "or": logic(np.bitwise_or),
    "xor": logic(np.bitwise_xor),
    "shl": shift,
    "shr": shift,
    "shf": funnel,
    "bfe": extract,
    "prmt": permute,
    "ex2": floats(approximate(np.exp2)),
    "lg2": floats(approximate(np.log2)),
    "rcp": floats(approximate(np.reciprocal)),
    "rsqrt": floats(approximate(lambda x: 1 / np.sqrt(x))),
    "sqrt": floats(approximate(np.sqrt)),
    "tanh": floats(approximate(np.tanh)),
    "mov": move,
    "selp": select,
    "setp": compare,
    "cvt": convert,
    "cvta": move,
    "shfl": shuffle,
    "elect": elect,
}
