"""Windows: a job object holds the tree, its memory and its number of processes, and ends them together.

What is missing is much, and `missing()` says it: files, network and other processes of this user stay open to a recipe
(an AppContainer would close them). The order of a start, the channel, the handing over of files, the watching and the
end run in the tests on Linux, with another `System`; the calls of `Windows` ran under Wine 10, never on Windows itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from ctypes import wintypes
from pathlib import Path
from socket import socket
from typing import IO, Protocol

import psutil

from core import handles, sandbox, trees, wire
from core.apart import CREATE_NEW_PROCESS_GROUP, CREATE_NO_WINDOW
from core.childlog import CappedLog
from core.handles import Giver
from core.windows import library

CREATE_SUSPENDED = 0x4
IDLE_PRIORITY = 0x40
# JOB_OBJECT_LIMIT_: no process outlives us; a fault ends a process, where it would show a dialogue and wait
KILL_ON_JOB_CLOSE, DIE_ON_UNHANDLED_EXCEPTION = 0x2000, 0x400
JOB_MEMORY, ACTIVE_PROCESS = 0x200, 0x8
EXTENDED_LIMITS = 9  # JobObjectExtendedLimitInformation; limits of the user interface would forbid to nest the job,
# and a terminal or an editor that runs us has often put us into one
KILLED = 137  # exit status of what a job ended


class BasicLimits(ctypes.Structure):
    _fields_ = [
        ("PerProcessUserTimeLimit", wintypes.LARGE_INTEGER),
        ("PerJobUserTimeLimit", wintypes.LARGE_INTEGER),
        ("LimitFlags", wintypes.DWORD),
        ("MinimumWorkingSetSize", ctypes.c_size_t),
        ("MaximumWorkingSetSize", ctypes.c_size_t),
        ("ActiveProcessLimit", wintypes.DWORD),
        ("Affinity", ctypes.c_size_t),
        ("PriorityClass", wintypes.DWORD),
        ("SchedulingClass", wintypes.DWORD),
    ]


class Limits(ctypes.Structure):
    _fields_ = [
        ("Basic", BasicLimits),
        ("IoInfo", ctypes.c_ulonglong * 6),
        ("ProcessMemoryLimit", ctypes.c_size_t),
        ("JobMemoryLimit", ctypes.c_size_t),
        ("PeakProcessMemoryUsed", ctypes.c_size_t),
        ("PeakJobMemoryUsed", ctypes.c_size_t),
    ]


class System(Protocol):
    """What the system does with a tree of processes. Everything raises `OSError` when it is refused."""

    def make_job(self, memory_bytes: int, processes: int) -> int:
        """An empty job with these limits (0 bytes: none), whose processes end with its last handle."""
        ...

    def start(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, idle: bool) -> subprocess.Popen[bytes]:
        """Suspended, before its first instruction; standard input is a pipe, output and error are another."""
        ...

    def assign(self, job: int, process: subprocess.Popen[bytes]) -> None:
        """Put the process, and all that it will start, into the job."""
        ...

    def giver(self, process: subprocess.Popen[bytes]) -> Giver: ...

    def end(self, job: int) -> None:
        """End every process of the job."""
        ...

    def peak(self, job: int) -> int:
        """Bytes: the most that the job's processes had at once."""
        ...

    def close(self, job: int) -> None: ...


class Windows:
    """`System` by kernel32."""

    def make_job(self, memory_bytes: int, processes: int) -> int:
        create = library("kernel32").CreateJobObjectW
        create.restype = wintypes.HANDLE
        job = checked(create(None, None), "CreateJobObject")
        limits = Limits()
        limits.Basic.LimitFlags = (
            KILL_ON_JOB_CLOSE | DIE_ON_UNHANDLED_EXCEPTION | ACTIVE_PROCESS | (JOB_MEMORY if memory_bytes else 0)
        )
        limits.Basic.ActiveProcessLimit = processes
        limits.JobMemoryLimit = memory_bytes
        call = library("kernel32").SetInformationJobObject
        try:
            done = call(wintypes.HANDLE(job), EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits))
            checked(done, "SetInformationJobObject")
        except OSError:
            self.close(job)
            raise
        return job

    def start(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, idle: bool) -> subprocess.Popen[bytes]:
        flags = CREATE_SUSPENDED | CREATE_NEW_PROCESS_GROUP | CREATE_NO_WINDOW | (IDLE_PRIORITY if idle else 0)
        command, more = without_redirector(argv)
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**env, **more},
            cwd=cwd,
            creationflags=flags,
        )

    def assign(self, job: int, process: subprocess.Popen[bytes]) -> None:
        call = library("kernel32").AssignProcessToJobObject
        checked(call(wintypes.HANDLE(job), wintypes.HANDLE(handle_of(process))), "AssignProcessToJobObject")

    def giver(self, process: subprocess.Popen[bytes]) -> Giver:
        return handles.WindowsGiver(process.pid, handle_of(process))

    def end(self, job: int) -> None:
        checked(library("kernel32").TerminateJobObject(wintypes.HANDLE(job), KILLED), "TerminateJobObject")

    def peak(self, job: int) -> int:
        limits = Limits()
        call = library("kernel32").QueryInformationJobObject
        done = call(wintypes.HANDLE(job), EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits), None)
        checked(done, "QueryInformationJobObject")
        return int(limits.PeakJobMemoryUsed)

    def close(self, job: int) -> None:
        checked(library("kernel32").CloseHandle(wintypes.HANDLE(job)), "CloseHandle")


def checked(result: int | None, call: str) -> int:
    """`result` of a call that answers 0 when it is refused."""
    if not result:
        number = getattr(ctypes, "get_last_error")()  # noqa: B009 - exists on Windows only
        raise OSError(f"{call}: Windows refused with error {number}")
    return result


def handle_of(process: subprocess.Popen[bytes]) -> int:
    return int(getattr(process, "_handle"))  # noqa: B009 - Windows only, where multiprocessing uses it too


def without_redirector(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command, and more environment for it, such that its process is the one that we start: a virtual environment's
    python.exe only starts the real one, whose number is another. As multiprocessing does it."""
    base = getattr(sys, "_base_executable", sys.executable)
    if argv[0] != sys.executable or base == sys.executable:
        return list(argv), {}
    return [base, *argv[1:]], {"__PYVENV_LAUNCHER__": sys.executable}


def environment(home: Path, caches: Path) -> dict[str, str]:
    """What a child on Windows needs besides, or otherwise, than elsewhere. Nothing of the user's own folders."""
    root = os.environ.get("SYSTEMROOT", r"C:\Windows")
    return {
        "PATH": ";".join([*map(str, _python_folders()), rf"{root}\System32", root]),
        "USERPROFILE": str(home),
        "APPDATA": str(caches / "roaming"),
        "LOCALAPPDATA": str(caches / "local"),
        "PYTHONUTF8": "1",
    }


def _python_folders() -> list[Path]:
    """Where this Python's libraries lie: conda keeps those that ctypes and numpy need in folders of their own."""
    base = Path(sys.base_prefix)
    more = (base / "DLLs", base / "Library" / "bin", base / "Library" / "mingw-w64" / "bin")
    return [base, *(folder for folder in more if folder.is_dir())]


def hard_limit(policy: sandbox.Policy) -> int:
    """Bytes that the job refuses to exceed. A card's driver commits system memory for the card's own, as much as that
    has, so for a GPU there is no such limit: there the memory in RAM is looked at."""
    return policy.memory_bytes if policy.backend == "cpu" else 0


def launch(
    argv: list[str], policy: sandbox.Policy, *, cwd: Path, log: Path, system: System | None = None
) -> WindowsChild:
    """Start suspended, put into the job, let go: nothing of the child runs before the job holds it. `OSError` when that
    is refused; nothing is left then."""
    system = system or Windows()
    with contextlib.ExitStack() as undo:
        job = system.make_job(hard_limit(policy), policy.processes)
        undo.callback(system.close, job)
        ours, theirs = handles.pair()
        undo.callback(ours.close)
        with theirs:
            env = {**policy.env, wire.CHANNEL: wire.NOTED}
            process = system.start(sandbox.command(argv, policy), env, cwd, policy.nice > 0)
            try:
                system.assign(job, process)
                psutil.Process(process.pid).resume()
            except (OSError, psutil.Error) as error:
                process.kill()
                process.wait()
                raise OSError(f"the child could not be put into its job: {error}") from error
            giver = system.giver(process)
            with contextlib.suppress(OSError):  # it has ended: its channel closes now, and its log says why
                tell(process, giver.share(theirs))
        undo.pop_all()
    return WindowsChild(process, ours, policy, CappedLog(log, policy.log_bytes), system, job, giver)


def tell(process: subprocess.Popen[bytes], note: bytes) -> None:
    stream: IO[bytes] | None = process.stdin
    if stream is not None:
        with stream:
            stream.write(note.hex().encode() + b"\n")


class WindowsChild(sandbox.Child):
    """The job does what launcher, init and control groups do elsewhere."""

    _process: subprocess.Popen[bytes]

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        channel: socket,
        policy: sandbox.Policy,
        log: CappedLog,
        system: System,
        job: int,
        giver: Giver,
    ) -> None:
        self._system = system
        self._job: int | None = job  # None once its handle is closed
        super().__init__(process, channel, policy, None, log, (-1, -1, -1))
        self.giver = giver
        self.enforced = {"job": True, "memory": "job object" if hard_limit(policy) else "watched"}

    def _keep(self) -> None:
        """Look at the tree until its first process ends, then end what it has left behind."""
        reader = threading.Thread(target=self._read, name=f"sandbox-log-{self.pid}", daemon=True)
        reader.start()
        while self._process.poll() is None:
            self._look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(sandbox.WATCH_EVERY)
        code = self._process.wait()
        with contextlib.suppress(OSError):  # what is left ends with the job's last handle, in `_finish`
            self._tell_launcher()
        reader.join(sandbox.END_WITHIN)  # the pipe ends with the last process that holds it
        try:
            self._finish()
        finally:
            self._code = -9 if code == KILLED else code
            self._ended.set()

    def _finish(self) -> None:
        with self._lock:
            job, self._job = self._job, None
        try:
            if job is not None:
                if self._policy.backend == "cpu":  # else the job's figure holds what a driver commits for the card
                    with contextlib.suppress(OSError):  # then the largest that was seen counts
                        self._peak = max(self._peak, self._system.peak(job))
                self._system.close(job)
        finally:
            self._log.close()

    def _read(self) -> None:
        output = self._process.stdout
        if output is not None:
            with output:
                while data := os.read(output.fileno(), 1 << 16):
                    self._log.add(data)

    def _tree(self) -> list[int]:
        found = [self.pid, *trees.descendants(self.pid)]
        self._seen.update({pid: trees.started(pid) for pid in found if pid not in self._seen})
        return found

    def _lowered(self, tree: list[int]) -> str | None:
        """Windows ranks no process to be ended when memory runs out."""
        return None

    def _tell_launcher(self) -> None:
        """End the job's processes; nothing when that was done and the handle is closed."""
        with self._lock:
            if self._job is not None:
                self._system.end(self._job)


def missing() -> list[str]:
    return [
        "Windows: a recipe can read and write this user's files, prepared data among them (no AppContainer yet)",
        "Windows: a recipe can open network connections",
        "Windows: a recipe can read and write the memory of this user's other processes, the referee's too",
        "Windows: a recipe can read the clipboard and send input to other programs' windows",
        "Windows: with a GPU backend memory is looked at every 0.1 s, a faster rise can overshoot",
        "the calls of Windows' job objects and handles ran under Wine only, never on a Windows machine",
    ]
