"""What Windows does with a tree of processes, done on Linux, so that the rest of that way runs for real.

A process starts stopped; a job's processes are found by a mark in their environment, which all that they start
inherits, and are really killed; sockets and files reach them through `core.handles.Postbox`.
"""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

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
