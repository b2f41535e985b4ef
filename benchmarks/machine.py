"""This machine as a result tells it: hardware and software, no names of users, hosts or folders."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Iterable

from benchmarks.results import Accelerator, Machine
from core.doctor import redact
from core.hardware import Hardware
from core.paths import project_root

LIBRARIES = ("autoresearch", "torch", "mlx", "triton", "numpy")
FOLDERS = re.compile(r"(?<![\w<./\\])(?:[A-Za-z]:)?(?:[\\/][^\s'\":,;()\\/]+)+[\\/](?=[^\s'\":,;()\\/]+)")
MEASURING = ("benchmarks/side.py", "benchmarks/work.py", "backends/reference.py", "backends/worker.py")


def anonymous(text: str) -> str:
    """A message as a result may hold it: no folders, no names of users and hosts, no keys."""
    return redact(FOLDERS.sub("", text))


def fingerprint(hardware: Hardware, backends: Iterable[str]) -> Machine:
    cards = [Accelerator(gpu.name, gpu.memory, gpu.arch) for gpu in hardware.gpus]
    if hardware.chip:
        cards = [Accelerator(hardware.chip, hardware.memory, "Apple GPU, unified memory")]
    return Machine(
        label=anonymous(hardware.summary()),
        os=hardware.os,
        release=anonymous(hardware.release),
        machine=hardware.machine,
        cpu=hardware.cpu,
        flags=list(hardware.flags),
        cores=hardware.cores,
        threads=hardware.threads,
        memory=hardware.memory,
        accelerators=cards,
        container=hardware.container,
        wsl=hardware.wsl,
        software=_software(hardware),
        code=code(backends),
    )


def _software(hardware: Hardware) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if hardware.gpus and hardware.gpus[0].driver:
        found["driver"] = str(hardware.gpus[0].driver)
    return found


def code(backends: Iterable[str]) -> str:
    """16 hex digits over what was run: recipes, devices, kernels and what measures them."""
    root = project_root()
    files = [root / name for name in MEASURING] + sorted((root / "kernels").glob("*.py"))
    files += [root / "backends" / b / name for b in sorted(set(backends)) for name in ("train.py", "device.py")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0")
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:16]
