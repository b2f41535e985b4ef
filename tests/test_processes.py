"""The whole tree ends: by kill, with its recipe, with its launcher, with its referee. And logs stay bounded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import cgroups, paths, processes, sandbox, trees
from core.childlog import CappedLog

if sys.platform == "linux":
    from sandboxed_referee import launch as launch_in

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
REFEREE = Path(__file__).with_name("sandboxed_referee.py")
NAMESPACES = sys.platform == "linux" and sandbox.abilities().namespaces
LAYERS = {
    "everything": {},
    "no namespaces": {"namespaces": False},
    "no namespaces, no cgroups": {"namespaces": False, "cgroups": False},
    "a fork": {"forked": True},
    "a fork, no namespaces": {"forked": True, "namespaces": False},
}
DEEP = """
import os, time
for generation in range(3):
    if os.fork(): break
    os.setsid()
else:
    print("deep", flush=True)
time.sleep(120)
"""


def wait_until(true: Any, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def still_alive(pids: Iterable[int]) -> list[int]:
    return [pid for pid in pids if trees.alive(pid)]


def launch(folder: Path, code: str, **layers: Any) -> sandbox.Child:
    forked = layers.pop("forked", False)
    policy = sandbox.standard_policy(folder / "scratch", "cpu")
    policy = replace(policy, layers=sandbox.Layers(**layers))
    return launch_in(policy, folder, ["-c", code], forked)


def deep(folder: Path, **layers: Any) -> tuple[sandbox.Child, list[int]]:
    """A child whose grandchildren have left its session and lost their parents."""
    child = launch(folder, DEEP, **layers)
    assert wait_until(lambda: "deep" in child.log_tail() or child.poll() is not None)
    tree = trees.descendants(child.pid)
    assert len(tree) >= 4, child.log_tail()
    return child, tree


@linux
@pytest.mark.parametrize("name", LAYERS)
def test_kill_ends_daemons(name: str, tmp_path: Path) -> None:
    child, tree = deep(tmp_path, **LAYERS[name])
    child.kill()
    assert still_alive([child.pid, *tree]) == []
    assert child.poll() == -9
    assert child.exceeded() is None
    child.kill()  # once more does nothing
    child.channel.close()


@linux
@pytest.mark.parametrize("name", LAYERS)
def test_daemons_end_with_the_recipe(name: str, tmp_path: Path) -> None:
    code = "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork(): time.sleep(120)\n    os._exit(0)\nos.wait(); print('started', flush=True); input_ = os.read(int(os.environ['AUTORESEARCH_CHANNEL']), 1)"  # noqa: E501
    child = launch(tmp_path, code, **LAYERS[name])
    assert wait_until(lambda: "started" in child.log_tail())
    tree = trees.descendants(child.pid)
    child.channel.send(b"x")
    assert child.wait(20) == 0
    assert len(tree) >= 2
    assert still_alive(tree) == []
    child.channel.close()


@pytest.fixture
def referee(tmp_path: Path) -> Iterator[Any]:
    started = []

    def start(layers: dict[str, Any]) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        layers = dict(layers)
        forked = layers.pop("forked", False)
        given = {"do": "tree", "folder": str(tmp_path), "layers": layers, "stay": 120, "forked": forked}
        orders = json.dumps(given)
        command = [sys.executable, str(REFEREE), str(paths.project_root()), orders]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        return process, json.loads(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


@linux
@pytest.mark.parametrize("name", LAYERS)
def test_tree_ends_with_the_referee(name: str, referee: Any) -> None:
    process, said = referee(LAYERS[name])
    tree = [said["launcher"], *said["tree"]]
    assert len(still_alive(tree)) == len(tree) >= 5
    process.kill()
    assert wait_until(lambda: not still_alive(tree)), still_alive(tree)
    process.wait()
    for place in cgroups.places():  # its groups are taken away by the next process that makes some
        cgroups.remove_stale(place.folder)
        assert list(place.folder.glob(f"autoresearch-{process.pid}-*")) == []


@linux
@pytest.mark.skipif(
    not NAMESPACES, reason="without a pid namespace daemons may stay when launcher and referee are both killed"
)
@pytest.mark.parametrize("launcher_first", [True, False])
def test_tree_ends_when_launcher_and_referee_are_killed(launcher_first: bool, referee: Any) -> None:
    process, said = referee({})
    for pid in (said["launcher"], process.pid)[:: 1 if launcher_first else -1]:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not still_alive(said["tree"])), still_alive(said["tree"])


@linux
@pytest.mark.parametrize("name", LAYERS)
def test_killed_launcher(name: str, tmp_path: Path) -> None:
    """From outside only: a recipe cannot signal it."""
    child, tree = deep(tmp_path, **LAYERS[name])
    wait_until(lambda: set(tree) <= set(child._seen))
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(20) == -9
    assert still_alive(tree) == []
    child.channel.close()


@linux
def test_child_outlives_the_thread_that_launched_it(tmp_path: Path) -> None:
    made: list[sandbox.Child] = []
    thread = threading.Thread(
        target=lambda: made.append(launch(tmp_path, "import time; time.sleep(0.6); print('done')"))
    )
    thread.start()
    thread.join()
    assert made[0].wait(20) == 0
    assert made[0].log_tail() == "done"
    made[0].channel.close()


@linux
def test_channel_closes_with_the_recipe(tmp_path: Path) -> None:
    child = launch(tmp_path, "")
    child.channel.settimeout(20)
    assert child.channel.recv(1) == b""
    child.kill()
    child.channel.close()


@linux
def test_tree_and_memory_of_processes() -> None:
    grow = """
import subprocess, sys
b = bytearray(b"x") * (50 << 20)
subprocess.run([sys.executable, "-c", "print(1, flush=True); input()"])
"""
    with subprocess.Popen([sys.executable, "-c", grow], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        below = processes.descendants(process.pid)
        assert len(below) == 1
        table = dict(processes.parents())
        assert table[below[0]] == process.pid
        assert process.pid in processes.descendants(os.getpid())
        assert processes.resident(process.pid) > 50 << 20
        assert 50 << 20 < processes.proportional(process.pid) <= processes.resident(process.pid)
        assert processes.peak(process.pid) > 50 << 20
        assert processes.alive(process.pid)
        began = processes.started(process.pid)
        assert began > 0
        process.stdin.write(b"\n")
    assert not processes.alive(process.pid)
    assert processes.started(process.pid) == 0
    assert processes.descendants(process.pid) == []


def test_cgroup_files_are_read() -> None:
    mounts = (
        "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n"
        "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
        "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
    )
    assert cgroups.mounts(mounts) == {
        "memory": (Path("/sys/fs/cgroup/memory"), 1),
        "": (Path("/sys/fs/cgroup/unified"), 2),
    }
    assert cgroups.own_groups("5:cpu,memory:/a\n0::/user.slice/b.scope\n") == {
        "cpu": "/a",
        "memory": "/a",
        "": "/user.slice/b.scope",
    }


@given(st.lists(st.binary(min_size=1, max_size=3000), max_size=40), st.integers(400, 5000))
@settings(max_examples=60, deadline=None)
def test_log_keeps_both_ends(tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes], limit: int) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    log = CappedLog(path, limit)
    for number, chunk in enumerate(chunks):
        log.add(chunk)
        if number % 7 == 0:
            log.flush()
    log.close()
    everything = b"".join(chunks)
    kept = path.read_bytes()
    assert len(kept) <= limit
    head = limit // 4
    assert kept[:head] == everything[:head]
    if len(everything) <= head + limit - head - 128:
        assert kept == everything
    else:
        beginning, _, end = kept.partition(b" bytes not kept]\n")
        assert everything.endswith(end) and end
        dropped = int(beginning.rpartition(b"[")[2].replace(b",", b""))
        assert head + dropped + len(end) == len(everything)


def test_log_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    log = CappedLog(tmp_path / "log", 1000)
    log.add(b"text\n")
    log.close()
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert (tmp_path / "log").read_text() == "text\n"


def test_the_own_peak_is_what_was_held_at_once() -> None:
    code = "from core.trees import own_peak\nat = own_peak()\nx = bytearray(200 << 20)\ndel x\nprint(own_peak() - at)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.project_root(), capture_output=True, text=True, check=True
    )
    assert 199 << 20 < int(done.stdout) < 260 << 20


def test_where_the_system_does_not_tell_what_is_shared_all_of_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wine refuses the question with WinError 87, Windows for a process of another user."""
    monkeypatch.setattr(trees, "LINUX", False)

    def refuse(_: psutil.Process) -> None:
        raise OSError(22, "Invalid parameter")

    monkeypatch.setattr(psutil.Process, "memory_full_info", refuse)
    assert trees.proportional(os.getpid()) > 10 << 20
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    assert trees.proportional(gone.pid) == 0


def test_a_child_ends_when_the_watching_of_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs unwatched, and nobody waits for ever for what nobody tells."""
    told = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(str(args.exc_value)))
    monkeypatch.setattr(sandbox.Child, "_look", lambda _: 1 / 0)
    policy = sandbox.standard_policy(tmp_path / "scratch", "cpu")
    code = [sys.executable, "-c", "import time; time.sleep(120)"]
    child = sandbox.launch(code, policy, cwd=tmp_path / "scratch", log=tmp_path / "log")
    assert child.wait(20) == -9 and told == ["division by zero"]
    assert "watches it failed" in (child.exceeded() or "")
    child.kill()
    child.channel.close()
    assert child.pid not in trees.descendants(os.getpid())
    assert [g for p in cgroups.places() for g in p.folder.glob(f"autoresearch-{os.getpid()}-*")] == []
