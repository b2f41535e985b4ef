"""Joules of some work, where the machine tells: NVML for a card, RAPL for a processor, powermetrics on macOS."""

from __future__ import annotations

import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
EVERY_MS = 250  # between two samples of powermetrics


@dataclass(frozen=True)
class Counter:
    """A counter that only rises."""

    joules: Callable[[], float]
    source: str


class Meter:
    """`start()`, the work, `stop()` -> JSON: joules (None where not told), seconds, source. As often as one likes."""

    def __init__(self, device: str, powercap: Path = POWERCAP) -> None:
        self._counter, self._why = find(device, powercap)
        self._sampler: subprocess.Popen[str] | None = None
        self._before = self._began = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()
        if self._counter:
            self._before = self._counter.joules()
        elif sys.platform == "darwin":
            self._sampler = _powermetrics()

    def stop(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._began
        joules, source = None, self._why
        if self._counter:
            joules, source = self._counter.joules() - self._before, self._counter.source
        elif self._sampler is not None:
            watts, source = _sampled(self._sampler)
            joules = watts * seconds if watts is not None else None
        if joules is not None and joules <= 0:  # a counter that stands still, or has run over
            joules, source = None, f"not told: {source} did not move"
        return {"joules": joules, "seconds": seconds, "source": source}


def find(device: str, powercap: Path) -> tuple[Counter | None, str]:
    """The counter of this device, or why there is none."""
    if device.startswith("cuda"):
        return _nvml(int(device.partition(":")[2] or 0))
    if sys.platform == "darwin":
        return None, "not told: powermetrics needs root (sudo autoresearch bench)"
    return rapl(powercap)


# --- processors --------------------------------------------------------------------------------


def rapl(powercap: Path) -> tuple[Counter | None, str]:
    """The packages' counters: intel-rapl:N, which AMD's driver has too. Only root may read them on most systems."""
    zones = sorted(p for p in powercap.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", p.name))
    if not zones:
        return None, "not told: this machine has no RAPL counter"
    try:
        names = [(zone / "name").read_text().strip() for zone in zones]
        ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        _microjoules(zones)
    except (OSError, ValueError):
        return None, "not told: the RAPL counters are for root only"
    last, total = _microjoules(zones), [0] * len(zones)

    def joules() -> float:
        nonlocal last
        now = _microjoules(zones)
        for i, (a, b, full) in enumerate(zip(last, now, ranges, strict=True)):
            total[i] += b - a if b >= a else b - a + full
        last = now
        return sum(total) / 1e6

    return Counter(joules, f"RAPL: {', '.join(names)}, the whole of it"), ""


def _microjoules(zones: list[Path]) -> list[int]:
    return [int((zone / "energy_uj").read_text()) for zone in zones]


# --- cards -------------------------------------------------------------------------------------


def _nvml(index: int) -> tuple[Counter | None, str]:
    """The card's own counter, from Volta on."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return None, "not told: nvidia-ml-py is not installed"
    from core.nvml import cuda_uuid

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(cuda_uuid(index))
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return None, f"not told: NVML: {error}"
    return Counter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, "NVML: the whole card"), ""


# --- Macs --------------------------------------------------------------------------------------


def _powermetrics() -> subprocess.Popen[str] | None:
    command = ["sudo", "-n", "powermetrics", "--samplers", "cpu_power", "-i", str(EVERY_MS)]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _sampled(sampler: subprocess.Popen[str]) -> tuple[float | None, str]:
    with suppress(OSError):
        sampler.send_signal(signal.SIGINT)
    try:
        text, _ = sampler.communicate(timeout=5.0)
    except subprocess.TimeoutExpired:
        sampler.kill()
        text, _ = sampler.communicate()
    watts = combined_watts(text)
    if watts is None:
        return None, "not told: powermetrics needs root (sudo autoresearch bench)"
    return watts, "powermetrics: CPU, GPU and ANE together"


def combined_watts(text: str) -> float | None:
    """Mean of what powermetrics prints as "Combined Power (CPU + GPU + ANE): 12345 mW"."""
    found = re.findall(r"^Combined Power[^:]*:\s*([\d.]+)\s*mW", text, re.MULTILINE)
    return statistics.fmean(map(float, found)) / 1e3 if found else None
