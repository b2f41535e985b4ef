"""SQLite as the ledger needs it: on disk when it says so, and its errors as errors that a user can act on."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from core.errors import LabError, UserError

# SQLite's write-ahead log needs shared memory, which only these file systems give.
_LOCAL = frozenset(
    {
        *("apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "jfs"),
        *("ntfs", "overlay", "ramfs", "refs", "tmpfs", "ufs", "xfs", "zfs"),
    }
)


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """`mode`: "rw", or "rwc" to make the file. Raises `UserError` and `LabError`."""
    with explained(path):
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        wanted = "WAL" if is_local(path) else "DELETE"
        _set_journal(connection, wanted)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection


def _set_journal(connection: sqlite3.Connection, wanted: str) -> None:
    """Two processes that open one ledger at the same moment may meet here; SQLite's own waiting does not cover it."""
    for attempt in range(50):
        if str(connection.execute("PRAGMA journal_mode").fetchone()[0]).upper() == wanted:
            return
        try:
            connection.execute(f"PRAGMA journal_mode = {wanted}")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or attempt == 49:
                raise
            time.sleep(0.1)


def is_local(path: Path) -> bool:
    """Does the file lie on a disk of this machine? Unknown file systems count as not."""
    best, kind = "", ""
    for disk in psutil.disk_partitions(all=True):
        mount = disk.mountpoint.rstrip("/\\") + "/"
        if (str(path.absolute()).replace("\\", "/")).startswith(mount.replace("\\", "/")) and len(mount) >= len(best):
            best, kind = mount, disk.fstype.lower()
    return kind in _LOCAL


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors that a user can act on, as errors of ours."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = str(error)
        if isinstance(error, sqlite3.IntegrityError):
            raise
        if "full" in text:
            free = psutil.disk_usage(str(path.parent)).free / 2**20
            raise UserError(
                f"the disk of {path.parent} is full ({free:.1f} MiB free)", "free some space; nothing is lost"
            ) from error
        if "readonly" in text or "unable to open" in text:
            raise UserError(
                f"the ledger {path} cannot be written ({text})", "check the folder's permissions"
            ) from error
        if "locked" in text:
            raise UserError(
                f"the ledger {path} was locked by another process for 30 s", "see which one holds it"
            ) from error
        if "disk I/O error" in text:
            raise UserError(
                f"the disk of {path} fails or is full ({text})", "check the disk; nothing is lost"
            ) from error
        if "malformed" in text or "not a database" in text or "no such table" in text:
            raise LabError(f"the ledger {path} is damaged ({text})", "restore it from a backup") from error
        raise
