"""Files that are replaced as a whole and are on disk when the call returns."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

REPARSE_POINT = 0x400  # FILE_ATTRIBUTE_REPARSE_POINT


def replace_file(path: Path, content: bytes) -> None:
    """`path` holds either what it held or `content`, whatever happens, a power cut too. Makes missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace_open(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace_open(source: Path, target: Path, patience: float = 2.0) -> None:
    """`source` becomes `target`. Windows refuses while somebody reads the target: it is tried again for a while."""
    deadline = time.monotonic() + patience
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def move_into_place(made: Path, path: Path, last: str) -> None:
    """A folder, as a whole; into a folder that is there (somebody may stand in it) entry by entry, the one named `last`
    at the end. One that is a mount point (a container's volume) is on another file system, to which nothing can be
    moved: it gets a copy first."""
    if not path.exists():
        replace_open(made, path)
        sync_folder(path.parent)
        return
    try:
        _move_entries(made, path, last)
    except OSError as error:
        if error.errno != errno.EXDEV:  # the first of them tells
            raise
        copy = path / made.name
        try:
            shutil.copytree(made, copy, symlinks=True)
            _move_entries(copy, path, last)
        finally:
            remove(copy)
    remove(made)
    sync_folder(path)


def _move_entries(folder: Path, target: Path, last: str) -> None:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == last):
        replace_open(entry, target / entry.name)


def remove_unfinished(folder: Path, *names: str) -> None:
    """What `replace_file` left beside these files when it was killed."""
    for name in names:
        for path in folder.glob(f".{name}.*.tmp"):
            if path.name[len(name) + 2 : -4].isdecimal():  # the pid
                path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk, where the system knows how."""
    if sys.platform == "win32":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """A file, a link or a whole folder, whatever its permissions are; nothing where nothing is. What cannot be removed
    from a folder stays there unsaid."""
    if not path.is_dir() or is_link(path):
        path.unlink(missing_ok=True)
        return
    open_up = partial(_open_up, path)
    if sys.version_info >= (3, 12):
        shutil.rmtree(path, onexc=open_up)
    else:
        shutil.rmtree(path, onerror=open_up)


def _open_up(root: Path, function: Callable[..., Any], name: str, _: Any) -> None:
    """Once more, with the right to do it: a recipe may take that from its folders, and git from its objects. What lies
    outside of `root` is not ours to change."""
    path = Path(name)
    for place in (path.parent, path):
        # Windows removes no read-only file; elsewhere a file may be one of ours by another name.
        if root in (place, *place.parents) and not is_link(place) and (place.is_dir() or sys.platform == "win32"):
            with suppress(OSError):
                place.chmod(0o700)
    with suppress(OSError):
        if function in (os.unlink, os.rmdir):
            function(name)
        elif path.is_dir() and os.access(path, os.R_OK | os.X_OK):  # now it can be looked into
            remove(path)


def is_link(path: Path) -> bool:
    try:
        return leads_elsewhere(path.lstat())
    except OSError:
        return False


def leads_elsewhere(facts: os.stat_result) -> bool:
    """A symbolic link, or on Windows whatever else is one (to Python before 3.12 a junction is a folder)."""
    return stat.S_ISLNK(facts.st_mode) or bool(getattr(facts, "st_file_attributes", 0) & REPARSE_POINT)


def tree_bytes(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    if path.is_dir() and not path.is_symlink():
        return sum(f.lstat().st_size for f in path.rglob("*") if f.is_file() and not f.is_symlink())
    return path.lstat().st_size if path.exists() else 0
