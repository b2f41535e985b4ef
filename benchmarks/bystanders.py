"""What else the machine did during a bench: processor time of other programs, and what a virtual machine's host took.

Our own processes are those below this one, ended ones included, as their parents are told what they took. Children of
an experiment are not: the launcher that the referee kills with them has not been told yet. So an experiment is left
out, and what the referee saw of others during its training (core/health.py) is taken instead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from core.health import Watch


class Bystanders:
    """From its making to `others()` and `stolen()`."""

    def __init__(self) -> None:
        self._watch = Watch(os.getpid())
        self._began = time.monotonic()
        self._paused = 0.0  # seconds
        self._seen: list[tuple[float, float]] = []  # seconds of a training, cores that others kept busy
        self._steal = _steal()

    @contextmanager
    def experiment(self) -> Iterator[None]:
        """Not looked at while in here."""
        began = time.monotonic()
        self._watch.pause()
        try:
            yield
        finally:
            self._watch.go_on()
            self._paused += time.monotonic() - began

    def saw(self, seconds: float, cores: float) -> None:
        """What the referee saw of others while an experiment trained."""
        self._seen.append((seconds, cores))

    def others(self) -> float:
        """How many cores others kept busy, on average."""
        looked = time.monotonic() - self._began - self._paused
        parts = [(looked, float(self._watch.report().get("others_cores", 0.0))), *self._seen]
        return sum(seconds * cores for seconds, cores in parts) / sum(seconds for seconds, _ in parts)

    def stolen(self) -> float:
        """The share of all processors' time that the host of this virtual machine gave to others (Linux)."""
        processors = psutil.cpu_count() or 1
        return (_steal() - self._steal) / (processors * max(1e-3, time.monotonic() - self._began))


def _steal() -> float:
    """Seconds of all processors since the start of the system; 0 where nobody counts them."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))
