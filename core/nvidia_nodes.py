"""The device node of CUDA's memory, which a card that nobody has used since the start of the machine does not have.

`/dev/nvidia-uvm` is made by nvidia-modprobe, a setuid program that libcuda starts. In the sandbox no program gets its
privileges, so it is started here, before the first child.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from core.errors import UserError

MODPROBE = ("nvidia-modprobe", "-c", "0", "-u")
SECONDS = 30.0  # a driver that has to load its firmware takes some
BY_HAND = f"run: sudo {' '.join(MODPROBE)}"


def missing(dev: Path = Path("/dev")) -> bool:
    """Whether NVIDIA's driver is there, and its node for CUDA's memory is not."""
    return (dev / "nvidiactl").exists() and not (dev / "nvidia-uvm").exists()


def make(dev: Path = Path("/dev")) -> None:
    """Make it where it is missing. UserError with the command that does, where we cannot."""
    if not missing(dev):
        return
    fact = f"{dev / 'nvidia-uvm'}, which CUDA needs, is missing"
    program = shutil.which(MODPROBE[0])
    if program is None:
        raise UserError(f"{fact}, and {MODPROBE[0]} was not found", f"install it (it is NVIDIA's), then {BY_HAND}")
    try:
        done = subprocess.run(
            [program, *MODPROBE[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        why = f"took more than {SECONDS:g} s" if isinstance(problem, subprocess.TimeoutExpired) else str(problem)
        raise UserError(f"{fact}, and {MODPROBE[0]} {why}", BY_HAND) from None
    if missing(dev):
        said = " ".join((done.stderr or done.stdout).split())[:200] or f"exit status {done.returncode}"
        raise UserError(f"{fact}, and {MODPROBE[0]} did not make it: {said}", BY_HAND)
