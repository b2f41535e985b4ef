"""A frozen tree computes nothing, and one that wakes itself is found out: helpers, threads, forks, timers, signals."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from core import sandbox, trees
from core.freezing import RAN_AT_MOST, FreezeError, freeze

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is counted for each thread is Linux's")

LAYERS = {
    "everything": {},
    "no namespaces": {"namespaces": False},
    "no namespaces, no cgroups": {"namespaces": False, "cgroups": False},
}
# Work that shows: a thread, a child and an orphan in a session of its own each count on in a byte of one shared map.
WORKING = """
import mmap, os, threading, time
shared = mmap.mmap(os.open("counts", os.O_RDWR), 4096)
def count(slot):
    while True:
        number = int.from_bytes(shared[8 * slot : 8 * slot + 8], "little") + 1
        shared[8 * slot : 8 * slot + 8] = number.to_bytes(8, "little")
        time.sleep(0.0002)
for slot in (1, 2):
    if not os.fork():
        if slot == 2:
            os.setsid()
            if os.fork(): os._exit(0)
        count(slot)
threading.Thread(target=count, args=(3,), daemon=True).start()
count(0)
"""
# POSIX timers send SIGCONT: the kernel wakes the process although nobody of its tree runs. Many, as a SIGSTOP takes
# away the signals that wait then, and a timer whose signal is lost does not start again.
ALARMED = """
import ctypes, signal
libc = ctypes.CDLL(None)
class Event(ctypes.Structure):
    _fields_ = [("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("how", ctypes.c_int), ("x", ctypes.c_byte * 64)]
signal.signal(signal.SIGCONT, lambda *_: None)  # else the kernel drops what is ignored
failed = 0
for n in range(30):
    timer, every = ctypes.c_void_p(), (ctypes.c_long * 4)(0, (20 + n) * 1_000_000, 0, (20 + n) * 1_000_000)
    failed |= libc.timer_create(1, ctypes.byref(Event(None, signal.SIGCONT, 0)), ctypes.byref(timer))
    failed |= libc.timer_settime(timer, 0, every, None)
print(f"timers {failed}", flush=True)
number = 0
while True:
    number += 1
"""
# Two processes continue each other without end.
MATES = """
import os, signal
other = os.fork() or os.getppid()
print("ready", flush=True)
while True:
    os.kill(other, signal.SIGCONT)
"""
# Each of a chain of orphans starts the next one and ends; the recipe itself stays.
MOVING = """
import os, time
print("ready", flush=True)
if os.fork():
    time.sleep(120)
while True:
    if os.fork():
        time.sleep(0.001)
        os._exit(0)
"""


def start(folder: Path, code: str, **layers: object) -> sandbox.Child:
    policy = sandbox.standard_policy(folder / "scratch", "cpu")
    (folder / "scratch" / "counts").write_bytes(bytes(4096))
    policy = replace(policy, layers=sandbox.Layers(**layers))  # type: ignore[arg-type]
    argv = [sys.executable, "-c", code]
    return sandbox.launch(argv, policy, cwd=folder / "scratch", log=folder / "log")


@pytest.fixture
def children() -> Iterator[list[sandbox.Child]]:
    """What a test starts; ended afterwards, frozen or not."""
    started: list[sandbox.Child] = []
    yield started
    for child in started:
        tree = trees.descendants(child.pid)
        child.kill()
        child.channel.close()
        assert [pid for pid in tree if trees.alive(pid)] == []


def counts(folder: Path) -> list[int]:
    data = (folder / "scratch" / "counts").read_bytes()
    return [int.from_bytes(data[8 * slot : 8 * slot + 8], "little") for slot in range(4)]


def wait_for(true: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_of_a_frozen_tree_runs(name: str, children: list[sandbox.Child], tmp_path: Path) -> None:
    child = start(tmp_path, WORKING, **LAYERS[name])
    children.append(child)
    wait_for(lambda: min(counts(tmp_path)) > 10 or child.poll() is not None)
    frozen = child.freeze()
    before = counts(tmp_path)
    time.sleep(0.2)
    assert counts(tmp_path) == before
    assert frozen.ran() == 0.0
    frozen.thaw()
    wait_for(lambda: all(now > then for now, then in zip(counts(tmp_path), before)))
    assert frozen.ran() > RAN_AT_MOST, "it is awake"
    again = child.freeze()
    assert again.ran() == 0.0


def test_a_timer_that_wakes_the_tree_is_found_out(children: list[sandbox.Child], tmp_path: Path) -> None:
    child = start(tmp_path, ALARMED)
    children.append(child)
    wait_for(lambda: "timers 0" in child.log_tail())
    try:
        frozen = child.freeze()
    except FreezeError:
        return
    time.sleep(0.2)
    assert frozen.ran() > RAN_AT_MOST


@pytest.mark.parametrize("code", [MATES, MOVING], ids=["continue each other", "always another process"])
def test_what_evades_is_refused_or_stands_still(code: str, children: list[sandbox.Child], tmp_path: Path) -> None:
    child = start(tmp_path, code, seccomp=False, namespaces=False)
    children.append(child)
    wait_for(lambda: "ready" in child.log_tail() or child.poll() is not None)
    try:
        frozen = child.freeze()
    except FreezeError as error:
        assert "did not stop" in str(error)
        return
    time.sleep(0.1)
    # Beside other work those that have ended may be too many to be let go on: then its limit ends the whole tree.
    assert frozen.ran() == 0.0 or (child.wait(20) is not None and child.exceeded())


def test_what_has_ended_cannot_be_frozen() -> None:
    with pytest.raises(FreezeError, match="0 of 0"):
        freeze(list, patience=0.01)
