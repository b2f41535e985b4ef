"""The training text as an endless stream of shuffled rows, one step ahead of the device.

Shapes: R rows, L targets in a row, N tokens of text. A row is a window of L + 1 tokens; neighbours in the text
share one token, so that every token is a target of one row only.

A pass cuts the text at a random offset into windows of M tokens (M: the longest row asked for so far) and serves
them in random order, each once. Shorter rows are cut from these windows, so a recipe may mix shapes, or change
them on the way, and still sees a text once in each pass. Where text ends, nothing is padded or dropped but less
than M tokens at either end, at another offset in the next pass.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from core.errors import DataError

Shape = tuple[int, int]  # rows, length
AHEAD = 2  # batches that are ready before they are asked for


class Text:
    """Token shards read as one text. Shards are memory maps: only what is asked for is read from disk."""

    def __init__(self, shards: Sequence[int | np.ndarray], dtype: np.dtype | str) -> None:
        """`shards`: read-only file descriptors (the caller may close them afterwards) or arrays."""
        self._shards = [s if isinstance(s, np.ndarray) else map_tokens(s, np.dtype(dtype)) for s in shards]
        self._ends = np.cumsum([len(s) for s in self._shards], dtype=np.int64)
        self.tokens = int(self._ends[-1]) if len(self._ends) else 0

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(R, length + 1) int32: the tokens from each of `starts` (R,) on."""
        out = np.empty((len(starts), length + 1), dtype=np.int32)
        shard_of = np.searchsorted(self._ends, starts, side="right")
        for index in np.unique(shard_of):
            shard, end = self._shards[index], self._ends[index]
            whole = (shard_of == index) & (starts + length < end)
            if whole.any():
                out[whole] = sliding_window_view(shard, length + 1)[starts[whole] - (end - len(shard))]
        for row in np.flatnonzero(starts + length >= self._ends[shard_of]):
            out[row] = self.span(int(starts[row]), int(starts[row]) + length + 1)
        return out

    def span(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`, across shards."""
        found = []
        for shard, end in zip(self._shards, self._ends.tolist(), strict=True):
            begin = end - len(shard)
            if begin < stop and start < end:
                found.append(shard[max(start - begin, 0) : stop - begin])
        return np.concatenate(found) if found else np.empty(0, dtype=np.int32)


def map_tokens(fd: int, dtype: np.dtype) -> np.ndarray:
    """A read-only memory map of a token shard. It holds a descriptor of its own."""
    return np.frombuffer(mmap.mmap(fd, 0, access=mmap.ACCESS_READ), dtype=dtype)


@dataclass(frozen=True)
class Grid:
    """One pass: starts of windows of `length` tokens, in the order in which they are served."""

    number: int
    length: int
    starts: np.ndarray  # (windows,)


@dataclass(frozen=True)
class Position:
    """How far the stream is. A value: to look ahead and to go back is to keep two of them."""

    grid: Grid
    used: int = 0  # windows of the grid
    spare: Mapping[int, np.ndarray] = field(default_factory=dict)  # row length -> starts cut but not served yet


class Schedule:
    """Which rows come next: a function of the seed and of the shapes asked for, and of nothing else."""

    def __init__(self, tokens: int, seed: int) -> None:
        self._tokens = tokens
        self._seed = seed
        self.start = Position(Grid(-1, 0, np.empty(0, dtype=np.int64)))

    def take(self, at: Position, rows: int, length: int) -> tuple[np.ndarray, Position]:
        """Starts (rows,) of the next rows, and the position after them."""
        self._check(rows, length)
        if length > at.grid.length:
            at = self._widen(at, length)
        spare = at.spare.get(length, np.empty(0, dtype=np.int64))
        found, lacking = [spare[:rows]], rows - len(spare[:rows])
        spare = spare[rows:]
        within = at.grid.length // length
        cuts = np.arange(within, dtype=np.int64) * length
        while lacking > 0:
            windows = at.grid.starts[at.used : at.used + -(-lacking // within)]
            if len(windows) == 0:
                at = Position(self._grid(at.grid.number + 1, at.grid.length))
                continue
            starts = (windows[:, None] + cuts).reshape(-1)
            found.append(starts[:lacking])
            spare = starts[lacking:]
            lacking -= len(found[-1])
            at = replace(at, used=at.used + len(windows))
        return np.concatenate(found), replace(at, spare={**at.spare, length: spare})

    def _check(self, rows: int, length: int) -> None:
        if rows < 1 or length < 1:
            raise ValueError(f"{rows} rows of {length} tokens: both must be 1 or more")
        if length + 1 > self._tokens:
            raise DataError(
                f"the training text has {self._tokens:,} tokens, a row needs {length + 1:,}",
                "use shorter rows or more text",
            )

    def _grid(self, number: int, length: int) -> Grid:
        random = np.random.default_rng([self._seed, number, length])
        room = self._tokens - 1 - length  # the largest start of a window with the target after it
        offset = int(random.integers(0, min(length - 1, room) + 1))
        starts = np.arange(offset, room + 1, length, dtype=np.int64)
        random.shuffle(starts)
        return Grid(number, length, starts)

    def _widen(self, at: Position, length: int) -> Position:
        """Go on with longer windows; those that are mostly served in this pass are left out of it."""
        old = at.grid
        grid = self._grid(max(old.number, 0), length)
        served = old.starts[: at.used] + old.length // 2  # by the middle of each old window
        offset = int(grid.starts.min())
        share = np.bincount(np.clip((served - offset) // length, 0, len(grid.starts) - 1), minlength=len(grid.starts))
        fresh = share[(grid.starts - offset) // length] * old.length * 2 <= length
        return replace(at, grid=replace(grid, starts=grid.starts[fresh]), used=0)


class TokenStream:
    """`contract.Batches` over token shards. Not for several consumers at once."""

    def __init__(
        self,
        shards: Sequence[int | np.ndarray],
        dtype: np.dtype | str,
        seed: int,
        put: Callable[[np.ndarray], Any],
        prefetch: bool = True,
    ) -> None:
        """`put` gets a fresh int32 array (rows, length + 1) and is called in the consumer's thread."""
        self._text: Text | None = Text(shards, dtype)
        self._tokens = self._text.tokens
        self._schedule = Schedule(self._tokens, seed)
        self._position = self._schedule.start
        self._put = put
        self._ahead = _Ahead(self._batch) if prefetch else None
        self.served = 0  # targets handed out

    @property
    def passes(self) -> float:
        """How many times over the text `served` is."""
        return self.served / self._tokens if self._tokens else 0.0

    def next(self, rows: int, length: int) -> Any:
        """What `put` makes of the next int32 (rows, length + 1). `DataError` on a text shorter than one row."""
        if self._text is None:
            raise ValueError("the stream is closed")
        shape = (rows, length)
        made = self._ahead.get(shape, self._position) if self._ahead else self._batch(shape, self._position)
        batch, self._position = made
        self.served += rows * length
        return self._put(batch)

    def close(self) -> None:
        """End the thread and let go of the text. May be called twice."""
        if self._ahead:
            self._ahead.close()
        self._text = None

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batch(self, shape: Shape, at: Position) -> tuple[np.ndarray, Position]:
        text = self._text
        if text is None:
            raise ValueError("the stream is closed")
        starts, after = self._schedule.take(at, *shape)
        return text.windows(starts, shape[1]), after


Made = tuple[np.ndarray, Position]


class _Ahead:
    """A thread that makes the batches that will probably be asked for next.

    It supposes that after a shape comes the one that came after it last time, which is right for one shape and
    for shapes that take turns. A wrong guess costs the work, never the order: its batches are thrown away and the
    stream goes on from the position before them.
    """

    def __init__(self, make: Callable[[Shape, Position], Made]) -> None:
        self._make = make
        self._changed = threading.Condition()
        self._ready: deque[tuple[Shape, Made]] = deque()
        self._follows: dict[Shape, Shape] = {}
        self._last: Shape | None = None  # what the consumer asked for last
        self._plan: tuple[Shape, Position] | None = None  # what the thread makes next, or is making
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def get(self, shape: Shape, at: Position) -> Made:
        """The batch of `shape` from `at` on; an exception of the thread is raised here."""
        with self._changed:
            if self._last is not None:
                self._follows[self._last] = shape
            self._last = shape
            expected = self._ready[0][0] if self._ready else self._plan[0] if self._plan else None
            if expected != shape:
                self._restart(shape, at)
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            if self._closed:
                raise ValueError("the stream is closed")
            if not self._ready and self._error:
                raise self._error
            _, made = self._ready.popleft()
            self._changed.notify_all()
            return made

    def _restart(self, shape: Shape, at: Position) -> None:
        self._ready.clear()
        self._plan = (shape, at)
        self._error = None
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="token-stream", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._plan and len(self._ready) < AHEAD))
                if self._closed or self._plan is None:
                    return
                plan = self._plan
            try:
                made = self._make(*plan)
            except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
                with self._changed:
                    if plan is self._plan:  # else nobody wants it any more
                        self._error, self._plan = error, None
                        self._changed.notify_all()
                continue
            with self._changed:
                if plan is self._plan:
                    self._ready.append((plan[0], made))
                    self._plan = (self._follows.get(plan[0], plan[0]), made[1])
                    self._changed.notify_all()
