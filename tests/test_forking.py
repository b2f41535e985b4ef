"""Children that are forks of a process with torch in it: as new Pythons are, and no end leaves anything behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from edits import changed, check_clean, left_behind
from sandboxed_referee import launch

from core import child, forkserver, landlock, sandbox, trees
from core.child import Ended, LibraryGone, Place, Worker
from core.data import Dataset
from core.forkserver import Forkserver, NotLoaded
from core.outcome import Request
from core.referee import execute
from core.settings import Settings

pytestmark = pytest.mark.skipif(not forkserver.possible("cpu"), reason="Linux with pidfds")

# What a program can know of the process that it is in, but for its number.
FACTS = r"""
import gc, json, os, resource, signal, sys, tempfile, threading

status = dict(line.rstrip().split(":", 1) for line in open("/proc/self/status"))
kept = "SigBlk SigIgn CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp Seccomp_filters"
kept += " Uid Gid Groups Umask Threads"
frames, frame = [], sys._getframe()
while frame:
    frames.append((os.path.basename(frame.f_code.co_filename), frame.f_code.co_name))
    frame = frame.f_back


def opened(name):
    try:
        target = os.readlink("/proc/self/fd/" + name)
    except OSError:
        return "the listing's"
    return target.split(":")[0].replace(str(os.getpid()), "PID")


print(json.dumps({
    "status": {name: status.get(name, "") for name in kept.split()},
    "descriptors": sorted(map(opened, os.listdir("/proc/self/fd"))),
    "environment": {k: v for k, v in os.environ.items() if k != "AUTORESEARCH_CHANNEL"},
    "channel": opened(os.environ["AUTORESEARCH_CHANNEL"]),
    "folder": os.getcwd(), "arguments": sys.argv, "path": sys.path, "flags": str(sys.flags), "prefix": sys.prefix,
    "finders": [str(type(finder)) for finder in sys.meta_path],
    "limits": {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource)
               if n.startswith("RLIMIT_") and n != "RLIMIT_NPROC"},
    "nice": os.nice(0), "leads": (os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()),
    "temporary": tempfile.gettempdir(), "hash": hash("abc"), "rank": open("/proc/self/oom_score_adj").read(),
    "signals": {number.name: str(signal.getsignal(number)) for number in signal.Signals},
    "main": sorted(name for name in vars(sys.modules["__main__"]) if not name.startswith("__")),
    "threads": threading.active_count(), "collector": (gc.isenabled(), gc.get_threshold()), "frames": frames,
    "orders": sum(isinstance(o, dict) and {"referee", "rules"} <= set(map(str, o)) for o in gc.get_objects()),
}))
"""


def facts(folder: Path, layers: sandbox.Layers, forked: bool) -> dict[str, Any]:
    folder.mkdir()
    policy = replace(sandbox.standard_policy(folder / "scratch", "cpu", nice=3), layers=layers)
    started = launch(policy, folder, ["-c", FACTS], forked)
    assert started.wait(60) == 0, started.log_tail()
    started.channel.close()
    found = json.loads(started.log_tail(1).replace(str(folder), "FOLDER"))
    return {**found, "enforced": started.enforced}


@pytest.mark.parametrize(
    "layers", [sandbox.Layers(), sandbox.Layers(landlock=1, namespaces=False)], ids=["everything", "Landlock 1"]
)
def test_a_fork_is_as_a_new_python(layers: sandbox.Layers, tmp_path: Path) -> None:
    new, fork = (facts(tmp_path / f"{forked}", layers, forked) for forked in (False, True))
    assert {k: (v, fork[k]) for k, v in new.items() if v != fork[k]} == {}
    assert fork["enforced"]["landlock"] == min(landlock.landlock_abi(), layers.landlock)
    assert fork["status"]["NoNewPrivs"].strip() == "1" and fork["orders"] == 0


@pytest.fixture
def place(settings: Settings, tmp_path: Path) -> Iterator[Place]:
    made = Place(settings, tmp_path, forked=True)
    yield made
    made.close()
    assert list(tmp_path.glob("library-*")) == []


def named(worker: Worker) -> str:
    """What its recipe's process is called."""
    (recipe,) = trees.descendants(worker.child.pid)[-1:]
    return Path(f"/proc/{recipe}/comm").read_text().strip()


def test_torch_is_loaded_once_for_all(place: Place) -> None:
    """Two children share the pages of one library; a process that ended is reaped when the next is begun."""
    assert left_behind() == []
    workers = []
    try:
        for role in ("trainer", "scorer"):
            workers.append(Worker(role, place))
            workers[-1].get_ready()
        server = place.forkserver
        assert server is not None and server.pid != os.getpid()
        launchers = {worker.child.pid for worker in workers}
        assert {p.pid for p in psutil.Process(server.pid).children()} == launchers
        assert len(left_behind()) == 1 + len(workers) * (3 if sandbox.abilities().namespaces else 2), "as tests look"
        assert named(workers[0]) == "trainer" and named(workers[1]) == "scorer", "as `ps -o comm` and `top` tell"
        assert Path(f"/proc/{workers[1].child.pid}/comm").read_text() == "scorer-launch\n"
        (recipe,) = trees.descendants(workers[0].child.pid)[-1:]
        maps = psutil.Process(recipe).memory_full_info()
        assert maps.pss < 0.6 * maps.rss, "what is shared counts in parts only"
        workers.pop(0).close()
        workers.append(Worker("auditor", place))
        assert {p.pid for p in psutil.Process(server.pid).children()} == {worker.child.pid for worker in workers}
    finally:
        for worker in workers:
            worker.close()


def test_it_draws_random_numbers_of_its_own(
    tiny_recipe: str, dataset: Dataset, settings: Settings, tmp_path: Path
) -> None:
    """NumPy's own, which nobody seeded, differ in trainer, scorer and auditor."""
    drawing = 'import numpy as np\nimport torch\nprint("drawn", np.random.rand(), flush=True)\n'
    source = changed(tiny_recipe, ("import numpy as np\nimport torch\n", drawing))
    request = Request(source.encode(), settings, dataset, seed=1, experiment="1", workdir=tmp_path / "work", lint=False)
    outcome = execute(replace(request, would_keep=lambda bpb: True))
    assert outcome.status == "scored" and outcome.audited, outcome.reason
    drawn = {
        line for log in (tmp_path / "work").glob("*.log") for line in log.read_text().splitlines() if "drawn" in line
    }
    assert len(drawn) == 3
    check_clean(tmp_path / "work")


def test_the_process_of_all_is_killed(place: Place) -> None:
    """Who runs already goes on; who is to come cannot be started, which is tried again like a library too slow."""
    worker = Worker("scorer", place)
    try:
        server = place.forkserver
        assert server is not None
        os.kill(server.pid, signal.SIGKILL)
        worker.get_ready()
        with pytest.raises(LibraryGone, match=r"the auditor cannot be started: .* \(exit status -9\)"):
            Worker("auditor", place)
        assert worker.child.poll() is None
    finally:
        worker.close()
    assert list(place.workdir.glob("auditor-*")) == []


def test_a_stop_ends_the_waiting(settings: Settings, tmp_path: Path) -> None:
    """At once: what is still loading need not hear of it."""
    stop = threading.Event()
    place = Place(settings, tmp_path, stop, forked=True)
    server = place.forkserver
    assert server is not None
    stop.set()
    with pytest.raises(Ended, match="stopped on request"):
        Worker("trainer", place)
    place.close()
    assert server._process.returncode == -signal.SIGKILL and list(tmp_path.iterdir()) == []


def test_the_process_of_all_does_not_answer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its late answer is not taken for another child's: it is ended."""
    Worker("trainer", place).close()
    server = place.forkserver
    assert server is not None
    os.kill(server.pid, signal.SIGSTOP)
    monkeypatch.setattr(forkserver, "FORK_CAP", 0.2)
    for why in ("no answer in time", "exit status -9"):
        with pytest.raises(LibraryGone, match=why):
            Worker("scorer", place)
    assert list(place.workdir.glob("scorer-*")) == []


def test_killed_with_a_message_unread(place: Place) -> None:
    """The kernel answers the referee with a reset then, and not with an end."""
    Worker("trainer", place).close()
    server = place.forkserver
    assert server is not None
    os.kill(server.pid, signal.SIGSTOP)
    killer = threading.Timer(0.5, os.kill, (server.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(LibraryGone, match="exit status -9"):
        Worker("scorer", place)
    killer.join()


def test_nothing_is_left_to_whoever_reaps_orphans(tmp_path: Path) -> None:
    """In a container that is often the referee itself, which would gather the dead of a night."""
    code = f"""
import os, sys, time
sys.path[:0] = [{str(sandbox.paths.project_root())!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
from core import landlock, sandbox
from core.forkserver import Forkserver
landlock.become_subreaper()
folder = Path({str(tmp_path)!r})
policy = sandbox.standard_policy(folder / "scratch", "cpu")
server = Forkserver(policy, folder)
server.wait(lambda: None, 60)
for number in (1, 2):
    command = [sys.executable, "-c", "print('done')"]
    child = sandbox.launch(command, policy, cwd=folder / "scratch", log=folder / "log", forkserver=server)
    assert child.wait(60) == 0, child.log_tail()
server.close()
print(child.log_tail(), [p.pid for p in __import__("psutil").Process().children()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done []\n", done.stderr


def test_what_it_printed_is_told_where_it_fails(settings: Settings, tmp_path: Path) -> None:
    policy = sandbox.standard_policy(tmp_path / "scratch", "nowhere")
    server = Forkserver(policy, tmp_path)
    with pytest.raises(NotLoaded) as failed:
        server.wait(lambda: None, 60)
    assert failed.value.code == 1 and "backends.nowhere" in server.log_tail(3)
    server.close()
    server.close()


@pytest.mark.parametrize("missing", ["os.pidfd_open", "signal.pidfd_send_signal"])
def test_a_python_without_pidfds_does_without(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conda's, and uv's before 2026, are built against old headers."""
    monkeypatch.delattr(missing)
    forkserver.handles.cache_clear()
    assert not forkserver.possible("cpu")
    monkeypatch.undo()
    forkserver.handles.cache_clear()
    assert forkserver.possible("cpu")


def test_where_it_cannot_be_each_child_loads_for_itself(
    tiny_recipe: str, dataset: Dataset, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child.forkserver, "possible", lambda backend: False)
    request = Request(tiny_recipe.encode(), settings, dataset, seed=1, experiment="1", workdir=tmp_path / "work")
    outcome = execute(replace(request, would_keep=lambda bpb: True))
    assert outcome.status == "scored" and outcome.audited, outcome.reason


def test_it_ends_with_its_referee(tmp_path: Path) -> None:
    """A referee that is killed while torch is loaded, or after it."""
    code = f"""
import sys
sys.path.insert(0, {str(sandbox.paths.project_root())!r})
from pathlib import Path
from core import sandbox
from core.forkserver import Forkserver
server = Forkserver(sandbox.standard_policy(Path({str(tmp_path)!r}) / "scratch", "cpu"), Path({str(tmp_path)!r}))
if sys.argv[1] == "after":
    server.wait(lambda: None, 60)
print(server.pid, flush=True)
input()
"""
    for when in ("before", "after"):
        referee = psutil.Popen([sys.executable, "-c", code, when], stdin=-1, stdout=-1, text=True)
        pid = int(referee.stdout.readline())
        watched = psutil.Process(pid)
        referee.kill()
        referee.communicate()
        psutil.wait_procs([watched], timeout=60)
        assert not trees.alive(pid)
