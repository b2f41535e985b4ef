"""Where dry builds may use the device: in the gap between two experiments, never beside a running clock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

PERIOD = 0.2  # seconds between two looks at the stop


class Stopped(Exception):
    """The run was stopped before there was an answer."""


class Gap:
    """A gate between the loop, which closes it around what is measured, and dry builds in another thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._inside = 0

    @property
    def used(self) -> bool:
        """Is a dry build under way?"""
        return self._inside > 0

    @contextmanager
    def between(self, stop: threading.Event) -> Iterator[None]:
        """Waits until nothing is measured; what follows has to end before the next measurement starts.

        Raises `Stopped` after a stop."""
        with self._changed:
            while self._closed and not stop.is_set():
                self._changed.wait(PERIOD)
            if stop.is_set():
                raise Stopped
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self, stop: threading.Event) -> None:
        """No dry build begins any more; returns when none is under way, or after a stop."""
        with self._changed:
            self._closed = True
            while self._inside and not stop.is_set():
                self._changed.wait(PERIOD)

    def open(self) -> None:
        with self._changed:
            self._closed = False
            self._changed.notify_all()
