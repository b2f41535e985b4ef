"""Process trees as the referee sees them: /proc on Linux, psutil elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

from core import processes
from core.files import leads_elsewhere

LINUX = sys.platform == "linux"
# psutil hands on as it is, an OSError, what Windows says of a process that is just ending.
UNTOLD = (psutil.Error, OSError)


def descendants(pid: int) -> list[int]:
    if LINUX:
        return processes.descendants(pid)
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except UNTOLD:
        return []


def listed(pid: int) -> list[int]:
    """`descendants` from one list of all processes: none is missed for having got another parent meanwhile."""
    return processes.descendants_listed(pid) if LINUX else descendants(pid)


def resident(pid: int) -> int:
    if LINUX:
        return processes.resident(pid)
    try:
        return psutil.Process(pid).memory_info().rss
    except UNTOLD:
        return 0


def proportional(pid: int) -> int:
    """Shared pages divided among their users; on macOS and Windows the pages that are the process's alone."""
    if LINUX:
        return processes.proportional(pid)
    try:
        return psutil.Process(pid).memory_full_info().uss
    except psutil.NoSuchProcess:
        return 0
    except UNTOLD:  # it does not tell, or the system does not: what it shares counts too then
        return resident(pid)


def peak(pid: int) -> int:
    """The largest resident size that the process has had, in bytes; on macOS, which does not tell, its present one."""
    if LINUX:
        return processes.peak(pid)
    try:
        told = psutil.Process(pid).memory_info()
    except UNTOLD:
        return 0
    return int(getattr(told, "peak_wset", told.rss))  # Windows


def own_peak() -> int:
    """`peak` of this process, of which macOS does tell."""
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak(os.getpid())


def started(pid: int) -> float:
    """When the process started, in any unit; 0 when it is gone. With the pid it names a process for good."""
    if LINUX:
        return processes.started(pid)
    try:
        return psutil.Process(pid).create_time()
    except UNTOLD:
        return 0.0


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    if LINUX:
        return processes.alive(pid)
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except UNTOLD:
        return False


def disk_usage(folders: Iterable[Path]) -> int:
    """Bytes on disk of all files beneath; a file that vanishes meanwhile counts nothing."""
    total = 0
    waiting = [str(folder) for folder in folders]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    facts = entry.stat(follow_symlinks=False)
                    blocks = getattr(facts, "st_blocks", None)  # not on Windows, which tells the size alone
                    total += facts.st_size if blocks is None else blocks * 512
                    if entry.is_dir(follow_symlinks=False) and not leads_elsewhere(facts):
                        waiting.append(entry.path)
        except OSError:
            continue
    return total


def end(pids: list[int]) -> None:
    for pid in pids:
        try:
            psutil.Process(pid).kill()
        except UNTOLD:
            pass
