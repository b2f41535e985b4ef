"""What happens to a machine under a training, beside its load: it sleeps, its clock is set, memory gets short, somebody
pulls its plug."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from core.deadline import running
from core.windows import awake_seconds

PRESSURE = Path("/proc/pressure/memory")  # Linux with PSI


@dataclass(frozen=True)
class Clocks:
    """Seconds, of origins that do not matter. The first stands still while the machine sleeps, the second goes on, the
    third is the time of day, which anybody may set."""

    awake: float
    running: float
    wall: float


def read_clocks() -> Clocks:
    """Where the system has no pair of clocks that tells sleep, the first two are the same one."""
    return Clocks(awake(), running(), time.time())


def awake() -> float:
    if sys.platform == "darwin":
        return time.clock_gettime(time.CLOCK_UPTIME_RAW)
    return awake_seconds() if sys.platform == "win32" else time.monotonic()  # on Windows that goes on in sleep


def slept(began: Clocks, now: Clocks) -> float:
    """Seconds that the machine slept between these two."""
    return round(max(0.0, (now.running - began.running) - (now.awake - began.awake)), 3)


class Interruptions:
    """From its making to `report()`."""

    def __init__(self, clocks: Callable[[], Clocks] = read_clocks, pressure: Path = PRESSURE) -> None:
        self._clocks, self._pressure = clocks, pressure
        self._began = clocks()
        self._stalled = stalled_seconds(pressure)

    def report(self) -> dict[str, Any]:
        """JSON: `slept_seconds`; `clock_set_seconds`, by how much the time of day was moved; `memory_stalled`, the
        share of the time in which some process waited for memory (None: the system does not tell); `on_battery`."""
        now, began = self._clocks(), self._began
        awake, running, wall = now.awake - began.awake, now.running - began.running, now.wall - began.wall
        before, after = self._stalled, stalled_seconds(self._pressure)
        stalled = None if before is None or after is None else round((after - before) / max(1e-3, awake), 4)
        return {
            "slept_seconds": slept(began, now),
            "clock_set_seconds": round(wall - running, 3),
            "memory_stalled": stalled,
            "on_battery": on_battery(),
        }


def stalled_seconds(file: Path = PRESSURE) -> float | None:
    """For how long since the start of the system some process has waited for memory (the kernel's pressure stall
    information); None where the kernel does not count it."""
    try:
        some = file.read_text().splitlines()[0]
        return int(some.rpartition("total=")[2]) / 1e6
    except (OSError, ValueError, IndexError):
        return None


def on_battery() -> bool | None:
    """None where there is no battery, or where nobody can tell."""
    try:
        found = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    except (OSError, RuntimeError, ValueError):
        return None
    return None if found is None or found.power_plugged is None else not found.power_plugged
