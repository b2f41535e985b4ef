"""Keep the machine from going to sleep while a run is on, by a helper process that ends with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from core.apart import apart

STAYS = 1.0 if sys.platform == "win32" else 0.3  # seconds after which a helper that still runs was not refused
# Windows drops the request when the thread that made it ends, so a small process holds it until its stdin closes.
_WINDOWS = (
    "import ctypes, sys; "
    "ctypes.windll.kernel32.SetThreadExecutionState(0x80000000 | 0x00000001) or sys.exit(1); "
    "sys.stdin.buffer.read()"
)


def command(platform: str = sys.platform, pid: int | None = None) -> tuple[list[str] | None, str]:
    """The helper for this platform, and what to say: what holds sleep off, or why nothing does."""
    if platform == "darwin":
        if shutil.which("caffeinate"):
            return [
                "caffeinate",
                "-i",
                "-s",
                "-w",
                str(pid or os.getpid()),
            ], "sleep is held off (caffeinate); keep the lid open and the plug in"
        return None, "sleep is not held off: caffeinate is missing"
    if platform == "win32":
        return [sys.executable, "-c", _WINDOWS], "sleep is held off (SetThreadExecutionState)"
    if shutil.which("systemd-inhibit") and os.path.isdir("/run/systemd/system"):  # noqa: PTH112
        what = ["--what=sleep:idle", "--who=autoresearch", "--why=experiments are running", "--mode=block"]
        return ["systemd-inhibit", *what, "cat"], "sleep is held off (systemd-inhibit)"
    return None, "sleep is not held off: no systemd here; see that the machine stays awake"


@contextmanager
def awake() -> Iterator[str]:
    """Hold sleep off inside the block; yields one line that says whether it is."""
    argv, says = command()
    if argv is None:
        yield says
        return
    quiet = subprocess.DEVNULL
    try:
        helper = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, **apart())
    except OSError as error:
        yield f"sleep is not held off: {argv[0]}: {error.strerror}"
        return
    try:
        try:
            refused = helper.wait(STAYS)  # it stays as long as all is well
            says = f"sleep is not held off: {argv[0]} ended with status {refused}"
        except subprocess.TimeoutExpired:
            pass
        yield says
    finally:
        if helper.stdin is not None:
            helper.stdin.close()
        helper.terminate()
        helper.wait(5)
