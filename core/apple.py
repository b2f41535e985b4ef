"""What is particular to Apple Silicon: chip, GPU, unified memory, and what makes such a machine slow down.

Pure functions of raw facts (core.facts). Commands that a Mac lacks give "unknown", never an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.facts import Facts
from core.gpuwatch import Look

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """`bandwidth` in bytes/s by the number of GPU cores, from the technical specifications on Apple's support pages."""

    name: str
    bandwidth: Mapping[int, float]


def _chip(name: str, *by_cores: tuple[int, float]) -> Chip:
    return Chip(name, {cores: gigabytes * 1e9 for cores, gigabytes in by_cores})


CHIPS = (
    _chip("Apple M1", (7, 68.25), (8, 68.25)),
    _chip("Apple M1 Pro", (14, 200), (16, 200)),
    _chip("Apple M1 Max", (24, 400), (32, 400)),
    _chip("Apple M1 Ultra", (48, 800), (64, 800)),
    _chip("Apple M2", (8, 100), (10, 100)),
    _chip("Apple M2 Pro", (16, 200), (19, 200)),
    _chip("Apple M2 Max", (30, 400), (38, 400)),
    _chip("Apple M2 Ultra", (60, 800), (76, 800)),
    _chip("Apple M3", (8, 100), (10, 100)),
    _chip("Apple M3 Pro", (14, 150), (18, 150)),
    _chip("Apple M3 Max", (30, 300), (40, 400)),
    _chip("Apple M3 Ultra", (60, 819), (80, 819)),
    _chip("Apple M4", (8, 120), (10, 120)),
    _chip("Apple M4 Pro", (16, 273), (20, 273)),
    _chip("Apple M4 Max", (32, 410), (40, 546)),
)
# hw.model of the MacBook Airs: without a fan they slow down steadily under load.
FANLESS = ("MacBookAir10,1", "Mac14,2", "Mac14,15", "Mac15,12", "Mac15,13", "Mac16,12", "Mac16,13")


@dataclass(frozen=True)
class Apple:
    gpu_cores: int = 0  # 0: unknown
    bandwidth: float = 0.0  # bytes/s of the unified memory; 0: unknown
    wired_limit: int = 0  # bytes that the GPU may keep resident, where it was set by hand; 0: macOS decides
    fanless: bool = False

    def summary(self) -> str:
        """ "40 GPU cores, 546 GB/s", as far as it is known."""
        parts = [f"{self.gpu_cores} GPU cores"] if self.gpu_cores else []
        parts += [f"{self.bandwidth / 1e9:.0f} GB/s"] if self.bandwidth else []
        parts += [f"wired limit {self.wired_limit / GIB:.0f} GiB"] if self.wired_limit else []
        parts += ["no fan"] if self.fanless else []
        return ", ".join(parts)


def identify(chip: str, facts: Facts) -> Apple:
    """`chip`: sysctl's machdep.cpu.brand_string."""
    cores = _number(r'"gpu-core-count"\s*=\s*(\d+)', facts.run("ioreg", "-rc", "AGXAccelerator", "-d", "1"))
    known = next((c for c in CHIPS if c.name == chip), None)
    widths = known.bandwidth if known else {}
    least = min(widths.values(), default=0.0)  # of the smaller GPU, where the cores are not known
    limit = _number(r"(\d+)", facts.run("sysctl", "-n", "iogpu.wired_limit_mb")) * 2**20
    return Apple(cores, widths.get(cores, least), limit, (facts.run("sysctl", "-n", "hw.model") or "") in FANLESS)


class GpuLoad:
    """`core.gpuwatch.Source` of a Mac: how busy its GPU is, as the driver tells without privileges. Written from
    what others read there; not run on a Mac yet."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def look(self, device: str, ours: Sequence[int]) -> Look:
        said = self._facts.run("ioreg", "-rc", "AGXAccelerator", "-d", "1")
        match = re.search(r'"Device Utilization %"\s*=\s*(\d+)', said or "")
        return Look(busy=int(match[1]) / 100) if match else Look(error="ioreg does not tell how busy the GPU is")


THERMAL = ("nominal", "moderate", "heavy", "trapping", "sleeping")
MEMORY = {1: "normal", 2: "warning", 4: "critical"}


def conditions(facts: Facts) -> dict[str, Any]:
    """What slows a Mac down, now: `thermal` and `memory_pressure` as numbers (0 is best), `low_power`, `battery`.

    What the system does not tell is left out.
    """
    found: dict[str, Any] = {}
    level = facts.run("notifyutil", "-g", "com.apple.system.thermalpressurelevel")
    if level and (match := re.search(r"(\d+)\s*$", level)):
        found["thermal"] = int(match[1])
    pressure = facts.run("sysctl", "-n", "kern.memorystatus_vm_pressure_level")
    if pressure and pressure.strip().isdecimal():
        found["memory_pressure"] = int(pressure) - 1
    settings = facts.run("pmset", "-g")
    if settings and (match := re.search(r"^\s*lowpowermode\s+(\d)", settings, re.M)):
        found["low_power"] = match[1] == "1"
    source = facts.run("pmset", "-g", "batt")
    if source and (match := re.search(r"drawing from '(\w+)", source)):
        found["battery"] = match[1] == "Battery"
    return found


def departure(now: Mapping[str, Any], steady: Mapping[str, Any]) -> str:
    """How conditions are worse than the lab's own steady state; "" if they are not.

    A Mac that has been warm since its baseline is comparable with itself: only a change is not.
    """
    for name, words in (("thermal", "the machine is hotter"), ("memory_pressure", "memory is under more pressure")):
        if int(now.get(name, 0)) > int(steady.get(name, 0)):
            scale = THERMAL if name == "thermal" else [MEMORY.get(i + 1, str(i)) for i in range(8)]
            before, after = (scale[min(int(x.get(name, 0)), len(scale) - 1)] for x in (steady, now))
            return f"{words} than at the baseline: {after}, was {before}"
    if now.get("low_power") and not steady.get("low_power"):
        return "low-power mode was switched on since the baseline"
    if now.get("battery") and not steady.get("battery"):
        return "the machine runs on its battery, unlike at the baseline"
    return ""


def _number(pattern: str, text: str | None) -> int:
    match = re.search(pattern, text or "")
    return int(match[1]) if match else 0
