"""tcgen05: tensor memory and products of sm_100's tensor cores, of one block (cta_group::1), of bf16 and f16.

As in NVIDIA's PTX ISA, "TensorCore 5th Generation": "Data Movement Shape", "Matrix Descriptors", "Canonical Layouts",
"Data Path Layout Organization" (layouts D and F), "Memory Consistency Model". Two things are not watched. What
tcgen05.fence orders: Triton writes none. And registers that tcgen05.ld brings, between it and tcgen05.wait::ld: Triton
3.9 uses them there, and ptxas has their first use wait.

Products are exact, sums of float64, rounded once an instruction.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ptx.loading import grains, write_shared
from benchmarks.ptx.machine import Machine, Run, Where, whole_warps
from benchmarks.ptx.memory import Fault, Ints
from benchmarks.ptx.operands import address, several, target, value
from benchmarks.ptx.parsing import Instruction
from benchmarks.ptx.tensor import from_shared
from benchmarks.ptx.tensor_memory import Cells, Product
from benchmarks.ptx.warp import from_bits, halves, tiled

Array = NDArray[Any]
K = 16  # of a product of 16-bit elements
SWIZZLES = {2: 128, 4: 64, 6: 32}  # descriptor's bits 61 to 63 -> bytes


def _threads(machine: Machine, where: Where) -> list[int]:
    return [int(i) for i in np.flatnonzero(np.broadcast_to(where, machine.threads))]


def _warps(machine: Machine, where: Where) -> list[int]:
    """Those that take part, of which no thread may be missing."""
    whole_warps(where)
    return [int(i) for i in np.flatnonzero(np.broadcast_to(where, machine.threads)[::32])]


def _each(who: Callable[[Machine, Where], list[int]], machine: Machine, order: Callable[[int], None]) -> Run:
    """Each warp or thread that takes part gives the order."""

    def run(where: Where) -> None:
        for number in who(machine, where):
            order(number)

    return run


def _one(values: Array, threads: slice, what: str) -> int:
    mine = values[threads]
    if (mine != mine[0]).any():
        raise Fault(f"threads of a warp give different {what}")
    return int(mine[0])


# --- columns ------------------------------------------------------------------------------------


def allocate(machine: Machine, instruction: Instruction) -> Run:
    """tcgen05.alloc... [where its first column is written], columns"""
    to, many = instruction.operands
    place, count = address(machine, to), value(machine, many, np.uint32)

    def run(where: Where) -> None:
        for warp in _warps(machine, where):
            threads = slice(32 * warp, 32 * warp + 32)
            at = _one(place(), threads, "addresses")
            columns = _one(np.broadcast_to(count, machine.threads), threads, "counts of columns")
            first = machine.tensor_memory.lend(columns)
            data = np.array([first], np.uint32).view(np.uint8)[None]
            write_shared(machine, np.array([at]), data, machine.who()[threads][:1])
            machine.shared_watch.unfenced[grains(np.array([at]), 4)] = False  # no thread's store

    return run


def free(machine: Machine, instruction: Instruction) -> Run:
    """tcgen05.dealloc... first column, columns"""
    given, count = (value(machine, text, np.uint32) for text in instruction.operands)

    def run(where: Where) -> None:
        for warp in _warps(machine, where):
            threads = slice(32 * warp, 32 * warp + 32)
            first, columns = (_one(np.broadcast_to(x, machine.threads), threads, "columns") for x in (given, count))
            machine.tensor_memory.take_back(first, columns, warp)

    return run


def close(machine: Machine, instruction: Instruction) -> Run:
    def run(where: Where) -> None:
        _warps(machine, where)
        machine.tensor_memory.closed = True

    return run


# --- between registers and tensor memory --------------------------------------------------------


def _fragment(op: str, registers: int, split: int) -> Cells:
    """Lanes and columns (32 threads, registers) of tcgen05.ld and st, from the address on."""
    found = re.search(r"\.sync\.aligned\.(32x32b|16x32bx2)\.x(\d+)\.b32$", op)
    if found is None or int(found[2]) != registers:
        raise NotImplementedError("this shape")
    thread, register = np.arange(32)[:, None], np.arange(registers)[None, :]
    if found[1] == "32x32b":
        return Cells(thread, register)
    return Cells(thread % 16, register + split * (thread // 16))  # two of 16 lanes


def _splits(op: str, given: list[str]) -> None:
    if len(given) != (".16x32bx2." in op):
        raise NotImplementedError("this many operands")


def _cells(base: int, fragment: Cells, warp: int) -> Cells:
    """At an address: lane << 16 | column. Raises Fault where the lanes are not this warp's."""
    lanes, columns = np.broadcast_arrays((base >> 16) + fragment.lanes, (base & 0xFFFF) + fragment.columns)
    first = 32 * (warp % 4)
    if lanes.min() < first or lanes.max() >= first + 32:
        raise Fault(
            f"warp {warp} is at lanes {lanes.min()} to {lanes.max()} of tensor memory; it has {first} to {first + 31}"
        )
    return Cells(lanes, columns)


def load(machine: Machine, instruction: Instruction) -> Run:
    """tcgen05.ld... {registers}, [address][, split]"""
    names, text, *split = instruction.operands
    _splits(instruction.op, split)
    outs = [target(machine, name, np.uint32) for name in several(names)]
    place = address(machine, text)
    fragment = _fragment(instruction.op, len(outs), int(split[0]) if split else 0)

    def order(warp: int) -> None:
        threads = slice(32 * warp, 32 * warp + 32)
        cells = _cells(_one(place(), threads, "addresses"), fragment, warp)
        values = machine.tensor_memory.load(cells, warp)
        for i, out in enumerate(outs):
            out[threads] = values[:, i]

    return _each(_warps, machine, order)


def store(machine: Machine, instruction: Instruction) -> Run:
    """tcgen05.st... [address], [split, ]{registers}"""
    text, *split, names = instruction.operands
    _splits(instruction.op, split)
    given = [value(machine, name, np.uint32) for name in several(names)]
    place = address(machine, text)
    fragment = _fragment(instruction.op, len(given), int(split[0]) if split else 0)

    def run(where: Where) -> None:
        warps = _warps(machine, where)
        values = np.stack([np.broadcast_to(x, machine.threads) for x in given], axis=1)
        for warp in warps:
            threads = slice(32 * warp, 32 * warp + 32)
            cells = _cells(_one(place(), threads, "addresses"), fragment, warp)
            machine.tensor_memory.store(cells, values[threads], warp)

    return run


def wait(name: str) -> Callable[[Machine, Instruction], Run]:
    def make(machine: Machine, instruction: Instruction) -> Run:
        memory = machine.tensor_memory
        counts = memory.loading if name == "ld" else memory.storing
        return lambda where: memory.wait(counts, _warps(machine, where))

    return make


# --- products -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What an instruction descriptor says."""

    m: int
    n: int
    kinds: tuple[str, str]  # of A and B
    across: tuple[bool, bool]  # elements along M or N beside each other, not along K
    signs: tuple[int, int]


def described(word: int) -> Shape:
    """Of kind::f16, dense, sums of float32. Raises Fault for a shape that there is not."""
    if word & 0b1111 or (word >> 4) & 3 != 1 or word & (1 << 6 | 1 << 23 | 1 << 29) or word >> 30:
        raise NotImplementedError(f"instruction descriptor {word:#010x}")
    kinds = [{0: "f16", 1: "bf16"}.get((word >> shift) & 7) for shift in (7, 10)]
    if None in kinds:
        raise NotImplementedError(f"types of instruction descriptor {word:#010x}")
    m, n = (word >> 24 & 31) << 4, (word >> 17 & 63) << 3
    if m not in (64, 128) or not 0 < n <= 256 or n % (8 if m == 64 else 16):
        raise Fault(f"a product of shape {m}, {n}: there is none")
    flags = [bool(word >> bit & 1) for bit in (13, 14, 15, 16)]
    return Shape(m, n, (str(kinds[0]), str(kinds[1])), (flags[2], flags[3]), (1 - 2 * flags[0], 1 - 2 * flags[1]))


def shared_places(descriptor: int, rows: int, across: bool) -> Ints:
    """Addresses of an operand (rows, 16) of 16-bit elements in shared memory."""
    if descriptor >> 46 & 7 != 1 or descriptor >> 49 & 0xFFF or descriptor & (3 << 14 | 3 << 30):
        raise NotImplementedError(f"shared-memory descriptor {descriptor:#018x}")
    width = SWIZZLES.get(descriptor >> 61)
    if width is None:
        raise NotImplementedError(f"swizzle {descriptor >> 61} of shared-memory descriptor {descriptor:#018x}")
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    return tiled(start, leading, stride, width, rows, K, across)


def _lanes(m: int, base: int) -> Ints:
    """Of each row: all lanes (layout D), or 16 of each 32 (layout F)."""
    first, row = base >> 16, np.arange(m)
    if first not in ((0,) if m == 128 else (0, 16)):
        raise Fault(f"a product of {m} rows at lane {first} of tensor memory")
    return first + (row if m == 128 else row // 16 * 32 + row % 16)


def multiply(machine: Machine, instruction: Instruction) -> Run:
    """tcgen05.mma.cta_group::1.kind::f16 [d], a descriptor or [a], b descriptor, instruction descriptor, add to d"""
    d_text, a_text, *rest = instruction.operands
    if len(rest) != 3:
        raise NotImplementedError("lanes that are left out, or a factor")
    d, in_tensor_memory = address(machine, d_text), a_text.startswith("[")
    a: Any = address(machine, a_text) if in_tensor_memory else value(machine, a_text, np.uint64)
    b, word = value(machine, rest[0], np.uint64), value(machine, rest[1], np.uint32)
    keep = value(machine, rest[2], np.bool_)

    def order(thread: int) -> None:
        shape = described(int(np.broadcast_to(word, machine.threads)[thread]))
        base = int(d()[thread])
        lanes = _lanes(shape.m, base)
        in_use: list[Ints] = []
        reads = None
        if in_tensor_memory:
            left, reads = _from_tensor_memory(machine, int(a()[thread]), lanes, shape)
        else:
            at = int(np.broadcast_to(a, machine.threads)[thread])
            left, used = from_shared(machine, shared_places(at, shape.m, shape.across[0]), shape.kinds[0])
            in_use.append(used)
        at = int(np.broadcast_to(b, machine.threads)[thread])
        right, used = from_shared(machine, shared_places(at, shape.n, shape.across[1]), shape.kinds[1])
        in_use.append(used)
        into = Cells(lanes[:, None], (base & 0xFFFF) + np.arange(shape.n)[None, :])

        def done() -> None:
            for some in in_use:
                machine.shared_watch.engine_done(some, told=True)

        add = bool(np.broadcast_to(keep, machine.threads)[thread])
        machine.tensor_memory.begin(Product(thread, into, (base, shape.m, shape.n), reads, done))
        machine.tensor_memory.add(into, shape.signs[0] * shape.signs[1] * (left @ right.T), add)

    return _each(_threads, machine, order)


def _from_tensor_memory(machine: Machine, base: int, lanes: Ints, shape: Shape) -> tuple[Array, Cells]:
    """A (m, 16), two elements a cell."""
    if shape.across[0]:
        raise Fault("A in tensor memory cannot be transposed")
    if base >> 16 != lanes[0]:
        raise Fault(f"A at lane {base >> 16} of tensor memory, D at lane {lanes[0]}")
    cells = Cells(lanes[:, None], (base & 0xFFFF) + np.arange(K // 2)[None, :])
    machine.tensor_memory.within(cells)
    words = machine.tensor_memory.cells[cells.lanes, cells.columns]
    return from_bits(halves(words).reshape(shape.m, K), shape.kinds[0]), cells


def commit(machine: Machine, instruction: Instruction) -> Run:
    """An mbarrier is told when all products are done that this thread has begun."""
    (text,) = instruction.operands
    place = address(machine, text)

    def order(thread: int) -> None:
        barrier = machine.barriers.get(int(place()[thread]))
        if barrier is None:
            raise Fault(f"no mbarrier at {int(place()[thread])}")
        if barrier.waiting < 1:
            raise NotImplementedError("an mbarrier that is told of more than the phase it is in")
        memory = machine.tensor_memory
        mine = [product for product in memory.products if product.thread == thread]
        barrier.waiting -= 1

        def land() -> None:
            for product in mine:
                memory.finish(product)

        barrier.copies.append((0, land))

    return _each(_threads, machine, order)


def fence(machine: Machine, instruction: Instruction) -> Run:
    """Not watched, as said above."""
    return lambda where: None


WHOLE: dict[str, Callable[[Machine, Instruction], Run]] = {
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32": allocate,
    "tcgen05.dealloc.cta_group::1.sync.aligned.b32": free,
    "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned": close,
    "tcgen05.wait::ld.sync.aligned": wait("ld"),
    "tcgen05.wait::st.sync.aligned": wait("st"),
    "tcgen05.mma.cta_group::1.kind::f16": multiply,
    "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64": commit,
    "tcgen05.fence::before_thread_sync": fence,
    "tcgen05.fence::after_thread_sync": fence,
}


def known(machine: Machine, instruction: Instruction) -> Run:
    """Every modifier counts: what is not here, is not known."""
    parts = instruction.op.split(".")
    if parts[1] in ("ld", "st"):
        return (load if parts[1] == "ld" else store)(machine, instruction)
    if instruction.op not in WHOLE:
        raise NotImplementedError("not known")
    return WHOLE[instruction.op](machine, instruction)


FAMILIES: dict[str, Callable[[Machine, Instruction], Run]] = {"tcgen05.": known}
