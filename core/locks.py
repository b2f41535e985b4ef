"""Locks between processes: one run for each lab, one experiment for each device.

The operating system holds them (`flock`, `msvcrt.locking`), so the death of the holder frees them: there is
no stale lock to be cleaned up. The file's content only tells who holds it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from core.errors import Busy
from core.facts import Gpu
from core.gpuwatch import is_laptop
from core.paths import locks_root

if sys.platform == "win32":
    import msvcrt

    _FAR = 2**30  # the locked byte lies behind the text: on Windows a locked byte cannot be read by others

    def _try_lock(fd: int) -> bool:
        os.lseek(fd, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


_held: dict[int, Gpu] = {}  # the CUDA devices that this process holds, by number
LETTING_GO = 2.0  # seconds: a child that was just forked has its dead parent's lock until it executes its program


@contextmanager
def hold(path: Path, what: str, action: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`. Raises `Busy` with the holder's pid after `wait` seconds without success.

    `what` names the thing for the message ("the lab night1"), `action` says what to do instead.
    """
    fd = _open(path)
    try:
        started = time.monotonic()
        while not _try_lock(fd):
            patience = wait if _is_alive(_read(fd)) else max(wait, LETTING_GO)
            if time.monotonic() - started >= patience:
                raise Busy(f"{what} is in use by {_describe(_read(fd))}", action)
            time.sleep(0.05)
        _write(fd, {"pid": os.getpid(), "since": time.time(), "what": what})
        yield
    finally:
        os.close(fd)


def holder(path: Path) -> int | None:
    """The pid of the process that holds `path` now, else None. 0: held, the pid cannot be read."""
    if not path.exists():
        return None
    fd = _open(path)
    try:
        return None if _try_lock(fd) else int(_read(fd).get("pid", 0))
    finally:
        os.close(fd)


def device_lock(device: str) -> Path:
    """The lock file of a device that is named as the backend's library names it ("cpu", "cuda:1", "gpu").

    A CUDA device is known by its UUID: "cuda:0" is another card for each CUDA_VISIBLE_DEVICES. What has no name of
    its own is named by the host, as homes on network disks are shared by many machines.
    """
    index = cuda_index(device)
    name = "" if index is None else cuda_uuid(index)
    return locks_root() / f"device-{re.sub(r'[^A-Za-z0-9._-]', '_', name or f'{device}-{platform.node()}')}.lock"


def cuda_index(device: str) -> int | None:
    """1 of "cuda:1", 0 of "cuda"; None for what is no CUDA device."""
    kind, _, index = device.partition(":")
    return int(index or 0) if kind == "cuda" and (index or "0").isdecimal() else None


def cuda_uuid(index: int) -> str:
    """The card of that number as CUDA counts; "" where the driver does not tell."""
    gpu = _card(index)
    return gpu.uuid if gpu else ""


def cuda_name(index: int) -> str:
    """The name of that card as the driver gives it ("NVIDIA H100 80GB HBM3"); "" where it does not tell."""
    gpu = _card(index)
    return gpu.name if gpu else ""


def cuda_is_laptops(device: str) -> bool:
    """Whether the card that "cuda:0" stands for is a laptop's, by what its driver says; False where it says nothing."""
    index = cuda_index(device)
    gpu = None if index is None else _card(index)
    return gpu is not None and is_laptop(gpu.name, gpu.product)


def _card(index: int) -> Gpu | None:
    """A card that is held keeps its number, though another be lost or come, or the driver not answer for a moment: what
    is watched and shown to children is what was locked."""
    if index in _held:
        return _held[index]
    from core import hardware  # here, because most locks are not of CUDA devices and probing takes a while

    gpus = hardware.probe().gpus
    return gpus[index] if index < len(gpus) else None


@contextmanager
def hold_device(device: str, wait: float = 0.0) -> Iterator[None]:
    """Hold a device, so that nothing else is measured on it at the same time. Raises `Busy`."""
    action = "wait for it or stop it there: two experiments on one device would slow each other down"
    index = cuda_index(device)
    card = None if index is None else _card(index)
    with hold(device_lock(device), f"the device {device}", action, wait):
        if index is not None and card is not None and card.uuid:
            _held[index] = card
        try:
            yield
        finally:
            if index is not None:
                _held.pop(index, None)


def require_free(device: str) -> None:
    """Raises `Busy` where somebody holds the device at this moment: known before work that would be in vain."""
    with hold_device(device):
        pass


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # not inheritable: children do not keep the lock alive


def _read(fd: int) -> dict[str, Any]:
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        found = json.loads(os.read(fd, 4096) or b"{}")
    except ValueError:  # caught while the holder was writing it
        return {}
    return found if isinstance(found, dict) else {}


def _write(fd: int, content: dict[str, Any]) -> None:
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, json.dumps(content).encode())


def _is_alive(content: dict[str, Any]) -> bool:
    """Of what is unknown it is supposed."""
    pid = content.get("pid")
    return not isinstance(pid, int) or psutil.pid_exists(pid)


def _describe(content: dict[str, Any]) -> str:
    pid = content.get("pid")
    return f"process {pid}" if pid else "another process"
