"""What a score was measured with. When it changes, the best is measured again before the next verdict."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import hardware, locks
from core.caches import kernels_tag
from core.facts import nvidia_driver
from core.paths import project_root
from core.settings import Settings

# Modules of core that cannot change a number. All others count, so that a new one is not forgotten.
NOT_MEASURING = frozenset(
    {
        *("attacks", "doctor", "documents", "errors", "facts", "files", "gitstore", "gpuwatch", "guard", "hardware"),
        *("hub", "nvml", "places", "torchbuild", "wddm", "windows", "apart", "commands"),
        *("keeping", "lab", "ledger", "live", "locks", "loop", "paths", "recipe", "recovery", "selfcheck"),
        "selfcheck_windows",
        *("verdict", "versions", "deciding", "measuring", "schema", "session"),
        *("ablation", "confirming", "database", "discovery", "effects", "evidence", "finalizing"),
        *("noise", "runs", "sequential", "size", "steady"),
        *("gap", "idle", "objections", "reapply", "rebase", "thinking", "waiting"),
    }
)
LIBRARIES = ("torch", "mlx", "triton", "triton-windows", "numpy")
ON_CARDS = ("flash-attn-3", "flash-attn-4", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


def versions(settings: Settings, root: Path | None = None) -> dict[str, Any]:
    """Code hash, libraries, interpreter, OS, driver, device and card or processor, as JSON. Loads no library for it.

    A card is one by its name: in a rented machine, or by another CUDA_VISIBLE_DEVICES, "cuda:0" may be a faster one
    than yesterday, and what it trains in a budget is no gain of a recipe. So is a processor, with the cores of it that
    may be used.
    """
    on_card = settings.device.startswith("cuda")
    index = locks.cuda_index(settings.device)
    names = (*LIBRARIES, *(ON_CARDS if on_card else ()))
    return {
        "code": code_hash(root or project_root(), settings.backend),
        **({"kernels": kernels_tag(root)} if on_card else {}),
        **({"card": locks.cuda_name(index) or None} if index is not None else {"processor": hardware.processor()}),
        **{name: version for name in names if (version := _installed(name)) is not None},
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "driver": _driver(settings.device),
        "device": settings.device,
        "dtype": settings.dtype,
    }


def code_hash(root: Path, backend: str) -> str:
    """16 hex digits over the code that a score depends on."""
    files = [f for f in sorted((root / "core").glob("*.py")) if f.stem not in NOT_MEASURING]
    files += [root / "backends" / "worker.py", root / "backends" / backend / "device.py"]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:16]


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """ "torch 2.9.0 -> 2.10.0", one for each difference."""
    names = sorted({*before, *after})
    return [f"{n} {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver(
    device: str,
    read: Callable[[Path], str] = lambda path: path.read_text(),
    ask: Callable[[], str | None] = nvidia_driver,
) -> str | None:
    """The NVIDIA driver's version; None without one. Where its module is not Linux' own (Windows, WSL2) it is asked,
    which takes longer, and so for its own devices only."""
    try:
        return read(Path("/sys/module/nvidia/version")).strip()
    except OSError:
        return ask() if device.startswith("cuda") else None
