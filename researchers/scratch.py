"""The scratch copy in which a coding agent works, and what it did outside of its one file."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRAIN, PROGRAM, KERNELS, DIGEST, PROMPT, IDEA, FAILED = (
    "train.py", "program.md", "kernels.md", "digest.md", "prompt.md", "idea.txt", "failed.py",
)  # fmt: skip
LARGEST = 1 << 20  # bytes of a file that is taken back; the guard allows far less
FILES = 2000  # that are looked at
OURS = (TRAIN, PROMPT, IDEA)  # these may change
# Written by the loop itself, by people who edit, and by git; nothing there acts by itself.
NOT_WATCHED = (TRAIN, PROGRAM, "results.tsv", "report.html", "report.png", ".git/objects", ".git/refs", ".git/logs",
               ".git/index", ".git/HEAD", ".git/packed-refs", ".git/ORIG_HEAD")  # fmt: skip
ACTS = (".git/hooks/", ".git/config", ".git/info/")  # git obeys these: what an agent did there is taken back

Snapshot = Mapping[str, str]  # path below a folder -> hash of what is there


class Unreadable(Exception):
    """What lies there is no train.py that could be taken back."""


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder with `lab` (the scratch copy) and `tmp` in it, removed at the end whatever was made of it."""
    place = Path(tempfile.mkdtemp(prefix="autoresearch-agent-")).resolve()
    try:
        (place / "lab").mkdir()
        (place / "tmp").mkdir()
        yield place
    finally:
        handler: Any = {"onexc" if sys.version_info >= (3, 12) else "onerror": _open_up}
        shutil.rmtree(place, **handler)


def _open_up(function: object, path: str, _: object) -> None:
    """A folder that was made unreadable: opened, and tried again; what resists stays in the temporary place."""
    target = Path(path)
    try:
        target.parent.chmod(0o700)
        if target.is_symlink() or not target.is_dir():
            target.unlink()
            return
        target.chmod(0o700)
        shutil.rmtree(target, ignore_errors=True)
    except OSError:
        return


def take(path: Path, most: int = LARGEST) -> bytes:
    """A plain file's bytes; never what a link points to. Raises `Unreadable`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise Unreadable(f"{path.name} cannot be read ({error.strerror})") from None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or path.is_symlink():
            raise Unreadable(f"{path.name} is no plain file")
        if found.st_nlink > 1:
            raise Unreadable(f"{path.name} is a link to another file")
        if found.st_size > most:
            raise Unreadable(f"{path.name} has {found.st_size:,} bytes")
        return file.read(most)


def snapshot(folder: Path, ignored: Iterable[str] = ()) -> dict[str, str]:
    """What lies below `folder`, but for paths that begin with one of `ignored`."""
    skip = tuple(ignored)
    found: dict[str, str] = {}
    for top, folders, files in os.walk(folder):
        below = Path(top).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        folders[:] = [f for f in folders if not f"{prefix}{f}".startswith(skip)] if skip else folders
        for name in files:
            path = f"{prefix}{name}"
            if not (skip and path.startswith(skip)) and len(found) < FILES:
                found[path] = _mark(Path(top, name))
    return found


def _mark(path: Path) -> str:
    try:
        if path.is_symlink():
            return f"-> {path.readlink()}"
        info = path.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > LARGEST:
            return f"{info.st_mode} {info.st_size} {info.st_mtime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest() + f" {info.st_mode}"
    except OSError as error:
        return f"? {error.errno}"


def changes(before: Snapshot, after: Snapshot, kept: Iterable[str] = ()) -> list[str]:
    """'changed x', 'made y', 'removed z', but for `kept`."""
    words = {(True, True): "changed", (False, True): "made", (True, False): "removed"}
    paths = sorted({*before, *after} - set(kept))
    return [f"{words[p in before, p in after]} {p}" for p in paths if before.get(p) != after.get(p)]


class Watch:
    """Over a lab's folder while an agent works, where the folder could not be closed to it."""

    def __init__(self, lab: Path | None) -> None:
        self.lab = lab
        self.before = snapshot(lab, NOT_WATCHED) if lab else {}
        self.contents = {p: (lab / p).read_bytes() for p in self.before if p.startswith(ACTS)} if lab else {}

    def end(self) -> list[str]:
        """What changed meanwhile. What git obeys is put back as it was; the rest is only told."""
        if self.lab is None:
            return []
        told = changes(self.before, snapshot(self.lab, NOT_WATCHED))
        return [f"{what} in the lab{self._put_back(what.split(' ', 1)[1])}" for what in told]

    def _put_back(self, path: str) -> str:
        if self.lab is None or not path.startswith(ACTS):
            return ""
        target = self.lab / path
        if target.is_symlink() or target.exists():
            target.unlink()
        if path in self.contents:
            target.write_bytes(self.contents[path])
            return " (put back)"
        return " (removed)"
