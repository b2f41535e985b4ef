"""Experiments as they run on Windows, on Linux: the referee with the platform presented as Windows, real children in
jobs that tests/windows_stand_in.py keeps, a TCP channel, files by number. docs/verified.md says what is not shown."""

from __future__ import annotations

import dataclasses
import os
import re
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scripted import Limits, Loop, Night, Scripted, check, make_lab
from windows_stand_in import StandIn, members, refuse_open_files

from console.output import Screen
from console.running import run_verb
from core import handles, interruptions, processes, sandbox, sandbox_windows, selfcheck_windows, wire
from core.child import Worker
from core.data import Dataset
from core.errors import UserError
from core.lab import Lab
from core.outcome import Request
from core.probing import Probe
from core.referee import execute
from core.settings import Settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in for Windows' jobs is written for Linux")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """`sys.platform` is "win32" in this process; its children see where they really are."""
    system = StandIn()
    sandbox.abilities.cache_clear()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sandbox_windows, "Windows", lambda: system)
    monkeypatch.setattr(interruptions, "awake_seconds", time.monotonic)
    monkeypatch.setattr(wire, "Selector", selectors.SelectSelector)
    yield system
    monkeypatch.undo()
    sandbox.abilities.cache_clear()
    assert system.jobs == {}, "a job was left open"
    system.close_boxes()


# Looks into its postbox while it is imported: the trainer then has neither tokens nor the scorer weights.
EARLY = """
import os, socket

def peek():
    with socket.socket(fileno=os.dup(int(os.environ["AUTORESEARCH_POSTBOX"]))) as box:
        try:
            return len(box.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return 0

EARLY = peek()
"""


def test_an_experiment_is_scored_and_audited(
    jobs: StandIn, settings: Settings, dataset: Dataset, tiny_recipe: str, tmp_path: Path, monkeypatch
) -> None:
    """No file is replaced or removed while it is open."""
    recipe = tiny_recipe.replace('{"depth": 1,', '{"depth": 1, "early": EARLY,') + EARLY
    work = tmp_path / "work"
    refused = refuse_open_files(monkeypatch)
    request = Request(recipe.encode(), settings, dataset, settings.seed, "1", work, audit="always", lint=False)
    outcome = execute(request)
    assert (outcome.status, outcome.reason, outcome.audited) == ("scored", "", True)
    assert refused == []
    assert outcome.steps > 5 and 1.0 < outcome.val_bpb < 9.0
    assert outcome.describe["early"] == 0
    assert outcome.peak_memory > 10**7
    for role in ("trainer", "scorer", "auditor"):
        assert outcome.sandbox[role] == {"job": True, "memory": "job object"}
    assert any("network" in lack for lack in outcome.sandbox["abilities"]["missing"])
    assert len(jobs.limits) == 3 and all(memory > 2**30 and processes == 64 for memory, processes in jobs.limits)
    assert {p.name for p in work.iterdir()} == {"weights.safetensors", "trainer.log", "scorer.log", "auditor.log"}


@pytest.mark.parametrize(
    ("device", "audit", "begun"),
    [
        ("cpu", "always", [("trainer", 0), ("scorer", 1), ("auditor", 2)]),
        # Each process that loads torch for a card commits gigabytes: never two beside the training.
        ("cuda:0", "always", [("trainer", 0), ("scorer", 0), ("auditor", 0)]),
        ("cuda:0", "auto", [("trainer", 0), ("scorer", 0)]),
    ],
)
def test_what_runs_beside_a_training(
    jobs: StandIn,
    settings: Settings,
    dataset: Dataset,
    tiny_recipe: str,
    tmp_path: Path,
    monkeypatch,
    device,
    audit,
    begun,
) -> None:
    """No prober, which would wait for looks that cannot be taken; on a card no scorer and no auditor."""
    started: list[tuple[str, int]] = []

    class Started(Worker):
        def __init__(self, role: str, *place: Any) -> None:
            started.append((role, len(jobs.jobs)))
            super().__init__(role, *place)

    monkeypatch.setattr("core.referee.Worker", Started)
    monkeypatch.setattr("core.pausing.Worker", Started)
    here = dataclasses.replace(settings, device=device)
    request = Request(tiny_recipe.encode(), here, dataset, settings.seed, "1", tmp_path / "work", audit=audit)
    outcome = execute(dataclasses.replace(request, probe=Probe((0.3, 0.6), 2048), would_keep=lambda bpb: False))
    assert (outcome.status, outcome.reason, outcome.audited) == ("scored", "", audit == "always")
    assert started == begun and outcome.unprobed == outcome.probes == []


def test_a_night_moves_no_open_file(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lab, ledger, git and the loop's files with Windows' rules; the experiments follow a script."""
    monkeypatch.setattr(sys, "platform", "win32")
    refused = refuse_open_files(monkeypatch)
    lab = make_lab(tmp_path / "lab", settings)
    Loop(lab, Night(), Scripted(), lambda event: None).run(Limits(experiments=12))
    lab = Lab.open(tmp_path / "lab")
    Loop(lab, Night(), Scripted(), lambda event: None).run(Limits(experiments=4))
    assert refused == []
    check(lab)
    assert len(lab.ledger.experiments()) == 16 and sum(e.is_kept for e in lab.ledger.experiments()) >= 3


@pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib keeps os's functions to itself there")
def test_what_windows_refuses_is_refused_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules that the tests above go by."""
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "file"
    file.write_text("x")
    refused = refuse_open_files(monkeypatch)
    with file.open(), pytest.raises(PermissionError):
        file.replace(tmp_path / "other")
    with file.open(), pytest.raises(PermissionError):
        (tmp_path / "folder").rename(tmp_path / "moved")
    mapped = np.memmap(file, np.uint8, "r")
    with pytest.raises(PermissionError):
        file.unlink()
    del mapped
    file.unlink()
    assert len(refused) == 3


# A daemon in a session of its own, whose parents have gone; then the recipe ends as a crash does.
DAEMON = """
        import os, time
        told, tell = os.pipe()
        if not os.fork():
            os.setsid()
            if not os.fork():
                os.write(tell, str(os.getpid()).encode())
                time.sleep(600)
            os._exit(0)
        os.wait()
        raise RuntimeError(f"daemon {os.read(told, 20).decode()}")
"""


def test_a_daemon_ends_with_the_job_of_its_recipe(
    jobs: StandIn, settings: Settings, dataset: Dataset, tiny_recipe: str, tmp_path: Path
) -> None:
    recipe = tiny_recipe.replace("        torch.manual_seed(spec.seed)\n", DAEMON)
    request = Request(recipe.encode(), settings, dataset, settings.seed, "1", tmp_path / "work", lint=False)
    outcome = execute(request)
    assert outcome.status == "crash"
    daemon = int(re.search(r"RuntimeError: daemon (\d+)", outcome.reason)[1])
    assert not processes.alive(daemon)


def test_too_many_processes_end_it(
    jobs: StandIn, settings: Settings, dataset: Dataset, tiny_recipe: str, tmp_path: Path
) -> None:
    storm = (
        "        import os, time\n        for _ in range(90):\n            os.fork() or time.sleep(60)\n"
        "        time.sleep(60)\n"  # or it would be asked for its end before anybody has counted
    )
    recipe = tiny_recipe.replace("        torch.manual_seed(spec.seed)\n", storm)
    request = Request(recipe.encode(), settings, dataset, settings.seed, "1", tmp_path / "work", lint=False)
    outcome = execute(request)
    assert outcome.status == "crash" and "too many processes" in outcome.reason


def test_doctor_looks_at_the_channel_the_end_and_the_memory(jobs: StandIn) -> None:
    checks = sandbox.self_check()
    assert [check.ok for check in checks[:3]] == [True, True, True], [check.line() for check in checks]
    assert [check.name for check in checks[3:]] == ["sandbox: lacks"] * len(sandbox_windows.missing())


def test_strict_refuses_windows_and_makes_nothing(jobs: StandIn, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    limits = {"experiments": 1, "hours": None, "until": None}
    with pytest.raises(UserError, match=rf"lacks {len(sandbox_windows.missing())} things: Windows: a recipe can read"):
        run_verb(Screen(False), "night", researcher="search", demo=False, strict=True, **limits)
    assert not (tmp_path / "labs").exists()


def test_doctor_says_that_no_child_can_be_started(jobs: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(job: int, process: object) -> None:
        raise OSError("AssignProcessToJobObject: Windows refused with error 5")

    monkeypatch.setattr(jobs, "assign", refused)
    check = selfcheck_windows.self_check()[0]
    assert check.ok is False and "refused with error 5" in check.detail
    assert not any(members(mark) for mark in jobs._marks.values())


def test_a_child_that_is_not_in_its_job_never_runs(jobs: StandIn, tmp_path: Path) -> None:
    def refused(job: int, process: object) -> None:
        raise OSError("refused")

    policy = sandbox.standard_policy(tmp_path / "scratch", "cpu")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="refused"):
        patch.setattr(jobs, "assign", refused)
        sandbox.launch([sys.executable, "-c", code], policy, cwd=tmp_path / "scratch", log=tmp_path / "log")
    time.sleep(0.2)
    assert not (tmp_path / "ran").exists()


def test_a_call_of_windows_that_is_refused_leaves_no_child_that_never_ends(
    jobs: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the peak nor the end of a job that is empty by now."""

    def refused(job: int) -> int:
        raise OSError("QueryInformationJobObject: Windows refused with error 87")

    monkeypatch.setattr(jobs, "peak", refused)
    monkeypatch.setattr(jobs, "end", refused)
    policy = sandbox.standard_policy(tmp_path / "scratch", "cpu")
    child = sandbox.launch(
        [sys.executable, "-c", "print('done')"], policy, cwd=tmp_path / "scratch", log=tmp_path / "log"
    )
    assert child.wait(60.0) == 0 and child.log_tail().strip() == "done"
    began = time.monotonic()
    child.kill()
    assert time.monotonic() - began < 5.0 and jobs.jobs == {}
    child.channel.close()


def test_a_gpu_childs_memory_is_watched_and_not_limited_by_the_job(tmp_path: Path) -> None:
    """Windows' driver commits as much memory of the system as it uses of the card."""
    policy = sandbox.standard_policy(tmp_path, "cpu", memory_bytes=2**30)
    assert sandbox_windows.hard_limit(policy) == 2**30
    assert sandbox_windows.hard_limit(dataclasses.replace(policy, backend="rtx")) == 0


@pytest.mark.parametrize(("backend", "told"), [("cpu", True), ("rtx", False)])
def test_what_a_driver_commits_for_its_card_is_no_memory_that_was_taken(
    jobs: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, told: bool
) -> None:
    monkeypatch.setattr(jobs, "peak", lambda job: 2**40)
    policy = dataclasses.replace(sandbox.standard_policy(tmp_path / "scratch", "cpu"), backend=backend)
    living = "import time; held = bytes(2**24); time.sleep(1.5)"  # long enough for its memory to be looked at
    child = sandbox.launch([sys.executable, "-c", living], policy, cwd=tmp_path / "scratch", log=tmp_path / "log")
    child.wait(60.0)
    assert (child.peak_memory() == 2**40) is told and child.peak_memory() > 2**20
    child.channel.close()


def test_what_a_child_on_windows_finds_in_its_environment(jobs: StandIn, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SYSTEMROOT", r"C:\WINDOWS")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "secret")
    found = sandbox.environment(tmp_path / "home", tmp_path / "tmp", tmp_path / "caches")
    assert found["USERPROFILE"] == str(tmp_path / "home") and r"C:\WINDOWS\System32" in found["PATH"].split(";")
    assert "PYTORCH_ALLOC_CONF" not in found and "secret" not in found.values()


# --- the parts ---------------------------------------------------------------------------------------


def test_a_stranger_who_connects_first_is_no_end_of_the_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    real, strangers = socket.create_connection, []

    def late(address: tuple[str, int], timeout: float) -> socket.socket:
        strangers.append(real(address, timeout))
        return real(address, timeout)

    monkeypatch.setattr(handles.socket, "create_connection", late)
    with pytest.raises(ConnectionError, match="another process"):
        handles.pair()
    strangers[0].close()


def test_a_file_is_duplicated_to_be_read_and_taken_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of Windows' calls is made with what; whether they do what their documentation says is not shown."""
    calls = []

    def duplicate(*arguments: object) -> int:
        calls.append(arguments)
        return 812

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "O_BINARY", 0x8000, raising=False)
    kernel = SimpleNamespace(GetCurrentProcess=lambda: -1, DuplicateHandle=duplicate)
    runtime = SimpleNamespace(
        get_osfhandle=lambda fd: fd + 1000, open_osfhandle=lambda number, flags: (number, flags & os.O_BINARY)
    )
    monkeypatch.setitem(sys.modules, "_winapi", kernel)
    monkeypatch.setitem(sys.modules, "msvcrt", runtime)
    assert handles.WindowsGiver(77, 55).give(3) == 812
    # source process and handle, the child's process, FILE_GENERIC_READ, not inheritable, not with the same rights
    assert calls == [(-1, 1003, 55, 0x120089, False, 0)]
    assert handles.WindowsTaker().take(812) == (812, 0x8000)


def test_elsewhere_no_handle_is_duplicated() -> None:
    for call in (lambda: handles.WindowsGiver(1, 1).give(0), lambda: handles.WindowsTaker().take(0)):
        with pytest.raises(OSError, match="on Windows only"):
            call()


def test_the_python_of_a_virtual_environment_is_started_without_its_redirector(monkeypatch) -> None:
    monkeypatch.setattr(sys, "_base_executable", r"C:\Python\python.exe", raising=False)
    command, more = sandbox_windows.without_redirector([sys.executable, "-c", "pass"])
    assert command == [r"C:\Python\python.exe", "-c", "pass"] and more == {"__PYVENV_LAUNCHER__": sys.executable}
    assert sandbox_windows.without_redirector(["git"]) == (["git"], {})
