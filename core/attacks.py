# ruff: noqa: PTH101, PTH102, PTH103, PTH104, PTH108, PTH109, PTH115, PTH116, PTH118, PTH208, PTH211
"""What a hostile recipe would try. `doctor` and the tests run it inside the sandbox, to see that each is refused.

`python -m core.attacks JSON NAMES...` inside; prints one line of JSON: name -> [held, what happened]. The targets are
what the referee has set up outside: listening sockets, files with a secret in them, its own pid.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import re
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import TypedDict

from core import landlock, seccomp


class Targets(TypedDict):
    secret: str  # must not be found anywhere
    referee: int  # pid outside
    port: int  # TCP and UDP, IPv4, listening on 127.0.0.1
    port6: int  # on ::1; 0: no IPv6 here
    socket: str  # path of a listening unix socket
    abstract: str  # name of a listening abstract unix socket
    readable: list[str]  # files with the secret
    folder: str  # outside; must not change
    victim: str  # a file in it


class Held(Exception):
    """The wall held, and how."""


Attack = Callable[[Targets], str | None]  # what was gained; raises OSError or Held when refused


def number(name: str) -> int:
    """Of a system call on this machine."""
    found = seccomp.CALLS[name][list(seccomp.ARCHITECTURES).index(platform.machine())]
    if found is None:
        raise Held("no such call on this machine")
    return found


def call(name: str, *arguments: int | bytes | None) -> str:
    return f"{name} returned {landlock.syscall(name, number(name), *arguments)}"


def connect(family: int, kind: int, address: object) -> str:
    with socket.socket(family, kind) as attempt:
        attempt.settimeout(2)
        attempt.connect(address)  # type: ignore[arg-type]
        attempt.send(b"secret")
    return f"sent to {address}"


def tcp(t: Targets) -> str:
    return connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", t["port"]))


def udp(t: Targets) -> str:
    return connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", t["port"]))


def ipv6(t: Targets) -> str:
    return connect(socket.AF_INET6, socket.SOCK_STREAM, ("::1", t["port6"] or 9))


def unix_path(t: Targets) -> str:
    return connect(socket.AF_UNIX, socket.SOCK_STREAM, t["socket"])


def unix_abstract(t: Targets) -> str:
    return connect(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + t["abstract"])


def unix_datagram(t: Targets) -> str:
    """A datagram pair may send to any address, not only to its other end."""
    one, _other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    one.sendto(b"secret", t["socket"])
    return "sent"


def netlink(t: Targets) -> str:
    socket.socket(16, socket.SOCK_RAW, 0).close()
    return "opened"


def listen(t: Targets) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
    return "listening"


def unix_serve(t: Targets) -> str:
    """An abstract socket of its own, for others to come to. What would be served is told by accept: nobody waits."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(f"\0autoresearch-{os.getpid()}")
        server.listen()
        server.setblocking(False)
        try:
            server.accept()
        except BlockingIOError:
            pass
    return "would let others in"


def read_planted(t: Targets) -> str | None:
    return opened(t["readable"], t["secret"])


def opened(candidates: list[str], secret: str) -> str | None:
    """The candidates that could be read at all."""
    got = []
    for path in candidates:
        try:
            with open(path, "rb") as file:
                got.append(f"{path} ({'secret' if secret.encode() in file.read(1 << 22) else 'no secret'})")
        except OSError:
            continue
    return ", ".join(got) or None


def parent_in_proc(t: Targets) -> str | None:
    """Environment, arguments, memory map and descriptors of the referee and of the launcher."""
    found = []
    for pid in (t["referee"], os.getppid(), 1):
        for name in ("environ", "cmdline", "maps", "mem", "status", "cwd/."):
            try:
                os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
                found.append(f"/proc/{pid}/{name}")
            except OSError:
                continue
    return ", ".join(found) or None


def all_of_proc(t: Targets) -> str | None:
    """The secret in any process's environment or arguments."""
    pids = [name for name in listed("/proc") if name.isdecimal()] or [str(pid) for pid in range(1, 40000)]
    return opened(
        [f"/proc/{p}/{f}" for p in pids if p != str(os.getpid()) for f in ("environ", "cmdline")], t["secret"]
    )


def listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def own_environment(t: Targets) -> str | None:
    found = [name for name, value in os.environ.items() if t["secret"] in value or name.endswith(("_KEY", "_TOKEN"))]
    return ", ".join(found) or None


def open_descriptors(t: Targets) -> str | None:
    """Anything inherited besides standard input, output, error, the channel and mere names of what /proc tells all.

    By a name alone (O_PATH) nothing is read, and to open it anew is judged as to open the path. A library whose code
    runs here may hold its own file open to read, as newer builds of libffi do for the callbacks of ctypes.
    """
    expected = {0, 1, 2, int(os.environ["AUTORESEARCH_CHANNEL"])}
    own, libraries = f"/proc/{os.getpid()}", running_files()
    found = []
    for name in listed("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the one that listed
        flags = fcntl.fcntl(int(name), fcntl.F_GETFL)
        told = flags & os.O_PATH and (target in (own, f"{own}/task") or re.match(r"/proc/[a-z]", target))
        library = flags & os.O_ACCMODE == os.O_RDONLY and target in libraries
        if int(name) not in expected and not (told or library):
            found.append(f"{name} -> {target}")
    return ", ".join(found) or None


def running_files() -> set[str]:
    """The files that this process runs code of."""
    with open("/proc/self/maps") as maps:
        lines = [line.split(maxsplit=5) for line in maps]
    return {line[5].rstrip("\n") for line in lines if len(line) == 6 and "x" in line[1]}


def write_outside(t: Targets) -> str | None:
    """Everything that changes a file or folder outside; the files belong to our user."""
    victim, new = t["victim"], os.path.join(t["folder"], "new")
    here = os.path.join(os.getcwd(), "mine")
    with open(here, "w") as file:
        file.write("mine")
    attempts: dict[str, Callable[[], object]] = {
        "write": lambda: os.close(os.open(victim, os.O_WRONLY)),
        "append": lambda: os.close(os.open(victim, os.O_WRONLY | os.O_APPEND)),
        "create": lambda: os.close(os.open(new, os.O_CREAT | os.O_WRONLY)),
        "empty": lambda: os.close(os.open(victim, os.O_RDONLY | os.O_TRUNC)),
        "truncate": lambda: os.truncate(victim, 0),
        "remove": lambda: os.unlink(victim),
        "move out": lambda: os.rename(here, new),
        "move in": lambda: os.rename(victim, here + "2"),
        "link": lambda: os.link(victim, here + "3"),
        "folder": lambda: os.mkdir(new),
        "symlink": lambda: os.symlink("/", new),
        "attribute": lambda: os.setxattr(victim, "user.note", b"x"),
        "owner": lambda: os.chown(victim, os.getuid(), os.getgid()),
    }
    return tried(attempts)


def tried(attempts: dict[str, Callable[[], object]]) -> str | None:
    """The names of those that were not refused."""
    done = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except (OSError, Held):
            continue
        done.append(name)
    return ", ".join(done) or None


def mode_and_time(t: Targets) -> str | None:
    """The sandbox says yes to these and does nothing: the state of the file has to be as before."""
    before = os.stat(t["victim"])
    for attempt in (lambda: os.chmod(t["victim"], 0o777), lambda: os.utime(t["victim"], (1, 1))):
        try:
            attempt()
        except OSError:
            continue
    after = os.stat(t["victim"])
    return None if (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns) else "changed"


def run_written(t: Targets) -> str:
    """A program that was written into scratch."""
    path = os.path.join(os.getcwd(), "program")
    with open(path, "w") as file:
        file.write("#!/bin/sh\nexit 0\n")
    os.chmod(path, 0o755)
    pid = os.fork()
    if not pid:
        try:
            os.execv(path, [path])
        finally:
            os._exit(99)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise Held("not executed")
    return "executed"


def other_processes(t: Targets) -> str | None:
    """Signals, tracing, memory, limits and priority of the referee; harmless where they succeed."""
    pid = t["referee"]
    iovec = struct.pack("=QQ", 0, 0)
    attempts: dict[str, Callable[[], object]] = {
        "signal": lambda: os.kill(pid, 0),
        "ptrace attach": lambda: call("ptrace", 16, pid, 0, 0),
        "ptrace seize": lambda: call("ptrace", 0x4206, pid, 0, 0),
        "read memory": lambda: call("process_vm_readv", pid, iovec, 1, iovec, 1, 0),
        "limits": lambda: call("prlimit64", pid, resource.RLIMIT_CPU, None, bytes(16)),
        "priority": lambda: os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0)),
        "affinity": lambda: os.sched_setaffinity(pid, os.sched_getaffinity(0)),
        "compare": lambda: call("kcmp", pid, os.getpid(), 0, 0, 0),
    }
    return tried(attempts)


def kernel_calls(t: Targets) -> str | None:
    """Calls with a large attack surface, or that lead out of the sandbox."""
    blank = bytes(128)
    mine = os.path.join(os.getcwd(), "mounted").encode() + b"\0"
    os.makedirs(mine[:-1], exist_ok=True)
    attempts: dict[str, Callable[[], object]] = {
        "io_uring": lambda: call("io_uring_setup", 4, blank),
        "bpf": lambda: call("bpf", 0, blank, 128),
        "perf": lambda: call("perf_event_open", blank, 0, -1, -1, 0),
        "userfaultfd": lambda: call("userfaultfd", 1),
        "keys": lambda: call("add_key", b"user\0", b"note\0", b"x", 1, -5),
        "shared memory": lambda: call("shmget", 0, 4096, 0o1600),
        "message queue": lambda: call("mq_open", b"note\0", 0o102, 0o600, None),
        "memory file": lambda: call("memfd_create", b"note\0", 0),
        "mount": lambda: call("mount", b"none\0", mine, b"tmpfs\0", 0, None),
        "chroot": lambda: os.chroot("/"),
        "unshare": lambda: call("unshare", landlock.CLONE_NEWUSER),
        "clone": lambda: call("clone", landlock.CLONE_NEWUSER | 17, 0, 0, 0, 0),
        "clone3": lambda: call("clone3", blank, 64),
        "file handle": lambda: call("open_by_handle_at", 0, blank, 0),
        "modules": lambda: call("finit_module", 0, b"\0", 0),
        "clock": lambda: call("clock_settime", 0, struct.pack("=qq", *divmod(time.time_ns(), 10**9))),
        "parent's death": lambda: landlock.die_with_parent(0),
    }
    return tried(attempts)


def cached_pages(t: Targets) -> str | None:
    """Which pages of a file are cached, told or changed: what one child has read or evicted, a later one could read."""
    page = mmap.PAGESIZE
    with open(os.__file__, "rb") as file:
        mapped = mmap.mmap(file.fileno(), page, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        where = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        attempts: dict[str, Callable[[], object]] = {
            "mincore": lambda: call("mincore", where, page, bytes(1)),
            "cachestat": lambda: call("cachestat", file.fileno(), struct.pack("=QQ", 0, page), bytes(40), 0),
            "page out": lambda: call("madvise", where, page, seccomp.MADV_PAGEOUT),
            "read if cached": lambda: os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT),
        }
        return tried(attempts)


def foreign_calls(t: Targets) -> str | None:
    """System calls by the numbers of 32-bit x86, which the filter does not know."""
    if platform.machine() != "x86_64":
        raise Held("x86 only")
    pid = os.fork()
    if not pid:
        code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20 (getpid); int 0x80; ret
        run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
        os._exit(0 if run() > 0 else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status in (-signal.SIGSYS, -signal.SIGSEGV):  # killed by the filter, or the kernel has no such entry
        raise Held(signal.Signals(-status).name)
    return f"int 0x80 ended with {status}"


def privileges(t: Targets) -> str | None:
    """Capabilities, no_new_privs and the filter, as the kernel shows them."""
    with open("/proc/self/status") as file:
        shown = {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
    sets = ["CapInh", "CapPrm", "CapEff", "CapAmb"]
    if os.getuid() == 0:
        sets.append("CapBnd")  # an ordinary user cannot empty it; no_new_privs keeps exec from using it
    wrong = [f"{name} {shown[name]}" for name in sets if int(shown[name], 16)]
    wrong += [] if shown["NoNewPrivs"] == "1" else ["NoNewPrivs 0"]
    return ", ".join(wrong) or None


def everything_readable(t: Targets) -> str | None:
    """The secret in any file that can be reached by listing, the packages' own folders left out."""
    own = {os.path.realpath(folder) for folder in (os.getcwd(), sys.base_prefix, *sys.path) if folder}
    found: list[str] = []
    for root in (
        "/etc",
        "/home",
        "/root",
        "/tmp",
        "/var",
        "/run",
        "/dev/shm",
        "/opt",
        "/srv",
        "/mnt",
        t["folder"],
        "/",
    ):
        for folder, inner, files in os.walk(root):
            inner[:] = [i for i in inner if os.path.join(folder, i) not in own and (folder, i) not in HUGE]
            hit = opened([os.path.join(folder, name) for name in files], t["secret"])
            if hit and "(secret)" in hit:
                found.append(f"in {folder}")
    return ", ".join(found) or None


HUGE = {("/", name) for name in ("usr", "lib", "lib32", "lib64", "bin", "sbin", "sys", "proc", "nix", "dev")}


def embedded_corpus(t: Targets) -> str | None:
    """The package that holds the Bible's text, validation part included."""
    try:
        import bible  # type: ignore[import-not-found,unused-ignore]
    except ImportError as problem:
        found = [f"{folder}/bible/__init__.py" for folder in sys.path]
        if opened(found, t["secret"]):
            return "readable as a file"
        raise Held(str(problem)) from None
    return str(bible.__file__)


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        *(tcp, udp, ipv6, unix_path, unix_abstract, unix_datagram, unix_serve, netlink, listen),
        *(read_planted, parent_in_proc, all_of_proc, own_environment, open_descriptors, everything_readable),
        *(embedded_corpus,),
        *(write_outside, mode_and_time, run_written, other_processes, kernel_calls, cached_pages, foreign_calls),
        *(privileges,),
    )
}


def attempt(attack: Attack, targets: Targets) -> tuple[bool, str]:
    """(whether the wall held, what happened)."""
    try:
        gained = attack(targets)
    except Held as how:
        return True, str(how)
    except OSError as problem:
        return True, errno.errorcode.get(problem.errno or 0, type(problem).__name__)
    return (True, "nothing gained") if gained is None else (False, gained)


def main() -> None:
    targets: Targets = json.loads(sys.argv[1])
    names = sys.argv[2:] or list(ATTACKS)
    print(json.dumps({name: attempt(ATTACKS[name], targets) for name in names}), flush=True)


if __name__ == "__main__":
    main()
