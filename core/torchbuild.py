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
# Minor release of torch -> that of Triton which is guaranteed to work with it: the table in triton-windows' README
# (triton-lang/triton-windows, "3. PyTorch", July 2026), and for 2.14 the one that torch itself asks for on Linux.
TRITON_OF = {(2, 10): (3, 6), (2, 11): (3, 6), (2, 12): (3, 7), (2, 13): (3, 7), (2, 14): (3, 8)}
# Compute capability from which on -> the first Triton that makes a fence between cp.async and each product behind it
FENCED = {(9, 0): (3, 8), (10, 0): (3, 9), (12, 0): (0, 0)}


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


def windows_triton(torch: str) -> str:
    """What pip is asked for beside this torch ("2.11.0+cu128"); "" where no Triton is known to be built for it."""
    triton = TRITON_OF.get(_release(torch))
    return f"triton-windows>={triton[0]}.{triton[1]},<{triton[0]}.{triton[1] + 1}" if triton else ""


def unmatched(torch: str, triton: str) -> str:
    """Why this Triton ("3.8.0.post29") may fail beside this torch; "" where it is the one for it, or nobody knows."""
    if (0, 0) in (_release(torch), _release(triton)):
        return ""
    wanted, told = TRITON_OF.get(_release(torch)), f"triton-windows {triton} does not match torch {torch}"
    if wanted:
        return "" if _release(triton) == wanted else f"{told}, whose Triton is {wanted[0]}.{wanted[1]}"
    matching = [f"{major}.{minor}" for (major, minor), one in TRITON_OF.items() if one == _release(triton)]
    return f"{told}: it is for torch {' and '.join(matching)}" if matching else ""


def unfenced(triton: str, capability: tuple[int, int]) -> str:
    """What this Triton ("3.7.1") leaves out for such a card; "" where it does not, or nobody knows."""
    first = max(((least, made) for least, made in FENCED.items() if least <= capability), default=((0, 0), (0, 0)))[1]
    if _release(triton) == (0, 0) or _release(triton) >= first:
        return ""
    return (
        f"{triton} makes no fence between a copy into shared memory and a product that reads it, which PTX's rules ask "
        f"for (its pull request 9610) and {first[0]}.{first[1]} does; whether this card minds was not seen"
    )


def _release(version: str) -> tuple[int, int]:
    """(2, 14) of "2.14.1+cu130"; (0, 0) where that is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


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
