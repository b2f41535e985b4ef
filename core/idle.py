"""How long the device did nothing between two experiments, and what it waited for.

An experiment counts as busy from its start to its outcome, its children's start and its scoring included. What lies
between is idle: "thinking" (a proposal was not ready), "dry build" (a proposal was tried out), "waiting" (a
researcher could not answer), "paused" (somebody asked for it); the rest is the loop's own work, mostly writes to disk.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

WAITS = ("thinking", "dry build", "waiting", "paused")


class Idle:
    """From its making, or from `begin`, the device does nothing."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._since: float | None = time.monotonic()
        self._waits: dict[str, float] = defaultdict(float)

    def add(self, what: str, seconds: float) -> None:
        self._waits[what] += seconds

    @contextmanager
    def waits_for(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(what, time.monotonic() - began)

    def end(self) -> dict[str, float]:
        """The device is used from now on. `seconds` that it was idle, and how many of them it waited for what."""
        if self._since is None:
            return {"seconds": 0.0}
        seconds = time.monotonic() - self._since
        self._since = None
        waits = {what: round(self._waits[what], 3) for what in WAITS}
        return {"seconds": round(seconds, 3), **{what: waited for what, waited in waits.items() if waited}}
