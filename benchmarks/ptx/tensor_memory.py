"""Tensor memory of sm_100: 128 lanes of 512 columns of 32 bits, and the watch over what comes and goes there.

A warp moves what it likes between its own 32 lanes and its registers (tcgen05.ld and st); products (tcgen05.mma) read
and write all lanes. None of it is ordered but by waiting: for one's own moves (tcgen05.wait), for products by the
mbarrier that they are committed to, and between warps by a barrier behind that. Products into one place, of one shape,
follow each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ptx.memory import Fault, Ints, Order

Array = NDArray[Any]
LANES, COLUMNS = 128, 512
NOBODY, MANY = -1, -2  # of warps


@dataclass(frozen=True)
class Cells:
    """Lanes and columns that broadcast to one place each."""

    lanes: Ints
    columns: Ints

    def __getitem__(self, key: Any) -> Cells:
        lanes, columns = np.broadcast_arrays(self.lanes, self.columns)
        return Cells(lanes[key], columns[key])


@dataclass(eq=False)
class Product:
    """A tcgen05.mma that was begun."""

    thread: int  # who began it
    into: Cells
    kind: tuple[int, ...]  # place, shape: products alike in it, of one thread, follow each other
    reads: Cells | None  # A, where it lies here
    done: Callable[[], None]  # tells shared memory


@dataclass(eq=False)
class Move:
    """A tcgen05.ld or st of one warp that was begun."""

    warp: int
    cells: Cells
    counts: Array  # of loads or stores at each place


@dataclass
class TensorMemory:
    """Of one block. Columns are lent from the last ones on, so that no kernel can take for granted where they begin."""

    order: Order
    lent: dict[int, int] = field(default_factory=dict)  # first column -> columns
    closed: bool = False  # nobody may ask for more
    products: list[Product] = field(default_factory=list)  # begun, and not waited for
    moves: list[Move] = field(default_factory=list)  # likewise

    def __post_init__(self) -> None:
        size = (LANES, COLUMNS)
        self.cells: Array = np.zeros(size, np.uint32)
        self.storing, self.loading, self.used, self.coming = (np.zeros(size, np.int16) for _ in range(4))
        self.writer, self.reader = np.zeros(size, np.int16), np.zeros(size, np.int16)  # warps
        self.written, self.read_at = np.zeros(size, np.int64), np.zeros(size, np.int64)  # clock
        self.start()

    def start(self) -> None:
        self.cells[:] = 0xFFFFFFFF  # NaN
        for counts in (self.storing, self.loading, self.used, self.coming, self.written, self.read_at):
            counts[:] = 0
        self.writer[:], self.reader[:] = NOBODY, NOBODY
        for what in (self.lent, self.products, self.moves):
            what.clear()  # type: ignore[attr-defined]
        self.closed = False

    def end(self) -> None:
        if self.products or self.moves:
            raise Fault("the block ended while products or moves of tensor memory were not waited for")
        if self.lent:
            raise Fault(f"the block ended and kept {sum(self.lent.values())} columns of tensor memory")

    # --- columns that are lent ------------------------------------------------------------------

    def lend(self, count: int) -> int:
        """The first of `count` columns."""
        if count not in (32, 64, 128, 256, 512):
            raise Fault(f"{count} columns of tensor memory: powers of two from 32 to {COLUMNS}")
        if self.closed:
            raise Fault("tensor memory is asked for after the right to it was given up")
        for first in range(COLUMNS - count, -1, -32):
            if all(first + count <= at or at + size <= first for at, size in self.lent.items()):
                self.lent[first] = count
                return first
        raise Fault(f"waits for ever: {count} columns of tensor memory, {COLUMNS - sum(self.lent.values())} are free")

    def take_back(self, first: int, count: int, warp: int) -> None:
        if self.lent.get(first) != count:
            raise Fault(f"{count} columns of tensor memory from {first} on are given back, and were not lent")
        cells = Cells(np.arange(LANES)[:, None], np.arange(first, first + count)[None])
        self._alone(cells, "given back")
        self._ordered(cells, warp, "gives back")
        self.cells[:, first : first + count] = 0xFFFFFFFF
        self.writer[:, first : first + count] = NOBODY
        del self.lent[first]

    def within(self, cells: Cells) -> None:
        lanes, columns = cells.lanes, cells.columns
        if lanes.min() < 0 or lanes.max() >= LANES:
            raise Fault(f"tensor memory: lanes {lanes.min()} to {lanes.max()}, of {LANES}")
        first, last = int(columns.min()), int(columns.max())
        if not any(at <= first and last < at + size for at, size in self.lent.items()):
            raise Fault(f"tensor memory: columns {first} to {last} were not lent: {self.lent}")

    # --- what warps move ------------------------------------------------------------------------

    def load(self, cells: Cells, warp: int) -> Array:
        """The values, one for each of `cells`. Until the warp waits, what lies there is still being read."""
        self.within(cells)
        self._no(self.coming, cells, "read before the product that writes it was waited for")
        self._no(self.storing, cells, "read while it is being stored")
        self._apart(self.writer, self.written, cells, warp, "reads what {} wrote")
        at = (cells.lanes, cells.columns)
        fresh = (self.read_at[at] >= self.order.barrier) & ~np.isin(self.reader[at], (NOBODY, warp))
        self.reader[at] = np.where(fresh, MANY, warp)
        self.read_at[at] = self.order.now
        self._begin_move(Move(warp, cells, self.loading))
        found: Array = self.cells[at]
        return found

    def store(self, cells: Cells, values: Array, warp: int) -> None:
        """values: one for each of `cells`."""
        self.within(cells)
        self._alone(cells, "written")
        self._ordered(cells, warp, "writes")
        at = (cells.lanes, cells.columns)
        self.cells[at] = values
        if (self.cells[at] != values).any():
            raise Fault("tensor memory: a warp writes different values to one place at once")
        self.writer[at], self.written[at] = warp, self.order.now
        self._begin_move(Move(warp, cells, self.storing))

    def _begin_move(self, move: Move) -> None:
        np.add.at(move.counts, (move.cells.lanes, move.cells.columns), 1)
        self.moves.append(move)

    def wait(self, counts: Array, warps: list[int]) -> None:
        """For all loads or all stores, as `counts` says, of these warps."""
        for move in [m for m in self.moves if m.counts is counts and m.warp in warps]:
            self.moves.remove(move)
            np.subtract.at(counts, (move.cells.lanes, move.cells.columns), 1)

    # --- products -------------------------------------------------------------------------------

    def begin(self, product: Product) -> None:
        """What it writes is not there before `finish`."""
        warp = product.thread // 32
        if product.reads is not None:
            self._readable(product.reads, warp)
            np.add.at(self.used, (product.reads.lanes, product.reads.columns), 1)
        into, at = product.into, (product.into.lanes, product.into.columns)
        self.within(into)
        for counts, words in (
            (self.storing, "written by a product while it is being stored"),
            (self.loading, "written by a product while it is being loaded"),
            (self.used, "written by a product while another reads it, or itself"),
        ):
            self._no(counts, into, words)
        if self.coming[at].any():
            self._follows(product)
        self._ordered(into, warp, "writes")
        self.coming[at] += 1
        self.products.append(product)

    def add(self, cells: Cells, numbers: Array, keep: bool) -> None:
        """float64 numbers (m, n), added to what is there or in its place."""
        at = (cells.lanes, cells.columns)
        with np.errstate(all="ignore"):
            total = numbers + (self.cells[at].view(np.float32) if keep else 0)
            self.cells[at] = total.astype(np.float32).view(np.uint32)

    def finish(self, product: Product) -> None:
        """As whoever waited for it is told."""
        if product in self.products:
            self.products.remove(product)
            at = (product.into.lanes, product.into.columns)
            self.coming[at] -= 1
            self.writer[at] = NOBODY
            if product.reads is not None:
                np.subtract.at(self.used, (product.reads.lanes, product.reads.columns), 1)
            product.done()

    def _follows(self, product: Product) -> None:
        """Products on their way to one place follow each other where place and shape are the same."""
        for other in self.products:
            if (other.kind, other.thread) == (product.kind, product.thread):
                continue
            if np.isin(_numbers(product.into), _numbers(other.into)).any():
                raise Fault(
                    f"tensor memory{_place(product.into)}: written by a product while one of another place, shape or "
                    "thread still writes it: nothing orders them"
                )

    def _readable(self, cells: Cells, warp: int) -> None:
        self.within(cells)
        self._no(self.coming, cells, "read by a product before the one that writes it was waited for")
        self._no(self.storing, cells, "read by a product while it is being stored")
        self._apart(self.writer, self.written, cells, warp, "has a product read what {} wrote")

    # --- rules ----------------------------------------------------------------------------------

    def _alone(self, cells: Cells, words: str) -> None:
        self._no(self.coming, cells, f"{words} while a product still writes it")
        self._no(self.used, cells, f"{words} while a product still reads it")
        self._no(self.storing, cells, f"{words} while it is being stored")
        self._no(self.loading, cells, f"{words} while it is being loaded")

    def _ordered(self, cells: Cells, warp: int, words: str) -> None:
        self._apart(self.writer, self.written, cells, warp, words + " where {} wrote")
        self._apart(self.reader, self.read_at, cells, warp, words + " where {} read")

    def _no(self, counts: Array, cells: Cells, words: str) -> None:
        bad = counts[cells.lanes, cells.columns] > 0
        if bad.any():
            raise Fault(f"tensor memory{_place(cells[bad])}: {words}")

    def _apart(self, warps: Array, clock: Array, cells: Cells, warp: int, words: str) -> None:
        other, at = warps[cells.lanes, cells.columns], clock[cells.lanes, cells.columns]
        bad = (at >= self.order.barrier) & (other != NOBODY) & (other != warp)
        if bad.any():
            them = int(other[bad].flat[0])
            told = words.format("several warps" if them == MANY else f"warp {them}")
            raise Fault(f"tensor memory{_place(cells[bad])}: warp {warp} {told}, with no barrier between")


def _place(cells: Cells) -> str:
    return f"[lane {int(cells.lanes.flat[0])}, column {int(cells.columns.flat[0])}]"


def _numbers(cells: Cells) -> Ints:
    return np.ravel(cells.lanes * COLUMNS + cells.columns)
