"""Runs untrusted Python with little around it: `launch(argv, policy)` gives a `Child` that can be ended as a whole.

What is enforced where, and what is not, is in docs/sandbox.md; `abilities()` says it for this machine. The work is
done by `core/launcher.py` (processes), `core/landlock.py` and `core/seccomp.py` (Linux), `core/sandbox_macos.py`,
`core/sandbox_windows.py`; what a child may read is listed in `core/readable.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from core import allocator, cgroups, freezing, landlock, nvidia_nodes, paths, processes, readable, trees
from core import caches as compile_caches
from core.childlog import CappedLog
from core.handles import Giver

if TYPE_CHECKING:
    from core.doctor import Check
    from core.forkserver import Forked, Forkserver

GIB = 1 << 30
LAUNCHER = "core/launcher.py"
WATCH_EVERY = 0.1  # seconds between two looks at a tree whose memory nobody else limits
LOOK_EVERY = 0.5  # the same where a cgroup limits it
DISK_EVERY = 2.0  # seconds between two looks at what is written
FAILED = 125  # exit status when the sandbox could not be applied
END_WITHIN = 60.0  # seconds in which a killed tree has to be gone; more means a process stuck in the kernel

# Passed on from our environment where set; everything else is made here. None of these carries a secret.
PASSED_ON = readable.words(
    "LANG LC_ALL LC_CTYPE TZ OMP_NUM_THREADS OMP_PROC_BIND OMP_WAIT_POLICY MKL_NUM_THREADS OPENBLAS_NUM_THREADS "
    "GOMP_SPINCOUNT KMP_BLOCKTIME KMP_AFFINITY ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA "
    "CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_HOME CUDA_PATH HIP_VISIBLE_DEVICES ROCM_PATH TRITON_PTXAS_PATH "
    "TRITON_PTXAS_BLACKWELL_PATH TRITON_LIBCUDA_PATH "
    "PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF LD_LIBRARY_PATH CC CXX SDKROOT SYSTEMROOT SYSTEMDRIVE WINDIR PATHEXT "
    "COMSPEC PROGRAMDATA PROGRAMFILES PROGRAMFILES(X86) PROCESSOR_ARCHITECTURE PROCESSOR_IDENTIFIER "
    "NUMBER_OF_PROCESSORS"
)


USER = "sandbox"  # what children are told
PROGRAMS = ("/usr/local/bin", "/usr/bin", "/bin", "/opt/homebrew/bin")


class SandboxError(Exception):
    """A tree that could not be ended, with the pids that are left."""


@dataclass(frozen=True)
class Layers:
    """Which walls to use where there are any. For tests, which show that one holds without another."""

    landlock: int = 99  # highest ABI
    seccomp: bool = True
    namespaces: bool = True
    cgroups: bool = True


@dataclass(frozen=True)
class Policy:
    """What a child may do. `readable.basics(backend)` is always readable: interpreter, libraries, packages."""

    readable: tuple[Path, ...]
    writable: tuple[Path, ...]
    memory_bytes: int = 0  # of the whole tree; 0: no limit
    processes: int = 64  # of the whole tree
    nice: int = 0  # added to our priority, 19: the lowest
    env: Mapping[str, str] = field(default_factory=dict)
    log_bytes: int = 1 << 20
    file_bytes: int = 16 * GIB  # of one file
    disk_bytes: int = 32 * GIB  # of all that is writable
    backend: str = "cpu"
    layers: Layers = Layers()

    def tasks(self) -> int:
        """Processes and threads of the tree: libraries start a few threads for each core."""
        return self.processes + 64 + 16 * (os.cpu_count() or 1)

    def rules(self) -> list[tuple[str, int]]:
        """Landlock rules: (path, rights beneath it)."""
        given = [(str(p), landlock.READ) for p in self.readable] + [(str(p), landlock.WRITE) for p in self.writable]
        return [*readable.basics(self.backend), *given]


def standard_policy(
    scratch: Path,
    backend: str,
    *,
    readable: tuple[Path, ...] | list[Path] = (),
    writable: tuple[Path, ...] | list[Path] = (),
    memory_bytes: int = 0,
    caches: Path | None = None,
    nice: int = 0,
    env: Mapping[str, str] | None = None,
) -> Policy:
    """For a worker of `backend`: scratch, a private TMPDIR in it and `caches` (default: in it) are writable.

    `env` is what it has in its environment beside what all have."""
    scratch = scratch.resolve()
    caches = (caches or scratch / "caches").resolve()
    temporary = scratch / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    # torch.compile keeps its precompiled header (seconds of g++) under TMPDIR and a user's name, not in its cache; MLX
    # keeps all that it compiles (Linux) there. On Windows, where links are for administrators, neither is so.
    for name, kept in ((f"torchinductor_{USER}", "headers"), ("mlx", "mlx")):
        (caches / kept).mkdir(parents=True, exist_ok=True)
        if sys.platform != "win32" and not (temporary / name).is_symlink():
            (temporary / name).symlink_to(caches / kept, target_is_directory=True)
    return Policy(
        readable=tuple(Path(p).resolve() for p in readable),
        writable=(scratch, caches, *(Path(p).resolve() for p in writable)),
        memory_bytes=memory_bytes,
        nice=nice,
        env=environment(scratch, temporary, caches) | preloaded(backend) | dict(env or {}),
        backend=backend,
    )


OPENBLAS = ("x86_64-linux-gnu/openblas-pthread", "aarch64-linux-gnu/openblas-pthread", "openblas-pthread", "openblas")


def preloaded(backend: str) -> dict[str, str]:
    """MLX's wheel for Linux brings a BLAS that runs at a tenth of OpenBLAS's speed: where that is installed it is used.

    (Debian and Ubuntu: libopenblas0-pthread.)
    """
    if backend != "mlx" or sys.platform != "linux":
        return {}
    found = [p for place in OPENBLAS if (p := Path("/usr/lib") / place / "libblas.so.3").is_file()]
    return {"LD_PRELOAD": str(found[0])} if found else {}


def environment(home: Path, temporary: Path, caches: Path) -> dict[str, str]:
    """The child's whole environment."""
    made = {
        "PATH": os.pathsep.join(p for p in PROGRAMS if Path(p).is_dir()) or os.defpath,
        "LANG": "C.UTF-8",
        "HOME": str(home),
        "USER": USER,
        "LOGNAME": USER,
        "TMPDIR": str(temporary),
        "TMP": str(temporary),
        "TEMP": str(temporary),
        **compile_caches.environment(caches),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
        **allocator.settings(os.environ),
        # Compiled in the process itself: a pool of compilers needs /dev/shm, and two cores gain nothing by it.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # A GNU OpenMP thread that waits at a barrier spins before it sleeps. Beside one busy process the default of
        # 300,000 rounds makes steps 4 times as long; 6,000 make them 3 times as long there, and 1 % longer on an idle
        # machine (docs/verified.md).
        "GOMP_SPINCOUNT": "6000",
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
    }
    if sys.platform == "win32":
        from core import sandbox_windows

        made |= sandbox_windows.environment(home, caches)
    return {**made, **{name: os.environ[name] for name in PASSED_ON if name in os.environ}}


@dataclass(frozen=True)
class Abilities:
    """What this machine enforces, and what it lacks."""

    platform: str
    landlock: int  # ABI, 0: none
    seccomp: bool
    namespaces: bool  # pid, network and ipc namespaces of the child's own
    memory: str  # "cgroup v1", "cgroup v2" or "watched"
    processes: str
    missing: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@lru_cache(maxsize=1)
def abilities() -> Abilities:
    """Found by trying, once per process (some 30 ms)."""
    if sys.platform == "darwin":
        from core import sandbox_macos

        return Abilities("darwin", 0, False, False, "watched", "watched", sandbox_macos.missing())
    if sys.platform == "win32":
        from core import sandbox_windows

        return Abilities("win32", 0, False, False, "job object", "job object", sandbox_windows.missing())
    command = [sys.executable, "-I", "-S", str(paths.project_root() / LAUNCHER), "--probe"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)
    kinds = {limit: f"cgroup v{place.version}" for place in cgroups.places() for limit in place.limits}
    return Abilities(
        platform="linux",
        landlock=found["landlock"],
        seccomp=found["seccomp"],
        namespaces=found["namespaces"],
        memory=kinds.get("memory", "watched"),
        processes=kinds.get("pids", "watched"),
        missing=lacking(found, kinds),
    )


def lacking(found: Mapping[str, Any], kinds: Mapping[str, str]) -> list[str]:
    """Plain sentences about what Linux does not enforce here."""
    missing = []
    abi = found["landlock"]
    if not abi:
        missing.append("Landlock (Linux 5.13): a recipe can read this user's files and other processes' environment")
    elif abi == 1:
        missing.append("Landlock ABI 2 (Linux 5.19): native code in a recipe cannot rename across folders")
    if not found["seccomp"]:
        missing.append("seccomp filter: a recipe can open network connections unless a namespace keeps it from that")
    if not found["namespaces"]:
        missing.append(
            "pid namespace: processes are ended one by one, and if launcher and referee are both killed, some may stay"
        )
    if "memory" not in kinds:
        missing.append(f"memory cgroup: memory is looked at every {WATCH_EVERY:g} s, a faster rise can overshoot")
    if "pids" not in kinds:
        missing.append(f"pids cgroup: processes are counted every {WATCH_EVERY:g} s")
    return missing


def self_check() -> list[Check]:
    """Children that attack the sandbox, and what came of it, for `doctor`."""
    if sys.platform == "win32":  # what attacks is POSIX
        from core import selfcheck_windows

        return selfcheck_windows.self_check()
    from core import selfcheck

    return selfcheck.self_check()


def launch(argv: list[str], policy: Policy, *, cwd: Path, log: Path, forkserver: Forkserver | None = None) -> Child:
    """Start `argv` under `policy`; with a forkserver (of an equal policy) in a fork of it, without a new Python. The
    child's end of the channel is what its AUTORESEARCH_CHANNEL says: a descriptor, or that a note on standard input
    tells (see `core.wire.own_channel`).

    A Python command (`argv[0]` is `sys.executable`) gets its import path from `core/inside.py`: project, standard
    library, listed packages; never the working directory. Raises OSError when no process can be started, UserError
    when a card lacks what only its user can make.
    """
    if sys.platform == "win32":
        from core import sandbox_windows

        return sandbox_windows.launch(argv, policy, cwd=cwd, log=log)
    if policy.backend in readable.NVIDIA:
        nvidia_nodes.make()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    group = make_group(policy)
    with contextlib.ExitStack() as given, contextlib.ExitStack() as kept:
        kept.callback(ours.close)
        if group:
            kept.callback(group.remove)
        control_reader, control = os.pipe()
        status, status_writer = os.pipe()
        output, output_writer = os.pipe()
        ends = [theirs.detach(), control_reader, status_writer, output_writer]
        for end in ends:
            given.callback(os.close, end)
        for end in (control, status, output):
            kept.callback(os.close, end)
        orders = {
            "goes_on": forkserver is not None,
            "argv": argv[1:] if forkserver else command(argv, policy),
            "name": log.stem,
            "env": {**policy.env, "AUTORESEARCH_CHANNEL": str(ends[0])},
            "cwd": str(cwd),
            "rules": policy.rules(),
            "abi": policy.layers.landlock,
            "filter": policy.layers.seccomp,
            "cuda": policy.backend in readable.NVIDIA,
            "namespaces": policy.layers.namespaces and abilities().namespaces,
            "groups": group.doors() if group else [],
            "limits": resource_limits(policy),
            "nice": policy.nice,
            "channel": ends[0],
            "control": control_reader,
            "status": status_writer,
            "referee": os.getpid(),
        }
        with written(json.dumps(orders)) as stream:
            process = forkserver.fork([stream.fileno(), *ends]) if forkserver else started(stream, ends)
        kept.pop_all()
    return Child(process, ours, policy, group, CappedLog(log, policy.log_bytes), (output, status, control))


def started(orders: IO[bytes], ends: list[int]) -> subprocess.Popen[bytes]:
    """A launcher with these orders. `ends`: its channel, control, status, output."""
    *inherited, output = ends
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(paths.project_root() / LAUNCHER), str(orders.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={"LANG": "C.UTF-8"},
        cwd="/",
        pass_fds=[orders.fileno(), *inherited],
        start_new_session=True,
    )


def command(argv: list[str], policy: Policy) -> list[str]:
    """Python commands go through `core/inside.py`; on macOS all go through sandbox-exec."""
    if argv[0] == sys.executable:
        root = paths.project_root()
        setup = {
            "root": str(root),
            "prefix": sys.prefix,
            "folders": readable.package_folders(),
            "names": readable.package_names(policy.backend),
            "abi": min(abilities().landlock, policy.layers.landlock),
        }
        flags = ["-s", "-S", "-u", "-B", "-X", "faulthandler"]
        argv = [argv[0], *flags, str(root / "core/inside.py"), json.dumps(setup), *argv[1:]]
    if sys.platform == "darwin":
        from core import sandbox_macos

        argv = ["/usr/bin/sandbox-exec", "-p", sandbox_macos.profile(policy.rules()), *argv]
    return argv


def resource_limits(policy: Policy) -> dict[str, int]:
    # RLIMIT_CORE 1, not 0: where cores are piped to a program Linux ignores the limit but for this value (core(5)).
    limits = {"RLIMIT_CORE": 1, "RLIMIT_NOFILE": 4096, "RLIMIT_FSIZE": policy.file_bytes}
    if sys.platform == "linux":
        # Counts tasks of this user outside the tree too, so it lies above all that run now. Root is exempt.
        now = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
        limits["RLIMIT_NPROC"] = now + policy.tasks()
    return limits


def make_group(policy: Policy) -> cgroups.Group | None:
    places = cgroups.places() if sys.platform == "linux" and policy.layers.cgroups else ()
    try:
        return cgroups.Group(places, policy.memory_bytes, policy.tasks()) if places else None
    except OSError:
        return None  # it could be done before; then this child is watched


def written(text: str) -> IO[bytes]:
    """An open, unnamed file with this text, to be read from its start."""
    stream = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the caller
    stream.write(text.encode())
    stream.seek(0)
    return stream


class Child:
    """A sandboxed process and everything below it. `pid` is the launcher's, the root of the tree."""

    def __init__(
        self,
        process: subprocess.Popen[bytes] | Forked,
        channel: socket.socket,
        policy: Policy,
        group: cgroups.Group | None,
        log: CappedLog,
        pipes: tuple[int, int, int],
    ) -> None:
        self.pid = process.pid
        self.channel = channel
        self.giver: Giver | None = None  # by which files are handed over where the channel carries none
        self.enforced: dict[str, Any] = {}  # what the launcher applied; complete once the child runs
        self._process = process
        self._policy = policy
        self._group = group
        self._log = log
        self._output, self._status, self._control = pipes
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._code: int | None = None
        self._exit: int | None = None  # the recipe's own, when it ended by itself
        self._left = False  # whether the launcher has said that it has done its work
        self._exceeded: str | None = None
        self._peak = 0
        self._disk_seen = 0.0
        self._seen: dict[int, float] = {}  # pid -> when it started
        self._keeper = threading.Thread(target=self._watch, name=f"sandbox-{self.pid}", daemon=True)
        self._keeper.start()

    # --- for the referee -------------------------------------------------------------------------

    def poll(self) -> int | None:
        """The exit status (negative: the signal) once the whole tree is gone, else None. 125: not applied."""
        return self._code if self._ended.is_set() else None

    def wait(self, timeout: float | None = None) -> int | None:
        self._ended.wait(timeout)
        return self.poll()

    def kill(self) -> None:
        """End the whole tree and return when it is gone. Raises SandboxError when something stays."""
        self._tell_launcher()
        if not self._ended.wait(END_WITHIN):
            self._process.kill()
            left = self._sweep()
            if left or not self._ended.wait(END_WITHIN):
                raise SandboxError(f"processes {sorted(left)} cannot be ended; they are stuck in the kernel")

    def peak_memory(self) -> int:
        """Bytes: the largest seen for the tree (looked at in steps), at least the largest of its main process."""
        return self._peak

    def exceeded(self) -> str | None:
        """The limit that ended the child, with its numbers; None when none did."""
        return self._exceeded

    def log_tail(self, lines: int = 50) -> str:
        return self._log.tail(lines)

    def freeze(self) -> freezing.Frozen:
        """Stop the recipe's process and all below it. Raises `freezing.FreezeError` when one does not stop."""
        return freezing.freeze(lambda: self._of_the_recipe(trees.listed(self.pid)))

    # --- the keeper's thread ---------------------------------------------------------------------

    def _watch(self) -> None:
        """`_keep`; when that fails, the tree ends: nothing runs unwatched, and nobody waits for what nobody tells."""
        try:
            self._keep()
        finally:
            if not self._ended.is_set():
                self._exceeded = self._exceeded or "the thread that watches it failed: see its traceback above"
                self._code = -9
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    self._tell_launcher()
                    self._process.wait(END_WITHIN)
                self._process.kill()
                self._process.wait()
                self._sweep()
                if self._group:
                    self._group.remove()
                self._log.close()
                self._ended.set()

    def _keep(self) -> None:
        """Drain the output, listen to the launcher, look at the tree, until the launcher has gone."""
        os.set_blocking(self._output, False)  # type: ignore[attr-defined,unused-ignore]  # Windows: since Python 3.12
        pause = LOOK_EVERY if self._group and "memory" in self._group.limits else WATCH_EVERY
        poll = selectors.DefaultSelector()
        for descriptor in (self._output, self._status):
            poll.register(descriptor, selectors.EVENT_READ)
        look_at = time.monotonic()
        said = b""
        while True:
            wait = max(0.0, look_at - time.monotonic())
            ready = {key.fd for key, _ in poll.select(wait)}
            if self._output in ready:
                self._drain(1 << 20)
            if self._status in ready:
                data = os.read(self._status, 1 << 16)
                if not data:
                    break  # launcher and init are gone
                *lines, said = (said + data).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
            if time.monotonic() >= look_at:
                self._look()
                look_at = time.monotonic() + pause
        poll.close()
        self._finish()

    def _hear(self, said: dict[str, Any]) -> None:
        if said.pop("ready", False):
            self.enforced = said
        self._left = self._left or "left" in said
        self._peak = max(self._peak, said.get("maxrss", 0))
        self._exit = FAILED if "failed" in said else said.get("exit", self._exit)

    def _drain(self, size: int) -> bool:
        """Read what is there; False when nothing is."""
        try:
            data = os.read(self._output, size)
        except BlockingIOError:
            return False
        self._log.add(data)
        return bool(data)

    def _look(self) -> None:
        """One look at memory and numbers of the tree."""
        tree = self._tree()
        if len(tree) > self._policy.processes:  # first: what they use together takes long to count
            self._end(f"processes: {len(tree)} of {self._policy.processes}")
            return
        used = sum(trees.resident(pid) for pid in tree)
        limit = self._policy.memory_bytes
        if len(tree) > 1 and used > min(limit or self._peak, self._peak):
            used = sum(trees.proportional(pid) for pid in tree)  # shared pages counted once
        self._peak = max(self._peak, used, *(trees.peak(pid) for pid in tree[:1]))
        if limit and used > limit:
            self._end(over("memory", used, limit))
        elif lowered := self._lowered(tree):
            self._end(lowered)
        elif refused := self._refused():
            self._end(refused)
        elif time.monotonic() - self._disk_seen > DISK_EVERY:
            self._disk_seen = time.monotonic()
            written = trees.disk_usage(self._policy.writable)
            if written > self._policy.disk_bytes:
                self._end(over("disk", written, self._policy.disk_bytes))

    def _lowered(self, tree: list[int]) -> str | None:
        """Where NVIDIA's driver names its threads a recipe can write what lies beside the name, too, and with it leave
        its place in front of the referee when the machine's memory runs out. Nothing honest does."""
        if self._policy.backend not in readable.NVIDIA or not self.enforced:
            return None
        rank = min((processes.oom_rank(pid) for pid in tree), default=processes.FIRST_TO_GO)
        if rank >= processes.FIRST_TO_GO:
            return None
        return f"its oom_score_adj was lowered from {processes.FIRST_TO_GO} to {rank}: others would be ended before it"

    def _tree(self) -> list[int]:
        """The recipe's process and all below it, launcher and init not counted."""
        found = trees.descendants(self.pid)
        self._seen.update({pid: trees.started(pid) for pid in found if pid not in self._seen})
        return self._of_the_recipe(found)

    def _of_the_recipe(self, tree: list[int]) -> list[int]:
        """What is below the launcher without init, which is the launcher's only child where there is one."""
        return tree[1:] if self.enforced.get("namespaced", self._policy.layers.namespaces) else tree

    def _end(self, reason: str) -> None:
        self._exceeded = self._exceeded or reason
        self._tell_launcher()

    def _tell_launcher(self) -> None:
        with self._lock:
            if self._control >= 0:
                try:
                    os.write(self._control, b"end")
                except BrokenPipeError:
                    pass  # it has gone already
                os.close(self._control)
                self._control = -1

    def _finish(self) -> None:
        """The launcher has ended the tree and left, or was killed itself."""
        launcher = self._process.wait()
        if launcher is None:  # the child of another process, who alone is told
            launcher = 0 if self._left else -9
        if launcher:
            self._sweep()
        self._exceeded = self._exceeded or self._refused()
        if self._group:
            self._group.remove()
        while self._drain(1 << 20):
            pass
        self._log.close()
        self._tell_launcher()
        os.close(self._output)
        os.close(self._status)
        killed = -9 if launcher == 0 else launcher  # no exit was reported: the launcher ended the recipe
        self._code = killed if self._exit is None else self._exit
        self._ended.set()

    def _refused(self) -> str | None:
        """What the kernel refused to the group, as `exceeded` says it."""
        limit = self._policy.memory_bytes
        if self._group and self._group.out_of_memory():
            self._peak = max(self._peak, limit)
            return over("memory", limit, limit) if limit else "memory: none was left on this machine"
        if self._group and self._group.out_of_tasks():
            return f"processes: more than {self._policy.tasks()} processes and threads"
        return None

    def _sweep(self) -> set[int]:
        """End what a killed launcher has left, by all that is known of the tree; returns the pids that stay."""
        deadline = time.monotonic() + END_WITHIN
        while True:
            left = {pid for pid, began in self._seen.items() if trees.alive(pid) and trees.started(pid) == began}
            left |= {pid for pid in (self._group.members() if self._group else ()) if trees.alive(pid)}
            if not left or time.monotonic() > deadline:
                return left
            trees.end(sorted(left))
            time.sleep(0.01)


def over(what: str, used: int, limit: int) -> str:
    unit, name = (GIB, "GiB") if limit >= GIB else (1 << 20, "MiB")
    return f"{what}: {used / unit:.1f} of {limit / unit:.1f} {name}"
