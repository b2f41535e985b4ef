"""Windows: a job object holds the tree, its memory and its number of processes. From the documentation, not run.

What is missing is much: files, network and other processes of this user stay open to a recipe (an AppContainer
would close them), and the channel is a TCP pair on the loopback address, over which no file can be handed.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from ctypes import wintypes
from pathlib import Path
from typing import Any

from core import sandbox, trees
from core.childlog import CappedLog

CREATE_SUSPENDED = 0x4
IDLE_PRIORITY = 0x40
KILL_ON_JOB_CLOSE, JOB_MEMORY, ACTIVE_PROCESS = 0x2000, 0x200, 0x8
EXTENDED_LIMITS = 9  # JobObjectExtendedLimitInformation
KILLED = 137


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


def library(name: str) -> Any:
    return getattr(ctypes, "WinDLL")(name, use_last_error=True)  # noqa: B009 - exists on Windows only


def make_job(memory_bytes: int, processes: int) -> int:
    kernel = library("kernel32")
    kernel.CreateJobObjectW.restype = wintypes.HANDLE
    job = kernel.CreateJobObjectW(None, None)
    limits = Limits()
    limits.Basic.LimitFlags = KILL_ON_JOB_CLOSE | ACTIVE_PROCESS | (JOB_MEMORY if memory_bytes else 0)
    limits.Basic.ActiveProcessLimit = processes
    limits.JobMemoryLimit = memory_bytes
    done = kernel.SetInformationJobObject(
        wintypes.HANDLE(job), EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)
    )
    if not job or not done:
        raise OSError("a job object could not be made")
    return job


def peak_of_job(job: int) -> int:
    limits = Limits()
    library("kernel32").QueryInformationJobObject(
        wintypes.HANDLE(job), EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits), None
    )
    return int(limits.PeakJobMemoryUsed)


def launch(argv: list[str], policy: sandbox.Policy, *, cwd: Path, log: Path) -> sandbox.Child:
    """Start suspended, put into the job, let go: no child process can come before the job holds it."""
    if sys.platform != "win32":
        raise OSError("job objects exist on Windows only")
    ours, theirs = socket.socketpair()
    job = make_job(policy.memory_bytes, policy.processes)
    theirs.set_inheritable(True)
    startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [theirs.fileno()]})
    process = subprocess.Popen(
        sandbox.command(argv, policy),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**policy.env, "AUTORESEARCH_CHANNEL": str(theirs.fileno())},
        cwd=cwd,
        startupinfo=startup,
        creationflags=CREATE_SUSPENDED | subprocess.CREATE_NEW_PROCESS_GROUP | (IDLE_PRIORITY if policy.nice else 0),
    )
    theirs.close()
    handle = wintypes.HANDLE(int(process._handle))
    library("kernel32").AssignProcessToJobObject(wintypes.HANDLE(job), handle)
    library("ntdll").NtResumeProcess(handle)
    return WindowsChild(process, ours, policy, job, CappedLog(log, policy.log_bytes))


class WindowsChild(sandbox.Child):
    """The same outside as `sandbox.Child`; the job does what the launcher does elsewhere."""

    def __init__(
        self, process: subprocess.Popen[bytes], channel: socket.socket, policy: sandbox.Policy, job: int, log: CappedLog
    ) -> None:
        self.pid = process.pid
        self.channel = channel
        self.enforced = {"job": True}
        self._process = process
        self._policy = policy
        self._job = job
        self._log = log
        self._ended = threading.Event()
        self._code = None
        self._exceeded = None
        self._keeper = threading.Thread(target=self._keep, name=f"sandbox-{self.pid}", daemon=True)
        self._keeper.start()
        threading.Thread(target=self._read, name=f"sandbox-log-{self.pid}", daemon=True).start()

    def _read(self) -> None:
        output = self._process.stdout
        while output and (data := os.read(output.fileno(), 1 << 16)):
            self._log.add(data)

    def _keep(self) -> None:
        while self._process.poll() is None:
            limit = self._policy.memory_bytes
            if limit and trees.resident(self.pid) > limit:
                self._exceeded = sandbox.over("memory", trees.resident(self.pid), limit)
                break
            time.sleep(sandbox.WATCH_EVERY)
        library("kernel32").TerminateJobObject(wintypes.HANDLE(self._job), KILLED)
        self._code = self._process.wait()
        self._log.close()
        self._ended.set()

    def kill(self) -> None:
        library("kernel32").TerminateJobObject(wintypes.HANDLE(self._job), KILLED)
        if not self._ended.wait(sandbox.END_WITHIN):
            raise sandbox.SandboxError(f"process {self.pid} cannot be ended")

    def peak_memory(self) -> int:
        return peak_of_job(self._job)


def missing() -> list[str]:
    return [
        "Windows: a recipe can read and write this user's files (no AppContainer yet)",
        "Windows: a recipe can open network connections",
        "Windows: files cannot be handed over the channel",
        "the job-object code has not been run on Windows yet",
    ]
