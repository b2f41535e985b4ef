"""Files of a page, written together: all of them are new, or those that were there stay as they were."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from console.words import size
from core.errors import UserError

ROOM = 16 * 2**20  # bytes that a page and its pictures may need


def write_files(make: Callable[[], Mapping[str, bytes]], folder: Path) -> list[Path]:
    """Their paths. `make` is called once it is known that there is room.

    Raises `UserError` where the folder cannot be made or written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < ROOM:
            raise UserError(
                f"{folder} has {size(free)} left, a page may need {size(ROOM)}",
                "free some, or name another folder",
            )
        return _replaced(make(), folder)
    except OSError as error:
        why = "no space is left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        raise UserError(f"the page cannot be written to {folder}: {why}", "name another folder") from error


def _replaced(files: Mapping[str, bytes], folder: Path) -> list[Path]:
    """All are written beside their places before the first is moved."""
    written = [(folder / f".{name}.part", folder / name) for name in files]
    try:
        for (beside, _), content in zip(written, files.values(), strict=True):
            beside.write_bytes(content)
        for beside, place in written:
            beside.replace(place)
    finally:
        for beside, _ in written:
            beside.unlink(missing_ok=True)
    return [place for _, place in written]


def replace_text(path: Path, text: str) -> None:
    """One file, whole or not at all. UserError where it cannot be written."""
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        why = "no space is left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        raise UserError(f"{path} cannot be written: {why}", "name another file") from error
