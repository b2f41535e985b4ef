"""What a child prints: its beginning and its end are kept, what lies between is counted."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

PAUSE = 1.0  # seconds between two writes of the changing end


class CappedLog:
    """At most `limit` bytes in memory and on disk, however much comes: a quarter for the beginning."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self._head_limit = max(1, limit // 4)
        self._tail_limit = max(1, limit - self._head_limit - 128)
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0
        self._written = 0.0
        self._changed = False
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link planted under this name must not lead our writing elsewhere.
        path.unlink(missing_ok=True)
        how = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        how |= getattr(os, "O_BINARY", 0)  # else Windows writes two bytes for a line's end, and places are counted
        self._file = os.open(path, how, 0o600)

    def add(self, data: bytes) -> None:
        with self._lock:
            room = self._head_limit - len(self._head)
            if room > 0:
                os.lseek(self._file, len(self._head), os.SEEK_SET)
                os.write(self._file, data[:room])
                self._head += data[:room]
                data = data[room:]
            if not data:
                return
            self._tail += data
            if len(self._tail) > 2 * self._tail_limit:  # cut seldom: a cut copies the whole tail
                self._cut()
            self._changed = True
        if time.monotonic() - self._written > PAUSE:
            self.flush()

    def _cut(self) -> None:
        excess = len(self._tail) - self._tail_limit
        if excess > 0:
            self._dropped += excess
            del self._tail[:excess]

    def flush(self) -> None:
        with self._lock:
            if not self._changed or self._file < 0:
                return
            self._cut()
            rest = self._gap() + bytes(self._tail)
            os.lseek(self._file, len(self._head), os.SEEK_SET)
            os.write(self._file, rest)
            os.ftruncate(self._file, len(self._head) + len(rest))
            self._changed = False
            self._written = time.monotonic()

    def _gap(self) -> bytes:
        return f"\n[{self._dropped:,} bytes not kept]\n".encode() if self._dropped else b""

    def tail(self, lines: int) -> str:
        with self._lock:
            self._cut()
            text = (bytes(self._head) + self._gap() + bytes(self._tail)).decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-lines:])

    def close(self) -> None:
        self.flush()
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1
