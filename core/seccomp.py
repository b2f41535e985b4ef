"""The system calls that a recipe may not make: a seccomp filter, as a classic BPF program.

`program(machine, ...)` is pure, so a test can interpret it for machines that are not at hand. Numbers are from
asm/unistd_64.h and asm-generic/unistd.h. The filter refuses; what is not named here is allowed.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from core import landlock

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, JUMP_EQUAL, JUMP_ANY_BIT, JUMP_AT_LEAST, AND, RETURN = 0x20, 0x15, 0x45, 0x35, 0x54, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SECCOMP = {"x86_64": 317, "aarch64": 277}


def words(text: str) -> list[str]:
    return text.split()


# name: (x86_64, aarch64); None where the machine has no such call
CALLS: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "open_tree_attr": (467, 467),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    "clone": (56, 220),
    "clone3": (435, 435),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    "lookup_dcookie": (212, 18),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "truncate": (76, 45),
    "mincore": (27, 232),
    "cachestat": (451, 451),
    "fadvise64": (221, 223),
    "madvise": (28, 233),
    "preadv2": (327, 286),
    "open": (2, None),
    "openat": (257, 56),
    "openat2": (437, 437),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}

# Refused whatever the arguments are.
REFUSED = words(
    # network and sockets by address: only a connected stream pair remains, see PAIRS
    "socket connect bind listen accept accept4 "
    # other processes
    "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_getfd kcmp migrate_pages "
    "move_pages "
    # large or seldom needed parts of the kernel
    "io_uring_setup io_uring_enter io_uring_register bpf perf_event_open userfaultfd add_key request_key keyctl "
    # namespaces and mounts
    "mount umount2 pivot_root chroot open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick "
    "mount_setattr setns unshare "
    # the machine
    "kexec_load kexec_file_load init_module finit_module delete_module reboot swapon swapoff acct quotactl "
    "quotactl_fd syslog vhangup iopl ioperm modify_ldt settimeofday clock_settime clock_adjtime adjtimex sethostname "
    "setdomainname open_by_handle_at name_to_handle_at fanotify_init lookup_dcookie "
    # memory that no process's resident size shows, and state that outlives the process
    "memfd_secret shmget shmat semget msgget mq_open mq_unlink "
    # Landlock does not govern these, and the files belong to our user: an owner could be locked out of them, and
    # what one child notes in an attribute the next one could read
    "chown fchown lchown fchownat setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr setxattrat "
    "removexattrat file_setattr truncate"
)
# ENOSYS. The C library then takes the older call; the last two tell which pages of a file are cached: by that one child
# could read what another, before it, has read or evicted, a bit for each page
ABSENT = words("clone3 openat2 fchmodat2 mincore cachestat")
MEMORY_FILES = ["memfd_create"]  # their pages show in no process's resident size: absent where memory is watched by it
# CUDA's cuInit makes an abstract unix socket (@cuda-uvmfd-NAMESPACE-PID), binds it and listens, and fails where that is
# refused (canonical/snapd's interface `cuda-support`). Nobody is ever let in: accept stays refused, and connect is
# answered as by a socket that nobody serves, so that NVML does without nvidia-persistenced (NVIDIA/OpenShell #710).
# By a path none is bound: Landlock allows no socket to be made.
SERVED = words("socket bind listen connect")
# Success without effect: compilers and copy functions call these on their own files and need not fail. (fadvise would
# evict pages of any file that can be read.)
PRETENDED = words("chmod fchmod fchmodat utime utimes futimesat utimensat fadvise64")

NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
O_ACCMODE, O_TRUNC = 0o3, 0o1000
PAIRS = (1, 5)  # SOCK_STREAM, SOCK_SEQPACKET: a datagram pair could still send to any address
AF_UNIX = 1
PR_SET_PDEATHSIG = 1
MADV_COLD, MADV_PAGEOUT = 20, 21
RWF_NOWAIT, RWF_DONTCACHE = 0x8, 0x80
F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY = 8, 10, 15, 1024, 1026
TIOCSTI, TIOCLINUX, FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR, FS_IOC_SETVERSION = (
    0x5412,
    0x541C,
    0x40086602,
    0x401C5820,
    0x40087602,
)


@dataclass(frozen=True)
class Rule:
    """Compare the low half of one argument with `values`; on a match return `action`, else `otherwise`.

    `action` None: on a match the next rule of the same call decides."""

    call: str
    argument: int
    values: tuple[int, ...]
    action: int | None
    otherwise: int = ALLOW
    mask: int | None = None  # applied before the comparison
    any_bit: bool = False  # match when any bit of the value is set


def refuse(number: int) -> int:
    return ERRNO | number


def rules(own_pid: int | None) -> list[Rule]:
    """The calls whose arguments decide. `own_pid`: the only target of signals, where Landlock cannot scope them."""
    denied = refuse(errno.EPERM)
    found = [
        Rule("clone", 0, (NAMESPACES,), denied, any_bit=True),
        Rule("socketpair", 1, PAIRS, ALLOW, refuse(errno.EACCES), mask=0xF),
        # a file that may only be read could be emptied by O_TRUNC before Landlock's ABI 3
        Rule("open", 1, (O_TRUNC,), denied, mask=O_ACCMODE | O_TRUNC),
        Rule("openat", 2, (O_TRUNC,), denied, mask=O_ACCMODE | O_TRUNC),
        # what is cached, told and changed: as with mincore
        Rule("madvise", 2, (MADV_COLD, MADV_PAGEOUT), refuse(errno.EINVAL)),
        Rule("preadv2", 5, (RWF_NOWAIT | RWF_DONTCACHE,), refuse(errno.EOPNOTSUPP), any_bit=True),
        Rule("prctl", 0, (PR_SET_PDEATHSIG,), denied),
        Rule("prlimit64", 0, (0,), ALLOW, denied),
        Rule("sched_setaffinity", 0, (0,), ALLOW, denied),
        Rule("sched_setscheduler", 0, (0,), ALLOW, denied),
        Rule("sched_setparam", 0, (0,), ALLOW, denied),
        Rule("sched_setattr", 0, (0,), ALLOW, denied),
        Rule("setpriority", 1, (0,), ALLOW, denied),
        Rule("ioprio_set", 1, (0,), ALLOW, denied),
        Rule("fcntl", 1, (F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY), denied),
        Rule("ioctl", 1, (TIOCSTI, TIOCLINUX, FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR, FS_IOC_SETVERSION), denied),
    ]
    if own_pid is not None:
        found += [Rule(call, 0, (own_pid, 0), ALLOW, denied) for call in ("kill", "tgkill", "rt_sigqueueinfo")]
        found += [Rule(call, 0, (), ALLOW, denied) for call in ("tkill", "rt_tgsigqueueinfo", "pidfd_send_signal")]
    return found


def rules_of_cuda() -> list[Rule]:
    """What a child that uses an NVIDIA card may do beside that: see SERVED."""
    denied = refuse(errno.EACCES)
    return [
        Rule("socket", 0, (AF_UNIX,), None, denied),
        Rule("socket", 1, PAIRS, ALLOW, denied, mask=0xF),
        Rule("connect", 0, (), ALLOW, refuse(errno.ECONNREFUSED)),
    ]


def statement(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value)


def jump(code: int, value: int, yes: int, no: int) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def argument(index: int) -> int:
    return ARGUMENTS + 8 * index  # the low half: both machines are little-endian


def compiled(rule: Rule, number: int) -> list[bytes]:
    """BPF that returns for this call, and falls through with the call's number loaded for any other."""
    body = [statement(LOAD, argument(rule.argument))]
    if rule.mask is not None:
        body.append(statement(AND, rule.mask))
    code = JUMP_ANY_BIT if rule.any_bit else JUMP_EQUAL
    if rule.action is None:
        ahead = range(len(rule.values), 0, -1)  # beyond the other comparisons and the return
        body += [jump(code, value, steps, 0) for value, steps in zip(rule.values, ahead)]
        body += [statement(RETURN, rule.otherwise), statement(LOAD, NUMBER)]
        return [jump(JUMP_EQUAL, number, 0, len(body)), *body]
    for value in rule.values:
        body += [jump(code, value, 0, 1), statement(RETURN, rule.action)]
    body.append(statement(RETURN, rule.otherwise))
    return [jump(JUMP_EQUAL, number, 0, len(body)), *body]


def program(machine: str, own_pid: int | None = None, cuda: bool = False) -> bytes:
    """The whole filter for `x86_64` or `aarch64`, as an array of struct sock_filter. `cuda`: for NVIDIA's driver."""
    column = list(ARCHITECTURES).index(machine)

    def number(name: str) -> int | None:
        return CALLS[name][column]

    def simple(names: Iterable[str], action: int) -> list[bytes]:
        known = [n for n in map(number, names) if n is not None]
        return [part for n in known for part in (jump(JUMP_EQUAL, n, 0, 1), statement(RETURN, action))]

    parts = [
        statement(LOAD, ARCHITECTURE),
        jump(JUMP_EQUAL, ARCHITECTURES[machine], 1, 0),
        statement(RETURN, KILL),  # 32-bit calls have other numbers
        statement(LOAD, NUMBER),
    ]
    if machine == "x86_64":
        parts += [jump(JUMP_AT_LEAST, 0x40000000, 0, 1), statement(RETURN, KILL)]  # the x32 numbers
    for rule in [*rules(own_pid), *(rules_of_cuda() if cuda else [])]:
        call = number(rule.call)
        if call is not None:
            parts += compiled(rule, call)
    parts += simple([name for name in REFUSED if not cuda or name not in SERVED], refuse(errno.EACCES))
    parts += simple(ABSENT if cuda else ABSENT + MEMORY_FILES, refuse(errno.ENOSYS))
    parts += simple(PRETENDED, ERRNO)
    parts.append(statement(RETURN, ALLOW))
    return b"".join(parts)


def install(machine: str, own_pid: int | None = None, cuda: bool = False) -> None:
    """Filter this thread and all that it starts, for good. Needs no_new_privs. Raises OSError."""
    filters = program(machine, own_pid, cuda)
    array = ctypes.create_string_buffer(filters, len(filters))
    # struct sock_fprog: unsigned short len, padding, pointer
    wrapped = struct.pack(
        "@HxxxxxxQ" if struct.calcsize("P") == 8 else "@HxxI", len(filters) // 8, ctypes.addressof(array)
    )
    landlock.syscall("seccomp", SECCOMP[machine], 1, 0, wrapped)  # SECCOMP_SET_MODE_FILTER


def available(machine: str) -> bool:
    """Whether this kernel takes filters, and we have the numbers of its calls."""
    if machine not in SECCOMP:
        return False
    try:
        landlock.syscall("seccomp", SECCOMP[machine], 2, 0, struct.pack("=I", KILL))  # SECCOMP_GET_ACTION_AVAIL
    except OSError:
        return False
    return True
