"""Keep the machine from going to sleep while a run is on, by a helper process that ends with it."""

from __future__ import annotations

import base64
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from core.apart import apart
from core.windows import STAY_AWAKE_BY_HAND, under_wsl, windows_powershell

STAYS = 1.0 if sys.platform == "win32" else 0.3  # seconds after which a helper that still runs was not refused
ANSWERS = 20.0  # seconds in which PowerShell starts, on a busy machine
# Windows drops the request when the thread that made it ends, so a small process holds it until its stdin closes.
_WINDOWS = (
    "import ctypes, sys; "
    "ctypes.windll.kernel32.SetThreadExecutionState(0x80000000 | 0x00000001) or sys.exit(1); "
    "sys.stdin.buffer.read()"
)
# The same from WSL2, whose own inhibitors Windows knows nothing of. PowerShell takes seconds to start: it says when.
_FROM_WSL = (
    "$k = Add-Type -PassThru -Name K -Namespace A -MemberDefinition "
    "'[DllImport(\"kernel32.dll\")] public static extern uint SetThreadExecutionState(uint s);'; "
    "if ($k::SetThreadExecutionState(2147483649) -eq 0) { exit 1 }; "
    "[Console]::Out.WriteLine('held'); [void][Console]::In.ReadToEnd()"
)
ENCODED = "-EncodedCommand"


def command(
    platform: str = sys.platform, pid: int | None = None, wsl: bool | None = None
) -> tuple[list[str] | None, str]:
    """The helper for this platform, and what to say: what holds sleep off, or why nothing does."""
    if under_wsl() if wsl is None else wsl:
        shell = windows_powershell()
        if shell is None:
            return None, f"sleep is not held off: Windows cannot be asked from here; {STAY_AWAKE_BY_HAND}"
        script = base64.b64encode(_FROM_WSL.encode("utf-16-le")).decode()  # no quotes that two systems would read
        return [shell, "-NoProfile", "-NonInteractive", ENCODED, script], "Windows is asked to stay awake"
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
    answer = subprocess.PIPE if ENCODED in argv else quiet
    try:
        helper = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=answer, stderr=quiet, **apart())
    except OSError as error:
        yield f"sleep is not held off: {argv[0]}: {error.strerror}"
        return
    try:
        yield _refused(helper, argv[0]) or says
    finally:
        if helper.stdin is not None:
            helper.stdin.close()
        helper.terminate()
        helper.wait(5)
        if helper.stdout is not None:
            helper.stdout.close()


def _refused(helper: subprocess.Popen[bytes], name: str) -> str:
    """Why sleep is not held off; "" if it is. A helper stays as long as all is well; PowerShell's says so, too."""
    if helper.stdout is not None:
        if select.select([helper.stdout], [], [], ANSWERS)[0] and helper.stdout.readline().strip() == b"held":
            return ""
        return f"sleep is not held off: Windows' PowerShell did not do it; {STAY_AWAKE_BY_HAND}"
    try:
        return f"sleep is not held off: {name} ended with status {helper.wait(STAYS)}"
    except subprocess.TimeoutExpired:
        return ""
