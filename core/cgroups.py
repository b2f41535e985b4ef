"""Limits of memory and tasks by control groups (Linux, v1 and v2), where this user may make one.

A group holds one child's tree. Nothing here is needed for safety where it is missing: `core/sandbox.py` then watches.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from core import processes


@dataclass(frozen=True)
class Place:
    """A folder in which groups can be made, and what they can limit there."""

    folder: Path
    version: int
    limits: frozenset[str]  # of "memory", "pids"


def mounts(text: str) -> dict[str, tuple[Path, int]]:
    """Controller -> (mount point, version) from /proc/self/mounts; the unified tree is called ""."""
    found: dict[str, tuple[Path, int]] = {}
    for line in text.splitlines():
        _, point, kind, options = line.split()[:4]
        if kind == "cgroup2":
            found[""] = Path(point), 2
        elif kind == "cgroup":
            for controller in {"memory", "pids"} & set(options.split(",")):
                found[controller] = Path(point), 1
    return found


def own_groups(text: str) -> dict[str, str]:
    """Controller -> our group's path from /proc/self/cgroup; the unified tree is called ""."""
    found = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


def usable(place: Place) -> bool:
    """Try it: make a group, set its limits, remove it."""
    try:
        Group([place], memory_bytes=1 << 40, tasks=1 << 15).remove()
    except OSError:
        return False
    return True


@lru_cache(maxsize=1)
def places() -> tuple[Place, ...]:
    """Where groups for memory and tasks can be made by us now; empty where nowhere."""
    try:
        mounted = mounts(Path("/proc/self/mounts").read_text())
        own = own_groups(Path("/proc/self/cgroup").read_text())
    except OSError:
        return ()
    found: list[Place] = []
    for controller in ("memory", "pids"):
        if controller not in mounted:
            continue
        point = mounted[controller][0]
        for folder in (point / own.get(controller, "/").lstrip("/"), point):
            place = Place(folder, 1, frozenset({controller}))
            if folder.is_dir() and usable(place):
                found.append(place)
                break
    if "" in mounted and not found:
        found += unified(mounted[""][0], own.get("", "/"))
    for place in found:
        remove_stale(place.folder)
    return tuple(found)


def remove_stale(folder: Path) -> None:
    """Take away the groups of referees that were killed; a group that still has members stays, the kernel refuses."""
    for group in folder.glob("autoresearch-*-*"):
        pid = group.name.split("-")[1]
        if pid.isdecimal() and not processes.alive(int(pid)):
            try:
                group.rmdir()
            except OSError:
                continue


def unified(point: Path, path: str) -> list[Place]:
    """A group with members may not have groups with controllers below it, so ours goes beside or above us."""
    folder = point / path.lstrip("/")
    while folder.is_dir():
        try:
            given = frozenset((folder / "cgroup.subtree_control").read_text().split()) & {"memory", "pids"}
        except OSError:
            given = frozenset()
        place = Place(folder, 2, given)
        if given and os.access(folder / "cgroup.procs", os.W_OK) and usable(place):
            return [place]
        if folder == point:
            break
        folder = folder.parent
    return []


class Group:
    """The groups of one child. Raises OSError when one cannot be made."""

    def __init__(self, where: list[Place] | tuple[Place, ...], memory_bytes: int, tasks: int) -> None:
        name = f"autoresearch-{os.getpid()}-{secrets.token_hex(4)}"
        self.folders: list[Path] = []
        self.limits: set[str] = set()
        try:
            for place in where:
                self._make(place, name, memory_bytes, tasks)
        except OSError:
            self.remove()
            raise

    def _make(self, place: Place, name: str, memory_bytes: int, tasks: int) -> None:
        folder = place.folder / name
        folder.mkdir()
        self.folders.append(folder)
        if "pids" in place.limits:
            (folder / "pids.max").write_text(str(tasks))
            self.limits.add("pids")
        if "memory" in place.limits and memory_bytes:
            first, swap = ("memory.max", "memory.swap.max") if place.version == 2 else V1_MEMORY
            (folder / first).write_text(str(memory_bytes))
            if (folder / swap).exists():
                (folder / swap).write_text("0" if place.version == 2 else str(memory_bytes))
            if place.version == 2:
                (folder / "memory.oom.group").write_text("1")
            self.limits.add("memory")

    def doors(self) -> list[str]:
        """The files by which a process joins."""
        return [str(folder / "cgroup.procs") for folder in self.folders]

    def _count(self, names: tuple[str, ...], key: str) -> int:
        for folder in self.folders:
            for name in names:
                try:
                    lines = (folder / name).read_text().splitlines()
                except OSError:
                    continue
                for line in lines:
                    if line.split()[:1] == [key]:
                        return int(line.split()[1])
        return 0

    def out_of_memory(self) -> bool:
        """Whether the kernel ended one of the group for memory."""
        return self._count(("memory.oom_control", "memory.events"), "oom_kill") > 0

    def out_of_tasks(self) -> bool:
        """Whether a fork or a thread was refused."""
        return self._count(("pids.events",), "max") > 0

    def members(self) -> set[int]:
        found: set[int] = set()
        for folder in self.folders:
            try:
                found.update(map(int, (folder / "cgroup.procs").read_text().split()))
            except OSError:
                pass
        return found

    def remove(self, patience: float = 1.0) -> None:
        """Take the groups away; their members must have ended. What is still busy after `patience` s stays."""
        deadline = time.monotonic() + patience
        for folder in self.folders:
            while folder.exists():
                try:
                    folder.rmdir()
                except OSError:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.005)


V1_MEMORY = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
