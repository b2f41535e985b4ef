"""The Linux system calls of the sandbox: capabilities, resource limits, namespaces and Landlock, by ctypes.

Runs inside `core/launcher.py`, so it imports the standard library only. Every function raises `OSError` with the
name of the call when the kernel refuses. Landlock's numbers are from linux/landlock.h, whose features come in ABI
versions: 1 files, 2 rename across folders, 3 truncate, 4 TCP ports, 5 ioctl on devices, 6 abstract sockets, signals.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << bit for bit in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15

READ = READ_FILE | READ_DIR
RUN = READ | EXECUTE
LIST = READ_DIR
# No sockets, fifos or device nodes are made, and nothing that was written is executed.
WRITE = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
DEVICE = READ | WRITE_FILE | IOCTL_DEV
RENAME_THREADS = WRITE_FILE | TRUNCATE  # as the shell's `>` and fopen open a file
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV  # what a rule on a plain file may allow

PR_SET_PDEATHSIG, PR_SET_NAME, PR_CAPBSET_READ, PR_CAPBSET_DROP = 1, 15, 23, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 36, 38, 47, 4
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 14, 1 << 18
SHARED_MEMORY = "size=256m,mode=1777"
CLONE_NEWNS = 0x00020000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def check(result: int, name: str) -> int:
    """`result` of a C call, or the OSError of its errno."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def syscall(name: str, number: int, *arguments: int | ctypes.Array[ctypes.c_char] | bytes | None) -> int:
    call = libc().syscall
    call.restype = ctypes.c_long
    ready = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    return check(call(ctypes.c_long(number), *ready), name)


def prctl(name: str, option: int, *arguments: int) -> int:
    values = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    return check(libc().prctl(ctypes.c_int(option), *values), f"prctl {name}")


def name_process(name: str) -> None:
    """What `ps -o comm` and `top` call this process, 15 bytes of it: a fork has the command line of what it was forked
    from. An exec undoes it."""
    text = ctypes.create_string_buffer(name.encode())
    prctl("PR_SET_NAME", PR_SET_NAME, ctypes.addressof(text))


def die_with_parent(signal_number: int) -> None:
    prctl("PR_SET_PDEATHSIG", PR_SET_PDEATHSIG, signal_number)


def become_subreaper() -> None:
    """Orphans among our descendants become our children, not init's."""
    prctl("PR_SET_CHILD_SUBREAPER", PR_SET_CHILD_SUBREAPER, 1)


def no_new_privileges() -> None:
    prctl("PR_SET_NO_NEW_PRIVS", PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Empty the ambient, bounding, effective, permitted and inheritable sets, for root too."""
    prctl("PR_CAP_AMBIENT", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(64):
        try:
            prctl("PR_CAPBSET_DROP", PR_CAPBSET_DROP, capability)
        except OSError:
            # EINVAL: past the last capability. EPERM: no CAP_SETPCAP; no_new_privs then keeps exec from
            # giving anything back that the permitted set, emptied below, has lost.
            break
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    check(libc().capset(header, bytes(24)), "capset")


def unshare(flags: int) -> None:
    check(libc().unshare(ctypes.c_int(flags)), "unshare")


def mount(kind: str, target: str, flags: int, options: str = "") -> None:
    arguments = kind.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    check(libc().mount(*arguments), f"mount {kind} on {target}")


def private_mounts() -> None:
    """A view of the file system of our own, with the /proc of our pid namespace and an empty /dev/shm."""
    unshare(CLONE_NEWNS)
    mount("none", "/", MS_REC | MS_PRIVATE)
    plain = MS_NOSUID | MS_NODEV | MS_NOEXEC
    mount("proc", "/proc", plain)
    if os.path.isdir("/dev/shm"):  # noqa: PTH112 - pathlib takes its time to load
        mount("tmpfs", "/dev/shm", plain, SHARED_MEMORY)


def landlock_abi() -> int:
    """The kernel's Landlock version, 0 where there is none."""
    try:
        return syscall("landlock_create_ruleset", CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0


def handled(abi: int) -> tuple[int, int, int]:
    """What a ruleset governs at this ABI: file rights, network rights, scopes."""
    files = (1 << 13) - 1
    if abi >= 2:
        files |= REFER
    if abi >= 3:
        files |= TRUNCATE
    if abi >= 5:
        files |= IOCTL_DEV
    return files, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0


def restrict(rules: Iterable[tuple[str, int]], abi: int) -> int:
    """Hold this thread and all that it starts to `rules`: (path, rights beneath it). Returns how many applied.

    A path that does not exist needs no rule. No TCP port and no abstract socket is allowed, and no signal to a
    process outside. Call it while there is one thread: others would stay free.
    """
    files, network, scopes = handled(abi)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = syscall("landlock_create_ruleset", CREATE_RULESET, struct.pack("=QQQ", files, network, scopes), size, 0)
    applied = 0
    try:
        for path, rights in rules:
            applied += allow(ruleset, path, rights & files)
        syscall("landlock_restrict_self", RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return applied


def allow(ruleset: int, path: str, rights: int) -> bool:
    try:
        target = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return False
    try:
        if not stat.S_ISDIR(os.fstat(target).st_mode):
            rights &= ON_FILES
        if rights:
            syscall("landlock_add_rule", ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, target), 0)
    finally:
        os.close(target)
    return bool(rights)
