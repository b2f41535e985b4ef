"""The referee's side of `core/forking.py`: the process that loads the backend's library once for an experiment."""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from core import processes, sandbox
from core.childlog import CappedLog
from core.sandbox import Policy

SURVIVE = ("cpu", "cuda", "rtx")  # backends whose library, torch, goes on in a fork
OVERCOMMIT, PROMISED = "/proc/sys/vm/overcommit_memory", b"2"
LOOK_EVERY = 0.1  # seconds between two looks at what else the caller waits for
FORK_CAP = 30.0  # seconds in which a fork has to be there, on a busy machine
EXIT_CAP = 5.0  # seconds that it has to leave by itself


class NotLoaded(Exception):
    """The library is not there. `code`: exit status of who should have it; None: it did not answer in time."""

    def __init__(self, code: int | None) -> None:
        self.code = code
        super().__init__("no answer in time" if code is None else f"exit status {code}")


def possible(backend: str) -> bool:
    """Whether children of this backend can be forks here. What is another's child is watched by a pidfd: Linux 5.3;
    some containers refuse them, and a Python that was built against old headers has none (conda's, uv's before 2026).
    Where the kernel promises no memory that there is not, each fork would be promised all of the library's again."""
    return sys.platform == "linux" and backend in SURVIVE and handles()


@lru_cache(maxsize=1)
def handles() -> bool:
    if not hasattr(os, "pidfd_open") or not hasattr(signal, "pidfd_send_signal"):
        return False
    try:
        handle = os.pidfd_open(os.getpid())
    except OSError:
        return False
    try:
        signal.pidfd_send_signal(handle, 0)  # type: ignore[arg-type]  # no signal: whether one could be sent
        return processes.read(OVERCOMMIT).strip() != PROMISED
    except OSError:
        return False
    finally:
        os.close(handle)


class Forkserver:
    """Loads the library from its start on; `fork` starts a launcher with its tree. It ends with `close`, or with the
    referee."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        """`policy`: of its children; `folder`: to work in, and for what it prints."""
        self._log = CappedLog(folder / "library.log", policy.log_bytes)
        self._server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._output, writer = os.pipe()
        os.set_blocking(self._output, False)
        try:
            argv = [sys.executable, "fork", f"backends.{policy.backend}.device", str(theirs.fileno())]
            self._process = subprocess.Popen(
                sandbox.command(argv, policy),
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                env=dict(policy.env),
                cwd=folder,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except BaseException:
            self._server.close()
            os.close(self._output)
            self._log.close()
            raise
        finally:
            theirs.close()
            os.close(writer)
        self.pid = self._process.pid
        self._loaded = False

    def wait(self, watch: Callable[[], None], timeout: float) -> None:
        """Until the library is loaded; `watch` is called while waiting. Raises `NotLoaded`."""
        deadline = time.monotonic() + timeout
        while not self._loaded:
            watch()
            self._drain()
            left = deadline - time.monotonic()
            if left <= 0:
                raise NotLoaded(None)
            if self._answers(min(LOOK_EVERY, left)):
                self._heard(1)
                self._loaded = True

    def fork(self, descriptors: Sequence[int]) -> Forked:
        """A new launcher with these descriptors: orders, channel, control, status, output. Raises `NotLoaded`."""
        try:
            socket.send_fds(self._server, [b"f"], list(descriptors))
        except (BrokenPipeError, ConnectionResetError):
            raise NotLoaded(self._end()) from None
        if not self._answers(FORK_CAP):
            self._process.kill()  # its late answer would be taken for another child's
            raise NotLoaded(None)
        pid = array.array("i")
        pid.frombytes(self._heard(pid.itemsize))
        try:
            return Forked(pid[0])
        except ProcessLookupError:  # reaped, so it has ended itself
            raise NotLoaded(self._end()) from None

    def log_tail(self, lines: int) -> str:
        if self._output >= 0:
            self._drain()
        return self._log.tail(lines)

    def close(self) -> None:
        """End it; what was forked goes on. May be called twice."""
        self._server.close()
        if self._output >= 0:
            if not self._loaded:  # it would hear of it when it has loaded
                self._process.kill()
            self._end()
            self._drain()
            os.close(self._output)
            self._output = -1
            self._log.close()

    def _heard(self, size: int) -> bytes:
        """The next answer, which is there. A process that has ended answers with nothing."""
        try:
            said = self._server.recv(size)
        except ConnectionResetError:  # it ended with a message unread
            said = b""
        if len(said) < size:
            raise NotLoaded(self._end())
        return said

    def _end(self) -> int:
        """Its exit status, once it has ended."""
        try:
            return self._process.wait(EXIT_CAP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _answers(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._server, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def _drain(self) -> None:
        try:
            while data := os.read(self._output, 1 << 16):
                self._log.add(data)
        except BlockingIOError:
            pass


class Forked:
    """A process whose parent is another one: as `subprocess.Popen`, as far as the referee needs it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle = os.pidfd_open(pid)  # still there: it is not reaped before the next fork
        weakref.finalize(self, os.close, self._handle)

    def wait(self, timeout: float | None = None) -> None:
        """Until it is gone. With what status its parent alone is told."""
        poll = select.poll()
        poll.register(self._handle, select.POLLIN)
        if not poll.poll(None if timeout is None else 1000 * timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)

    def kill(self) -> None:
        try:
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        except ProcessLookupError:
            pass
