"""Process trees on Linux, read from /proc: who is in one, what memory it takes, and ending it.

The standard library only: `core/launcher.py` runs it without packages. Elsewhere `core/sandbox.py` uses psutil.
"""

# ruff: noqa: PTH110, PTH208
# pathlib is not used: this is called many times a second.
from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

FIRST_TO_GO = 500  # oom_score_adj of a recipe: when memory runs out, it goes before the referee
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def read(path: str) -> bytes:
    """The file's content; empty when the process is gone or not ours to see."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def children(pid: int) -> list[int]:
    """The direct children, of all threads of the process."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        found += map(int, read(f"/proc/{pid}/task/{thread}/children").split())
    return found


def parents() -> Iterator[tuple[int, int]]:
    """(pid, parent's pid) of every process: for kernels without `children` files."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            fields = read(f"/proc/{name}/stat").rpartition(b")")[2].split()
            if len(fields) > 1:
                yield int(name), int(fields[1])


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, parents first; orphans count where they have been taken over by one of them."""
    if os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"):
        return below(pid, children)
    return descendants_listed(pid)


def descendants_listed(pid: int) -> list[int]:
    """The same from one list of all processes of the machine: slower, but one that gets another parent while the tree
    is walked is not missed."""
    table: dict[int, list[int]] = {}
    for child, parent in parents():
        table.setdefault(parent, []).append(child)
    return below(pid, lambda parent: table.get(parent, []))


def below(pid: int, find: Callable[[int], list[int]]) -> list[int]:
    found: list[int] = []
    seen = {pid}
    waiting = [pid]
    while waiting:
        for child in find(waiting.pop()):
            if child not in seen:
                seen.add(child)
                found.append(child)
                waiting.append(child)
    return found


def resident(pid: int) -> int:
    """Bytes of memory that the process has in RAM, pages shared with others included."""
    fields = read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * PAGE if len(fields) > 1 else 0


def proportional(pid: int) -> int:
    """Bytes in RAM and swap, shared pages divided among those who share them; slower to read than `resident`."""
    total = 0
    for line in read(f"/proc/{pid}/smaps_rollup").splitlines():
        name, _, value = line.partition(b":")
        if name in (b"Pss", b"SwapPss"):
            total += int(value.split()[0]) * 1024
    return total or resident(pid)


def peak(pid: int) -> int:
    """The largest resident size that the process has had, in bytes."""
    for line in read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def oom_rank(pid: int) -> int:
    """Its oom_score_adj; that of a recipe where the process is gone or does not tell."""
    told = read(f"/proc/{pid}/oom_score_adj").strip()
    return int(told) if told else FIRST_TO_GO


def alive(pid: int) -> bool:
    """Whether the process still runs; a zombie does not."""
    state = read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return bool(state) and state[0] not in (b"Z", b"X")


def started(pid: int) -> float:
    """When the process started, in clock ticks after boot; 0 when it is gone."""
    fields = read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return float(fields[19]) if len(fields) > 19 else 0.0


def signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def end_children(namespace: int | None, patience: float = 60.0) -> bool:
    """Kill all that descends from the calling process, a subreaper, and reap it. False when some would not die.

    `namespace`: the first process of a pid namespace, with which the kernel ends the rest.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if namespace is not None:
            signal_all([namespace], signal.SIGKILL)
        else:
            # Stopped first: what is stopped cannot fork while the rest is being found.
            found = descendants(os.getpid())
            signal_all(found, signal.SIGSTOP)
            signal_all(found, signal.SIGKILL)
        if not reap():
            return True
        time.sleep(0.002)
    return False


def reap() -> bool:
    """Collect the children that have ended; whether any is left."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if not pid:
            return True
