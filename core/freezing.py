"""Stopping every process of a tree, and the proof that none of them has run until it goes on.

SIGSTOP alone proves nothing: a process can be on its way into the kernel, fork while the tree is being listed, or have
ordered a SIGCONT from a timer. So a tree counts as stopped when two looks in a row find the same tasks, all of them
stopped, with the same count of switches onto a processor: then each of them stood still all the time between the two
looks, and nobody of the tree was left to wake another. The same comparison when the tree goes on says whether
one of them ran meanwhile. What a graphics card had been sent before goes on there: `core.pausing.at_rest`.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from core import processes

PATIENCE = 1.0  # seconds in which a tree has to stand still; the training's clock runs meanwhile
PAUSE = 0.001  # seconds between two looks
RAN_AT_MOST = 0.005  # seconds on a processor that a stopped tree may show: a machine that slept wakes every task once
STOPPED = frozenset("TtZX")  # stopped, traced, or ended: nothing of it can run


class FreezeError(Exception):
    """The tree could not be stopped; it runs on."""


@dataclass(frozen=True)
class Task:
    """A thread as the kernel counts it (Linux), or a whole process where threads are not told apart."""

    state: str  # a letter of STOPPED, or another
    switches: int  # how often it left a processor
    seconds: float  # on a processor; -1 where it is not told


Snapshot = dict[tuple[int, int], Task]  # (pid, thread)


@dataclass(frozen=True)
class Frozen:
    """A tree that stands still."""

    _pids: Callable[[], Sequence[int]]
    _before: Snapshot

    def ran(self) -> float:
        """Seconds for which one of the tree ran since it was stopped; infinite where tasks are awake, new or gone."""
        now = snapshot(self._pids())
        if now.keys() != self._before.keys() or not still(now):
            return math.inf
        moved = [(now[key], old) for key, old in self._before.items() if now[key].switches != old.switches]
        told = all(new.seconds >= 0 and old.seconds >= 0 for new, old in moved)
        return sum(new.seconds - old.seconds for new, old in moved) if told else math.inf

    def thaw(self) -> None:
        """Let all of it go on."""
        for pid in self._pids():
            _signal(pid, "SIGCONT")


def possible() -> bool:
    """Whether this system can stop a process and let it go on at all."""
    return sys.platform != "win32"


def freeze(pids: Callable[[], Sequence[int]], patience: float = PATIENCE) -> Frozen:
    """Stop the processes that `pids` lists, asked again until no new one appears. `FreezeError` says why not; then
    none of them is left stopped."""
    if not possible():
        raise FreezeError("Windows cannot stop a process and let it go on")
    deadline = time.monotonic() + patience
    before: Snapshot = {}
    while True:
        listed = pids()
        now = snapshot(listed)
        if now and now == before and still(now):
            return Frozen(pids, now)
        if time.monotonic() > deadline:
            for pid in listed:
                _signal(pid, "SIGCONT")
            awake = sorted({pid for (pid, _), task in now.items() if task.state not in STOPPED})
            raise FreezeError(f"{len(awake)} of {len(listed)} processes did not stop within {patience:g} s")
        for pid in {pid for (pid, _), task in now.items() if task.state not in STOPPED}:
            _signal(pid, "SIGSTOP")
        before = now
        time.sleep(PAUSE)


def still(tasks: Snapshot) -> bool:
    return all(task.state in STOPPED for task in tasks.values())


def snapshot(pids: Sequence[int]) -> Snapshot:
    """Every task of the processes; what ends meanwhile is left out."""
    found: Snapshot = {}
    for pid in pids:
        found |= _linux(pid) if sys.platform == "linux" else _elsewhere(pid)
    return found


def _linux(pid: int) -> Snapshot:
    found: Snapshot = {}
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - as in core/processes.py
    except OSError:
        return found
    for thread in threads:
        folder = f"/proc/{pid}/task/{thread}"
        if task := _task(processes.read(f"{folder}/status"), processes.read(f"{folder}/schedstat")):
            found[pid, int(thread)] = task
    return found


def _task(status: bytes, schedstat: bytes) -> Task | None:
    """From the two files of /proc; None when the task is gone. `schedstat` is missing in some kernels."""
    state, switches = "", 0
    for line in status.splitlines():
        name, _, value = line.partition(b":")
        if name == b"State":
            state = value.split()[0].decode()
        elif name in (b"voluntary_ctxt_switches", b"nonvoluntary_ctxt_switches"):
            switches += int(value)
    seconds = int(schedstat.split()[0]) / 1e9 if schedstat else -1.0
    return Task(state, switches, seconds) if state else None


def _elsewhere(pid: int) -> Snapshot:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times, counts, status = process.cpu_times(), process.num_ctx_switches(), process.status()
    except psutil.Error:
        return {}
    state = {psutil.STATUS_STOPPED: "T", psutil.STATUS_ZOMBIE: "Z"}.get(status, "R")
    return {(pid, 0): Task(state, counts.voluntary + counts.involuntary, times.user + times.system)}


def _signal(pid: int, name: str) -> None:
    try:
        os.kill(pid, getattr(signal, name))
    except ProcessLookupError:
        pass
