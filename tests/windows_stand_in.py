"""What Windows does with a tree of processes, done on Linux, so that the rest of that way runs for real.

A process starts stopped; a job's processes are found by a mark in their environment, which all that they start
inherits, and are really killed; sockets and files reach them through `core.handles.Postbox`. `refuse_open_files` makes
the file system refuse what Windows refuses.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from core import processes
from core.handles import POSTBOX, Postbox

MARK = "STAND_IN_JOB"
STOPPED_FIRST = 'kill -STOP $$; exec "$@"'


class StandIn:
    """`core.sandbox_windows.System` on Linux."""

    def __init__(self) -> None:
        self.jobs: dict[int, str] = {}  # open ones -> the mark of their processes
        self.limits: list[tuple[int, int]] = []  # memory, processes: as they were asked for
        self._numbers = itertools.count(1)
        self._marks: dict[int, str] = {}
        self._boxes: dict[int, Postbox] = {}
        self._peaks: dict[int, int] = {}

    def make_job(self, memory_bytes: int, processes: int) -> int:
        job = next(self._numbers)
        self.jobs[job] = ""
        self.limits.append((memory_bytes, processes))
        return job

    def start(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, idle: bool) -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        mark = secrets.token_hex(8)
        process = subprocess.Popen(
            ["/bin/sh", "-c", STOPPED_FIRST, "sh", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**env, POSTBOX: str(theirs.fileno()), MARK: mark},
            cwd=cwd,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.002)
        self._marks[process.pid], self._boxes[process.pid] = mark, Postbox(ours)
        return process

    def assign(self, job: int, process: subprocess.Popen[bytes]) -> None:
        self.jobs[job] = self._marks[process.pid]

    def giver(self, process: subprocess.Popen[bytes]) -> Postbox:
        return self._boxes[process.pid]

    def end(self, job: int) -> None:
        mark = self.jobs[job]
        while alive := members(mark):
            self._peaks[job] = max([self._peaks.get(job, 0), *map(processes.peak, alive)])
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.005)

    def peak(self, job: int) -> int:
        return self._peaks.get(job, 0)

    def close(self, job: int) -> None:
        assert not members(self.jobs.pop(job)), "the last handle of a job is closed while its processes live"

    def close_boxes(self) -> None:
        for box in self._boxes.values():
            box.close()


def members(mark: str) -> list[int]:
    """Living processes with this mark."""
    wanted = f"{MARK}={mark}".encode()
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if mark and processes.alive(pid) and wanted in environ(pid).split(b"\0")]


def environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


# --- open files --------------------------------------------------------------------------------------


def refuse_open_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on no file is replaced, moved or removed that a process of ours has open or mapped, and no folder with
    such a file in it is moved: `PermissionError`, as on Windows for files that Python has opened. Returns what was
    refused; a retry adds to it."""
    refused: list[str] = []

    def guarded(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def call(*paths: Any, **more: Any) -> None:
            folder = more.get("dir_fd", more.get("src_dir_fd"))
            base = Path(f"/proc/self/fd/{folder}").resolve() if folder is not None else Path.cwd()
            for path in paths:
                whole = base / os.fsdecode(path)
                if holder := who_holds(whole):
                    refused.append(f"{name} {whole}, open in {holder}")
                    raise PermissionError(13, "The process cannot access the file", str(whole))
            real(*paths, **more)

        return call

    for name in ("replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, guarded(name))
    return refused


def who_holds(path: Path) -> int | None:
    """A process of ours that has it, or something in it, open or mapped."""
    wanted = str(path.parent.resolve() / path.name)  # what a link leads to is not asked for
    for pid in [os.getpid(), *processes.descendants(os.getpid())]:
        if any(held == wanted or held.startswith(f"{wanted}/") for held in held_by(pid)):
            return pid
    return None


def held_by(pid: int) -> Iterator[str]:
    """Paths of the files that the process has open or mapped; of folders Windows knows no descriptors."""
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            if descriptor.is_file():
                yield str(descriptor.readlink())
    for line in maps.splitlines():
        yield line.split(maxsplit=5)[5] if line.count("/") else ""
