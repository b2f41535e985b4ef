"""Whether the installed torch can use an NVIDIA card: its build against the card's driver. Imports no torch."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from core.commands import pip_install

# CUDA's major version -> the oldest driver branch that runs it (NVIDIA, "CUDA Compatibility", table of minor versions).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
BLACKWELL = (10, 0)  # compute capability for which CUDA before 12.8 makes no code
BLACKWELL_CUDA = (12, 8)
# Oldest driver -> PyTorch's index for it, and whether its builds have code for Blackwell; newest first. None lies
# between the two: cu128 has no torch since 2.12.
WHEELS = ((580, "cu130", True), (525, "cu126", False))
INDEX = "https://download.pytorch.org/whl"
# Both as pyproject.toml's [rtx] has them: Triton is built for one release of torch.
WINDOWS_TORCH, WINDOWS_TRITON = "torch>=2.14,<2.15", "triton-windows>=3.8,<3.9"


@dataclass(frozen=True)
class TorchBuild:
    """What torch's own version file says; empty strings where it is not installed."""

    version: str = ""  # "2.14.1+cu130"
    cuda: str = ""  # "13.0"; empty for a build without CUDA


@dataclass(frozen=True)
class Problem:
    fact: str
    action: str


def problem(build: TorchBuild, driver: str, capability: tuple[int, int] = (0, 0)) -> Problem | None:
    """Why this build cannot use a card of this compute capability (0.0: unknown) with this driver ("570.133.20"), and
    the command that mends it."""
    branch = branch_of(driver)
    mend = install(branch, capability)
    if not build.version:
        return Problem("torch is not installed", mend)
    if not build.cuda:
        return Problem(f"torch {build.version} is a build without CUDA", mend)
    cuda = tuple(int(n) for n in re.findall(r"\d+", build.cuda)[:2])
    needed = OLDEST_DRIVER.get(cuda[0], 0)
    if branch and branch < needed:
        fact = f"driver {driver} is too old for torch {build.version}, whose CUDA {build.cuda} needs {needed} or newer"
        return Problem(fact, f"update the driver, or {mend}" if _wheel(branch, capability) else mend)
    if capability >= BLACKWELL and cuda < BLACKWELL_CUDA:
        named = f"compute capability {capability[0]}.{capability[1]}"
        return Problem(f"torch {build.version} has no code for {named}: its CUDA {build.cuda} is older", mend)
    return None


def branch_of(driver: str) -> int:
    """570 of "570.133.20"; 0: unknown."""
    return int(found.group()) if (found := re.match(r"\d+", driver)) else 0


def install(branch: int, capability: tuple[int, int] = (0, 0)) -> str:
    """The command that installs the newest build for a driver branch (0: unknown) and a card."""
    wheel = _wheel(branch, capability) if branch else WHEELS[0][1]
    if not wheel:
        oldest = min(driver for driver, _, blackwell in WHEELS if blackwell or capability < BLACKWELL)
        card = "with this card " if capability >= BLACKWELL else ""
        return f"update the driver to {oldest} or newer: {card}driver {branch} runs no build of torch that works here"
    torch = WINDOWS_TORCH if sys.platform == "win32" else "torch"
    return pip_install("--force-reinstall", torch, "--index-url", f"{INDEX}/{wheel}")


def _wheel(branch: int, capability: tuple[int, int]) -> str:
    fitting = (w for oldest, w, blackwell in WHEELS if branch >= oldest and (blackwell or capability < BLACKWELL))
    return next(fitting, "")
