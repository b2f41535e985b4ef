"""Global and shared memory of emulated kernels, and the watch over who touches what without a barrier between."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

GRAIN = 2  # bytes that are watched as one; no kernel has elements of less
NOBODY, MANY, WARP = -1, -2, 1 << 40  # of readers: WARP + w is several threads of warp w
SHARED_BASE = 1024  # where a block's shared memory begins; a card keeps the bytes before it


class Fault(Exception):
    """What a card would do wrong, or might: place, threads, line of the PTX."""


class Order:
    """What is ordered before what: a clock of all accesses, and where barriers stood.

    Threads are numbered through all blocks of a launch: block * 1024 + thread.
    """

    def __init__(self) -> None:
        self.now = 1
        self.barrier = 0  # the clock at the block's last barrier
        self.warps: Ints = np.zeros(64, np.int64)  # at each warp's own
        self.block = 0

    def start(self, block: int) -> None:
        self.block = block
        self.bar()

    def bar(self) -> None:
        self.now += 1
        self.barrier = self.now
        self.warps[:] = self.now

    def bar_warps(self, warps: Ints) -> None:
        self.now += 1
        self.warps[warps] = self.now


@dataclass(frozen=True)
class Access:
    """One thread's places: grain numbers (threads, grains), and who (threads)."""

    grains: Ints
    who: Ints

    @property
    def each(self) -> Ints:
        return np.broadcast_to(self.who[:, None], self.grains.shape)


class Watch:
    """Who last wrote and read each grain of one memory, and what is being copied or multiplied."""

    def __init__(self, size: int, order: Order, name: str) -> None:
        count = size // GRAIN + 1
        self.order, self.name = order, name
        self.fences = "all"  # of what the engines read: of all that threads wrote, or of their "stores", not copies
        self.writer: Ints = np.full(count, NOBODY, np.int64)
        self.reader: Ints = np.full(count, NOBODY, np.int64)
        self.written: Ints = np.zeros(count, np.int64)  # clock
        self.read_at: Ints = np.zeros(count, np.int64)
        self.block_read: Ints = np.full(count, NOBODY, np.int64)
        self.atomic = np.zeros(count, bool)  # the last write was one
        self.arriving = np.zeros(count, np.int16)  # copies on their way here
        self.in_use = np.zeros(count, np.int16)  # by tensor cores or the copy engine
        self.unfenced = np.zeros(count, bool)  # written by threads, and no fence since
        self.block_wrote: Ints = np.full(count, NOBODY, np.int64)
        self.reserved = np.zeros(count, bool)  # mbarriers

    def clear(self) -> None:
        """Nobody has been here."""
        for marks in (self.reader, self.writer, self.block_read):
            marks[:] = NOBODY
        for counts in (self.arriving, self.in_use, self.unfenced, self.written, self.read_at, self.reserved):
            counts[:] = 0

    def read(self, access: Access) -> None:
        grains = access.grains
        self._still(grains, self.arriving, "read while something is still being copied there")
        self._still(grains, self.reserved, "read, and an mbarrier lies there")
        self.comes_behind(access)

    def comes_behind(self, access: Access) -> None:
        """A read that may be of an mbarrier. Raises Fault unless the threads know of whatever was written there."""
        grains, who = access.grains, access.each
        self._written_before(grains, who, "reads what {} wrote")
        last = self.reader[grains]
        fresh = (self.read_at[grains] >= self.order.barrier) & (last != NOBODY)
        self._note(self.reader, grains, np.where(fresh, _several(last, who), who))
        self.read_at[grains] = self.order.now
        blocks, before = who // 1024, self.block_read[grains]
        self.block_read[grains] = np.where((before == NOBODY) | (before == blocks), blocks, MANY)

    def write(self, access: Access, atomic: bool = False) -> None:
        grains, who = access.grains, access.each
        self._still(grains, self.arriving, "written while something is still being copied there")
        self._still(grains, self.in_use, "written while tensor cores or the copy engine still read it")
        self._still(grains, self.reserved, "written, and an mbarrier lies there")
        plain = ~self.atomic[grains] if atomic else np.ones_like(grains, bool)  # sums of sums are of any order
        self._written_before(grains[plain], who[plain], "writes where {} wrote")
        self._ordered(grains, who, self.reader, self.read_at, "writes what {} read")
        others = self.block_read[grains]
        if (bad := (others != NOBODY) & (others != who // 1024)).any():
            raise Fault(f"{self.name}+{grains[bad].flat[0] * GRAIN}: written by {_thread(int(who[bad].flat[0]))}, and "
                        "another block reads it")  # fmt: skip
        self._note(self.writer, grains, who)
        self.written[grains], self.atomic[grains], self.unfenced[grains] = self.order.now, atomic, True
        self.block_wrote[grains] = self.order.block

    def reserve(self, grains: Ints, reserved: bool) -> None:
        self.reserved[grains] = reserved

    def _note(self, noted: Ints, grains: Ints, who: Ints) -> None:
        noted[grains] = who
        while (clash := noted[grains] != (both := _several(noted[grains], who))).any():  # several threads at one place
            noted[grains[clash]] = both[clash]

    def engine_reads(self, grains: Ints, who: int = NOBODY) -> None:
        """By tensor cores or the copy engine, from now until `engine_done`: of what threads wrote and fenced.

        grains: none of them twice. who: the thread that gives the order, which knows of its own writes.
        """
        self._still(grains, self.arriving, "tensor cores read what is still being copied there")
        self.fenced(grains)
        writer = self.writer[grains]
        late = grains[(self.written[grains] >= self.order.barrier) & (writer != NOBODY) & (writer != who)]
        if late.size:
            raise Fault(f"{self.name}+{late.flat[0] * GRAIN}: read by tensor cores without a barrier after its write")
        self.in_use[grains] += 1

    def fenced(self, grains: Ints) -> None:
        """Raises Fault where threads wrote and no fence came before tensor cores or the copy engine."""
        if (at := grains[self.unfenced[grains]]).size:
            raise Fault(f"{self.name}+{at.flat[0] * GRAIN}: tensor cores or the copy engine come without a fence")

    def engine_done(self, grains: Ints, told: bool = False) -> None:
        """told: all threads are, by an mbarrier, and need no barrier behind it."""
        self.in_use[grains] -= 1
        if not told:
            self.reader[grains], self.read_at[grains] = MANY, self.order.now

    def arrives(self, grains: Ints, who: Ints) -> None:
        """A copy of (threads, grains) begins; until `arrived` nobody may look."""
        self.write(Access(grains, who))
        self.arriving[grains] = 1

    def arrived(self, grains: Ints, who: Ints | None) -> None:
        """who: None where whoever waited for it needs no barrier (an mbarrier tells it)."""
        self.arriving[grains] = 0
        if who is None:
            self.writer[grains], self.unfenced[grains] = NOBODY, False
        else:
            self.written[grains], self.unfenced[grains] = self.order.now, self.fences == "all"

    def _still(self, grains: Ints, what: NDArray[Any], words: str) -> None:
        if what[grains].any():
            at = grains[what[grains] > 0].flat[0]
            raise Fault(f"{self.name}+{at * GRAIN}: {words}")

    def _written_before(self, grains: Ints, who: Ints, words: str) -> None:
        foreign = (self.writer[grains] != NOBODY) & (self.block_wrote[grains] != self.order.block)
        if foreign.any():
            by, place = _thread(int(who[foreign].flat[0])), int(grains[foreign].flat[0]) * GRAIN
            raise Fault(f"{self.name}+{place}: {by} {words.format('another block')}")
        self._ordered(grains, who, self.writer, self.written, words)

    def _ordered(self, grains: Ints, who: Ints, others: Ints, clock: Ints, words: str) -> None:
        order, other, at = self.order, others[grains], clock[grains]
        if not (at >= order.barrier).any():
            return
        warp = np.where(other >= WARP, other - WARP, other // 32)
        of_mine = (other >= 0) & (warp == who // 32)
        harmless = (other == who) | (of_mine & (at < order.warps[who // 32 % 32]))
        bad = (at >= order.barrier) & (other != NOBODY) & ~harmless & (at > 0)
        if bad.any():
            by, place = _thread(int(who[bad].flat[0])), int(grains[bad].flat[0]) * GRAIN
            told = words.format(_thread(int(other[bad].flat[0])))
            raise Fault(f"{self.name}+{place}: {by} {told}, with no barrier between")


def _several(a: Ints, b: Ints) -> Ints:
    """Who two are together, NOBODY aside: one thread, threads of one warp (WARP + w), or many."""
    warps = [np.where(x >= WARP, x - WARP, x // 32) for x in (a, b)]
    of_one = (a >= 0) & (b >= 0) & (warps[0] == warps[1])
    return np.where(a == b, b, np.where(of_one, WARP + warps[0], MANY))


def _thread(number: int) -> str:
    if number == MANY:
        return "several threads"
    if number >= WARP:
        return f"threads of block {(number - WARP) // 32}, warp {(number - WARP) % 32}"
    return f"block {number // 1024}, thread {number % 1024}"


@dataclass
class Region:
    """A tensor's storage."""

    base: int
    data: Bytes
    watch: Watch


class Global:
    """All that a launch was given."""

    def __init__(self, storages: Sequence[tuple[int, int, str]], order: Order) -> None:
        """storages: address, bytes, name."""
        self.regions: list[Region] = []
        for base, size, name in sorted(set(storages)):
            if size and not any(r.base == base for r in self.regions):
                data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
                self.regions.append(Region(base, data, Watch(size, order, name)))
        self.bases = np.array([r.base for r in self.regions], np.int64)

    def find(self, addresses: Ints, size: int) -> list[tuple[Region, NDArray[np.bool_]]]:
        """Regions and which of the threads' places, of `size` bytes each, lie in them."""
        places = np.searchsorted(self.bases, addresses, side="right") - 1
        found = []
        for i in np.unique(places):
            here = places == i
            region = self.regions[i] if i >= 0 else None
            if region is None or int(addresses[here].max()) + size > region.base + region.data.size:
                near = f"{region.watch.name} of {region.data.size} bytes" if region else "the first tensor"
                offset = int(addresses[here].max()) - (region.base if region else int(self.bases[0]))
                raise Fault(f"global memory: {size} bytes at {offset:+d} of {near}: outside")
            found.append((region, here))
        return found
