"""One sandboxed child of the referee: its folder, its channel, and a plain reason for every way in which it can end."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from core import allocator, caches, files, forkserver, locks, sandbox, trees, wire
from core.contract import Spec
from core.errors import DeviceFull, DiskFull, Transient, UserError
from core.forkserver import Forkserver, NotLoaded
from core.gpuwatch import TOLD_LAPTOP
from core.nvml import Nvml
from core.outcome import Status
from core.settings import Settings
from core.wire import ChannelClosed, ChannelTimeout, Message, ProtocolError

MESSAGE_BYTES = 65536  # of arrays, beyond what a caller expects
MESSAGES_PER_SECOND = 20  # of progress; more is flooding
MESSAGES_AT_ONCE = 200
SCRATCH_SPARE = 256 * 2**20  # bytes that have to stay free on the disk with the scratch folders
USUAL_WEIGHTS = 2**30  # bytes; who lacks the room for more than that wants more than others do
SPACE = "free some space, then `autoresearch run` goes on: nothing is lost"
SANDBOX_NOT_APPLIED = 125  # exit status; a recipe may choose it too, so it counts before there is one
MEMORY_SHARE = 0.9  # of the machine's memory, where no limit is set
EXIT_AFTER_CLOSING = 10.0  # seconds between the end of a child's channel and that of its process, on a busy machine
LOADING = "loading the backend's library"
LIBRARY_CAP = 120.0  # seconds to import torch or mlx; from a cold disk it is slow
SMALLER = "use smaller batches or a smaller model"
OUT_OF_MEMORY = "out of"  # begins the reason of a child that took more than it may
NT_FAULTS = 0xC0000000  # NTSTATUS of severity "error" begin here
NT_NAMES = {
    0xC0000005: " (access violation)",
    0xC0000017: " (out of memory)",
    0xC00000FD: " (stack overflow)",
    0xC0000135: " (a DLL is missing)",
    0xC0000409: " (the process was aborted)",
}
LOG_LINES = 50
LOOK_AT_DISK = 1.0  # seconds between two looks


class Ended(Exception):
    """The experiment ends here: its status, and the reason as the user reads it."""

    def __init__(self, status: Status, reason: str) -> None:
        self.status: Status = status
        self.reason = reason
        super().__init__(reason)


class OutOfMemory(Ended):
    """A crash for want of memory: what was asked for may work in smaller pieces."""

    def __init__(self, reason: str) -> None:
        super().__init__("crash", reason)


class SandboxFailed(UserError):
    """The sandbox could not be applied; nothing of the recipe has run."""


class BackendFailed(UserError):
    """The backend's own code or library did not start; nothing of the recipe has run."""


class NotInTime(BackendFailed, Transient):
    """It had not started when its time was up."""


class LibraryGone(BackendFailed, Transient):
    """The process that children are forked from was ended by somebody, the system for want of memory say."""


@dataclass(frozen=True)
class Place:
    """What all children of one experiment share."""

    settings: Settings
    workdir: Path
    stop: threading.Event = field(default_factory=threading.Event)
    nice: int = 0  # priority of the children; 19 is the lowest
    env: Mapping[str, str] = field(default_factory=dict)  # beside what all children get
    forked: bool = False  # children are forks of one process, where they can be: for those that have several

    def memory(self) -> int:
        """Bytes that one child and its processes may take."""
        return self.settings.memory_limit or int(MEMORY_SHARE * psutil.virtual_memory().total)

    @cached_property
    def card(self) -> dict[str, str]:
        """What shows children the card that is locked and watched, and no other: CUDA would count the cards by its own
        idea of their speed. By UUID one is meant, or a part of one (MIG), whatever order the user has set. And what
        CUDA does not tell of it: that it is a laptop's, and what is free where Windows gives it out."""
        device = self.settings.device
        uuid = locks.cuda_uuid(0) if locks.cuda_index(device) == 0 else ""
        shown = {"CUDA_VISIBLE_DEVICES": uuid} if uuid else {}
        if locks.cuda_is_laptops(device):
            shown[TOLD_LAPTOP] = "1"
        if device.startswith("cuda") and allocator.shared_with_windows() and (free := Nvml().look(device, ()).free):
            shown[allocator.TOLD_FREE] = str(free)  # looked at before the first child of the experiment takes its part
        return shown

    @cached_property
    def room(self) -> int:
        """Bytes that were free on the disk when its first child was started."""
        return shutil.disk_usage(self.workdir).free

    def look_again(self) -> None:
        """What children are told of the card is found out anew for the next one: others may have taken of it."""
        self.__dict__.pop("card", None)

    @cached_property
    def forkserver(self) -> Forkserver | None:
        """The process that loads the backend's library for all children; made when it is first asked for."""
        if not self.forked or not forkserver.possible(self.settings.backend):
            return None
        return Forkserver(self.policy(self.folder / "scratch"), self.folder)

    @cached_property
    def folder(self) -> Path:
        """Of the forkserver."""
        return Path(tempfile.mkdtemp(prefix="library-", dir=self.workdir))

    def policy(self, scratch: Path, caches: Path | None = None) -> sandbox.Policy:
        """Of a child with these folders."""
        return sandbox.standard_policy(
            scratch,
            self.settings.backend,
            memory_bytes=self.memory(),
            caches=caches,
            nice=self.nice,
            env={**self.card, **self.env},
        )

    def wait_for_library(self) -> Forkserver | None:
        """The forkserver, when its library is loaded. Nothing of the recipe is anywhere yet."""
        server = self.forkserver
        if server is None:
            return None
        try:
            server.wait(self.look_for_stop, LIBRARY_CAP)
        except NotLoaded as failed:
            what = self.not_loaded()
            if failed.code is None:
                raise NotInTime(f"{what}: {LOADING} took more than {LIBRARY_CAP:.3g} s", advice("")) from None
            how = f"the process that does it for all ended by itself in {LOADING}, with exit status {failed.code}"
            raise BackendFailed(f"{what}: {how}", advice(server.log_tail(3))) from None
        return server

    def not_loaded(self) -> str:
        return f"the backend {self.settings.backend} cannot be loaded"

    def look_for_stop(self) -> None:
        if self.stop.is_set():
            raise Ended("stopped", "stopped on request")

    def close(self) -> str:
        """End the forkserver, where there is one; the last lines of what it printed."""
        server: Forkserver | None = self.__dict__.pop("forkserver", None)
        if server is not None:
            server.close()
        if folder := self.__dict__.pop("folder", None):
            files.remove(folder)
        return server.log_tail(LOG_LINES).strip() if server else ""

    def spec(self, seed: int) -> Spec:
        s = self.settings
        return Spec(s.vocab_size, s.sequence_len, s.bos_id, s.device, s.dtype, seed, self.memory())


class Worker:
    """A child of one role, from its launch to its end. It imports the backend's library at once, and the recipe when
    `begin` sends it: so it can be started before it is needed without a recipe being alive in it."""

    def __init__(self, role: str, place: Place, name: str = "") -> None:
        """`name`: of its folder and log, where one role has several children."""
        library = place.wait_for_library()
        self.role = role
        self.place = place
        self.name = name or role
        self.until = math.inf  # when it has to be done with everything (time.monotonic)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=place.workdir))
        self.scratch = self.folder / "scratch"
        self.caches = self.folder / "caches"
        self.scratch.mkdir()
        self.on_progress: Callable[[Message], None] | None = None
        self._disk_at = 0.0
        _ = place.room  # before anything of it writes
        self._dead = False
        self._ready = False
        self._opened = False
        self._messages = 0
        self._began = time.monotonic()
        argv = [sys.executable, "-m", "backends.worker", role, place.settings.backend]
        log = place.workdir / f"{self.name}.log"
        policy = place.policy(self.scratch, self.caches)
        with contextlib.ExitStack() as undo:
            undo.callback(files.remove, self.folder)
            try:
                self.child = sandbox.launch(argv, policy, cwd=self.scratch, log=log, forkserver=library)
            except NotLoaded as gone:
                why = f"the process that has loaded its library is gone ({gone})"
                tail = library.log_tail(3) if library else ""
                raise LibraryGone(f"the {role} cannot be started: {why}", advice(tail)) from None
            undo.pop_all()
        self._channel = wire.Channel(self.child.channel, watch=self._watch, giver=self.child.giver)

    # --- talking -----------------------------------------------------------------------------------

    def get_ready(self) -> None:
        """Wait until the backend's library is loaded. Nothing of the recipe has run yet, so a failure is not its."""
        if self._ready:
            return
        try:
            self.expect("ready", LIBRARY_CAP, LOADING)
        except Ended as end:
            if end.status == "stopped":
                raise
            raise self._backend_failed(end, self.place.not_loaded()) from None
        self._ready = True

    def begin(self, source: bytes, seed: int, compiled: Path | None, **fields: Any) -> None:
        """Send the recipe. `compiled`: caches to copy for it first."""
        self.get_ready()
        self._open()
        if compiled is not None:
            caches.copy(compiled, self.caches)
        fields = {"spec": asdict(self.place.spec(seed)), **fields}
        self.send("begin", fields, {"source": np.frombuffer(source, np.uint8)})

    def _open(self) -> None:
        """Have the device opened, before anything of the recipe is there that could be to blame for a failure."""
        self.send("open")
        try:
            self.expect("opened", LIBRARY_CAP, "opening the device")
        except Ended as end:
            if end.status == "stopped":
                raise
            what = f"the device of the backend {self.place.settings.backend} cannot be used"
            raise self._backend_failed(end, what) from None
        self._opened = True

    def _backend_failed(self, end: Ended, what: str) -> BackendFailed:
        kind = NotInTime if end.status == "timeout" else BackendFailed
        return kind(f"{what}: {end.reason}", advice(self.child.log_tail(3)))

    def send(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
        fds: Sequence[int] = (),
        timeout: float = 60.0,
    ) -> None:
        timeout = self._at_most(timeout)
        try:
            self._channel.send(kind, fields, arrays, fds, timeout)
        except ChannelTimeout:
            raise Ended("timeout", f"the {self.role} did not read `{kind}` for {timeout:g} s") from None
        except ChannelClosed:
            raise self._gone(f"before `{kind}`") from None

    def expect(self, kind: str, timeout: float, doing: str, arrays_bytes: int = 0) -> Message:
        """The next message of this kind. Everything else that can happen is an `Ended`, or a `UserError` where it is
        nothing of the child's.

        `doing`: what the child is busy with, for messages; `arrays_bytes`: the most that the message may carry.
        """
        return self.expect_any((kind,), timeout, doing, arrays_bytes)

    def expect_any(self, kinds: Sequence[str], timeout: float, doing: str, arrays_bytes: int = 0) -> Message:
        """The next message of one of these kinds, as `expect`."""
        timeout = self._at_most(timeout)
        deadline = time.monotonic() + timeout
        while True:
            try:
                message = self._channel.receive(deadline - time.monotonic(), arrays_bytes + MESSAGE_BYTES)
            except ChannelTimeout:
                raise Ended("timeout", f"{doing} took more than {timeout:.3g} s") from None
            except ProtocolError as error:
                raise self.broke(error) from None
            except ChannelClosed:
                raise self._gone(doing) from None
            if message.kind in kinds:
                return message
            if message.kind == "failed":
                raise self._failed(message)
            if message.kind != "progress" or self.on_progress is None:
                raise self.broke(f"`{message.kind}` came instead of `{kinds[0]}`")
            self._count(message)
            self.on_progress(message)

    def _at_most(self, timeout: float) -> float:
        return min(timeout, max(0.1, self.until - time.monotonic()))

    def broke(self, what: object) -> Ended:
        """The child sent what its trusted part never sends."""
        return Ended("invalid", f"the {self.role} broke its protocol, so the recipe interfered with it: {what}")

    def _count(self, message: Message) -> None:
        self._watch()
        self._messages += 1
        if self._messages > MESSAGES_AT_ONCE + MESSAGES_PER_SECOND * (time.monotonic() - self._began):
            raise self.broke(f"{self._messages} messages of progress")

    def _failed(self, message: Message) -> Ended:
        try:
            status, reason = message.text("status", 20), message.text("reason", 600)
        except ProtocolError as error:
            return self.broke(error)
        if status == "backend" and not self._opened:
            if "needed" in message.fields:
                raise DeviceFull(reason, message.text("action", 600), message.integer("needed"))
            raise BackendFailed(reason, message.text("action", 600))
        if status not in ("crash", "invalid", "memory"):
            return self.broke(f"status {status!r}")
        if status == "memory" or self._limit().startswith(OUT_OF_MEMORY):
            return OutOfMemory(self._limit() or reason)
        return Ended("invalid" if status == "invalid" else "crash", self._limit() or reason)

    # --- watching ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Called while waiting. A dead child is reported at the second look, when what it sent last has been read."""
        self.place.look_for_stop()
        if reason := self._limit():
            raise _exceeded(reason)
        if self._dead:
            raise ChannelClosed("the child is gone")
        self._dead = self.child.poll() is not None
        now = time.monotonic()
        if now - self._disk_at > LOOK_AT_DISK:
            self._disk_at = now
            self._look_at_disk()

    def require_disk(self, weights: int) -> None:
        """Before a training: room for its weights, of so many bytes, beside what has to stay free. `DiskFull`, or a
        crash where they are larger than usual."""
        free, needed = shutil.disk_usage(self.folder).free, SCRATCH_SPARE + weights
        if free < needed:
            fact = f"the disk with {self.place.workdir} has {free >> 20} MiB left, and {needed >> 20} are needed"
            if weights > USUAL_WEIGHTS:
                raise Ended("crash", f"{fact}: weights() takes {weights >> 20} MiB")
            raise DiskFull(fact, SPACE)

    def _look_at_disk(self) -> None:
        """Who has written the disk full: the experiment's children, which ends it, or others, whose doing is not held
        against it."""
        free = shutil.disk_usage(self.folder).free
        if free >= SCRATCH_SPARE:
            return
        own = trees.disk_usage([self.place.workdir])
        fact = f"the disk with {self.place.workdir} has {free >> 20} MiB left, and {SCRATCH_SPARE >> 20} are needed"
        if free + own >= SCRATCH_SPARE and 2 * own > self.place.room - free:
            raise Ended("crash", f"{fact}: the recipe's processes wrote {own >> 20} MiB")
        raise DiskFull(fact, SPACE)

    def _limit(self) -> str:
        exceeded = self.child.exceeded() or ""
        if exceeded.startswith("memory"):
            return f"{OUT_OF_MEMORY} {exceeded}; {SMALLER}"
        return f"too many {exceeded}" if exceeded.startswith("processes") else exceeded

    def _gone(self, doing: str) -> Ended:
        code = self.child.wait(EXIT_AFTER_CLOSING)
        if reason := self._limit():
            return _exceeded(reason)
        if code is None:
            return Ended("invalid", f"the {self.role} closed its channel in {doing}, and went on running")
        if code == SANDBOX_NOT_APPLIED and not self._ready:
            raise SandboxFailed(
                "the sandbox could not be applied", f"see `autoresearch doctor`; {self.child.log_tail(3)}"
            )
        if code >= 0:
            self._look_at_disk()  # on which it could not write, maybe
            return Ended("crash", f"the {self.role} ended by itself in {doing}, with exit status {_status(code)}")
        name = "SIGKILL" if code == -9 else signal.Signals(-code).name  # which Windows' list of signals lacks
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        return Ended("crash", f"the {self.role} was killed by {name} in {doing}{hint}")

    # --- ending ------------------------------------------------------------------------------------

    def kill(self) -> None:
        """End the whole process tree. May be called twice."""
        self.child.kill()
        self._channel.close()

    def close(self) -> None:
        """End the tree and remove its folder."""
        self.kill()
        files.remove(self.folder)


def advice(tail: str) -> str:
    """What to do where a backend does not start."""
    return "see `autoresearch doctor`" + (f"; its last lines: {tail.strip()}" if tail.strip() else "")


def _status(code: int) -> str:
    """An exit status as it is looked up: on Windows that of a fault is an NTSTATUS, written in hexadecimal."""
    return str(code) if code < NT_FAULTS else f"{code:#x}{NT_NAMES.get(code, '')}"


def _exceeded(reason: str) -> Ended:
    return OutOfMemory(reason) if reason.startswith(OUT_OF_MEMORY) else Ended("crash", reason)
