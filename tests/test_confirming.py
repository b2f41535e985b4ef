"""confirm, the time that a run keeps for it, and finalize; with the real loop, real git and a made-up world."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from nights import FIRST, NIGHT, Clock, Story, World, confirmed, edit, kept, night, small, tell
from scripted import Limits, Loop, git, make_lab
from test_loop import in_background, wait_until

from cli import cli
from console.findings import findings, read
from core import confirming, finalizing, live
from core.confirming import RESERVED, confirm, pair, plan, reserved
from core.deadline import Deadline
from core.errors import UserError
from core.finalizing import Win, arrange
from core.recipe import constants

SHORT = NIGHT[:8]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return small(tmp_path_factory.mktemp("data"))


@pytest.fixture
def made(tmp_path, settings, monkeypatch):
    """(lab, loop, world) after a short night."""
    return night(tmp_path / "nov24", settings, monkeypatch, SHORT)


def samples(lab):
    return {e.number: lab.ledger.samples(e.number) for e in lab.ledger.experiments()}


def wanted(lab, numbers, seeds=2, holdout=(), **given):
    return plan(samples(lab), lab.settings.seed, 320.0, numbers, seeds, holdout, **given)


def verb(monkeypatch, world, *arguments, status=0):
    """A verb of the command line, its experiments run by `world`."""
    monkeypatch.setattr("core.executor.LocalExecutor", lambda: world)
    done = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done.output


# --- what is run -----------------------------------------------------------------------------------


def test_fresh_seeds_that_no_decision_has_used_seed_after_seed(made):
    lab, loop, world = made
    before = len(world.requests)
    first, last = pair(kept(lab))
    assert confirm(loop, wanted(lab, [first, last], 2, [last])) == confirming.Done(4, 0, "")
    run = [(r.experiment, r.seed - lab.settings.seed, r.holdout) for r in world.requests[before:]]
    name = lab.tag
    assert run == [
        (f"{name}-{first}", 1000, False), (f"{name}-{last}", 1000, True),
        (f"{name}-{first}", 1001, False), (f"{name}-{last}", 1001, True),
    ]  # fmt: skip
    found = lab.ledger.samples(last, "confirm")
    assert [s.holdout_bpb is not None for s in found] == [True, True]
    assert [s.holdout_bpb for s in lab.ledger.samples(first, "confirm")] == [None, None]
    decided = {s.seed for e in lab.ledger.experiments() for s in lab.ledger.samples(e.number, "verdict")}
    assert not decided & {s.seed for s in found}


def test_no_decision_reads_a_confirmation(made):
    """The same next experiment, judged after hugely different confirmations, is judged the same."""
    lab, loop, world = made
    best, last = lab.best_bpb(), kept(lab)[-1]
    world.shift = -0.5
    confirmed(lab, loop, [last], [last])
    world.shift = 0.0
    assert lab.best_bpb() == best
    assert lab.best().number == last
    judged = loop.judge(edit(lab.best_source().decode(), WARMUP_RATIO=0.01).encode(), "next")
    assert judged.best_before == pytest.approx(best)


def test_a_stop_in_the_middle_goes_on_where_it_was(made):
    lab, loop, world = made
    both = pair(kept(lab))
    real = world.execute

    def once(request, on_event, stop):
        outcome = real(request, on_event, stop)
        loop.stop()
        return outcome

    world.execute = once
    done = confirm(loop, wanted(lab, both))
    assert (done.measured, done.left, done.reason) == (1, 3, "stopped")
    world.execute = real
    left = wanted(lab, both)
    assert len(left.runs) == 3
    again = Loop(lab, None, world, lambda event: None)
    assert confirm(again, left).left == 0
    assert wanted(lab, both).runs == ()
    assert [(r.number, r.holdout) for r in wanted(lab, both, holdout=both[1:]).runs] == [(both[1], True)] * 2


NOISY = {"others_cores": 1.9, "our_cores": 2.0}


def test_three_disturbed_runs_in_a_row_end_it(made, monkeypatch):
    lab, loop, world = made
    first, last = pair(kept(lab))
    at = len(world.requests)
    world.healths |= {at: NOISY, **{at + n: NOISY for n in range(2, 99)}}
    done = confirm(loop, wanted(lab, [first, last], 1))
    assert (done.measured, done.left, len(world.requests)) == (1, 1, at + 5)
    assert done.reason.startswith("3 runs in a row were disturbed: other processes kept 1.9 cores busy")
    assert [s.tainted for s in lab.ledger.samples(first, "confirm")] == [True, False]
    assert [s.tainted for s in lab.ledger.samples(last, "confirm")] == [True] * 3
    said = verb(monkeypatch, world, "confirm", "--lab", lab.path, "--seeds", 1)
    assert "let the machine be as it was while the lab ran), 2 runs to go: the same command goes on" in said
    world.healths.clear()
    assert confirm(loop, wanted(lab, [first, last], 1)).left == 0


def test_at_the_end_of_a_night_a_seed_that_is_always_disturbed_is_passed_by(made):
    lab, loop, world = made
    first, last = pair(kept(lab))
    at = len(world.requests)
    world.healths |= {at: NOISY, at + 1: NOISY, at + 2: NOISY}
    done = confirm(loop, wanted(lab, [first, last], 1), deadline=Deadline.after(300))
    assert (done.measured, done.left, done.reason) == (1, 1, "")
    assert [s.tainted for s in lab.ledger.samples(first, "confirm")] == [True] * 3
    assert [r.number for r in wanted(lab, [first, last], 1).runs] == [first]


def test_a_pause_holds_before_the_next_run(made):
    lab, loop, world = made
    real, at = world.execute, len(world.requests)

    def slow(request, on_event, stop):
        time.sleep(1.5)  # in less the loop need not hear of it
        return real(request, on_event, stop)

    world.execute = slow
    with in_background(loop, lambda: confirm(loop, wanted(lab, pair(kept(lab)), 1))):
        wait_until(lambda: live.read(lab.record).get("state") == "running")
        lab.ask("pause")
        wait_until(lambda: live.read(lab.record).get("state") == "paused")
        done = len(world.requests)
        time.sleep(2.0)
        assert len(world.requests) == done == at + 1
        lab.ask("resume")
        wait_until(lambda: len(world.requests) == at + 2)


def test_a_pause_does_not_outlast_the_deadline(made):
    lab, loop, world = made
    real, at = world.execute, len(world.requests)

    def asks(request, on_event, stop):
        lab.ask("pause")
        time.sleep(1.5)
        return real(request, on_event, stop)

    world.execute = asks
    soon = replace(wanted(lab, pair(kept(lab)), 1), seconds_each=1.0)
    done = confirm(loop, soon, deadline=Deadline.after(5 / 3600))
    assert (done.left, done.reason, len(world.requests)) == (1, "the next run would not end in time", at + 1)


def test_a_machine_that_has_cooled_down_settles_before_the_first_run_alone(made, monkeypatch):
    lab, _, world = made
    real, at, settled = time.time, len(world.requests), []
    monkeypatch.setattr(time, "time", lambda: real() + 1e9)
    world.settle = lambda request, say, stop: settled.append(len(world.requests)) or "it is as warm as it gets"
    confirm(Loop(lab, None, world, lambda event: None), wanted(lab, pair(kept(lab)), 1))
    assert (settled, len(world.requests)) == ([at], at + 2)


def test_a_run_that_fails_is_told_and_leaves_no_number(made):
    lab, loop, world = made
    last = kept(lab)[-1]
    world.fails = lambda values: ("crash", "out of memory")
    said = []
    done = confirm(loop, wanted(lab, [last], 2), say=said.append)
    assert (done.measured, done.left) == (0, 2)
    assert lab.ledger.samples(last, "confirm") == []
    assert said[0].endswith("no score that counts")


def test_runs_of_other_versions_or_before_a_drift_count_for_nothing(made):
    lab, loop, _ = made
    last = kept(lab)[-1]
    confirmed(lab, loop, [last], seeds=2)
    assert wanted(lab, [last]).runs == ()
    assert len(wanted(lab, [last], versions={"torch": "another"}).runs) == 2
    lab.ledger.begin_epoch("the best has moved", last)
    assert len(wanted(lab, [last], epoch=lab.ledger.epoch()).runs) == 2


# --- the verb --------------------------------------------------------------------------------------


def test_the_verb_tells_the_cost_measures_and_goes_on(made, monkeypatch):
    lab, _, world = made
    first, last = pair(kept(lab))
    at = len(world.requests)
    said = verb(monkeypatch, world, "confirm", "--lab", lab.path, "--cost")
    assert f"#{first}, #{last} on 4 fresh seeds: 8 runs to go, about 44 min, the holdout too" in said
    assert len(world.requests) == at
    said = verb(monkeypatch, world, "confirm", "--lab", lab.path, "--seeds", 2)
    assert "4 runs to go" in said and "4 of 4" in said
    assert f"#{last} against #{first}, on fresh seeds: −" in said.replace("-0", "−0")
    assert all(r.holdout for r in world.requests[at:])
    assert "all is measured" in verb(monkeypatch, world, "confirm", "--lab", lab.path, "--seeds", 2)
    lines = verb(monkeypatch, world, "confirm", str(last), "--lab", lab.path, "--json").splitlines()
    end = json.loads(lines[-1])
    assert end["left"] == 0 and end["effects"][0]["number"] == last and end["effects"][0]["before"] != last


def test_the_cost_is_what_it_takes_with_the_holdout_and_without(made, monkeypatch):
    lab, _, world = made

    def cost(*options):
        said = verb(monkeypatch, world, "confirm", "--lab", lab.path, "--cost", "--json", *options)
        return json.loads(said)["seconds"]

    guessed, bare = cost("--seeds", 1), cost("--seeds", 1, "--no-holdout")
    began = world.clock.now
    verb(monkeypatch, world, "confirm", "--lab", lab.path, "--seeds", 1)
    took = (world.clock.now - began).total_seconds()
    parts = [lab.dataset().part(part).tokens for part in ("holdout", "val")]
    share = parts[0] / min(lab.settings.eval_tokens, parts[1])
    assert bare == pytest.approx(took - 2 * 15.0) and guessed == pytest.approx(bare + 2 * 13.6 * share)
    began, known = world.clock.now, cost("--seeds", 2)
    verb(monkeypatch, world, "confirm", "--lab", lab.path, "--seeds", 2)
    assert known == pytest.approx((world.clock.now - began).total_seconds(), abs=0.5), (
        "the holdout has been measured before"
    )


def test_a_discard_is_compared_with_what_it_started_from_and_a_failure_is_refused(made, monkeypatch):
    lab, _, world = made
    discard = next(e for e in lab.ledger.experiments() if e.status == "discard")
    said = verb(monkeypatch, world, "confirm", str(discard.number), "--lab", lab.path, "--seeds", 1)
    assert f"#{discard.parent}, #{discard.number} on 1 fresh seed: 2 runs to go" in said
    crash = next(e for e in lab.ledger.experiments() if e.status == "crash")
    said = verb(monkeypatch, world, "confirm", str(crash.number), "--lab", lab.path, status=1)
    assert "ended as crash: it has no score to confirm" in said
    assert "there is no experiment 99" in verb(monkeypatch, world, "confirm", "99", "--lab", lab.path, status=1)


# --- the end of a run ------------------------------------------------------------------------------


def test_a_share_of_the_time_is_kept_but_not_by_the_simple_rule_nor_for_less_than_a_pair():
    assert reserved(1000.0, "statistical", 10.0) == RESERVED * 1000
    assert reserved(1000.0, "simple", 10.0) == 0
    assert reserved(1000.0, "statistical", 60.0) == 0
    assert reserved(None, "statistical", 10.0) == 0
    assert reserved(-10.0, "statistical", 1.0) == 0


class Timed(World):
    """A world whose experiments take time by `time.time`, too."""

    def execute(self, request, on_event, stop):
        outcome = super().execute(request, on_event, stop)
        self.passed += outcome.timings["total"]
        return outcome

    passed = 0.0


def research(lab, world, edits, hours, monkeypatch):
    from console.confirming import research as run
    from console.output import Screen

    start, real, world.passed = time.time(), time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: real() + world.passed)
    said = []
    loop = Loop(lab, Story(*edits), world, lambda event: None)
    ticker = SimpleNamespace(say=lambda line, style=None: said.append(line))
    summary = run(Screen(as_json=True), loop, None, Deadline.at_time(start + hours * 3600), ticker)
    return summary, said, real() + world.passed - start


def endless(many=400):
    return [tell(WARMUP_RATIO=round(0.001 + 0.0001 * k, 5)) for k in range(many)]


def test_the_last_tenth_of_a_night_confirms_baseline_and_winner(tmp_path, settings, monkeypatch):
    world = Timed(Clock(monkeypatch), sd=0.0005)
    lab = make_lab(tmp_path / "long", replace(settings, verdict="statistical"), FIRST.encode())
    Loop(lab, Story(tell(MATRIX_LR=0.06)), world, lambda event: None).run(Limits(experiments=2))
    done = len(lab.ledger.experiments())
    _, said, passed = research(lab, world, [tell(MATRIX_LR=0.06), *endless()], 4, monkeypatch)
    first, last = pair(kept(lab))
    assert passed <= 4 * 3600
    runs = [len(lab.ledger.samples(n, "confirm")) for n in (first, last)]
    assert runs == [2, 2]  # in 24 min, at 5 min 35 s each
    assert any("confirming" in line for line in said)
    assert len(lab.ledger.experiments()) > done + 20
    assert findings(read(lab)).gain.validation.low > 0


def test_a_disturbed_run_is_not_repeated_past_the_deadline(tmp_path, settings, monkeypatch):
    world = Timed(Clock(monkeypatch))
    lab = make_lab(tmp_path / "late", replace(settings, verdict="statistical"), FIRST.encode())
    loop = Loop(lab, Story(), world, lambda event: None)
    loop.run(Limits(experiments=1))
    real, at = time.time, len(world.requests)
    monkeypatch.setattr(time, "time", lambda: real() + world.passed)
    world.healths |= {at: NOISY, at + 1: NOISY, at + 2: NOISY}
    done = confirm(loop, wanted(lab, [1], 2), deadline=Deadline.at_time(time.time() + 1.5 * 320))
    assert (done.left, done.reason, len(world.requests)) == (2, "the next run would not end in time", at + 1)


def test_when_nothing_was_kept_the_kept_time_goes_to_research(tmp_path, settings, monkeypatch):
    world = Timed(Clock(monkeypatch), sd=0.0004)
    lab = make_lab(tmp_path / "none", replace(settings, verdict="statistical"), FIRST.encode())
    Loop(lab, Story(), world, lambda event: None).run(Limits(experiments=1))
    _, said, passed = research(lab, world, endless(), 2, monkeypatch)
    assert any("nothing was kept" in line for line in said)
    assert 2 * 3600 - 700 < passed <= 2 * 3600
    assert not any(s.purpose == "confirm" for s in lab.ledger.all_samples())


# --- finalize --------------------------------------------------------------------------------------


def win(number, state):
    return Win(number, None, state)


def chain(tmp_path, settings, monkeypatch, *edits):
    """A lab in which each of these edits is kept."""
    lab, _, _ = night(tmp_path / "nov24", settings, monkeypatch, edits, sd=0.0)
    assert kept(lab) == list(range(1, len(edits) + 2))
    return lab


def measured_as(lab, final):
    experiments = lab.ledger.experiments()
    return final.measured_as(experiments, {e.number: lab.source(e.number) for e in experiments})


STEPS = (tell(MATRIX_LR=0.05), tell(DEPTH=5), tell(WEIGHT_DECAY=0.1), tell(DEPTH=6))


def test_wins_are_one_commit_each_and_what_did_not_replicate_is_left_out(tmp_path, settings, monkeypatch):
    lab = chain(tmp_path, settings, monkeypatch, *STEPS)
    (lab.path / "notes.txt").write_text("mine")
    (lab.path / "train.py").write_text("# half an idea\n")
    status, head = git(lab, "status", "--porcelain"), git(lab, "rev-parse", "HEAD")
    wins = [win(2, "replicated"), win(3, "replicated"), win(4, "not replicated"), win(5, "replicated")]
    final = arrange(lab, wins)
    assert [s.win.number for s in final.steps] == [2, 3, 5] and [w.number for w in final.left_out] == [4]
    name = finalizing.write(lab, final)
    assert name == "autoresearch/nov24-final"
    assert git(lab, "log", "--format=%s", "--reverse", name).splitlines() == [
        "night: the first recipe", "MATRIX_LR -> 0.05", "DEPTH -> 5", "DEPTH -> 6",
    ]  # fmt: skip
    found = {n: c.value for n, c in constants(git(lab, "show", f"{name}:train.py") + "\n").items()}
    assert (found["MATRIX_LR"], found["DEPTH"], found["WEIGHT_DECAY"]) == (0.05, 6, 0.2)
    assert (
        final.measured_as(lab.ledger.experiments(), {e.number: lab.source(e.number) for e in lab.ledger.experiments()})
        is None
    )
    assert (git(lab, "status", "--porcelain"), git(lab, "rev-parse", "HEAD")) == (status, head)
    assert (lab.path / "train.py").read_text() == "# half an idea\n"
    assert git(lab, "fsck", "--strict", "--no-dangling", "--no-progress") == ""


def test_what_a_later_win_needs_stays_with_a_note(tmp_path, settings, monkeypatch):
    lab = chain(tmp_path, settings, monkeypatch, *STEPS)
    wins = [win(2, "not replicated"), win(3, "not replicated"), win(4, "not replicated"), win(5, "replicated")]
    final = arrange(lab, wins)  # DEPTH 5 -> 6 changes the line that DEPTH 4 -> 5 has changed
    assert [s.win.number for s in final.steps] == [3, 5]
    assert "did not replicate, but a later change cannot be made without it" in final.steps[0].note
    name = finalizing.write(lab, final, "clean")
    assert "Note: it did not replicate" in git(lab, "log", "-1", "--format=%b", f"{name}~1")


def test_all_that_holds_is_the_winner_itself(tmp_path, settings, monkeypatch):
    lab = chain(tmp_path, settings, monkeypatch, *STEPS)
    final = arrange(lab, [win(n, "replicated") for n in (2, 3, 4, 5)])
    assert measured_as(lab, final).number == 5
    once, again = (git(lab, "rev-parse", finalizing.write(lab, final)) for _ in range(2))
    assert once == again


def test_an_undone_win_is_not_on_the_branch(tmp_path, settings, monkeypatch):
    lab = chain(tmp_path, settings, monkeypatch, *STEPS)
    lab.undo(4)
    found = findings(read(lab))
    final = arrange(lab, [win(k.row.number, "replicated") for k in found.kept])
    assert [s.win.number for s in final.steps] == [2, 3]


@pytest.mark.parametrize(
    ("branch", "says"),
    [
        ("no..good", "cannot name a branch"),
        ("-x", "cannot name a branch"),
        ("", "cannot name a branch"),
        ("autoresearch/nov24", "is the lab's own branch"),
        ("mine", "has commits that are not autoresearch's"),
        ("mine/final", "is in the way"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(tmp_path, settings, monkeypatch, branch, says):
    lab = chain(tmp_path, settings, monkeypatch, *STEPS[:1])
    subprocess.run(["git", "branch", "mine"], cwd=lab.path, check=True)
    before = git(lab, "for-each-ref")
    with pytest.raises(UserError, match=says):
        finalizing.write(lab, arrange(lab, [win(2, "replicated")]), branch or "a b")
    assert git(lab, "for-each-ref") == before


def test_a_branch_that_is_checked_out_is_left_alone(tmp_path, settings, monkeypatch):
    lab = chain(tmp_path, settings, monkeypatch, *STEPS[:2])
    name = finalizing.write(lab, arrange(lab, [win(2, "replicated")]))
    git(lab, "checkout", "-q", name)
    with pytest.raises(UserError, match="is checked out"):
        finalizing.write(lab, arrange(lab, [win(2, "replicated"), win(3, "replicated")]))


def test_the_verb_takes_only_what_holds_unless_asked(made, monkeypatch):
    lab, loop, world = made
    said = verb(monkeypatch, world, "finalize", lab.path, status=1)
    assert "none of 4 kept changes was measured to hold on fresh seeds; autoresearch confirm --kept" in said
    assert "(not written)" in verb(monkeypatch, world, "finalize", lab.path, "--unconfirmed", "--dry-run")
    assert "autoresearch/nov24-final" not in git(lab, "branch", "-a")
    confirmed(lab, loop, kept(lab))
    said = json.loads(verb(monkeypatch, world, "finalize", lab.path, "--json"))
    found = findings(read(lab))
    held = [k.row.number for k in found.kept if k.state == "replicated"]
    assert held and [c["number"] for c in said["commits"]] == held
    body = git(lab, "log", "-1", "--format=%B", said["branch"])
    k = next(k for k in found.kept if k.row.number == held[-1])
    assert f"val_bpb {-k.again.gain:+.4f} (95 %: {-k.again.high:+.4f} to {-k.again.low:+.4f}) on fresh seeds" in body


@pytest.mark.skipif(sys.platform == "win32", reason="the command is run by sh")
def test_what_results_and_was_never_measured_is_put_in_place_by_the_command_that_is_told(made, monkeypatch):
    lab, loop, world = made
    confirmed(lab, loop, kept(lab))
    monkeypatch.setattr(finalizing.Final, "measured_as", lambda self, *given: None)
    said = verb(monkeypatch, world, "finalize", lab.path, "--branch", "my&final")
    told = re.search(r"in the lab:\n  (git .*)\n  (autoresearch .*)\n", said)
    assert told and told[2] == 'autoresearch try -m "what holds"'
    (lab.path / "train.py").unlink()
    subprocess.run(told[1], shell=True, check=True, cwd=lab.path)
    assert lab.working_source().decode() == git(lab, "show", "my&final:train.py") + "\n"
    assert git(lab, "diff", "--cached") == ""
