"""Starts one sandboxed process, watches over its tree, and ends all of it.

Run as `python -I -S core/launcher.py FD`; FD holds the orders as JSON (see `Orders`). Three processes, so that
nothing of the tree outlives the referee or the recipe:

    referee -> launcher: subreaper; ends everything when told to, when the referee dies, or when the recipe ends
                 -> init: first process of a new pid namespace where that is allowed; its death ends the namespace
                      -> recipe: drops every privilege, applies Landlock and seccomp, executes Python

Each is single-threaded: Landlock does not hold threads that were started before it. Nothing here is believed by the
referee but the lines on the status pipe, which the recipe cannot write to: it is closed before the recipe's code comes.
`core/forking.py` runs the same three in forks of a process that has loaded torch; nothing is executed there.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

ROOT = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    sys.path.append(ROOT)  # behind the standard library; `-I -S` left nothing else

from core import landlock, processes, seccomp  # noqa: E402

FAILED = 125  # exit status when the sandbox could not be applied, as in env(1) and chroot(1)
SHARED_NAMESPACES = landlock.CLONE_NEWPID | landlock.CLONE_NEWIPC | landlock.CLONE_NEWNET


class Orders(TypedDict):
    """What the referee passes. File descriptors are numbers in the launcher."""

    goes_on: bool  # whether the recipe's process goes on where it was forked and executes nothing
    argv: list[str]  # to execute; where it goes on: the arguments of the Python that it goes on as
    name: str  # by which its three processes are told in lists of processes
    env: dict[str, str]
    cwd: str
    rules: list[tuple[str, int]]  # path, Landlock rights
    abi: int  # highest Landlock ABI to use
    filter: bool  # apply seccomp
    cuda: bool  # what NVIDIA's driver needs beside what all may do
    namespaces: bool  # give it namespaces of its own
    groups: list[str]  # cgroup.procs files to join
    limits: dict[str, int]  # name of an RLIMIT_ -> value
    nice: int  # added to the priority
    channel: int
    control: int  # readable or closed: end the tree
    status: int  # lines of JSON for the referee
    referee: int  # its pid


def say(status: int, **fields: Any) -> None:
    os.write(status, json.dumps(fields).encode() + b"\n")


def main() -> None:
    if sys.argv[1] == "--probe":
        print(json.dumps(probe()))
        return
    with os.fdopen(int(sys.argv[1])) as stream:
        orders: Orders = json.load(stream)
    for name in ("control", "status"):
        os.set_inheritable(orders[name], False)  # type: ignore[literal-required]
    supervise(orders)


def supervise(orders: Orders) -> bool:
    """The launcher's own life: start, wait for the first reason to end, end all. True in the recipe's process, behind
    all walls, where it executes nothing."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watched = [orders["control"], wakeup_on_child()]
    referee = process_handle(orders["referee"])
    if referee is not None:
        watched.append(referee)
    if not orders["goes_on"] and os.getppid() != orders["referee"]:  # a fork has another; it sees that the pipe closes
        os._exit(FAILED)
    if sys.platform == "linux":
        landlock.name_process(f"{orders['name'][:8]}-launch")
        landlock.become_subreaper()
    namespaced = orders["namespaces"] and enter_namespaces()
    first = fork(orders, namespaced)
    if not first:
        return True
    os.close(orders["channel"])  # else the referee would not see the recipe's end of it close
    while True:
        if readable(watched, None) - {watched[1]}:
            break  # told to end, or the referee is gone
        ended, code, usage = os.wait4(-1, os.WNOHANG)
        if ended == first:
            if not namespaced:
                report(orders, code, usage)
            break
        drain(watched[1])
    processes.end_children(first if namespaced else None)
    tell(orders, left=True)
    return False


def fork(orders: Orders, namespaced: bool) -> int:
    """The first child's pid; 0 in the recipe's process where it executes nothing."""
    launcher = os.getpid()
    handle = process_handle(launcher)
    pid = os.fork()
    if pid:
        return pid
    confined = False
    try:
        if namespaced:
            run_init(orders, handle)
        run_recipe(orders, launcher, namespaced)
        confined = True
    except OSError as problem:
        print(f"sandbox: {problem}", file=sys.stderr, flush=True)
        say(orders["status"], failed=str(problem))
    finally:
        if not confined:
            os._exit(FAILED)
    return 0


def run_init(orders: Orders, launcher: int | None) -> None:
    """Process 1 of the namespace: returns in the recipe's process only."""
    landlock.die_with_parent(signal.SIGKILL)
    if launcher is None or readable([launcher], 0):
        os._exit(FAILED)  # it died before the line above
    landlock.private_mounts()
    landlock.name_process(f"{orders['name'][:8]}-init")
    recipe = os.fork()
    if not recipe:
        return
    os.close(orders["channel"])
    while True:
        ended, code, usage = os.wait4(-1, 0)  # orphans of the recipe come here too
        if ended == recipe:
            report(orders, code, usage)
            os._exit(0)


def report(orders: Orders, code: int, usage: resource.struct_rusage) -> None:
    unit = 1 if sys.platform == "darwin" else 1024
    tell(orders, exit=os.waitstatus_to_exitcode(code), maxrss=usage.ru_maxrss * unit)


def tell(orders: Orders, **fields: Any) -> None:
    """`say`, which may be too late."""
    try:
        say(orders["status"], **fields)
    except BrokenPipeError:
        pass  # the referee is gone


def run_recipe(orders: Orders, launcher: int, namespaced: bool) -> None:
    """Give up every privilege, then execute."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    if orders["goes_on"]:
        close_others({orders["channel"], orders["status"]})
    os.chdir(orders["cwd"])
    os.umask(0o077)
    for name, value in orders["limits"].items():
        set_limit(getattr(resource, name), value)
    os.nice(orders["nice"])
    applied: dict[str, Any] = {}
    if sys.platform == "linux":
        landlock.name_process(orders["name"])
        landlock.die_with_parent(signal.SIGKILL)
        if not namespaced and os.getppid() != launcher:
            os._exit(FAILED)
        applied = confine(orders, namespaced)
    say(orders["status"], ready=True, namespaced=namespaced, **applied)
    if orders["goes_on"]:
        os.close(orders["status"])
        return
    os.set_inheritable(orders["channel"], True)
    os.execve(orders["argv"][0], orders["argv"], orders["env"])


def close_others(kept: set[int]) -> None:
    """Close all descriptors but these and the first three: what the launcher had open is not the recipe's."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - without packages
        if int(name) > 2 and int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                pass  # that of the listing itself


def confine(orders: Orders, namespaced: bool) -> dict[str, Any]:
    """Everything that Linux offers, in the order in which each step still may do its work."""
    for group in orders["groups"]:
        write(group, "0")
    write("/proc/self/oom_score_adj", str(processes.FIRST_TO_GO))
    landlock.no_new_privileges()
    landlock.drop_capabilities()
    abi = min(landlock.landlock_abi(), orders["abi"])
    rules = 0
    if abi:
        own = [("/dev/shm", landlock.WRITE)] if namespaced else []  # its own, gone with it
        if orders["cuda"]:
            # cuInit names its threads by /proc/self/task/TID/comm and gives up (304) where it cannot, since driver 570
            # (nolabs-ai/nono #924, NVIDIA/OpenShell #1486). No rule can name the files of threads to come, so the rest
            # of their folders is writable too: docs/sandbox.md lists it.
            own.append(("/proc/self/task", landlock.RENAME_THREADS))
        hold(path for path, _ in orders["rules"] + own if path.startswith("/proc/"))
        rules = landlock.restrict(orders["rules"] + own, abi)
    machine = os.uname().machine
    filtered = orders["filter"] and seccomp.available(machine)
    if filtered:
        seccomp.install(machine, None if abi >= 6 else os.getpid(), orders["cuda"])
    return {"landlock": abi, "rules": rules, "seccomp": filtered}


def hold(paths: Iterable[str]) -> None:
    """Keep what the kernel knows of these paths in memory for as long as the recipe lives.

    Landlock's rules are tied to inodes. /proc makes new ones whenever the kernel, short of memory, has dropped an entry
    that nobody holds: no rule is on those, and /proc/meminfo could no longer be read in the middle of a training.
    """
    for path in paths:
        try:
            os.set_inheritable(os.open(path, os.O_PATH), True)
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            continue  # it gets no rule either


def enter_namespaces() -> bool:
    """New pid, ipc and network namespaces for the processes started from now on; False where that is refused."""
    if sys.platform != "linux":
        return False
    user, group = os.geteuid(), os.getegid()
    try:
        landlock.unshare(SHARED_NAMESPACES)
        return True
    except OSError:
        pass  # not privileged: a user namespace of our own may allow it
    try:
        landlock.unshare(landlock.CLONE_NEWUSER | SHARED_NAMESPACES)
    except OSError:
        return False
    write("/proc/self/setgroups", "deny")
    write("/proc/self/gid_map", f"{group} {group} 1")
    write("/proc/self/uid_map", f"{user} {user} 1")
    return True


def set_limit(kind: int, value: int) -> None:
    """At most `value`, and never above what we have."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def wakeup_on_child() -> int:
    """A descriptor that becomes readable when a child ends."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return reader


def readable(descriptors: list[int], wait: int | None) -> set[int]:
    """Those that have something to read or are closed, within `wait` milliseconds (None: for ever)."""
    poll = select.poll()  # not select(): our numbers come from the referee and may lie above 1023
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(wait)}


def drain(reader: int) -> None:
    try:
        os.read(reader, 4096)
    except BlockingIOError:
        pass


def process_handle(pid: int) -> int | None:
    """A descriptor that becomes readable when the process is gone; None where there are none (macOS)."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def probe() -> dict[str, Any]:
    """What this kernel and this user allow, found by trying."""
    began = time.monotonic()
    found: dict[str, Any] = {"landlock": 0, "seccomp": False, "namespaces": False}
    if sys.platform == "linux":
        found["landlock"] = landlock.landlock_abi()
        found["seccomp"] = seccomp.available(os.uname().machine)
        found["namespaces"] = enter_namespaces() and mounts_work()
    found["seconds"] = time.monotonic() - began
    return found


def mounts_work() -> bool:
    """Tried in a process that is the first of the new pid namespace, as `run_init` is."""
    pid = os.fork()
    if not pid:
        try:
            landlock.private_mounts()
            os._exit(0)
        finally:
            os._exit(FAILED)
    return os.waitpid(pid, 0)[1] == 0


if __name__ == "__main__":
    main()
