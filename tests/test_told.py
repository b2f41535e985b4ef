"""What the verbs say of a lab while it runs, is cut off, paused, waited for, or ended by Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from scripted import Loop, Scripted, make_lab, recipe
from typed import Verb, quick_lab, typed_in

from console import places, running, tables
from console.display import finish_line
from console.options import Moment
from console.rows import tally
from console.running import Again, until_word
from core import live, locks, sandbox
from core.deadline import Deadline
from core.lab import Lab
from core.settings import Settings


@pytest.fixture
def verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Verb:
    return typed_in(tmp_path, monkeypatch)


@pytest.fixture
def lab(tmp_path: Path, settings: Settings) -> Lab:
    """./labs/quick with a baseline of 2.0 and a keep of 1.5."""
    return quick_lab(tmp_path, settings)


def propose(lab: Lab, score: float) -> int:
    source = recipe(score)
    return lab.ledger.propose(source=source, program=b"", fingerprint=str(score), description=f"idea {score}",
                              researcher="you", parent=2)  # fmt: skip


@contextmanager
def held(lab: Lab, **state: Any) -> Iterator[None]:
    """Somebody runs the lab, and publishes this."""
    with locks.hold(lab.record / "run.lock", "lab quick", ""):
        (lab.record / live.FILE).write_text(json.dumps({"updated": time.time(), **state}))
        yield


# --- cut off -----------------------------------------------------------------------------------------


def test_what_a_kill_cut_off_is_told_by_every_screen(verb: Verb, lab: Lab) -> None:
    lab.ledger.start(propose(lab, 1.4))
    with held(lab, state="running", number=3):
        assert "running" in verb("log", "quick").output and "interrupted" not in verb("log", "quick").output
        assert "interrupted" not in verb("status", "quick").output
    log, status = verb("log", "quick").output, verb("status", "quick").output
    assert "interrupted" in log and "#3 was interrupted: the next run repeats it (autoresearch run labs/quick)" in log
    assert "running      no" in status and "interrupted  #3  idea 1.4: the next run repeats it" in status
    assert "interrupted" in verb("show", "3", "quick").output
    found = json.loads(verb("log", "quick", "--json").output)["experiments"]
    assert [e["cut_off"] for e in found] == [False, False, True]


# --- waiting -----------------------------------------------------------------------------------------


def test_another_experiments_progress_is_not_told_as_its_own(verb: Verb, lab: Lab) -> None:
    first, second = propose(lab, 1.4), propose(lab, 1.3)
    state = {"state": "running", "number": first, "phase": "train", "step": 3}
    with held(lab, **state):
        said = verb("wait", second, "quick", "--timeout", "0", status=124).output
        assert said.splitlines()[-1].startswith(f"#{second} waits for #{first}, which still runs: train, step 3; see: ")
        found = json.loads(verb("wait", second, "quick", "--timeout", "0", "--json", status=124).output)
        assert found["waits_for"] == first and found["experiment"]["number"] == second
        said = verb("wait", first, "quick", "--timeout", "0", status=124).output
        assert said.splitlines()[-1].startswith(f"#{first} still runs: train, step 3; see: ")
        found = json.loads(verb("wait", first, "quick", "--timeout", "0", "--json", status=124).output)
        assert found["waits_for"] is None


# --- the plan ----------------------------------------------------------------------------------------


def test_the_plan_counts_the_baseline() -> None:
    """Five runs of it: 300 s, then three candidates of 150 s each."""
    said = finish_line(150.0, 4, None, baseline=300.0)
    assert said == "about 4 experiments (2 min 30 s each; the baseline 5 min), done in about 12 min 30 s"
    assert "about 3 experiments" in finish_line(150.0, None, 620.0, baseline=300.0)
    assert "about 1 experiment " in finish_line(150.0, None, 60.0, baseline=300.0)
    assert "; the baseline 5 min)" in finish_line(150.0, None, None, baseline=300.0)


@pytest.mark.parametrize(("rule", "runs"), [("statistical", 5), ("simple", 1)])
def test_the_banner_of_a_new_lab_has_it(
    verb: Verb, settings: Settings, tmp_path: Path, rule: str, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.executor.LocalExecutor", lambda: Scripted(noise=0.001))
    make_lab(tmp_path / "labs" / "new", replace(settings, verdict=rule))
    said = verb("run", "new", "--experiments", "1", "--researcher", "scripted:Night").output
    plan = next(line for line in said.splitlines() if line.startswith("  plan"))
    took = "1 min 25 s" if runs == 5 else "17 s"  # 2 s of training and 15 s of the rest, each
    assert f"the baseline {took}), done in about {took}" in plan


# --- the pause ---------------------------------------------------------------------------------------


def test_a_pause_is_pending_until_the_run_under_way_has_ended(verb: Verb, lab: Lab) -> None:
    loop = Loop(lab, None, Scripted(seconds=3.0), lambda event: events.append(event))
    events: list[Any] = []
    number = propose(lab, 1.4)
    judging = threading.Thread(target=lambda: loop.judge_pending(number))
    judging.start()
    try:
        until(lambda: live.read(lab.record).get("phase") == "train")
        assert "pauses after the run under way" in verb("pause", "quick").output
        until(lambda: live.read(lab.record).get("pause_asked"))
        assert verb("status", "quick").output.splitlines()[0].endswith("; pauses after the run under way")
        verb("resume", "quick")
        until(lambda: live.read(lab.record).get("pause_asked") is False)
        assert "pauses" not in verb("status", "quick").output
    finally:
        loop.stop()
        judging.join()


def until(done: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_paused_screen_shows_no_experiment(lab: Lab) -> None:
    from console.display import Ticker
    from console.output import Screen

    ticker = Ticker(Screen(False))
    narrator = running._Narrator(Screen(False), ticker, lab, None)
    narrator(live.Event("start", {"number": 3, "description": "idea"}))
    narrator(live.Event("phase", {"phase": "audit"}))
    assert ticker.line() == "#3  audit  idea"
    narrator(live.Event("waiting", {"text": "waits: a game"}))
    assert ticker.line() == "waits"
    narrator(live.Event("waiting", {"text": "paused", "paused": True}))
    assert ticker.line() == "paused"


# --- after Ctrl-C ------------------------------------------------------------------------------------


def test_the_command_that_goes_on_is_the_same_run(verb: Verb, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it: after a first experiment, of twenty."""

    def execute(self: Scripted, *given: Any) -> Any:
        if len(lab.ledger.experiments()) > 3:
            os.kill(os.getpid(), signal.SIGINT)
        return judged(self, *given)

    judged = Scripted.execute
    monkeypatch.setattr(Scripted, "execute", execute)
    whole = replace(sandbox.abilities(), missing=[])
    monkeypatch.setattr(sandbox, "abilities", lambda: whole)
    options = ["--strict", "--researcher", "scripted:Night", "--notify", "http://127.0.0.1:9/secret"]
    said = verb("run", "quick", "--hours", "48", "--experiments", "20", *options, status=130).output
    decided = sum(e.status is not None for e in lab.ledger.experiments()) - 2
    line = next(line for line in said.splitlines() if line.endswith("   go on"))
    words = shlex.split(line.removesuffix("go on"))
    assert words[:3] == ["autoresearch", "run", "labs/quick"] and "--strict" in words
    given = dict(pairwise(words))
    assert given["--experiments"] == str(20 - decided) and given["--researcher"] == "scripted:Night"
    assert given["--notify"] == "URL", "the address is a secret"
    ends = datetime.strptime(given["--until"], "%Y-%m-%dT%H:%M").timestamp() - time.time()
    assert 47.9 * 3600 < ends <= 48 * 3600 + 60


@pytest.mark.parametrize("seconds", [30.0, 3600.0, 86_000.0, 2 * 86_400.0])
def test_a_deadline_is_told_so_that_it_is_read_as_the_same(seconds: float) -> None:
    deadline = time.time() + seconds
    read = Moment().convert(until_word(deadline), None, None)
    assert 0 <= read - deadline < 60


@pytest.mark.parametrize("text", ["2020-01-01T07:00", "2026-13-01T07:00", "T", "tomorrow"])
def test_what_is_no_deadline(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is over" if text[:4] == "2020" else "HH:MM"):
        Moment().convert(text, None, None)


def test_a_demo_goes_on_with_all_that_it_was_given() -> None:
    again = Again(["run", "labs/x", "--demo"], {"strict": True, "meanwhile": None}, 5, None, counts_all=True)
    assert again.spelled(decided=3) == "autoresearch run labs/x --demo --experiments 5 --strict"
    assert Again(["run", "labs/x"], {}, 5, None).spelled(decided=5) == "", "nothing is left"
    assert Again(["run", "labs/x"], {}, None, Deadline.after(-1 / 3600)).spelled() == ""


# --- dropping an edit --------------------------------------------------------------------------------


def test_an_edit_is_dropped_and_can_be_had_again(verb: Verb, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.path)
    mine = recipe(1.0, mark="mine")
    (lab.path / "train.py").write_bytes(mine)
    said = verb("best", "--source", "--out", "train.py").output
    assert lab.working_source() == lab.best_source() and "written to train.py\nwhat lay there was never judged" in said
    again = shlex.split(said.partition("is kept: ")[2])
    assert subprocess.run(again, capture_output=True, check=True).stdout == mine
    (lab.path / "train.py").write_bytes(mine)
    aside = json.loads(verb("best", "--source", "--out", "train.py", "--json").output)["set_aside"]
    assert shlex.split(aside) == again
    assert verb("best", "--source", "--out", "train.py").output == "written to train.py\n"


def test_before_there_is_a_best_an_edit_is_dropped_for_the_first_recipe(
    verb: Verb, settings: Settings, tmp_path: Path
) -> None:
    new = make_lab(tmp_path / "labs" / "new", settings)
    first, file = new.working_source(), new.path / "train.py"
    file.write_bytes(recipe(1.0, mark="mine"))
    assert "is kept: git -C" in verb("best", "new", "--source", "--out", file).output
    assert file.read_bytes() == first
    assert json.loads(verb("best", "new", "--source", "--out", file, "--json").output)["best"] is None
    assert "no best yet" in str(verb("best", "new", "--source", status=1).output)


# --- tallies -----------------------------------------------------------------------------------------


def test_counts_add_up(verb: Verb, lab: Lab) -> None:
    judge = Loop(lab, None, Scripted(), lambda event: None).judge
    for score, text in ((1.4, "more"), (1.9, "worse"), (None, "broken")):
        judge(recipe(score), text)
    assert "5 experiments: baseline, 2 kept, 1 discarded, 1 failed; best" in verb("log", "quick").output
    verb("undo", "3", "quick")
    total = tally(places.look(lab).rows, 2)
    assert tables.counts_line(total) == "baseline, 1 kept, 1 discarded, 1 failed, 1 taken back"
    counted = 1 + total.kept + total.discarded + total.failed + total.undone
    assert counted == total.experiments == 5
    assert "last keep    #2" in verb("status", "quick").output
    verb("undo", "2", "quick")
    assert "last keep" not in verb("status", "quick").output, "the baseline is no keep"
    assert json.loads(verb("status", "quick", "--json").output)["total"]["undone"] == 2


def test_the_end_of_a_run_counts_its_own(verb: Verb, settings: Settings, tmp_path: Path) -> None:
    make_lab(tmp_path / "labs" / "new", settings)
    said = verb("run", "new", "--experiments", "2", "--researcher", "scripted:Night").output
    assert "\n2 experiments in this run: baseline, " in said
    said = verb("run", "new", "--experiments", "2", "--researcher", "scripted:Night").output
    counts = next(line for line in said.splitlines() if "in this run" in line)
    assert "baseline" not in counts
    assert sum(int(part.split()[0]) for part in counts.partition(": ")[2].split(", ")) == 2


# --- before the banner -------------------------------------------------------------------------------


def test_no_banner_comes_before_a_refusal(verb: Verb, lab: Lab, settings: Settings) -> None:
    with locks.hold_device(settings.device):
        said = verb("run", "quick", "--experiments", "1", status=1)
        assert "the device cpu is in use by" in said.output and "plan" not in said.output
    (lab.path / "train.py").write_bytes(recipe(1.0, mark="mine"))
    said = verb("run", "quick", "--experiments", "1", status=1)
    assert "not judged" in said.output and "plan" not in said.output and "git" not in said.output
    with held(lab, state="running", number=2):
        said = verb("run", "quick", "--experiments", "1", status=1)
        assert "autoresearch stop labs/quick" in said.output and "plan" not in said.output
