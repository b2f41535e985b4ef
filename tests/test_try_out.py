"""What is handed in and does not run at all is told before other runs are made."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted import Loop, Scripted, make_lab
from several import Machine, loop_of
from test_loop import in_background, wait_until
from test_rebase import Held, edit, hand_in, spread

from console.output import Screen
from console.trying import try_verb, wait_verb
from core import measuring
from core.executor import LocalExecutor


@pytest.fixture
def night(tmp_path, settings):
    return make_lab(tmp_path / "night", replace(settings, verdict="statistical"), spread(2.0))


def test_a_broken_edit_of_a_new_lab_does_not_wait_for_the_baseline(night):
    second, executor = hand_in(night, spread(-1.0), "broken"), Machine()
    e = loop_of(night, executor).judge_pending(second)
    assert (e.status, e.reason, len(executor.dry), executor.runs) == ("crash", "it does not run", 1, [])
    assert night.ledger.get(1).state == "proposed" and night.working_source() == spread(2.0)
    assert loop_of(night, executor).judge_pending(1).status == "keep"
    assert len(executor.dry) == 1


def test_one_that_runs_waits_and_is_tried_once_and_what_comes_first_is_not_tried(night):
    second, executor = hand_in(night, spread(2.1), "whole"), Machine()
    assert loop_of(night, executor).judge_pending(second).status == "discard"
    assert len(executor.dry) == 1 and not executor.together
    third = hand_in(night, spread(2.2), "alone")
    loop_of(night, executor).judge_pending(third)
    assert len(executor.dry) == 1


def test_it_is_tried_before_the_best_runs_again_for_it(night, monkeypatch):
    loop_of(night).judge_pending(1)
    monkeypatch.setattr(measuring, "CONTROL_EVERY", 0)
    executor = Machine()
    assert loop_of(night, executor).judge(spread(-1.0), "broken").status == "crash"
    assert executor.runs == []


def test_it_is_told_between_two_runs_of_a_night(tmp_path, settings, capsys):
    lab = make_lab(tmp_path / "busy", settings, spread(2.0))
    loop_of(lab, Scripted()).judge_pending(1)
    executor = Held()
    waits = [hand_in(lab, spread(score), f"waits {score}") for score in (2.1, 2.2)]
    loop = Loop(lab, None, executor, lambda event: None)
    with in_background(loop, lambda: loop.judge_pending(waits[-1])):
        wait_until(lambda: lab.ledger.get(waits[0]).state == "running")
        edit(lab, spread(-1.0))
        try_verb(Screen(False), str(lab.path), "broken", wait=False, timeout=None)
        executor.go.set()
        assert wait_verb(Screen(False), str(lab.path), 4, 60.0) == 1
    finished = [e.finished for e in lab.ledger.experiments()]
    assert finished[3] <= finished[2] and lab.ledger.get(4).status == "crash"
    assert "it does not run" in capsys.readouterr().out


def test_an_error_of_the_recipe_is_quoted(tmp_path, settings, tiny_recipe):
    lab = make_lab(tmp_path / "real", settings, tiny_recipe.encode())
    broken = tiny_recipe.replace("def build(spec", "def build(spec, _=undefined_name", 1)
    second = hand_in(lab, broken.encode(), "a name that is not there")
    e = Loop(lab, None, LocalExecutor(), lambda event: None).judge_pending(second)
    assert e.status == "crash" and "undefined_name" in e.reason + e.outcome["log_tail"]
    assert "NameError" in e.outcome["log_tail"] and "| " not in e.outcome["log_tail"].splitlines()[-1]
    assert lab.ledger.get(1).state == "proposed", "the baseline has not run"
