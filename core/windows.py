"""What Windows may do to a night: restart for an update, or let a cloud's client work on the lab's files."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from core.places import synced_by

_RESTART_KEYS = (  # each exists only while a restart is due
    r"SOFTWARE\Microsoft\Windows\CurrentVersion\WindowsUpdate\Auto Update\RebootRequired",
    r"SOFTWARE\Microsoft\Windows\CurrentVersion\Component Based Servicing\RebootPending",
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


def warnings(folder: Path, environ: Mapping[str, str]) -> list[str]:
    """What to say before a night in this lab, one line each; also on other systems, which have such clients too."""
    found = []
    if restart_pending():
        found.append("Windows waits for a restart to finish an update, and may do it tonight: restart first")
    if name := synced_by(folder, environ):
        found.append(f"{folder} is synchronised by {name}, which locks files while it copies them: move the lab")
    return found
