"""What else the machine was doing during a training: a score that was taken beside other work is not comparable."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from core import gpuwatch, trees
from core.apple import conditions
from core.facts import LocalFacts
from core.hardware import usable_cores
from core.interruptions import Interruptions
from core.nvml import Nvml


class Watch:
    """From its making to `report()`: processor time of everybody else, clock, temperature, load."""

    def __init__(
        self, pid: int, device: str = "", card: gpuwatch.Source | None = None, every: float = gpuwatch.EVERY
    ) -> None:
        """`pid`: root of the process tree that is ours. `device`: as the settings name it; an NVIDIA card is watched
        too, `every` so many seconds, through `card`, by default the driver."""
        self._pid = pid
        self._started = time.monotonic()
        self._ours = _tree_seconds(pid) or 0.0
        self._loop = _tree_seconds(os.getpid()) or 0.0
        self._all = _busy_seconds()
        self._clock = _clock()
        self._interruptions = Interruptions()
        self._card: gpuwatch.Watch | None = None
        if device.startswith("cuda"):
            ours = lambda: [p.pid for p in _tree(pid)] or [pid]  # noqa: E731
            self._card = gpuwatch.Watch(device, ours, card or Nvml(), every)

    def pause(self) -> None:
        """What happens from now on is none of the training's: a look at it."""
        self._mark = (time.monotonic(), _busy_seconds(), self._ours_now(), _tree_seconds(os.getpid()) or 0.0)
        if self._card:
            self._card.pause()

    def go_on(self) -> None:
        """After a `pause`: take it out of all that is counted."""
        now = (time.monotonic(), _busy_seconds(), self._ours_now(), _tree_seconds(os.getpid()) or 0.0)
        started, busy, ours, loop = (after - before for before, after in zip(self._mark, now))
        self._started, self._all = self._started + started, self._all + busy
        self._ours, self._loop = self._ours + ours, self._loop + loop
        if self._card:
            self._card.go_on()

    def _ours_now(self) -> float:
        return _tree_seconds(self._pid) or 0.0

    def report(self) -> dict[str, Any]:
        """JSON. `others_cores`: how many cores other processes kept busy on average, `loop_cores`: how many of these
        were this process and what it started beside the training, a researcher for example; `cores`: the machine's,
        where all of them are ours to use. Empty when ours is gone."""
        card = self._card.report() if self._card else {}
        wall = max(1e-3, time.monotonic() - self._started)
        busy = _busy_seconds() - self._all
        seconds = _tree_seconds(self._pid)
        if seconds is None:
            return {"card": card, "tainted": card["tainted"]} if card else {}
        ours = seconds - self._ours
        beside = (_tree_seconds(os.getpid()) or 0.0) - self._loop - ours
        return {
            "others_cores": round(max(0.0, busy - ours) / wall, 3),
            "loop_cores": round(max(0.0, beside) / wall, 3),
            "our_cores": round(ours / wall, 3),
            **_whole_machine(),
            "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
            "cpu_mhz_before": self._clock,
            "cpu_mhz_after": _clock(),
            "temperature_c": _temperature(),
            **self._interruptions.report(),
            **({"card": card, "tainted": card["tainted"]} if card else {}),
            **({"conditions": conditions(LocalFacts())} if sys.platform == "darwin" else {}),
        }


def _whole_machine() -> dict[str, int]:
    """Its cores; nothing in a container or under an affinity that gives us a part, as others are counted in all."""
    ours = usable_cores(LocalFacts())
    return {"cores": ours} if ours == psutil.cpu_count(logical=False) else {}


def _busy_seconds() -> float:
    t = psutil.cpu_times()
    return t.user + t.system + getattr(t, "nice", 0.0) + getattr(t, "irq", 0.0) + getattr(t, "softirq", 0.0)


def own_seconds(pid: int) -> float:
    """User and system time of the living processes below and including `pid`, those that have ended apart."""
    return sum(t.user + t.system for t in _tree_times(pid) or [])


def _tree(pid: int) -> list[psutil.Process]:
    """The living processes below and including `pid`; empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except trees.UNTOLD:
        return []


def _tree_seconds(pid: int) -> float | None:
    """User and system time of the processes below and including `pid`; None when it is gone."""
    times = _tree_times(pid)
    if times is None:
        return None
    ended = ("children_user", "children_system")  # not on Windows
    return sum(t.user + t.system + sum(getattr(t, name, 0.0) for name in ended) for t in times)


def _tree_times(pid: int) -> list[Any] | None:
    """What psutil says of each living process below and including `pid`; None when it is gone."""
    tree = _tree(pid)
    found = []
    for process in tree:
        with suppress(*trees.UNTOLD):
            found.append(process.cpu_times())
    return found if tree else None


def _clock() -> float | None:
    """Mean clock of the cores in MHz, where the system tells."""
    try:
        found = psutil.cpu_freq()
    except (OSError, NotImplementedError, AttributeError, RuntimeError):
        return None
    return round(found.current, 1) if found and found.current else None


def _temperature() -> float | None:
    """The hottest thermal zone in degrees Celsius, on Linux."""
    readings = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            readings.append(int(zone.read_text()) / 1000)
        except (OSError, ValueError):
            continue
    return max(readings, default=None)
