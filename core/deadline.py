"""When a run has to be over: at a time of day, or after so many hours."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from core.windows import under_wsl


def running() -> float:
    """Seconds of a clock that goes on while the machine sleeps, and that nobody sets."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    if sys.platform == "darwin":
        return time.clock_gettime(time.CLOCK_MONOTONIC)
    return time.monotonic()  # of Windows: goes on in sleep


def of_day() -> float:
    """Unix time, as the machine's clock is set at the moment."""
    return time.time()


def _with_its_host() -> Callable[[], float]:
    """WSL2 stands still while Windows sleeps, and of its clocks only the time of day is set right afterwards
    (microsoft/WSL #41291): the one that went further."""
    began, day = running(), of_day()
    return lambda: max(running() - began, of_day() - day)


@dataclass(frozen=True)
class Deadline:
    """A time of day moves with a clock that is set; hours that were asked for do not, and pass in sleep too."""

    at: float  # by the clock
    clock: Callable[[], float]

    @classmethod
    def after(cls, hours: float) -> Deadline:
        clock = _with_its_host() if under_wsl() else running
        return cls(clock() + hours * 3600, clock)

    @classmethod
    def at_time(cls, moment: float) -> Deadline:
        """`moment`: Unix time."""
        return cls(moment, of_day)

    def left(self) -> float:
        """Seconds; less than 0 when it is over."""
        return self.at - self.clock()

    def earlier(self, seconds: float) -> Deadline:
        return replace(self, at=self.at - seconds)

    def time(self) -> float:
        """Unix time, as the machine's clock is set now."""
        return of_day() + self.left()
