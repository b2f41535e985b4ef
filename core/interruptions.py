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
from core.windows import awake_seconds, under_wsl

PRESSURE = Path("/proc/pressure/memory")  # Linux with PSI
SET_RIGHT = 2.0  # seconds by which Windows may correct WSL2's time of day without having slept


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
    """Seconds that the machine slept between these two. In WSL2, which stands still while Windows sleeps, that is told
    by the time of day alone, which Windows sets right afterwards (microsoft/WSL #41291), and by a second or so at other
    times, too."""
    seconds = max(0.0, (now.running - began.running) - (now.awake - began.awake))
    host = _set(began, now) if under_wsl() else 0.0
    return round(seconds + (host if host > SET_RIGHT else 0.0), 3)


def _set(began: Clocks, now: Clocks) -> float:
    """Seconds by which the time of day was moved between these two."""
    return (now.wall - began.wall) - (now.running - began.running)


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
        asleep, awake = slept(began, now), now.awake - began.awake
        moved = _set(began, now) if not under_wsl() or not asleep else 0.0
        before, after = self._stalled, stalled_seconds(self._pressure)
        stalled = None if before is None or after is None else round((after - before) / max(1e-3, awake), 4)
        return {
            "slept_seconds": asleep,
            "clock_set_seconds": round(moved, 3),
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
