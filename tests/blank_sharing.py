"""What else happens to a blank card that processes share: others take and leave its memory, it fails, it is taken out.

    card = Shared(Path(os.environ["BLANK_CARD_SHARED"]), CARDS["4060"])
    with card.used(GIB, share=90): ...          # another program
    with card.befallen("lost"): ...             # an Xid 79
    card.fail()                                 # an Xid 13: all that computes on it now ends, and what comes is well

From any process, that of a test too: no CUDA is needed, and the library of none of them asks who wrote. The layout of
the file is that of sharing.c and card.h.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.blank_card import Card

USERS = 64
ROW = struct.Struct("IIQ")  # process id (of the reader's making), percent of the card's time, bytes
FATE = struct.Struct("II")  # state, failures
LOCK = struct.Struct("hhqqi")  # struct flock of Linux on x86_64
SIZE = USERS * ROW.size + FATE.size

# lost: the card has fallen off the bus, the driver counts it and gets no answer. removed: it is not there. untold: NVML
# says "Unknown Error", CUDA works (a container whose devices were taken away). mismatch: the driver's libraries were
# renewed and its module was not: what has a context goes on, nothing new begins.
STATES = ("", "lost", "removed", "untold", "mismatch")


class Shared:
    """The file that BLANK_CARD_SHARED names, from outside of the processes that are on the card."""

    def __init__(self, path: Path, card: Card) -> None:
        self.bytes = card.bytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)  # never closed: locks would go with it
        os.ftruncate(self._fd, SIZE)
        self._mine: set[int] = set()  # rows: a process is not told of its own locks

    def free(self) -> int:
        """Bytes that nobody has."""
        taken = [i for i in range(USERS) if i in self._mine or self._is_taken(i)]
        return max(0, self.bytes - sum(self._bytes(i) for i in taken))

    @contextmanager
    def used(self, size: int, share: int = 0) -> Iterator[None]:
        """Another program, this process, has `size` bytes of the card and keeps it busy for `share` percent."""
        place = next(i for i in range(USERS) if i not in self._mine and self._lock(i))
        self._mine.add(place)
        os.pwrite(self._fd, ROW.pack(0, share, size), place * ROW.size)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, place)
            self._mine.remove(place)

    @contextmanager
    def befallen(self, state: str) -> Iterator[None]:
        """One of STATES, until it is well again."""
        failures = self._fate()[1]
        os.pwrite(self._fd, FATE.pack(STATES.index(state), failures), USERS * ROW.size)
        try:
            yield
        finally:
            os.pwrite(self._fd, FATE.pack(0, self._fate()[1]), USERS * ROW.size)

    def fail(self) -> None:
        """Every process that has a context gets "unspecified launch failure" from now on."""
        state, failures = self._fate()
        os.pwrite(self._fd, FATE.pack(state, failures + 1), USERS * ROW.size)

    # --- the file ----------------------------------------------------------------------------------

    def _fate(self) -> tuple[int, int]:
        state, failures = FATE.unpack(os.pread(self._fd, FATE.size, USERS * ROW.size))
        return state, failures

    def _bytes(self, place: int) -> int:
        size: int = ROW.unpack(os.pread(self._fd, ROW.size, place * ROW.size))[2]
        return size

    def _lock(self, place: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            return False
        return True

    def _is_taken(self, place: int) -> bool:
        want = LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
        kind: int = LOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, want))[0]
        return kind != fcntl.F_UNLCK
