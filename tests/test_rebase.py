"""An edit that was made to one best and comes to its turn on another: by hand, after a stop, after an undo."""

from __future__ import annotations

import hashlib
import threading

import pytest
from scripted import Limits, Loop, Scripted, check, git, make_lab
from test_loop import in_background, wait_until
from test_thinking import FILLER, Says

from console.output import Screen
from console.rows import row
from console.tables import card
from console.trying import try_verb, wait_verb
from core.contract import Proposal
from core.errors import UserError
from core.files import replace_file
from core.recipe import fingerprint


def spread(score: float, mark: str = "") -> bytes:
    """A recipe whose two ends can be changed apart."""
    return f"SCORE = {score}\n{FILLER}MARK = {mark!r}\n\n\ndef build(spec):\n    return None\n".encode()


@pytest.fixture
def night(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return make_lab(tmp_path / "night", settings, first=spread(2.0))


def edit(lab, source: bytes) -> None:
    replace_file(lab.path / "train.py", source)


def hand_in(lab, source: bytes, what: str) -> int:
    """As `try` does while something else runs."""
    best = lab.best()
    return lab.ledger.propose(
        source=source, program=lab.program(), fingerprint=fingerprint(source), description=what, researcher="you",
        parent=best.number if best else None,
    )  # fmt: skip


class Held(Scripted):
    """Its run of a candidate ends when `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def execute(self, request, on_event, stop):
        outcome = super().execute(request, on_event, stop)
        assert request.experiment.endswith("-1") or self.go.wait(60)
        return outcome


def loop_of(lab, researcher=None, executor=None, on_event=lambda event: None) -> Loop:
    return Loop(lab, researcher, executor or Scripted(), on_event)


def interrupted(lab) -> int:
    """A night with a best, #1, that was stopped while a much better candidate was measured."""
    researcher, executor = Says(Proposal(spread(1.5), "a better score"), thinks_ahead=False), Scripted()
    loop_of(lab, researcher, executor).run(Limits(experiments=1))
    executor.seconds = 60.0
    loop = loop_of(lab, researcher, executor)
    with in_background(loop, lambda: loop.run(Limits())):
        wait_until(lambda: lab.ledger.experiments()[-1].state == "running")
        loop.stop()
    assert [e.state for e in lab.ledger.experiments()] == ["decided", "proposed"]
    return lab.ledger.experiments()[-1].number


def test_try_takes_nothing_back_that_was_kept_meanwhile(night, capsys):
    """An edit of #1, handed in while #2 is measured, which is kept then; and the same file again."""
    executor, researcher = Held(), Says(Proposal(spread(1.5), "a better score"), thinks_ahead=False)
    loop = loop_of(night, researcher, executor)
    with in_background(loop, lambda: loop.run(Limits(experiments=3))):
        wait_until(lambda: [e.state for e in night.ledger.experiments()] == ["decided", "running"])
        edit(night, spread(2.0, "mine"))
        assert try_verb(Screen(False), str(night.path), "a mark", wait=False, timeout=None) == 0
        executor.go.set()
        assert wait_verb(Screen(False), str(night.path), 3, 60.0) == 0
    found = night.ledger.get(3)
    check(night)
    assert night.source(3) == spread(1.5, "mine"), "both changes"
    assert (found.parent, found.detail["reapplied"]["from"], found.detail["reapplied"]["to"]) == (2, 1, 2)
    assert night.ledger.source(found.handed_in) == spread(2.0, "mine")
    assert "-MARK = ''" in night.diff(3) and "SCORE" not in night.diff(3)
    said = "it was made to #1; what is judged is the same change to #2, which was kept meanwhile"
    assert said in capsys.readouterr().out
    assert said in "\n".join(card(row(found), None, Screen(False)))
    edit(night, spread(2.0, "mine"))
    assert try_verb(Screen(False), str(night.path), "a mark", wait=True, timeout=60.0) == 0
    assert "this file was judged before" in capsys.readouterr().out
    assert len(night.ledger.experiments()) == 3


def test_after_a_stop_the_interrupted_candidate_comes_first_and_is_not_taken_back(night):
    assert interrupted(night) == 2
    third = hand_in(night, spread(2.0, "mine"), "a mark")
    e = loop_of(night).judge_pending(third)
    check(night)
    assert (night.source(third), e.parent, night.best().number) == (spread(1.5, "mine"), 2, 2)
    assert any("#3 was made to #1; its change is made to #2" in x.text for x in night.ledger.events())


def test_an_edit_that_does_not_fit_ends_with_both_named_and_nothing_lost(night, capsys):
    interrupted(night)
    edit(night, spread(1.8, "mine"))
    third = hand_in(night, spread(1.8, "mine"), "another score")
    executor = Scripted()
    e = loop_of(night, executor=executor).judge_pending(third)
    check(night)
    assert (e.status, e.parent, e.val_bpb, len(executor.runs)) == ("invalid", 1, None, 1)
    assert "it was made to #1, and #2 is the best now: both change the same lines (`autoresearch diff 2`)" in e.reason
    command = e.reason.split("what was handed in: ")[1].split()
    assert git(night, *command[3:]).encode() + b"\n" == spread(1.8, "mine") == night.source(third)
    assert "SCORE = 1.8" in night.diff(third)


def test_a_lint_refuses_what_a_merge_makes(night):
    interrupted(night)
    third, executor = hand_in(night, spread(2.0, "mine"), "a mark"), Scripted()
    executor.lints = False
    e = loop_of(night, executor=executor).judge_pending(third)
    assert e.status == "invalid" and "with both changes it is no recipe (no recipe for this machine)" in e.reason
    check(night)


def test_what_the_new_best_has_already_is_not_run(night):
    interrupted(night)
    twin = spread(1.5).replace(b"SCORE = 1.5", b"SCORE = 1.5  # as I like it")
    third = hand_in(night, twin, "the same idea")
    e = loop_of(night).judge_pending(third)
    assert e.status == "invalid"


def test_an_edit_that_lay_there_while_a_better_one_was_kept(night, capsys):
    """Nobody handed it in before: it is known from what this program put into the lab last."""
    loop_of(night).judge_pending(1)
    edit(night, spread(2.0, "mine"))
    loop_of(night).judge(spread(1.5), "a better score")
    assert night.working_source() == spread(2.0, "mine") and night.best().number == 2
    loop = loop_of(night, executor=(executor := Held()))
    with in_background(loop, lambda: loop.judge(spread(1.9), "something that runs meanwhile")):
        wait_until(lambda: [e.state for e in night.ledger.pending()] == ["running"])
        try_verb(Screen(False), str(night.path), "a mark", wait=False, timeout=None)
        executor.go.set()
    assert "train.py was edited from #1; #2 is the best now" in capsys.readouterr().out
    assert (night.ledger.get(4).parent, night.ledger.get(4).description) == (1, "a mark")
    loop_of(night).judge_pending(4)
    assert night.source(4) == spread(1.5, "mine")
    check(night)


def test_an_edit_that_lay_there_and_does_not_fit_is_refused_and_stays(night):
    loop_of(night).judge_pending(1)
    edit(night, spread(1.9, "mine"))
    loop_of(night).judge(spread(1.5), "a better score")
    with pytest.raises(UserError, match=r"made to #1, and #2 is the best now: both change the same lines") as refused:
        try_verb(Screen(False), str(night.path), "a score", wait=True, timeout=60.0)
    assert "autoresearch best --source" in refused.value.action
    assert night.working_source() == spread(1.9, "mine") and len(night.ledger.experiments()) == 2
    loop = loop_of(night, executor=(executor := Held()))
    with in_background(loop, lambda: loop.judge(spread(1.95), "something that runs meanwhile")):
        wait_until(lambda: [e.state for e in night.ledger.pending()] == ["running"])
        try_verb(Screen(False), str(night.path), "a score", wait=False, timeout=None)  # it was told
        executor.go.set()
    assert (night.ledger.get(4).parent, night.source(4)) == (2, spread(1.9, "mine"))


def test_a_best_that_was_taken_over_by_hand_is_what_the_edit_began_from(night, capsys):
    loop_of(night).judge_pending(1)
    edit(night, spread(2.0, "mine"))
    loop_of(night).judge(spread(1.5, "theirs"), "a better score")
    loop = loop_of(night, executor=(executor := Held()))
    with in_background(loop, lambda: loop.judge(spread(1.9), "something that runs meanwhile")):
        wait_until(lambda: [e.state for e in night.ledger.pending()] == ["running"])
        edit(night, spread(1.4, "theirs"))
        try_verb(Screen(False), str(night.path), "a score", wait=False, timeout=None)
        executor.go.set()
    assert night.ledger.get(4).parent == 2, "it sets what #2 has set"


def test_what_takes_a_keep_back_on_purpose_is_judged_as_written_and_said(night, capsys):
    loop_of(night).judge_pending(1)
    loop_of(night).judge(spread(1.5), "a better score")
    loop = loop_of(night, executor=(executor := Held()))
    with in_background(loop, lambda: loop.judge(spread(1.9), "something that runs meanwhile")):
        wait_until(lambda: [e.state for e in night.ledger.pending()] == ["running"])
        edit(night, spread(2.0, "mine"))
        try_verb(Screen(False), str(night.path), "the old score", wait=False, timeout=None)
        executor.go.set()
    assert "nearer to #1 than to the best, #2" in capsys.readouterr().out
    loop_of(night).judge_pending(4)
    assert (night.source(4), night.ledger.get(4).parent) == (spread(2.0, "mine"), 2)


def test_what_waits_when_its_best_is_taken_back_goes_on_without_it(night):
    loop_of(night).judge_pending(1)
    loop_of(night).judge(spread(1.5), "a better score")
    third = hand_in(night, spread(1.5, "mine"), "a mark")
    night.undo(2)
    e = loop_of(night).judge_pending(third)
    assert (night.source(third), e.parent) == (spread(2.0, "mine"), 1)


def test_the_record_of_a_file_is_found_by_what_was_handed_in(night):
    interrupted(night)
    source = spread(2.0, "mine")
    third = hand_in(night, source, "a mark")
    loop_of(night).judge_pending(third)
    sha256 = hashlib.sha256(source).hexdigest()
    assert [e.number for e in night.ledger.of_source(sha256)] == [third] and night.ledger.is_decided(sha256)
    assert loop_of(night).judge(source, "again").number == third
