"""Private copies of compile caches.

A cache is code that later runs, and it is written by a child that is not trusted; it may even still be writing
while its folder is copied. So a copy follows no link, takes regular files with one name only, opens every folder
through the descriptor of the one above it, and stops at a size.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

MOST_BYTES = 4 * 2**30
MOST_FILES = 200_000


def copy(source: Path, target: Path) -> int:
    """Copy the regular files below `source` into `target` (made if missing). Returns how many bytes.

    What is not copied (links, devices, files beyond the limits) is only a cache miss for whoever reads the copy.
    """
    target.mkdir(parents=True, exist_ok=True)
    if not hasattr(os, "fwalk"):
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        return sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    copied = files = 0
    for folder, _, names, descriptor in os.fwalk(source, follow_symlinks=False):
        inside = target / Path(folder).relative_to(source)
        for name in names:
            if files >= MOST_FILES or copied >= MOST_BYTES:
                return copied
            size = _copy_file(name, descriptor, inside, MOST_BYTES - copied)
            copied += size
            files += 1
    return copied


def is_empty(folder: Path) -> bool:
    """Whether there is no file below `folder`."""
    return not any(names for _, _, names in os.walk(folder))


def _copy_file(name: str, folder: int, target: Path, most: int) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(name, flags, dir_fd=folder)
    except OSError:
        return 0  # a link, or gone meanwhile
    with os.fdopen(fd, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1 or facts.st_size > most:
            return 0
        target.mkdir(parents=True, exist_ok=True)
        copied = 0
        with (target / name).open("wb") as out:
            while copied < facts.st_size and (data := file.read(min(2**20, facts.st_size - copied))):
                out.write(data)
                copied += len(data)
        (target / name).chmod(0o600 | (facts.st_mode & 0o100))
        return copied
