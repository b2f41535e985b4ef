"""Whether the installed torch can use an NVIDIA card: its build against the card's driver. Imports no torch."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from core.commands import pip_install

# CUDA's major version -> the oldest driver branch that runs it (NVIDIA, "CUDA Compatibility", table of minor versions).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
WHEELS = ((580, "cu130"), (570, "cu128"), (525, "cu126"))  # oldest driver -> PyTorch's index for it, newest first
INDEX = "https://download.pytorch.org/whl"
WINDOWS_TORCH = "torch>=2.14,<2.15"  # what the triton-windows of pyproject.toml's [rtx] is built for


@dataclass(frozen=True)
class TorchBuild:
    """What torch's own version file says; empty strings where it is not installed."""

    version: str = ""  # "2.14.1+cu130"
    cuda: str = ""  # "13.0"; empty for a build without CUDA


@dataclass(frozen=True)
class Problem:
    fact: str
    action: str


def problem(build: TorchBuild, driver: str) -> Problem | None:
    """Why this build cannot use a card with this driver ("570.133.20"), and the command that mends it."""
    branch = int(found.group()) if (found := re.match(r"\d+", driver)) else 0
    if not build.version:
        return Problem("torch is not installed", install(branch))
    if not build.cuda:
        return Problem(f"torch {build.version} is a build without CUDA", install(branch))
    needed = OLDEST_DRIVER.get(int(build.cuda.split(".")[0]), 0)
    if branch and branch < needed:
        fact = f"driver {driver} is too old for torch {build.version}, whose CUDA {build.cuda} needs {needed} or newer"
        return Problem(fact, f"update the driver, or {install(branch)}" if _wheel(branch) else install(branch))
    return None


def install(branch: int) -> str:
    """The command that installs the newest build for a driver branch (0: unknown)."""
    wheel = _wheel(branch) if branch else WHEELS[0][1]
    if not wheel:
        return f"update the driver to {WHEELS[-1][0]} or newer: driver {branch} runs no build of torch that works here"
    torch = WINDOWS_TORCH if sys.platform == "win32" else "torch"
    return pip_install("--force-reinstall", torch, "--index-url", f"{INDEX}/{wheel}")


def _wheel(branch: int) -> str:
    return next((wheel for oldest, wheel in WHEELS if branch >= oldest), "")
