"""The loop as a state machine: order, limits, failures, refusals, requests of other processes, changed versions, and a
rule-based search for sequences that break what has to hold. One test judges with the real referee."""

from __future__ import annotations

import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scripted import Ahead, Limits, Loop, Night, Scripted, check, git, idea, make_lab, recipe

from core import files, gitstore, lab, live
from core.contract import Proposal
from core.deadline import Deadline
from core.errors import Busy, DataError, LabError, UserError
from core.executor import LocalExecutor
from core.ledger import Ledger
from core.versions import code_hash


@pytest.fixture
def night(tmp_path, settings):
    return make_lab(tmp_path / "night", settings)


def loop_of(place, executor=None, researcher=None, on_event=lambda event: None, **given) -> Loop:
    return Loop(place, researcher or Night(), executor or Scripted(), on_event, **given)


class Fixed:
    """A researcher that proposes what it was given, one after another, and keeps every view that it saw."""

    name = "fixed"

    def __init__(self, *proposals: Proposal) -> None:
        self.left = list(proposals)
        self.views = []

    def propose(self, view):
        self.views.append(view)
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


# --- the order of things -------------------------------------------------------------------------


def test_baseline_first_then_ideas_against_the_best_of_the_moment(night):
    summary = loop_of(night).run(Limits(experiments=30))
    check(night)
    found = night.ledger.experiments()
    assert (summary.decided, summary.reason) == (30, "30 experiments are done")
    assert [e.description for e in found] == ["baseline", *(f"idea {k}" for k in range(1, 30))]
    best = None
    for e in found:
        assert e.best_before == best
        keeps = e.val_bpb is not None and (best is None or best - e.val_bpb > night.settings.min_delta)
        assert (e.status == "keep") == keeps
        best = e.val_bpb if keeps else best
    assert summary.kept == sum(e.is_kept for e in found) > 3


def test_a_second_run_goes_on(night):
    loop_of(night).run(Limits(experiments=4))
    loop_of(lab.Lab.open(night.path)).run(Limits(experiments=4))
    check(night)
    assert [e.description for e in night.ledger.experiments()][4:] == [f"idea {k}" for k in range(4, 8)]


def test_it_ends_when_the_researcher_has_no_more_ideas(night):
    summary = loop_of(night, researcher=Night(ideas=3)).run(Limits())
    assert summary.reason == "night has no more ideas: 3 ideas"
    assert summary.decided == 4


def test_it_ends_before_an_experiment_that_would_outlast_the_deadline(night):
    executor = Scripted(timings={"total": 100.0})
    loop_of(night, executor).run(Limits(experiments=3))
    summary = loop_of(night, executor).run(Limits(deadline=Deadline.after(50 / 3600)))
    assert summary.reason == "the next experiment would not end in time"
    assert summary.decided == 0


def test_events_tell_what_happens(night):
    told = []
    loop_of(night, on_event=told.append).run(Limits(experiments=1))
    assert [e.kind for e in told] == ["start", "phase", "phase", "decided"]
    assert told[0].data == {"number": 1, "description": "baseline"}
    assert told[-1].data["status"] == "keep"


def test_a_keep_that_was_not_audited_is_repeated_and_then_given_up(night):
    loop_of(night).run(Limits(experiments=1))
    executor = Scripted(audited=False)
    e = loop_of(night, executor).judge(recipe(0.1), "not audited")
    assert (e.status, e.val_bpb) == ("invalid", None)
    assert "would be kept and was not audited" in e.reason
    assert len(executor.runs) == 3
    check(night)


def test_scores_that_are_no_numbers_are_invalid(night):
    loop_of(night).run(Limits(experiments=1))
    for k, bad in enumerate((float("nan"), float("inf"), -1.0, 0.0)):
        e = loop_of(night, Scripted(val_bpb=bad, final_loss=float("nan"))).judge(recipe(1.0, mark=str(k)), f"bad {k}")
        assert (e.status, e.val_bpb) == ("invalid", None)
    check(night)


def test_a_disturbed_measurement_is_marked(night):
    e = loop_of(night, Scripted(health={"others_cores": 1.5, "our_cores": 1.0})).judge(recipe(2.0), "baseline")
    assert e.tainted
    assert night.ledger.samples(1)[0].tainted


# --- failures ------------------------------------------------------------------------------------


def test_a_failed_baseline_ends_the_run_and_can_be_mended(tmp_path, settings):
    place = make_lab(tmp_path / "night", settings, first=recipe(status="crash"))
    for _ in range(2):  # once per run it is tried again: the reason may pass
        with pytest.raises(LabError, match=r"no baseline: experiment \d ended as crash .*autoresearch try"):
            loop_of(place).run(Limits(experiments=5))
    (place.path / "train.py").write_bytes(recipe(1.9))
    e = loop_of(place).judge(recipe(1.9), "mended")
    assert (e.status, e.reason, e.number) == ("keep", "the baseline: 1.900000", 3)
    loop_of(place).run(Limits(experiments=2))
    assert git(place, "log", "--format=%s").splitlines()[-2:] == ["mended", "night: the first recipe"]


def test_the_researcher_sees_why_something_failed(night):
    loop_of(night).run(Limits(experiments=1))
    loop_of(night).judge(recipe(status="crash"), "breaks", detail={"idea": 1})
    researcher = Fixed(Proposal(recipe(1.5), "next"))
    loop_of(night, researcher=researcher).run(Limits(experiments=1))
    view = researcher.views[0]
    past = view.past[-1]
    assert (past.status, past.reason, past.val_bpb) == ("crash", "the recipe says crash", None)
    assert (past.log_tail, past.detail) == ("Traceback: the last line", {"idea": 1})
    assert past.source == recipe(status="crash")
    assert (view.best_bpb, view.program, view.settings["budget"]) == (2.0, "# try things\n", 2.0)


def test_an_idea_can_be_repaired_twice_and_is_then_given_up(night):
    loop_of(night).run(Limits(experiments=1))
    tries = [Proposal(recipe(status="crash", mark=f"v{k}"), f"v{k}", {"repairs": k + 1} if k else {}) for k in range(4)]
    researcher = Fixed(*tries, Proposal(recipe(1.5), "something else"))
    loop_of(night, researcher=researcher).run(Limits(experiments=4))
    assert [e.description for e in night.ledger.experiments()] == ["baseline", "v0", "v1", "v2", "something else"]
    assert "failed 3 times and is given up" in researcher.views[-1].notes[-1]


def test_what_was_tried_is_refused_and_the_researcher_is_told(night):
    loop_of(night).run(Limits(experiments=1))
    same = Proposal(b"# only a comment\n" + recipe(2.0), "the same again")
    researcher = Fixed(same, same, Proposal(recipe(1.5), "new"))
    loop_of(night, researcher=researcher).run(Limits(experiments=1))
    assert [e.description for e in night.ledger.experiments()] == ["baseline", "new"]
    assert researcher.views[0].notes == []
    assert "'the same again' is the same program as #1 (keep at 2.000000)" in researcher.views[-1].notes[-1]
    stubborn = loop_of(night, researcher=Fixed(same)).run(Limits())
    assert "20 proposals in a row were refused" in stubborn.reason


@pytest.mark.parametrize("error", [DataError("a shard is short", "prepare it again"), OSError(5, "Input/output error")])
def test_what_is_not_the_experiments_fault_leaves_it_waiting(night, error):
    class Broken(Scripted):
        def execute(self, request, on_event, stop):
            raise error

    with pytest.raises(type(error)):
        loop_of(night, Broken()).run(Limits(experiments=1))
    assert (night.ledger.get(1).state, night.ledger.get(1).attempts) == ("proposed", 0)
    loop_of(night).run(Limits(experiments=1))
    check(night)


def test_what_ends_the_process_each_time_is_given_up(night):
    class Death(BaseException):
        """Stands for kill -9: nothing is tidied up after it."""

    class Deadly(Scripted):
        def execute(self, request, on_event, stop):
            raise Death

    for _ in range(3):
        with pytest.raises(Death):
            loop_of(night, Deadly()).run(Limits(experiments=1))
        assert night.ledger.get(1).state == "running"
    with pytest.raises(LabError, match="no baseline"):
        loop_of(night).run(Limits(experiments=2))
    assert night.ledger.get(1).reason == "the process was ended 3 times while this ran; given up"
    loop_of(night).run(Limits(experiments=1))  # the next start tries the baseline again
    assert night.ledger.get(2).status == "keep"


# --- stopping, pausing, other processes ------------------------------------------------------------


@contextmanager
def in_background(loop: Loop, act):
    """`act` in a thread; it has to end without an error by itself, and is stopped when the test fails."""
    failed = []

    def run():
        try:
            act()
        except BaseException as error:
            failed.append(error)
            raise

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        loop.stop()
        raise
    finally:
        thread.join(30)
    assert not thread.is_alive()
    assert not failed


def wait_until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_stop_drops_what_runs_and_the_next_run_repeats_it(night):
    loop = loop_of(night, Scripted(seconds=60))
    with in_background(loop, lambda: loop.run(Limits())):
        wait_until(lambda: night.ledger.get(1).state == "running")
        loop.stop()
    assert (night.ledger.get(1).state, night.ledger.get(1).attempts) == ("proposed", 0)
    assert loop_of(night).run(Limits(experiments=2)).decided == 2
    check(night)


def test_another_process_can_stop_pause_and_resume(night):
    other = lab.Lab.open(night.path)  # its own connection, as another process has
    loop = loop_of(night, Scripted(seconds=0.2))
    with in_background(loop, lambda: loop.run(Limits())):
        wait_until(lambda: live.read(night.record).get("number"))
        other.ask("pause")
        wait_until(lambda: live.read(night.record).get("state") == "paused")
        paused_at = len(other.ledger.experiments())
        time.sleep(1.0)
        assert len(other.ledger.experiments()) == paused_at
        assert {e.state for e in other.ledger.experiments()} == {"decided"}
        other.ask("resume")
        wait_until(lambda: len(other.ledger.experiments()) > paused_at)
        other.ask("stop")
    assert live.read(night.record)["state"] == "ended"
    loop_of(night).run(Limits(experiments=1))
    check(night)


@pytest.mark.parametrize("verdict", ["simple", "statistical"])
def test_it_ends_after_the_run_under_way_and_nothing_of_that_is_lost(tmp_path, settings, verdict):
    night = make_lab(tmp_path / "finish", replace(settings, verdict=verdict))
    loop = loop_of(night, Scripted(seconds=0.3), on_event=lambda e: e.kind == "start" and loop.finish(True))
    summary = loop.run(Limits())
    assert summary.reason == "asked to end after the run that was under way"
    assert len(night.ledger.all_samples()) == 1  # a baseline has five under the statistical rule
    assert night.ledger.get(1).state == ("decided" if verdict == "simple" else "proposed")
    assert loop_of(night).run(Limits(experiments=1)).decided == 1
    check(night)


def test_a_wish_to_end_or_to_pause_can_be_taken_back_and_ending_also_ends_a_pause(night):
    loop = loop_of(night, Scripted(seconds=0.1))
    loop.finish(True)
    loop.finish(False)
    assert loop.run(Limits(experiments=1)).reason == "1 experiment is done"
    with in_background(loop, lambda: loop.run(Limits())):
        wait_until(lambda: len(night.ledger.experiments()) > 1)
        loop.pause(True)
        wait_until(lambda: live.read(night.record).get("state") == "paused")
        loop.pause(False)
        at = len(night.ledger.experiments())
        wait_until(lambda: len(night.ledger.experiments()) > at)
        loop.pause(True)
        wait_until(lambda: live.read(night.record).get("state") == "paused")
        loop.finish(True)
        wait_until(lambda: live.read(night.record)["state"] == "ended")
    assert {e.state for e in night.ledger.experiments()} == {"decided"}
    check(night)


def test_a_phase_begins_with_no_progress_of_the_one_before(tmp_path):
    with live.Live(tmp_path) as told:
        told.begin(3, "idea")
        told.progress("phase", {"phase": "train"})
        told.progress("progress", {"step": 14, "loss": 5.0, "remaining": 0.7, "fraction": 0.99})
        told.progress("phase", {"phase": "audit"})
        told.update(state="running")
        now = live.read(tmp_path)
    assert (now["number"], now["description"], now["phase"]) == (3, "idea", "audit")
    assert not {"step", "loss", "remaining", "fraction"} & set(now)


def test_a_stop_from_before_the_run_is_void(night):
    night.ask("stop")
    assert loop_of(night).run(Limits(experiments=2)).decided == 2
    with pytest.raises(ValueError, match="'sleep' is none of"):
        night.ask("sleep")


def test_progress_can_be_read_by_others(night):
    seen = []
    loop = loop_of(night, Scripted(seconds=2.5))
    with in_background(loop, lambda: loop.run(Limits(experiments=1))):
        while not seen or night.ledger.get(1).status is None:
            seen.append(live.read(night.record))
            time.sleep(0.1)
    running = [s for s in seen if s.get("step")]
    assert running
    assert running[-1]["phase"] == "train"
    assert (running[-1]["number"], running[-1]["description"]) == (1, "baseline")
    assert live.read(night.record)["number"] is None


def test_a_judge_waits_for_the_device(tmp_path, settings):
    one, two = make_lab(tmp_path / "one", settings), make_lab(tmp_path / "two", settings)
    told = []
    first, second = loop_of(one, Scripted(seconds=60)), loop_of(two, on_event=told.append)
    with in_background(first, lambda: first.run(Limits())):
        wait_until(lambda: one.ledger.get(1).state == "running")
        with in_background(second, lambda: second.judge_pending(1)):
            wait_until(lambda: told)
            assert "the device cpu is in use by process" in told[0].data["text"]
            wait_until(lambda: live.read(two.record)["state"] == "waiting")
            first.stop()
    assert two.ledger.get(1).status == "keep"


def test_judging_twice_starts_once(night):
    executor = Scripted()
    one, two = loop_of(night, executor), loop_of(lab.Lab.open(night.path), executor)
    first = one.judge(recipe(1.0), "better")
    again = two.judge(recipe(1.0), "better, said again")
    assert first == again
    assert len(executor.runs) == 2  # the baseline and this one
    slow = loop_of(night, Scripted(seconds=60))
    with in_background(slow, lambda: slow.judge(recipe(0.5), "slow")):
        wait_until(lambda: len(night.ledger.experiments()) == 3 and night.ledger.get(3).state == "running")
        with pytest.raises(Busy):
            two.judge(recipe(0.5), "slow")
        slow.stop()
    assert len(night.ledger.experiments()) == 3
    assert loop_of(night).judge_pending(3).status == "keep"


# --- versions --------------------------------------------------------------------------------------


def test_after_a_change_of_versions_the_best_is_measured_again_first(night):
    def old(settings):
        return {"torch": "2.9"}

    def new(settings):
        return {"torch": "2.10"}

    loop_of(night, measured_with=old).run(Limits(experiments=1))
    told = []
    slower = Scripted(seconds=0.0)
    slower.execute = _worse_by(slower, 0.2)
    e = loop_of(night, slower, on_event=told.append, measured_with=new).judge(recipe(1.9, mark="x"), "idea")
    notes = [t.data["text"] for t in told if t.kind == "note"]
    assert notes[0] == "measuring the best (#1) again: torch 2.9 -> 2.10"
    assert "2.200000, was 2.000000" in notes[1]
    assert [s.val_bpb for s in night.ledger.samples(1)] == [2.0, 2.2]
    assert (e.status, e.best_before) == ("keep", 2.2)
    assert night.ledger.get(1).val_bpb == 2.0
    assert slower.runs[0].endswith("-1")
    loop_of(night, slower, measured_with=new).judge(recipe(1.8, mark="y"), "one more")
    assert len(slower.runs) == 3  # not measured a third time


def _worse_by(executor, delta):
    plain = executor.execute

    def execute(request, on_event, stop):
        outcome = plain(request, on_event, stop)
        outcome.val_bpb = round(outcome.val_bpb + delta, 6)
        outcome.audited = request.would_keep(outcome.val_bpb)
        return outcome

    return execute


def test_code_that_measures_counts_and_other_code_does_not(tmp_path):
    for name in ("core", "backends/cpu"):
        (tmp_path / name).mkdir(parents=True)
    before = code_hash(tmp_path, "cpu")
    for name in ("core/ledger.py", "core/loop.py", "backends/cpu/train.py", "cli.py"):
        (tmp_path / name).write_text("A = 1\n")
        assert code_hash(tmp_path, "cpu") == before, name
    for name in ("core/evaluate.py", "core/some_new_part.py", "backends/worker.py", "backends/cpu/device.py"):
        (tmp_path / name).write_text("A = 1\n")
        assert code_hash(tmp_path, "cpu") != before, name
        before = code_hash(tmp_path, "cpu")


def test_a_best_that_does_not_run_any_more_is_a_clear_error(night):
    loop_of(night, measured_with=lambda s: {"torch": "1"}).run(Limits(experiments=1))
    broken = Scripted(status="crash", reason="no such operator", val_bpb=None)
    with pytest.raises(UserError, match=r"best \(#1\) does not run any more .*torch 1 -> 2.*no such operator"):
        loop_of(night, broken, measured_with=lambda s: {"torch": "2"}).run(Limits(experiments=1))
    loop_of(night, measured_with=lambda s: {"torch": "1"}).run(Limits(experiments=2))
    check(night)


# --- any order of everything -------------------------------------------------------------------------


class PowerCut(BaseException):
    """Nothing in the program catches it."""


class Fuse:
    """Ends the program before the n-th write of any kind: git, transaction, file, rename."""

    def __init__(self) -> None:
        self.left = -1  # writes until the cut; below zero: none

    def burn(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise PowerCut

    @contextmanager
    def built_in(self):
        with pytest.MonkeyPatch.context() as patch:
            self._guard(patch, gitstore.GitStore, "_run")
            self._guard(patch, lab, "replace_file")
            self._guard(patch, lab.Products, "keep")
            self._guard(patch, lab.Products, "clear_work")
            self._guard(patch, Ledger, "_set")
            yield

    def _guard(self, patch, owner, name):
        plain = getattr(owner, name)

        def guarded(*args, **kwargs):
            self.burn()
            return plain(*args, **kwargs)

        patch.setattr(owner, name, guarded)


class AnyOrder(RuleBasedStateMachine):
    """Runs, hand-made candidates, undo, foreign commits and edits, each cut off at any write."""

    given_settings = None  # set by the test

    @initialize(ahead=st.booleans())
    def make(self, ahead):
        self.researcher = Ahead() if ahead else Night()
        self.folder = Path(tempfile.mkdtemp(prefix="any-order-"))
        self.lab = make_lab(self.folder / "night", self.given_settings)
        self.fuse = Fuse()
        self.tries = 0
        self.undone = False
        self.floor = 0  # decided experiments never get fewer

    def teardown(self):
        if hasattr(self, "folder"):
            self.lab.ledger.close()
            files.remove(self.lab.record)
            files.remove(self.folder)  # git's objects are read-only, which on Windows nothing else removes
            assert not self.lab.record.exists() and not self.folder.exists()

    def cut(self, after: int, act) -> None:
        """Do it until the power goes, then start again and put in order, as every start does."""
        self.fuse.left = after
        try:
            with self.fuse.built_in():
                act()
        except PowerCut:
            self.lab.ledger.close()
            self.lab = lab.Lab.open(self.lab.path)
        self.fuse.left = -1
        with self.lab.lock():
            loop_of(self.lab).recover()

    cuts = st.integers(min_value=1, max_value=60)

    @rule(after=cuts, count=st.integers(1, 2))
    def run(self, after, count):
        self.cut(after, lambda: loop_of(self.lab, researcher=self.researcher).run(Limits(experiments=count)))

    @rule(after=cuts, score=st.floats(min_value=0.5, max_value=2.5))
    def judge(self, after, score):
        self.tries += 1
        source = recipe(round(score, 3), mark=f"try {self.tries}")
        self.cut(after, lambda: loop_of(self.lab).judge(source, f"try {self.tries}"))

    @precondition(lambda self: len([e for e in self.lab.ledger.experiments() if e.is_kept]) > 1)
    @rule(after=cuts, data=st.data())
    def undo(self, after, data):
        kept = [e.number for e in self.lab.ledger.experiments() if e.is_kept]
        number = data.draw(st.sampled_from(kept[1:]))
        self.undone = True
        self.cut(after, lambda: self.lab.undo(number))

    @rule(after=cuts)
    def foreign_commit(self, after):
        tree = self.lab.git.tree({"train.py": self.lab.git.blob(b"# theirs\n")})
        theirs = self.lab.git.commit(tree, [], "theirs", "2026-01-01T00:00:00+00:00")
        self.lab.git.update_refs({self.lab.branch_ref: theirs})
        self.cut(after, lambda: loop_of(self.lab).run(Limits(experiments=0)))
        assert git(self.lab, "rev-parse", self.lab.candidate_ref(f"saved/{theirs}")) == theirs

    @rule(after=cuts)
    def lose_the_working_file(self, after):
        (self.lab.path / "train.py").unlink()
        self.cut(after, lambda: loop_of(self.lab).run(Limits(experiments=0)))

    @invariant()
    def holds(self):
        if not hasattr(self, "lab"):
            return
        if self.undone and self.lab.best_weights() is None:  # after an undo the weights of the earlier best are gone
            best = self.lab.best()
            self.lab.products.keep(best.number, self._weights(best), None)
        check(self.lab)
        decided = sum(e.status is not None for e in self.lab.ledger.experiments())
        assert decided >= self.floor
        self.floor = decided

    def _weights(self, best):
        file = self.lab.record / "made-again"
        file.write_bytes(self.lab.source(best.number))
        return file


@pytest.mark.slow
def test_nothing_is_lost_in_any_order(settings):
    AnyOrder.given_settings = settings
    profile = hypothesis_settings(
        max_examples=10, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(AnyOrder, settings=profile)


# --- with the real referee ---------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.slow
def test_the_real_referee_judges(tmp_path, settings, tiny_recipe):
    place = make_lab(tmp_path / "night", settings, first=tiny_recipe.replace("LR = 0.02", "LR = 0.002").encode())
    loop = Loop(place, None, LocalExecutor(), lambda event: None)
    better = loop.judge(tiny_recipe.encode(), "a larger step")
    assert better.status == "keep", better.reason
    assert better.val_bpb < place.ledger.get(1).val_bpb
    broken = loop.judge(tiny_recipe.replace("loss.backward()", "loss.backwards()").encode(), "a slip")
    assert broken.status == "crash"
    assert "backwards" in broken.outcome["log_tail"] + broken.reason
    assert place.best_weights().stat().st_size > 1000
    assert [e.status for e in place.ledger.experiments()] == ["keep", "keep", "crash"]
    assert git(place, "fsck", "--strict", "--no-dangling", "--no-progress") == ""
    assert idea(1) != tiny_recipe
