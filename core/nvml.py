"""Looks at an NVIDIA card through NVML, for `core.gpuwatch`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psutil

from core.facts import LocalFacts, Power, product, refusals, text_of
from core.gpuwatch import Look, is_laptop
from core.locks import cuda_uuid
from core.wddm import Users

# NVML's reasons for a lower clock that make steps slower than they were: heat, a power brake. Being idle is none.
# Nor is 0x20, by which the driver of a laptop holds its card at the temperature that it has all night.
_HELD_BACK = 0x08 | 0x40 | 0x80


class Nvml:
    """`core.gpuwatch.Source` of this machine."""

    def __init__(self, users: Users | None = None) -> None:
        """`users`: who else uses the card where the driver does not tell; by default Windows, where this is Windows."""
        self._users = Users() if users is None and sys.platform == "win32" else users
        self._battery = LocalFacts().power() != Power()
        self._uuids: dict[str, str] = {}
        self._seen = 0  # microseconds: samples of processes up to here were read
        self._opened = False

    def look(self, device: str, ours: Sequence[int]) -> Look:
        try:
            import pynvml
        except ImportError:
            return Look(error="the package nvidia-ml-py is not installed")
        try:
            self._open(pynvml)
            uuid = self._uuid(device)
            if not uuid:
                return Look(error=f"no card was found for {device}")
            return self._read(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid), ours)
        except pynvml.NVMLError as error:
            self._close(pynvml)  # a driver that was renewed has to be opened anew
            return Look(error=str(error))

    def _open(self, nvml: Any) -> None:
        """Once for all looks: to search for a card by its UUID may start others, which end with the last that asks."""
        if not self._opened:
            nvml.nvmlInit()
            self._opened = True

    def _close(self, nvml: Any) -> None:
        if self._opened:
            self._opened = False
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    def _uuid(self, device: str) -> str:
        """The card that "cuda:1" stands for, as CUDA counts; looked up until it is found, as a card may come back."""
        if not self._uuids.get(device):
            index = device.partition(":")[2]
            self._uuids[device] = cuda_uuid(int(index or 0))
        return self._uuids[device]

    def _read(self, nvml: Any, handle: Any, ours: Sequence[int]) -> Look:
        def ask(name: str, *arguments: Any) -> Any:
            try:
                return getattr(nvml, name)(handle, *arguments)
            except refusals(nvml):
                return None

        rates, memory = ask("nvmlDeviceGetUtilizationRates"), ask("nvmlDeviceGetMemoryInfo")
        limit, reasons = ask("nvmlDeviceGetEnforcedPowerLimit"), ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        others, untold = self._others_share(ask, ours)
        return Look(
            busy=rates.gpu / 100 if rates else None,
            others_busy=others,
            used=int(memory.used) if memory else None,
            ours=_bytes_of(ask("nvmlDeviceGetComputeRunningProcesses"), ours),
            free=int(memory.free) if memory else None,
            clock=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            clock_most=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
            temperature=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            power_limit=limit / 1000 if limit else None,
            laptop=is_laptop(text_of(ask("nvmlDeviceGetName") or ""), product(nvml, handle), self._battery),
            slowed=bool(reasons and reasons & _HELD_BACK),
            untold=untold,
        )

    def _others_share(self, ask: Callable[..., Any], ours: Sequence[int]) -> tuple[float | None, str]:
        """What others use of the card (None: not told), and why it is not known.

        Windows schedules the card itself, so it is asked before NVML, which may answer there and know of some programs
        only. Without a process of ours it cannot say which card is meant: then all that is busy is others'."""
        if self._users is None:
            return self._others(ask, ours)
        if not ours:
            return None, ""
        share = self._users.others_busy({os.getpid(), *ours})
        return (self._others(ask, ours)[0] if share is None else share), self._users.problem

    def _others(self, ask: Callable[..., Any], ours: Sequence[int]) -> tuple[float | None, str]:
        """Share of the card that other processes used since the last look, None where processes are not told apart; and
        why they are not where the driver names some."""
        since = max(self._seen, int((time.time() - 5) * 1e6))  # older samples are of what has ended
        samples = ask("nvmlDeviceGetProcessUtilization", since)
        if samples is None:
            return None, ""
        # Some drivers give older samples than those asked for, and shares above 100 % (Syllo/nvtop #110).
        samples = [s for s in samples if int(s.timeStamp) > since and int(s.smUtil) <= 100]
        self._seen = max([since, *(int(s.timeStamp) for s in samples)])
        mine = {os.getpid(), *ours}
        known = ours or [s.pid for s in samples if psutil.pid_exists(s.pid)]
        if samples and not any(s.pid in known for s in samples):
            return None, "in a container the driver numbers processes as its host does: whose work it is cannot be told"
        share = {s.pid: int(s.smUtil) for s in samples if s.pid not in mine and psutil.pid_exists(s.pid)}
        return min(1.0, sum(share.values()) / 100), ""


def _bytes_of(processes: Any, ours: Sequence[int]) -> int | None:
    """Bytes of our processes on the card; None where the driver tells none of them (WDDM, WSL2, some containers)."""
    if processes is None:
        return None
    mine = [p.usedGpuMemory for p in processes if p.pid in ours]
    return (sum(mine) or None) if mine and all(isinstance(m, int) for m in mine) else None
