"""Raw facts about this machine, through one small interface, so that tests can present any other machine.

Nothing here interprets: `core.hardware` does. No torch, no mlx; every method is cheap (a few milliseconds).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

from core import windows
from core.torchbuild import TorchBuild


class GpuProblem(Exception):
    """The NVIDIA driver is missing or does not answer; the message says which."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA device as the driver lists it. Memory in bytes."""

    index: int  # in the driver's (PCI) order
    name: str
    uuid: str  # "GPU-…" or "MIG-…"
    memory: int
    memory_free: int = 0
    capability: tuple[int, int] = (0, 0)  # CUDA compute capability
    driver: str = ""
    processes: int = 0  # compute processes of others on it; 0 also where the driver does not tell
    display: bool = False  # a monitor hangs on it; False also where the driver does not tell
    product: int = 0  # PCI's device id (0x1F11), which tells cards of one name apart; 0: the driver does not say
    parts: tuple[Gpu, ...] = field(default=())  # MIG instances, if MIG is on
    lost: tuple[str, ...] = ()  # cards beside it that the driver counts and that do not answer: "card 1 of 2 (why)"

    @property
    def arch(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Power:
    """Mains or battery. None: no battery, or unknown."""

    plugged: bool | None = None
    percent: float | None = None


class Facts(Protocol):
    """What can be asked of a machine. A missing file or command is None, never an exception."""

    def system(self) -> tuple[str, str, str]:
        """("Linux" | "Darwin" | "Windows", release, machine)."""

    def environ(self) -> Mapping[str, str]: ...

    def read(self, path: str) -> str | None:
        """Text of a small file such as /proc/cpuinfo."""

    def listdir(self, path: str) -> Sequence[str]: ...

    def pci_devices(self) -> Sequence[str]:
        """Of Windows' registry, "VEN_10DE&DEV_2484&..." each; none on other systems."""

    def run(self, *argv: str) -> str | None:
        """Standard output of a command, stripped."""

    def cpus(self) -> Sequence[int]:
        """Ids of the logical processors that this process may use."""

    def cores(self) -> tuple[int, int]:
        """(physical, logical) processors of the machine; 0: unknown."""

    def memory(self) -> tuple[int, int]:
        """(total, available) bytes of the machine."""

    def disk_free(self, path: str) -> int:
        """Free bytes on the file system that holds `path` or its nearest existing parent; 0: unknown."""

    def power(self) -> Power: ...

    def installed(self, module: str) -> bool:
        """Whether a Python module could be imported; it is not."""

    def torch(self) -> TorchBuild:
        """The installed torch by its version file; it is not imported."""

    def nvidia(self) -> Sequence[Gpu]:
        """All NVIDIA devices, whatever CUDA_VISIBLE_DEVICES says. Raises GpuProblem."""


class LocalFacts:
    """The machine that this runs on."""

    def system(self) -> tuple[str, str, str]:
        return platform.system(), platform.release(), platform.machine()

    def environ(self) -> Mapping[str, str]:
        return os.environ

    def read(self, path: str) -> str | None:
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def listdir(self, path: str) -> Sequence[str]:
        try:
            return sorted(os.listdir(path))  # noqa: PTH208 - names only
        except OSError:
            return []

    def pci_devices(self) -> Sequence[str]:
        return windows.pci_devices()

    def run(self, *argv: str) -> str | None:
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=10, errors="replace", check=False)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    def cpus(self) -> Sequence[int]:
        if hasattr(os, "sched_getaffinity"):
            return sorted(os.sched_getaffinity(0))
        return range(os.cpu_count() or 1)

    def cores(self) -> tuple[int, int]:
        return psutil.cpu_count(logical=False) or 0, os.cpu_count() or 0

    def memory(self) -> tuple[int, int]:
        now = psutil.virtual_memory()
        return now.total, now.available

    def disk_free(self, path: str) -> int:
        place = Path(path).absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        try:
            return shutil.disk_usage(place).free
        except OSError:
            return 0

    def power(self) -> Power:
        try:
            battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        except (OSError, RuntimeError):  # psutil on machines whose power supply files are odd
            return Power()
        return Power() if battery is None else Power(battery.power_plugged, battery.percent)

    def installed(self, module: str) -> bool:
        return importlib.util.find_spec(module) is not None

    def torch(self) -> TorchBuild:
        spec = importlib.util.find_spec("torch")
        text = self.read(str(Path(spec.origin).with_name("version.py"))) if spec and spec.origin else None
        values = dict(re.findall(r"^(__version__|cuda)\b[^=\n]*= *'([^']*)'", text or "", re.MULTILINE))
        return TorchBuild(values.get("__version__", ""), values.get("cuda", ""))

    def nvidia(self) -> Sequence[Gpu]:
        return _nvml()


def nvidia_driver() -> str | None:
    """The driver's version as it says itself, on every system; None where it does not answer."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return text_of(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _nvml() -> list[Gpu]:
    try:
        import pynvml
    except ImportError:
        raise GpuProblem("the package nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise GpuProblem(str(error)) from None
    try:
        driver = text_of(pynvml.nvmlSystemGetDriverVersion())
        return _devices(pynvml, driver)
    except pynvml.NVMLError as error:
        raise GpuProblem(str(error)) from None
    finally:
        pynvml.nvmlShutdown()


def _devices(nvml: Any, driver: str) -> list[Gpu]:
    """Those that answer, each naming the others: an eGPU that was pulled out must not hide the card in the machine."""
    found: list[Gpu] = []
    lost: list[str] = []
    count = nvml.nvmlDeviceGetCount()
    for index in range(count):
        try:
            found.append(_device(nvml, index, driver))
        except nvml.NVMLError as error:
            lost.append(f"card {index} of {count} ({error})")
    if lost and not found:
        raise GpuProblem(", ".join(lost))
    return [replace(gpu, lost=tuple(lost)) for gpu in found]


def _device(nvml: Any, index: int, driver: str) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    total, free = _memory(nvml, handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    capability = (int(major), int(minor))
    return Gpu(
        index=index,
        name=text_of(nvml.nvmlDeviceGetName(handle)),
        uuid=text_of(nvml.nvmlDeviceGetUUID(handle)),
        memory=total,
        memory_free=free,
        capability=capability,
        driver=driver,
        processes=_processes(nvml, handle),
        display=_display(nvml, handle),
        product=product(nvml, handle),
        parts=_parts(nvml, handle, index, capability, driver),
    )


def refusals(nvml: Any) -> tuple[type[Exception], ...]:
    """What pynvml raises where a card, driver or system does not tell something. For processes, of which drivers before
    R510 do not tell, it has an error that is no NVMLError; older releases of it have no such error."""
    return nvml.NVMLError, getattr(nvml, "NVMLLibraryMismatchError", nvml.NVMLError)


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """Bytes of a card, and those that are free: the machine's where it shares them (GB10), of which NVML tells none."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except getattr(nvml, "NVMLError_NotSupported", ()):
        shared = psutil.virtual_memory()
        return shared.total, shared.available
    return int(memory.total), int(memory.free)


def product(nvml: Any, handle: Any) -> int:
    """PCI's device id of a card, NVIDIA's own number of the product; 0 where it is not told."""
    try:
        return int(nvml.nvmlDeviceGetPciInfo(handle).pciDeviceId) >> 16  # above the vendor's, 0x10DE
    except refusals(nvml):
        return 0


def _processes(nvml: Any, handle: Any) -> int:
    try:
        found = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except refusals(nvml):  # in some containers and under WSL, too
        return 0
    if all(p.usedGpuMemory is None for p in found):  # WDDM, which lists the desktop's programs among them
        return 0
    return sum(p.pid != os.getpid() for p in found)


def _display(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetDisplayActive(handle))
    except nvml.NVMLError:  # not told under WSL
        return False


def _parts(nvml: Any, handle: Any, index: int, capability: tuple[int, int], driver: str) -> tuple[Gpu, ...]:
    try:
        on, _ = nvml.nvmlDeviceGetMigMode(handle)
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle) if on else 0
    except nvml.NVMLError:  # a card without MIG
        return ()
    found = []
    for i in range(count):
        try:
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i)
            memory = nvml.nvmlDeviceGetMemoryInfo(part)
            name, uuid = text_of(nvml.nvmlDeviceGetName(part)), text_of(nvml.nvmlDeviceGetUUID(part))
        except nvml.NVMLError:  # a slot that holds no instance
            continue
        found.append(Gpu(index, name, uuid, int(memory.total), int(memory.free), capability, driver))
    return tuple(found)


def text_of(value: str | bytes) -> str:
    """Of NVML's answers, which are bytes in some versions."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
