"""A machine that sleeps in the middle of an experiment, as Windows does it: nothing of ours runs, and the clocks that
budgets and limits go by go on. Real experiments, all of whose processes are stopped for so long; that this was a sleep
is told by a clock that is presented. (On Linux and macOS these clocks stand still in sleep.)"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace

import psutil
import pytest
from scripted import Limits, Scripted, check, make_lab, recipe
from test_loop import loop_of

from core import interruptions
from core.executor import LocalExecutor
from core.loop import Loop
from core.steady import Steady, can_be_others, departure

BUDGET = 2.0
CAP = 4.0  # seconds for the warm-up; scoring may take BUDGET more
SLEEP = 9.0


def stopped(pid):
    """The process and all below it, which stand still."""
    found = []
    while True:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        if not (new := [p for p in tree if p not in found]):
            return found
        for process in new:
            process.send_signal(signal.SIGSTOP)
        found += new


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="processes are stopped by signals")
@pytest.mark.parametrize("phase", ["warm-up", "train", "score", "audit"])
def test_an_experiment_in_which_the_machine_slept_is_made_again(tmp_path, settings, tiny_recipe, phase):
    short = replace(settings, budget=BUDGET, warmup_cap=CAP)
    lab = make_lab(tmp_path / "night", short, tiny_recipe.encode())
    lab.ledger.close()
    began, slept = tmp_path / "began", tmp_path / "slept"

    def night():
        interruptions.awake = lambda: time.monotonic() - (SLEEP if slept.exists() else 0.0)
        interruptions.running = time.monotonic
        tell = lambda event: began.touch() if event.data.get("phase") == phase else None  # noqa: E731
        Loop(type(lab).open(lab.path), None, LocalExecutor(), tell).judge_pending(1)

    from test_kill import are_tensors, in_a_process  # which Windows has not

    pid = in_a_process(night)
    try:
        until = time.monotonic() + 60
        while not began.exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert began.exists()
        asleep = stopped(pid)
        time.sleep(SLEEP)
        slept.touch()
        for process in asleep:
            process.send_signal(signal.SIGCONT)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        for process in psutil.Process().children(recursive=True):
            process.kill()
    lab = type(lab).open(lab.path)
    check(lab, are_tensors)
    e = lab.ledger.get(1)
    assert (e.status, e.attempts) == ("keep", 2), e.reason
    assert "slept" not in str((e.outcome or {})["health"].get("disturbed", "")), "the second run began after it"
    why = f"the machine slept for {SLEEP:.0f} s meanwhile"
    assert any(why in event.text for event in lab.ledger.events()), [event.text for event in lab.ledger.events()]


@pytest.mark.parametrize("status", ["crash", "invalid", "timeout", "hopeless"])
def test_no_end_of_a_run_in_which_the_machine_slept_is_a_candidates(tmp_path, settings, status):
    """A card's memory may be lost in it: what crashed or was caught then may be well."""
    night = make_lab(tmp_path / "night", settings)
    loop_of(night).run(Limits(experiments=1))

    class Sleeps(Scripted):
        def execute(self, request, on_event, stop):
            once = not self.runs
            self.changes = {"status": status, "val_bpb": None, "health": {"slept_seconds": 60.0}} if once else {}
            return super().execute(request, on_event, stop)

    executor = Sleeps()
    assert (loop_of(night, executor).judge(recipe(1.0), "an idea").status, len(executor.runs)) == ("keep", 2)
    check(night)


def test_a_score_of_such_a_run_decides_nothing_under_the_simple_rule_either(tmp_path, settings):
    night = make_lab(tmp_path / "night", replace(settings, verdict="simple"))
    loop_of(night).run(Limits(experiments=1))
    executor = Scripted(health={"slept_seconds": 60.0})
    e = loop_of(night, executor).judge(recipe(0.5), "beside a closed lid")
    assert (e.status, len(executor.runs)) == ("invalid", 3)
    assert e.reason == "measured 3 times, each time disturbed: the machine slept for 60 s meanwhile"
    check(night)


def test_a_moment_is_no_sleep():
    outcome = {"status": "crash", "health": {"slept_seconds": 0.4}}
    assert not can_be_others(outcome) and not departure(outcome, Steady())
