"""What each instruction does: its name and operands become a function of the threads that take part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ptx import copying, forms, loading, tcgen05, tensor
from benchmarks.ptx.machine import Machine, Run, Where, whole_warps
from benchmarks.ptx.operands import TYPES, several, special, target, value
from benchmarks.ptx.parsing import Instruction
from benchmarks.ptx.rounding import (
    divided_roughly,
    flushed,
    fused,
    greater,
    greater_or_nan,
    lesser,
    lesser_or_nan,
    to_bf16,
    to_integers,
)
from benchmarks.ptx.warp import from_bits

Array = NDArray[Any]


def translate(machine: Machine, instruction: Instruction) -> Run:
    """Raises NotImplementedError for what is not known."""
    forms.check(instruction)
    parts = instruction.op.split(".")
    for table in (loading.FAMILIES, copying.FAMILIES, tensor.FAMILIES, tcgen05.FAMILIES):
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
        return lambda: _pairs(from_bits(_parts(raw, np.uint16), one), kind)
    dtype = TYPES[one]
    return lambda: _pairs(_widened(_parts(raw, dtype)), kind)


def _widened(x: Array) -> Array:
    with np.errstate(invalid="ignore"):  # signalling NaN
        return x.astype(np.float64)


def _parts(raw: Any, dtype: Any) -> Array:
    return np.ascontiguousarray(raw).reshape(-1).view(dtype)


def _pairs(x: Array, kind: str) -> Array:
    return x.reshape(-1, 2) if kind.endswith("x2") else x


def narrow(x: Array, kind: str, ftz: bool = False) -> Array:
    """Rounded to its kind, as the register's bits (N,). ftz: what is subnormal then becomes zero."""
    one = kind.removesuffix("x2")
    found = to_bf16(x) if one == "bf16" else np.asarray(x).astype(TYPES[one])
    if ftz:
        found = to_bf16(flushed(from_bits(found, one), one)) if one == "bf16" else flushed(found, one)
    if one == "f16":
        found = np.where(np.isnan(found), np.uint16(0x7FFF).view(np.float16), found)
    return np.ascontiguousarray(found).reshape(-1).view(TYPES[kind]) if kind.endswith("x2") else found


def floats(function: Callable[..., Array]) -> Callable[[Machine, Instruction, list[str]], Run]:
    def make(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
        kinds = [part for part in parts if part in TYPES]
        kind, given = kinds[0], kinds[-1]  # two in add.rn.f32.bf16 d, a, c and fma.rn.f32.bf16 d, a, b, c: c is of d's
        out = target(machine, instruction.operands[0], TYPES[kind])
        if kind == given == "f32" and "ftz" not in parts and function in (np.add, np.subtract, np.multiply):
            return _at_once(machine, instruction, function, np.float32)  # which rounds once in float32 itself
        *first, last = instruction.operands[1:]
        taken = [*(wide(machine, text, given) for text in first), wide(machine, last, kind)]
        ftz = "ftz" in parts
        if ftz:
            taken = [lambda take=take: flushed(take(), kind) for take in taken]  # type: ignore[misc]

        def run(where: Where) -> None:
            with np.errstate(all="ignore"):
                put(out, narrow(function(*(take() for take in taken)), kind, ftz), where)

        return run

    return make


def _at_once(machine: Machine, instruction: Instruction, function: Any, dtype: Any) -> Run:
    """function: one of NumPy's own, which takes `out` and `where`."""
    out = target(machine, instruction.operands[0], dtype)
    taken = [value(machine, text, dtype) for text in instruction.operands[1:]]

    def run(where: Where) -> None:
        with np.errstate(all="ignore"):
            function(*taken, out=out, where=where)

    return run


def integers(function: Any) -> Callable[[Machine, Instruction, list[str]], Run]:
    return lambda machine, instruction, parts: _at_once(machine, instruction, function, TYPES[parts[-1]])


def either(of_integers: Any, of_floats: Callable[..., Array]) -> Callable[[Machine, Instruction, list[str]], Run]:
    """By the type at the end of its name."""

    def make(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
        is_float = parts[-1].removesuffix("x2") in ("f16", "f32", "f64", "bf16")
        if is_float:
            chosen = {lesser: lesser_or_nan, greater: greater_or_nan}[of_floats] if "NaN" in parts else of_floats
            return floats(chosen)(machine, instruction, parts)
        return integers(of_integers)(machine, instruction, parts)

    return make


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
                    both = [int(x) * int(y) >> 64 for x, y in zip(*np.broadcast_arrays(a, b, machine.thread)[:2])]
                    put(out, np.array([x & (2**64 - 1) for x in both], np.uint64).view(dtype) + c, where)
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
        return floats(divided_roughly if "approx" in parts else np.divide)(machine, instruction, parts)
    dtype = np.dtype(TYPES[parts[-1]])
    unsigned = np.dtype(f"u{dtype.itemsize}")
    out = target(machine, instruction.operands[0], dtype)
    a, b = (value(machine, text, dtype) for text in instruction.operands[1:])
    rest = parts[0] == "rem"

    def run(where: Where) -> None:
        x, y = (np.asarray(v) for v in np.broadcast_arrays(a, b))
        with np.errstate(all="ignore"):
            by_zero, apart = y == 0, (x < 0) != (y < 0)
            above, below = (np.abs(v).view(unsigned) for v in (x, np.where(by_zero, dtype.type(1), y)))  # -2**31 too
            found, negative = (above % below, x < 0) if rest else (above // below, apart)
            found = np.where(negative, ~found + unsigned.type(1), found).view(dtype)
        put(out, np.where(by_zero, ~dtype.type(0), found), where)  # by zero: of no meaning, and seen

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
    """shf.l: the upper word of b:a shifted left; shf.r: the lower one shifted right."""
    out = target(machine, instruction.operands[0], np.uint32)
    low, high, by = (value(machine, text, np.uint32) for text in instruction.operands[1:])

    def run(where: Where) -> None:
        both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | np.asarray(low).astype(np.uint64)
        amount = (np.minimum(by, 32) if parts[2] == "clamp" else np.asarray(by) & 31).astype(np.uint64)
        found = (both << amount) >> np.uint64(32) if parts[1] == "l" else both >> amount
        put(out, found.astype(np.uint32), where)

    return run


def extract(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    """bfe: `length` bits from `start` on; a signed field's last bit (or the register's) fills the rest."""
    dtype = np.dtype(TYPES[parts[-1]])
    bits, unsigned = dtype.itemsize * 8, np.dtype(f"u{dtype.itemsize}")
    out = target(machine, instruction.operands[0], dtype)
    a = value(machine, instruction.operands[1], dtype)
    start, length = (value(machine, text, np.uint32) for text in instruction.operands[2:])

    def run(where: Where) -> None:
        first, count = (np.minimum(np.asarray(x) & 255, bits).astype(unsigned) for x in (start, length))
        count = np.minimum(count, bits - first).astype(unsigned)
        up = np.minimum(bits - first - count, bits - 1).astype(unsigned)
        down = np.minimum(bits - count, bits - 1).astype(unsigned)
        found = np.left_shift(np.asarray(a).view(unsigned), up).view(dtype)
        found = np.right_shift(found, down.astype(dtype))
        past = np.right_shift(np.asarray(a), dtype.type(bits - 1)) if dtype.kind == "i" else dtype.type(0)
        nothing = np.where(first >= bits, past, dtype.type(0))  # the sign, if the field lies past the register
        asked = np.asarray(length) & 255
        put(out, np.where(asked == 0, dtype.type(0), np.where(count == 0, nothing, found)), where)

    return run


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
    if "ftz" in parts:
        taken = [lambda take=take: flushed(take(), kind) for take in taken]  # type: ignore[misc]
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


ROUNDINGS: dict[str, Any] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def convert(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    to, given = [part for part in parts if part in TYPES][-2:]
    out = target(machine, instruction.operands[0], _same_size(machine, instruction.operands[0], to))
    sources = instruction.operands[1:]
    if to.endswith("x2"):  # cvt.rn.bf16x2.f32 d, upper, lower
        upper, lower = (value(machine, text, TYPES[given]) for text in sources)

        def pack(where: Where) -> None:
            both = np.stack(np.broadcast_arrays(lower, upper, machine.thread)[:2], axis=1)
            with np.errstate(all="ignore"):
                put(out, narrow(np.ascontiguousarray(both), to), where)

        return pack
    source = instruction.operands[1]
    whole = next((function for name, function in ROUNDINGS.items() if name in parts), None)
    if given in ("f16", "bf16", "f32", "f64"):
        if (given, to) == ("bf16", "f32"):
            bits, raw = target(machine, instruction.operands[0], np.uint32), value(machine, source, np.uint16)
            return lambda where: put(bits, np.asarray(raw).astype(np.uint32) << 16, where)
        taken = wide(machine, source, given)
        if "ftz" in parts and given == "f32":
            taken = lambda take=taken: flushed(take(), "f32")  # type: ignore[misc]  # noqa: E731
        if to in ("f16", "bf16", "f32", "f64"):
            as_is = whole or (lambda x: x)
            return lambda where: put(out, _quiet(narrow, as_is(taken()), to), where)
        assert whole is not None  # forms.py asks for one
        return lambda where: put(out, _quiet(to_integers, whole(taken()), TYPES[to], given), where)
    register = value(machine, source, _same_size(machine, source, given))
    if to in ("f16", "bf16"):  # of 32 bits at most: float64 holds them
        return lambda where: put(out, narrow(register.astype(TYPES[given]).astype(np.float64), to), where)
    # a register wider than its type is cut, and the result widened by the sign of what it is
    return lambda where: put(out, register.astype(TYPES[given]).astype(TYPES[to]).astype(out.dtype), where)


def _same_size(machine: Machine, text: str, kind: str) -> Any:
    """cvt.u16.u32 may read a register that is wider than its type: then all of it is read, and cut."""
    size = machine.registers[text].dtype.itemsize
    wanted = np.dtype(TYPES[kind])
    if size < wanted.itemsize:
        raise NotImplementedError(f"{text} has no {8 * wanted.itemsize} bits")
    return wanted if wanted.itemsize == size else np.dtype(f"{wanted.kind}{size}")


def _quiet(function: Callable[..., Array], *given: Any) -> Array:
    with np.errstate(all="ignore"):
        return function(*given)


# --- threads of a warp --------------------------------------------------------------------------


def shuffle(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    """shfl.sync d|p, a, b, c: of all 32 lanes; p is whether the lane it takes from exists."""
    name, _, predicate = instruction.operands[0].partition("|")
    out = target(machine, name, np.uint32)
    exists = machine.registers[predicate] if predicate else None
    a, by = (value(machine, text, np.uint32) for text in instruction.operands[1:3])
    mode, lanes, warp = parts[2], machine.thread % 32, machine.thread // 32 * 32
    if instruction.operands[3] != ("0" if mode == "up" else "31") or not _everyone(instruction.operands[4]):
        raise NotImplementedError("shuffles within parts of a warp")

    def run(where: Where) -> None:
        whole_warps(where)
        lane = np.asarray(by).astype(np.int64) & 31
        wanted = {"bfly": lanes ^ lane, "idx": lane + lanes * 0, "up": lanes - lane, "down": lanes + lane}[mode]
        here = (wanted >= 0) & (wanted < 32)
        found = np.broadcast_to(a, machine.threads)[warp + np.where(here, wanted, lanes)]
        put(out, found, where)
        if exists is not None:
            put(exists, here, where)

    return run


def _everyone(mask: str) -> bool:
    return mask in ("-1", "0xffffffff", "4294967295")


def elect(machine: Machine, instruction: Instruction, parts: list[str]) -> Run:
    """elect.sync d|p, all: which lane is not said; here it is the last, which seldom does anything else alone."""
    name, predicate = instruction.operands[0].split("|")
    out, chosen = target(machine, name, np.uint32), machine.registers[predicate]
    lanes = machine.thread % 32
    if not _everyone(instruction.operands[1]):
        raise NotImplementedError("an election within a part of a warp")

    def run(where: Where) -> None:
        whole_warps(where)
        put(out, np.uint32(31), where)
        put(chosen, lanes == 31, where)

    return run


ARITHMETIC: dict[str, Callable[[Machine, Instruction, list[str]], Run]] = {
    "add": either(np.add, np.add),
    "sub": either(np.subtract, np.subtract),
    "mul": multiply,
    "mad": multiply_add,
    "fma": floats(fused),
    "div": divide,
    "rem": divide,
    "min": either(np.minimum, lesser),
    "max": either(np.maximum, greater),
    "neg": either(np.negative, np.negative),
    "abs": either(np.abs, np.abs),
    "not": integers(np.invert),
    "and": integers(np.bitwise_and),
    "or": integers(np.bitwise_or),
    "xor": integers(np.bitwise_xor),
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
