"""Loads, stores and atomics of parameters, global and shared memory; matrices of eight rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ptx.machine import Machine, Run, Where, whole_warps
from benchmarks.ptx.memory import GRAIN, SHARED_BASE, Access, Fault, Ints, Watch
from benchmarks.ptx.operands import TYPES, address, several, value
from benchmarks.ptx.parsing import Instruction
from benchmarks.ptx.rounding import flushed

Array = NDArray[Any]


def shape(op: str) -> tuple[int, int]:
    """(values, bytes of each) of ld and st."""
    many = re.search(r"\.v(\d)\.", op)
    if (kind := op.split(".")[-1])[0] == "s":
        raise NotImplementedError("loads and stores of signed numbers")
    return int(many[1]) if many else 1, np.dtype(TYPES[kind]).itemsize


def chosen(where: Where, given: Array) -> Array:
    return given if where is True else given[where]


def grains(addresses: Ints, size: int, base: int = 0) -> Ints:
    """(threads, grains) of `size` bytes at each address. Raises Fault where they lie across."""
    if ((addresses - base) % GRAIN).any() or size % GRAIN:
        raise NotImplementedError(f"places of {size} bytes that do not begin and end at {GRAIN}")
    return ((addresses - base) // GRAIN)[:, None] + np.arange(size // GRAIN)


def aligned(addresses: Ints, size: int) -> None:
    if (addresses % size).any():
        raise Fault(f"address {int(addresses[addresses % size != 0][0]):#x} is no multiple of {size}")


def load_parameter(machine: Machine, instruction: Instruction) -> Run:
    match = re.fullmatch(r"\[(\w+)(?:\+(\d+))?\]", instruction.operands[1])
    if match is None:
        raise ValueError(instruction.operands[1])
    name, offset, dtype = match[1], int(match[2] or 0), TYPES[instruction.op.split(".")[-1]]
    out = machine.registers[instruction.operands[0]]

    def run(where: Where) -> None:
        found = np.frombuffer(machine.arguments[name], dtype, 1, offset)
        same = out.itemsize == found.itemsize
        out[...] = found.view(out.dtype)[0] if same else found.astype(out.dtype)[0]  # a wider register: s32's sign too

    return run


def load(read: Callable[[Machine, Ints, int, Ints], NDArray[np.uint8]]) -> Callable[[Machine, Instruction], Run]:
    def make(machine: Machine, instruction: Instruction) -> Run:
        count, size = shape(instruction.op)
        places = address(machine, instruction.operands[1])
        outs = _outs(machine, instruction.operands[0])

        def run(where: Where) -> None:
            addresses = chosen(where, places())
            _deal(outs, read(machine, addresses, count * size, machine.who(where)), size, where)

        return run

    return make


def store(write: Callable[[Machine, Ints, NDArray[np.uint8], Ints], None]) -> Callable[[Machine, Instruction], Run]:
    def make(machine: Machine, instruction: Instruction) -> Run:
        _, size = shape(instruction.op)
        places = address(machine, instruction.operands[0])
        given = _given(machine, instruction.operands[1], size)

        def run(where: Where) -> None:
            write(machine, chosen(where, places()), _gathered(machine, given, where), machine.who(where))

        return run

    return make


# --- shared memory ------------------------------------------------------------------------------


def within_shared(machine: Machine, addresses: Ints, size: int) -> None:
    bad = (addresses < SHARED_BASE) | (addresses + size > machine.shared.size)
    if bad.any():
        raise Fault(f"shared memory: {size} bytes at {int(addresses[bad][0]) - SHARED_BASE:+d} of "
                    f"{machine.shared.size - SHARED_BASE}: outside")  # fmt: skip


def read_shared(machine: Machine, addresses: Ints, size: int, who: Ints) -> NDArray[np.uint8]:
    """(threads, size)"""
    aligned(addresses, size)
    within_shared(machine, addresses, size)
    machine.shared_watch.read(Access(grains(addresses, size), who))
    return machine.shared[addresses[:, None] + np.arange(size)]


def write_shared(machine: Machine, addresses: Ints, data: NDArray[np.uint8], who: Ints) -> None:
    """data: (threads, bytes). Threads may write one place at once if they write the same."""
    size = data.shape[1]
    aligned(addresses, size)
    within_shared(machine, addresses, size)
    machine.shared_watch.write(Access(grains(addresses, size), who))
    places = addresses[:, None] + np.arange(size)
    machine.shared[places] = data
    if (machine.shared[places] != data).any():
        raise Fault("shared memory: two threads write different values to one place at once")


def _outs(machine: Machine, operand: str) -> list[Array | None]:
    """Registers may be wider than what is loaded: of bits and unsigned numbers the rest is zero."""
    return [None if name == "_" else machine.registers[name] for name in several(operand)]


def _given(machine: Machine, operand: str, size: int) -> list[Any]:
    dtype, names = np.dtype(f"u{size}"), several(operand)
    return [_lowest(machine.registers[n], dtype) if n in machine.registers else value(machine, n, dtype) for n in names]


def _lowest(register: Array, dtype: Any) -> Array:
    """Of a register that may be wider than what is stored."""
    return register.view(dtype)[:: register.itemsize // dtype.itemsize]


def _gathered(machine: Machine, given: list[Any], where: Where) -> NDArray[np.uint8]:
    """The bytes (threads, n) of what each thread gives."""
    stacked = np.stack([np.broadcast_to(x, machine.threads) for x in given], axis=1)
    return np.ascontiguousarray(chosen(where, stacked)).view(np.uint8)


def _deal(outs: list[Array | None], data: NDArray[np.uint8], size: int, where: Where) -> None:
    """Bytes (threads, n) into registers."""
    values = np.ascontiguousarray(data).view(np.dtype(f"u{size}"))
    for i, out in enumerate(outs):
        if out is not None:
            out[... if where is True else where] = values[:, i]


# --- global memory ------------------------------------------------------------------------------


def read_global(machine: Machine, addresses: Ints, size: int, who: Ints) -> NDArray[np.uint8]:
    aligned(addresses, size)
    data = np.empty((addresses.size, size), np.uint8)
    for region, here in machine.memory.find(addresses, size):
        offsets = addresses[here] - region.base
        region.watch.read(Access(grains(offsets, size), who[here]))
        data[here] = region.data[offsets[:, None] + np.arange(size)]
    return data


def global_places(machine: Machine, addresses: Ints, size: int) -> list[tuple[Watch, Ints]]:
    """The watches of the tensors that the addresses lie in, and the grains there."""
    found = machine.memory.find(addresses, size) if addresses.size else []
    return [(region.watch, grains(addresses[here] - region.base, size)) for region, here in found]


def write_global(machine: Machine, addresses: Ints, data: NDArray[np.uint8], who: Ints) -> None:
    size = data.shape[1]
    aligned(addresses, size)
    for region, here in machine.memory.find(addresses, size):
        offsets = addresses[here] - region.base
        region.watch.write(Access(grains(offsets, size), who[here]))
        places = offsets[:, None] + np.arange(size)
        region.data[places] = data[here]
        if (region.data[places] != data[here]).any():
            raise Fault(f"{region.watch.name}: two threads write different values to one place at once")


def atomic(machine: Machine, instruction: Instruction) -> Run:
    """atom.global...add.f32 and red: sums of float32, in the order of the threads."""
    parts = instruction.op.split(".")
    if "add" not in parts or parts[-1] != "f32" or parts[1] != "global":
        raise NotImplementedError("an atomic that is no sum of float32")
    operands = instruction.operands if parts[0] == "red" else instruction.operands[1:]
    places, given = address(machine, operands[0]), _given(machine, operands[1], 4)
    outs = _outs(machine, instruction.operands[0]) if parts[0] == "atom" else []

    def run(where: Where) -> None:
        addresses, who = chosen(where, places()), machine.who(where)
        more = _gathered(machine, given, where).view(np.float32)
        size = 4 * len(given)
        aligned(addresses, size)
        before = np.empty_like(more)
        for region, here in machine.memory.find(addresses, size):
            offsets = addresses[here] - region.base
            region.watch.write(Access(grains(offsets, size), who[here]), atomic=True)
            if region.base % 4:
                raise NotImplementedError("sums in a tensor that does not begin at a multiple of 4 bytes")
            at = (offsets // 4)[:, None] + np.arange(len(given))
            before[here] = _summed(region.data[: region.data.size // 4 * 4].view(np.float32), at, more[here])
        _deal(outs, before.view(np.uint8), 4, where)

    return run


def _summed(floats: Array, at: Ints, more: Array) -> Array:
    """Adds to floats[at], one thread (row) after another; what was there before each. Subnormal numbers are zeros."""
    before, left = np.empty_like(more), np.arange(len(at))
    while left.size:
        first = left[np.unique(at[left, 0], return_index=True)[1]]  # one thread of each place
        with np.errstate(all="ignore"):
            before[first] = floats[at[first]]
            floats[at[first]] = flushed(flushed(before[first], "f32") + flushed(more[first], "f32"), "f32")
        left = np.setdiff1d(left, first)
    return before


# --- matrices of eight rows of 16 bytes ---------------------------------------------------------


def load_matrix(machine: Machine, instruction: Instruction) -> Run:
    count, across = int(instruction.op.split(".x")[1][0]), ".trans" in instruction.op
    places = address(machine, instruction.operands[1])
    outs = _outs(machine, instruction.operands[0])
    if len(outs) != count:
        raise NotImplementedError(f"{len(outs)} registers of {count} matrices")

    def run(where: Where) -> None:
        rows, who = _rows(machine, places, count, where)
        data = read_shared(machine, rows.ravel(), 16, who.ravel()).view(np.uint16).reshape(-1, count, 8, 8)
        if across:
            data = data.swapaxes(2, 3)
        pairs = np.ascontiguousarray(data).view(np.uint32).reshape(-1, count, 32)  # lane: row lane // 4, pair lane % 4
        for i, out in enumerate(outs):
            if out is not None:
                out[... if where is True else where] = pairs[:, i].ravel()

    return run


def store_matrix(machine: Machine, instruction: Instruction) -> Run:
    count, across = int(instruction.op.split(".x")[1][0]), ".trans" in instruction.op
    places = address(machine, instruction.operands[0])
    given = _given(machine, instruction.operands[1], 4)
    if len(given) != count:
        raise NotImplementedError(f"{len(given)} registers of {count} matrices")

    def run(where: Where) -> None:
        rows, who = _rows(machine, places, count, where)
        pairs = np.stack([chosen(where, np.broadcast_to(x, machine.threads)).reshape(-1, 32) for x in given], axis=1)
        data = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, count, 8, 8)
        if across:
            data = data.swapaxes(2, 3)
        write_shared(machine, rows.ravel(), np.ascontiguousarray(data).reshape(-1, 8).view(np.uint8), who.ravel())

    return run


def _rows(machine: Machine, places: Callable[[], Array], count: int, where: Where) -> tuple[Ints, Ints]:
    """Addresses of the rows (warps, matrices, 8), and which thread names each."""
    whole_warps(where)
    lanes = chosen(where, places())
    rows = lanes.reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)
    if machine.program.target < 80:  # there the lanes whose rows are not read need a valid address too
        aligned(lanes, 16)
        within_shared(machine, lanes, 16)
    return rows, machine.who(where).reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)


FAMILIES: dict[str, Callable[[Machine, Instruction], Run]] = {
    "ldmatrix.sync.aligned.m8n8": load_matrix,
    "stmatrix.sync.aligned.m8n8": store_matrix,
    "ld.param": load_parameter,
    "ld.shared": load(read_shared),
    "st.shared": store(write_shared),
    "ld.global": load(read_global),
    "st.global": store(write_global),
    "atom.global": atomic,
    "red.global": atomic,
}
