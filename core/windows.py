"""What is asked of Windows alone: its libraries, its devices, how long it was awake, and what it may do to a night:
restart for an update, or let a cloud's client work on the lab's files."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.places import synced_by

_RESTART_KEYS = (  # each exists only while a restart is due
    r"SOFTWARE\Microsoft\Windows\CurrentVersion\WindowsUpdate\Auto Update\RebootRequired",
    r"SOFTWARE\Microsoft\Windows\CurrentVersion\Component Based Servicing\RebootPending",
)


_DEVICES = re.compile(
    r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|COM[0-9\xb9\xb2\xb3]|LPT[0-9\xb9\xb2\xb3])(\.|$)", re.IGNORECASE
)


def unusable_name(path: Path) -> str:
    """The first name in a path that Windows takes for something else than a file or folder: a device (`con`), another
    stream of one (`x:y`), a pattern, a name that ends in a space or a dot. "" where all are good."""
    names = re.split(r"[\\/]+", re.sub(r"^[A-Za-z]:", "", str(path)))
    plain = [name for name in names if name not in ("", ".", "..")]
    return next((n for n in plain if _DEVICES.match(n) or set(n) & set('<>:"|?*') or n[-1] in " ."), "")


def under_wsl(release: str | None = None) -> bool:
    """Whether this is Linux inside Windows (WSL2), by the kernel's release, by default the one that runs."""
    return "microsoft" in (platform.release() if release is None else release).lower()


STAY_AWAKE_BY_HAND = "in Windows: powercfg /change standby-timeout-ac 0"


def windows_powershell() -> str | None:
    """Windows' own PowerShell as WSL2 sees it, also where Windows' PATH is not added to ours."""
    return shutil.which("powershell.exe") or shutil.which(
        "/mnt/c/Windows/System32/WindowsPowerShell/v1.0/powershell.exe"
    )


def restart_pending() -> bool:
    """Whether an installed update waits for a restart. False on other systems, and where it cannot be read."""
    if sys.platform != "win32":
        return False
    import winreg

    for name in _RESTART_KEYS:
        try:
            winreg.CloseKey(winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, name))
        except OSError:  # no such key
            continue
        return True
    return False


def long_paths() -> bool:
    """Whether programs may use paths of more than 260 characters, as compile caches have them; elsewhere always."""
    if sys.platform != "win32":
        return True
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key:
            return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
    except OSError:
        return False


def pci_devices() -> list[str]:
    """ "VEN_10DE&DEV_2484&...", one for each kind of PCI device that Windows has met; [] on other systems."""
    if sys.platform != "win32":
        return []
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Enum\PCI") as key:
            return [winreg.EnumKey(key, index) for index in range(winreg.QueryInfoKey(key)[0])]
    except OSError:  # a virtual machine may have no such bus
        return []


def awake_seconds() -> float:
    """How long Windows has been awake since its start: what it slept does not count."""
    ticks = ctypes.c_ulonglong()  # of 100 ns
    library("kernel32").QueryUnbiasedInterruptTime(ctypes.byref(ticks))
    return ticks.value / 1e7


def library(name: str) -> Any:
    return getattr(ctypes, "WinDLL")(name, use_last_error=True)  # noqa: B009 - exists on Windows only


def warnings(folder: Path, environ: Mapping[str, str]) -> list[str]:
    """What to say before a night in this lab, one line each; also on other systems, which have such clients too."""
    found = []
    if restart_pending():
        found.append("Windows waits for a restart to finish an update, and may do it tonight: restart first")
    if name := synced_by(folder, environ):
        found.append(f"{folder} is synchronised by {name}, which locks files while it copies them: move the lab")
    return found
