"""Keeps a process that is not ours to trust: closes places to it, and ends it with all that it ever started.

Run as `python -I core/keeper.py ORDERS`; see `core/kept.py`, which starts it. Its environment is the one that the
process gets. It ends everything when the process ends, when its time is over, when it wrote too much, and when its
standard input is closed, which happens also when whoever started it dies. At the end it prints one line of JSON.

On Linux it is a subreaper: a grandchild that was given up by its parent, or has a session of its own, becomes a child
of the keeper and is ended. Elsewhere the tree is looked at five times a second, and who was seen in it is ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.append(ROOT)  # behind the standard library; `-I` left our own folder out

from core import landlock, processes  # noqa: E402
from core.apart import apart  # noqa: E402

LOOK = 0.2  # seconds between two looks
NOT_FOUND = 127  # exit status where there is no such program, as of a shell
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
LINUX = sys.platform == "linux"


def main() -> None:
    orders = json.loads(sys.argv[1])
    told: dict[str, Any] = {"lacks": "it was not asked for"}
    if hasattr(os, "nice"):
        os.nice(19)  # an experiment may be running beside it
    if LINUX:
        landlock.become_subreaper()
    if orders["isolate"]:
        told["lacks"] = shut(orders["read_only"], orders["hidden"])
    closed = threading.Event()
    threading.Thread(target=_wait_for_end, args=(sys.stdin.buffer, closed), daemon=True).start()
    told |= _keep(orders, closed)
    print(json.dumps(told), flush=True)
    os._exit(0)  # the thread still reads


def _wait_for_end(stream: BinaryIO, closed: threading.Event) -> None:
    stream.read()
    closed.set()


# --- closing places -----------------------------------------------------------------------------


def shut(read_only: Sequence[str], hidden: Sequence[str]) -> str:
    """Make folders read-only, and others empty, for this process and all that it starts, and give up every privilege
    that could undo it. Returns why that could not be done; "" when it is."""
    if not LINUX:
        return f"{sys.platform} cannot close folders to a process"
    try:
        _own_mounts()
        for path in filter(os.path.isdir, hidden):
            flags = landlock.MS_NOSUID | landlock.MS_NODEV | landlock.MS_NOEXEC
            landlock.mount("tmpfs", path, flags | MS_RDONLY, "size=4k,mode=755")
        for path in filter(os.path.isdir, read_only):
            landlock.mount(path, path, MS_BIND | landlock.MS_REC)
            landlock.mount("none", path, MS_REMOUNT | MS_BIND | MS_RDONLY | _kept_flags(path))
        landlock.no_new_privileges()
        landlock.drop_capabilities()  # those of this process are more than the agent's: /proc of ours stays closed
    except OSError as error:
        return f"the kernel refuses a view of the file system of its own ({error.strerror})"
    return ""


def _own_mounts() -> None:
    """A view of the file system of our own; by a user namespace where we may not have one otherwise."""
    uid, gid = os.getuid(), os.getgid()
    try:
        landlock.unshare(landlock.CLONE_NEWNS)
    except PermissionError:
        landlock.unshare(landlock.CLONE_NEWUSER | landlock.CLONE_NEWNS)
        for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path("/proc/self", name).write_text(line)
    landlock.mount("none", "/", landlock.MS_REC | landlock.MS_PRIVATE)


def _kept_flags(path: str) -> int:
    """Flags of the mount beneath, which a user namespace must not take away."""
    return os.statvfs(path).f_flag & (landlock.MS_NOSUID | landlock.MS_NODEV | landlock.MS_NOEXEC | 1024 | 2048)


# --- keeping ------------------------------------------------------------------------------------


def _keep(orders: dict[str, Any], closed: threading.Event) -> dict[str, Any]:
    """Run it to its end or to ours: {"status", "ended"}, `ended` one of exit, time, stop, output."""
    out, err = Path(orders["out"]), Path(orders["err"])
    with out.open("wb") as stdout, err.open("wb") as stderr, Path(orders["stdin"]).open("rb") as stdin:
        try:
            child = subprocess.Popen(
                orders["argv"], cwd=orders["cwd"], stdin=stdin, stdout=stdout, stderr=stderr, **apart()
            )
        except OSError as error:
            return {"status": NOT_FOUND, "ended": "exit", "error": f"{orders['argv'][0]}: {error.strerror}"}
    tree = _Tree()
    give_up = time.monotonic() + orders["seconds"]
    ended = ""
    try:
        while not ended:
            tree.look()
            if (status := child.poll()) is not None:
                ended = "exit"
            elif closed.wait(LOOK):
                ended = "stop"
            elif time.monotonic() > give_up:
                ended = "time"
            elif max(_size(out), _size(err)) > orders["most"]:
                ended = "output"
    finally:  # also where this process is told to end
        left = tree.end()
    return {"status": status, "ended": ended, "left": left}


def _size(file: Path) -> int:
    """Bytes of what is printed; endless where the file was taken away, as nothing bounds it then."""
    try:
        return file.lstat().st_size
    except OSError:
        return sys.maxsize


class _Tree:
    """All processes below this one."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}  # pid -> when it was started; where there is no subreaper

    def look(self) -> None:
        if LINUX:
            return
        import psutil

        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it ended meanwhile
                self.seen[child.pid] = child.create_time()

    def end(self) -> bool:
        """Kill what is left of it. Whether something would not die."""
        if LINUX:
            return not processes.end_children(None, patience=20.0)
        import psutil

        self.look()
        alive = []
        for pid, started in self.seen.items():
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.create_time() == started:
                    process.kill()
                    alive.append(process)
        return bool(psutil.wait_procs(alive, timeout=20.0)[1])


if __name__ == "__main__":
    main()
