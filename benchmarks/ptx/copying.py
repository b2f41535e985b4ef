"""What runs beside the threads and is waited for: cp.async, the copy engine (TMA), mbarriers; barriers and fences."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ptx.loading import aligned, chosen, global_places, grains, read_global, within_shared, write_global
from benchmarks.ptx.machine import PARAMETERS, Barrier, Copy, Machine, Run, Where, whole_warps
from benchmarks.ptx.memory import Access, Fault, Ints
from benchmarks.ptx.operands import address, value
from benchmarks.ptx.parsing import Instruction
from benchmarks.ptx.warp import swizzled

Array = NDArray[Any]
BARRIER = 8  # bytes of an mbarrier


@dataclass(frozen=True)
class Descriptor:
    """A tensor (rows, columns) that the copy engine moves blocks of."""

    base: int  # address
    shape: tuple[int, int]
    stride: int  # elements from row to row
    size: int  # bytes of an element
    box: tuple[int, int]  # rows, columns
    swizzle: int  # bytes: 128, 64, 32 or 0

    def __post_init__(self) -> None:
        """Raises Fault for what cuTensorMapEncodeTiled refuses."""
        pitch = self.box[1] * self.size
        if self.base % 16 or self.stride * self.size % 16 or pitch % 16 or max(self.box) > 256 or min(self.shape) < 1:
            raise Fault(f"no descriptor of the copy engine: {self}: base, rows and box are multiples of 16 bytes, "
                        "the box 256 at most")  # fmt: skip
        if self.swizzle and pitch > self.swizzle:
            raise Fault(f"a box of {pitch} bytes a row is wider than its swizzle of {self.swizzle}")
        if self.swizzle and pitch < self.swizzle:
            raise NotImplementedError(f"a box of {pitch} bytes a row in a swizzle of {self.swizzle}")


def wait_at_barrier(machine: Machine, instruction: Instruction) -> Run:
    if instruction.operands[0] != "0" or len(instruction.operands) > 1:
        raise NotImplementedError("barriers beside the block's own")

    def run(where: Where) -> None:
        if where is not True:
            raise Fault("a barrier that not all threads of the block come to")
        machine.order.bar()

    return run


def wait_for_warp(machine: Machine, instruction: Instruction) -> Run:
    if instruction.operands[0] not in ("-1", "0xffffffff"):
        raise NotImplementedError("parts of a warp")

    def run(where: Where) -> None:
        whole_warps(where)
        machine.order.bar_warps(np.unique(chosen(where, machine.thread // 32)))

    return run


def fence_proxy(machine: Machine, instruction: Instruction) -> Run:
    """What threads have written may be read by tensor cores and the copy engine."""

    def run(where: Where) -> None:
        if where is not True:
            raise Fault("a fence that not all threads of the block come to")
        machine.shared_watch.unfenced[:] = False

    return run


# --- groups of what was begun -------------------------------------------------------------------


def commit(name: str) -> Callable[[Machine, Instruction], Run]:
    def make(machine: Machine, instruction: Instruction) -> Run:
        def run(where: Where) -> None:
            _of_all(where)
            machine.groups[name].append(machine.begun[name])
            machine.begun[name] = []
            if name == "wgmma":
                machine.accumulators.fenced = False

        return run

    return make


def wait(name: str) -> Callable[[Machine, Instruction], Run]:
    def make(machine: Machine, instruction: Instruction) -> Run:
        left, sources = int(instruction.operands[0]), instruction.op.endswith(".read")

        def run(where: Where) -> None:
            _of_all(where)
            groups = machine.groups[name]
            done = groups[: max(0, len(groups) - left)]
            for copy in (copy for group in done for copy in group):
                if copy.release is not None and not copy.released:
                    copy.release()
                    copy.released = True
                if not sources:
                    copy.land()
            if not sources:
                del groups[: len(done)]

        return run

    return make


def _of_all(where: Where) -> None:
    if where is not True:
        raise NotImplementedError("groups of a part of the block's threads")


# --- cp.async -----------------------------------------------------------------------------------


def copy_async(machine: Machine, instruction: Instruction) -> Run:
    """cp.async.cg.shared.global [to], [from], bytes[, bytes that are read; zeros for the rest]"""
    to, source = (address(machine, text) for text in instruction.operands[:2])
    size = int(instruction.operands[2], 0)
    taken = value(machine, instruction.operands[3], np.uint32) if len(instruction.operands) > 3 else np.uint32(size)

    def run(where: Where) -> None:
        places, who = chosen(where, to()), machine.who(where)
        count = chosen(where, np.broadcast_to(taken, machine.threads)).astype(np.int64)
        if not np.isin(count, (0, size)).all():
            raise NotImplementedError("a copy of a part")
        within_shared(machine, places, size)
        aligned(places, size)
        data = np.zeros((places.size, size), np.uint8)
        if (reads := count > 0).any():
            data[reads] = read_global(machine, chosen(where, source())[reads], size, who[reads])
        at = grains(places, size)
        machine.shared_watch.arrives(at, who)
        machine.begun["cp.async"].append(Copy(lambda: _land(machine, places, data, at, who)))

    return run


def _land(machine: Machine, places: Ints, data: NDArray[np.uint8], at: Ints, who: Ints | None) -> None:
    machine.shared[places[:, None] + np.arange(data.shape[1])] = data
    machine.shared_watch.arrived(at, who)


# --- mbarriers ----------------------------------------------------------------------------------


def start_barrier(machine: Machine, instruction: Instruction) -> Run:
    place, count = address(machine, instruction.operands[0]), int(instruction.operands[1])

    def run(where: Where) -> None:
        places, who = _of_one_each(chosen(where, place()), "started"), machine.who(where)
        aligned(places, BARRIER)
        within_shared(machine, places, BARRIER)
        machine.shared_watch.write(Access(grains(places, BARRIER), who))
        for at in np.unique(places):
            machine.barriers[int(at)] = Barrier(count, count)
            machine.shared_watch.reserve(grains(np.array([at]), BARRIER), True)

    return run


def _of_one_each(places: Ints, what: str) -> Ints:
    if np.unique(places).size < places.size:
        raise Fault(f"an mbarrier is {what} by several threads")
    return places


def end_barrier(machine: Machine, instruction: Instruction) -> Run:
    place = address(machine, instruction.operands[0])

    def run(where: Where) -> None:
        for at in _of_one_each(chosen(where, place()), "ended"):
            if _barrier(machine, int(at)).copies:
                raise Fault("an mbarrier is ended while copies come to it")
            _told(machine, where, place)
            del machine.barriers[int(at)]
            machine.shared_watch.reserve(grains(np.array([at]), BARRIER), False)
        machine.shared_watch.write(Access(grains(chosen(where, place()), BARRIER), machine.who(where)))

    return run


def _barrier(machine: Machine, at: int) -> Barrier:
    if at not in machine.barriers:
        raise Fault(f"no mbarrier at {at}")
    return machine.barriers[at]


def _told(machine: Machine, where: Where, place: Callable[[], Array]) -> None:
    """Whoever uses an mbarrier comes behind its start, by a barrier of threads."""
    machine.shared_watch.comes_behind(Access(grains(chosen(where, place()), BARRIER), machine.who(where)))


def expect(machine: Machine, instruction: Instruction) -> Run:
    place, size = address(machine, instruction.operands[1]), int(instruction.operands[2], 0)

    def run(where: Where) -> None:
        for at in chosen(where, place()):
            barrier = _barrier(machine, int(at))
            barrier.bytes += size
            barrier.waiting -= 1
            if barrier.waiting < 0:
                raise Fault("more arrivals at an mbarrier than it waits for, before its phase was waited for")
        _told(machine, where, place)

    return run


def try_wait(machine: Machine, instruction: Instruction) -> Run:
    """Copies land when somebody asks for them: as late as may be."""
    done = machine.registers[instruction.operands[0]]
    place, parity = address(machine, instruction.operands[1]), value(machine, instruction.operands[2], np.uint32)

    def run(where: Where) -> None:
        places, phases = chosen(where, place()), chosen(where, np.broadcast_to(parity, machine.threads))
        if np.unique(places).size != 1 or np.unique(phases).size != 1:
            raise NotImplementedError("threads that wait for several mbarriers")
        barrier = _barrier(machine, int(places[0]))
        _told(machine, where, place)
        if int(phases[0]) > 1:
            raise Fault(f"waits for parity {int(phases[0])} of an mbarrier: 0 or 1")
        if barrier.phase % 2 == int(phases[0]):
            if barrier.waiting > 0 or sum(size for size, _ in barrier.copies) != barrier.bytes:
                come = sum(size for size, _ in barrier.copies)
                raise Fault(f"waits for ever: {barrier.waiting} arrivals, {come} of {barrier.bytes} bytes")
            if where is not True and any(not size for size, _ in barrier.copies):
                raise NotImplementedError("products of tensor cores that a part of the block waits for")
            for _, land in barrier.copies:
                land()
            barrier.copies.clear()
            barrier.phase, barrier.bytes, barrier.waiting = barrier.phase + 1, 0, barrier.expected
        done[... if where is True else where] = True

    return run


# --- the copy engine ----------------------------------------------------------------------------


def _tile(machine: Machine, operand: str) -> tuple[Callable[[], Array], list[Any]]:
    """[descriptor, {column, row}]"""
    found = re.fullmatch(r"\[([%\w]+),\{([^}]*)\}\]", operand)
    if found is None:
        raise ValueError(operand)
    names = found[2].split(",")
    return address(machine, f"[{found[1]}]"), [value(machine, name, np.int32) for name in names]


def _places(given: Descriptor, column: int, row: int, start: int) -> tuple[Ints, Ints, Array]:
    """Of each element of the box: its address in the tensor, in shared memory, and whether it lies within."""
    rows, columns = np.arange(given.box[0])[:, None], np.arange(given.box[1])[None, :]
    within = (row + rows >= 0) & (row + rows < given.shape[0]) & (column + columns >= 0)
    within = within & (column + columns < given.shape[1])
    outside = given.base + ((row + rows) * given.stride + column + columns) * given.size
    pitch = given.box[1] * given.size
    if start % 128:
        raise Fault(f"the copy engine's place {start} is no multiple of 128")
    inside = swizzled(start + rows * pitch + columns * given.size, given.swizzle)
    return outside.ravel(), inside.ravel().astype(np.int64), within.ravel()


def _orders(machine: Machine, where: Where, *what: Any) -> list[tuple[Ints, list[int]]]:
    """Each thread that gives an order: (who,), and its numbers."""
    given = [chosen(where, np.broadcast_to(x, machine.threads)) for x in what]
    who = machine.who(where)
    return [(who[i : i + 1], [int(x[i]) for x in given]) for i in range(who.size)]


def _descriptor(machine: Machine, at: int) -> Descriptor:
    which, names = (at - PARAMETERS) // 4096, list(machine.program.parameters)
    found = machine.arguments[names[which]] if 0 <= which < len(names) else None
    if not isinstance(found, Descriptor):
        raise Fault("the copy engine is given no descriptor")
    return found


def load_tile(machine: Machine, instruction: Instruction) -> Run:
    to, done = address(machine, instruction.operands[0]), address(machine, instruction.operands[2])
    at, (x, y) = _tile(machine, instruction.operands[1])

    def order(who: Ints, what: int, start: int, barrier: int, column: int, row: int) -> None:
        given = _descriptor(machine, what)
        source, places, within = _places(given, column, row, start)
        within_shared(machine, places, given.size)
        data = np.zeros((places.size, given.size), np.uint8)
        if within.any():
            data[within] = read_global(machine, source[within], given.size, np.repeat(who, within.sum()))
        spots = grains(places, given.size)
        machine.shared_watch.fenced(spots)
        machine.shared_watch.arrives(spots, who)
        copies = _barrier(machine, barrier).copies
        copies.append((data.size, lambda: _land(machine, places, data, spots, None)))

    def run(where: Where) -> None:
        for who, numbers in _orders(machine, where, at(), to(), done(), x, y):
            order(who, *numbers)

    return run


def store_tile(machine: Machine, instruction: Instruction) -> Run:
    """Read when the group is waited for, as late as may be; nobody may write there before."""
    source = address(machine, instruction.operands[1])
    at, (x, y) = _tile(machine, instruction.operands[0])

    def order(who: Ints, what: int, start: int, column: int, row: int) -> None:
        given = _descriptor(machine, what)
        to, places, within = _places(given, column, row, start)
        within_shared(machine, places, given.size)
        spots = np.unique(grains(places, given.size))
        machine.shared_watch.engine_reads(spots, int(who[0]))
        threads, goals = np.repeat(who, within.sum()), global_places(machine, to[within], given.size)
        for watch, goal in goals:
            watch.arrives(goal, threads[: goal.shape[0]])
        found: list[Array] = []

        def release() -> None:
            found.append(machine.shared[places[:, None] + np.arange(given.size)])
            machine.shared_watch.engine_done(spots)

        def land() -> None:
            for watch, goal in goals:
                watch.arrived(goal, threads[: goal.shape[0]])
            write_global(machine, to[within], found[0][within], threads)

        machine.begun["bulk"].append(Copy(land, release))

    def run(where: Where) -> None:
        for who, numbers in _orders(machine, where, at(), source(), x, y):
            order(who, *numbers)

    return run


FAMILIES: dict[str, Callable[[Machine, Instruction], Run]] = {
    "bar.sync": wait_at_barrier,
    "barrier.sync": wait_at_barrier,
    "bar.warp.sync": wait_for_warp,
    "fence.proxy.async": fence_proxy,
    "cp.async.bulk.tensor.2d.shared::cta.global": load_tile,
    "cp.async.bulk.tensor.2d.shared::cluster.global": load_tile,
    "cp.async.bulk.tensor.2d.global.shared::cta": store_tile,
    "cp.async.bulk.commit_group": commit("bulk"),
    "cp.async.bulk.wait_group": wait("bulk"),
    "cp.async.commit_group": commit("cp.async"),
    "cp.async.wait_group": wait("cp.async"),
    "cp.async.c": copy_async,
    "wgmma.commit_group": commit("wgmma"),
    "wgmma.wait_group": wait("wgmma"),
    "mbarrier.init": start_barrier,
    "mbarrier.inval": end_barrier,
    "mbarrier.arrive.expect_tx": expect,
    "mbarrier.try_wait": try_wait,
}
