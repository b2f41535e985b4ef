"""A kept change left out of the best: the recipe, its runs, what they say; with the real loop, real git and a made-up
world."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from nights import FIRST, Clock, Story, World, confirmed, constants, edit, kept, left_out, small, tell
from scripted import Limits, Loop, check, git, make_lab

from cli import cli
from console import ablations
from console.findings import findings, read
from console.markdown import markdown
from core import ablation
from core.ablation import Without, choose, leave_out, take_back, touched
from core.confirming import Done, Run
from core.effects import Effect
from core.gitstore import GitStore
from core.lab import Lab

STEPS = (tell(MATRIX_LR=0.05), tell(DEPTH=5), tell(WEIGHT_DECAY=0.1), tell(DEPTH=6), tell(block="x * x"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return small(tmp_path_factory.mktemp("data"))


class Redundant(World):
    """EMBEDDING_LR = 0.9 and a block that squares each give 0.006, both together no more; squaring gives 0.004 on top.
    A block that squares and is not deep is out of memory."""

    def true(self, source, share=1.0):
        squares, rate = b"x * x" in source, constants(source)["EMBEDDING_LR"] == 0.9
        lost = -0.006 * (squares or rate) - 0.004 * squares - 0.003 * (constants(source)["WEIGHT_DECAY"] == 0.1)
        return 1.2 + share * lost

    def execute(self, request, on_event, stop):
        self.squares = b"x * x" in request.source
        return super().execute(request, on_event, stop)

    def fails(self, values):
        return ("crash", "out of memory") if values["DEPTH"] == 4 and self.squares else None


TWICE = (tell(EMBEDDING_LR=0.9), tell(WEIGHT_DECAY=0.1), tell(DEPTH=5, block="x * x"))


def lab_of(path, settings, monkeypatch, edits, world=World, sd=0.0, **locked):
    """(lab, loop, world) in which each of the edits was kept."""
    made = world(Clock(monkeypatch), sd)
    lab = make_lab(path, replace(settings, **locked), FIRST.encode())
    loop = Loop(lab, Story(*edits), made, lambda event: None)
    loop.run(Limits(experiments=len(edits) + 1))
    assert kept(lab) == list(range(1, len(edits) + 2))
    return lab, loop, made


@pytest.fixture
def twice(tmp_path, settings, monkeypatch):
    """A lab in which #4 makes #2 needless, with noise; nothing is confirmed yet."""
    return lab_of(tmp_path / "nov24", settings, monkeypatch, TWICE, Redundant, sd=0.0003)


def verb(monkeypatch, world, *arguments, status=0):
    monkeypatch.setattr("core.executor.LocalExecutor", lambda: world)
    done = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done.output


def of(lab, number):
    """What is known of the best without this change."""
    return ablations.withouts(lab)[number][-1]


# --- the recipe ------------------------------------------------------------------------------------


def test_only_what_the_change_changed_goes_back(tmp_path, settings, monkeypatch):
    lab, _, _ = lab_of(tmp_path / "nov24", settings, monkeypatch, STEPS)
    refs, status = git(lab, "for-each-ref"), git(lab, "status", "--porcelain")
    best = constants(lab.best_source())
    for number, name, before in ((2, "MATRIX_LR", 0.04), (4, "WEIGHT_DECAY", 0.2)):
        found = leave_out(lab, number)
        assert (found.winner, found.reason) == (6, "")
        assert constants(found.source) == {**best, name: before}
        assert b"x * x" in found.source
    assert leave_out(lab, 6).source == lab.source(5)
    line = lab.best_source().decode().splitlines().index("DEPTH = 6  # search: 1..12; layers") + 1
    assert leave_out(lab, 3) == ablation.LeftOut(3, 6, None, f"#5 builds on it (line {line})")
    assert (git(lab, "for-each-ref"), git(lab, "status", "--porcelain")) == (refs, status)


def test_what_is_gone_or_never_did_anything(tmp_path):
    store = GitStore(tmp_path)
    one, two = FIRST, edit(FIRST, block="x * x")
    three = edit(two, block="x", DEPTH=6)
    chain = {n: source.encode() for n, source in ((1, one), (4, two), (7, three))}
    assert take_back(store, chain, 4).reason == "nothing of it is left in #7"
    chain = {1: one.encode(), 4: one.replace("made-up", "invented").encode(), 7: edit(one, DEPTH=6).encode()}
    assert take_back(store, chain, 4).reason == "it changed nothing that the program does"


def test_lines_that_were_changed_again_or_stand_beside():
    before = b"a\nb\nc\nd\ne\nf\n"
    changed = before.replace(b"c\n", b"C\n")
    assert touched(before, changed, changed.replace(b"C\n", b"CC\n")) == [3]
    assert touched(before, changed, changed.replace(b"d\n", b"D\n")) == [4]
    assert touched(before, changed, changed.replace(b"C\n", b"C\nnew\nnewer\n")) == [4, 5]
    assert touched(before, changed, changed.replace(b"f\n", b"F\n")) == []
    assert ablation._spelled([3, 4, 5, 9]) == "3-5, 9" and ablation._spelled([1, 3, 5, 7, 8]) == "1-8"


values = st.lists(st.sampled_from([4, 5, 6]), min_size=4, max_size=4)


@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(values, min_size=2, max_size=4), where=st.integers(0, 9))
def test_each_constant_is_the_bests_or_what_it_was_before_the_change(tmp_path_factory, steps, where):
    """Whatever was changed in whatever order: what the change set goes back, unless it was set again, and then nothing
    does."""
    store = GitStore(tmp_path_factory.getbasetemp())
    chain = {n: "".join(f"{k} = {v}\n" for k, v in zip("ABCD", step, strict=True)).encode() for n, step in
             enumerate(steps, 1)}  # fmt: skip
    number = 2 + where % (len(steps) - 1)
    old, new, best = steps[number - 2], steps[number - 1], steps[-1]
    found = take_back(store, chain, number)
    assert (found.source is None) == bool(found.reason)
    if found.source is None:
        assert old == new or any(b != n for o, n, b in zip(old, new, best, strict=True) if o != n)
    else:
        want = [o if o != n else b for o, n, b in zip(old, new, best, strict=True)]
        assert list(constants(found.source).values()) == want != best


# --- what is run -----------------------------------------------------------------------------------


def test_both_run_on_the_same_fresh_seeds_and_what_is_there_is_not_run_again(twice, monkeypatch):
    lab, _, world = twice
    at, before = len(world.requests), lab.ledger.experiments()
    refs = git(lab, "for-each-ref")
    said = verb(monkeypatch, world, "confirm", "--without", 2, "--lab", lab.path, "--cost")
    assert "#4 with and without #2, on 4 fresh seeds: 8 runs to go, about 43 min" in said
    assert lab.ledger.ablations() == [] and len(world.requests) == at
    said = verb(monkeypatch, world, "confirm", "--without", 2, "--lab", lab.path, "--seeds", 2)
    left = leave_out(lab, 2).source
    assert [(r.source == left, r.seed - lab.settings.seed) for r in world.requests[at:]] == [
        (False, 1000), (True, 1000), (False, 1001), (True, 1001),
    ]  # fmt: skip
    assert {r.source for r in world.requests[at:]} == {left, lab.best_source()}
    assert all(r.would_keep(9.0) and not r.holdout for r in world.requests[at:])  # audited, whatever comes out
    assert "4 of 4: #4 without #2 on seed 1043" in said
    said = verb(monkeypatch, world, "confirm", "--without", 2, "--lab", lab.path)
    assert "4 runs to go (4 are there already)" in said
    assert "all is measured" in verb(monkeypatch, world, "confirm", "--without", 2, "--lab", lab.path)
    assert len(world.requests) == at + 8
    assert lab.ledger.experiments() == before and git(lab, "for-each-ref") == refs
    assert {s.purpose for s in lab.ledger.samples(2)} == {"verdict"}
    check(lab, lambda weights, lab: True)


def test_each_in_its_turn_beside_runs_that_confirm_has_made(twice, monkeypatch):
    lab, loop, world = twice
    confirmed(lab, loop, kept(lab))
    at = len(world.requests)
    said = verb(monkeypatch, world, "confirm", "--without", "all", "--lab", lab.path)
    assert (
        "#4 with and without #2, #3, #4, each in its turn, on 4 fresh seeds: 8 runs to go (8 are there already)" in said
    )
    assert len(world.requests) == at + 8  # the best has its runs, and without #4 it is #3
    assert "#2 left out of the best (#4): " in said and ": no longer pays: a later change does the same now" in said
    assert said.count(": still pays") == 2
    commands = '  autoresearch best --source --without 2 --out train.py\n  autoresearch try -m "without #2"\n'
    assert f"to try the best without #2, in the lab:\n{commands}" in said
    two, three, four = (of(lab, n) for n in (2, 3, 4))
    assert (two.state, two.before, two.replaced) == ("not replicated", "replicated", True)
    assert three.effect.low < 0.003 < three.effect.high and not three.replaced
    assert (four.twin, four.effect, four.replaced) == (3, findings(read(lab)).kept[-1].again, False)


def test_only_one_change_is_the_gain_itself(tmp_path, settings, monkeypatch):
    lab, loop, world = lab_of(tmp_path / "nov24", settings, monkeypatch, TWICE[:1], Redundant, sd=0.0003)
    confirmed(lab, loop, kept(lab))
    at = len(world.requests)
    said = verb(monkeypatch, world, "confirm", "--without", "all", "--lab", lab.path)
    assert "#2 with and without #2, on 4 fresh seeds: 0 runs to go: all is measured" in said
    assert len(world.requests) == at and of(lab, 2).effect == findings(read(lab)).gain.validation


def test_no_decision_reads_them(twice):
    lab, loop, world = twice
    best = lab.best_bpb()
    world.shift = -0.5
    left_out(lab, loop, [2])
    world.shift = 0.0
    assert (lab.best_bpb(), lab.best().number) == (best, 4)
    judged = loop.judge(edit(lab.best_source().decode(), HEAD_DIM=32).encode(), "next")
    assert judged.best_before == pytest.approx(best) and judged.status == "discard"


def test_a_stop_loses_nothing_and_the_same_command_goes_on(twice, monkeypatch):
    lab, _, world = twice
    real = world.execute

    def stopped(request, on_event, stop):
        outcome = real(request, on_event, stop)
        if len(world.requests) == at + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return outcome

    at, world.execute = len(world.requests), stopped
    said = verb(monkeypatch, world, "confirm", "--without", "2", "--lab", lab.path, status=130)
    assert "ended early (Ctrl-C), 5 runs to go: the same command goes on" in said
    world.execute = real
    assert "5 runs to go (3 are there already)" in verb(
        monkeypatch, world, "confirm", "--without", 2, "--lab", lab.path
    )
    assert len(world.requests) == at + 8 and len(lab.ledger.ablation(2, 4).runs) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and fork are POSIX")
def test_a_kill_in_the_middle_of_a_run_loses_only_that_run(twice, monkeypatch):
    lab, _, world = twice
    pid = os.fork()
    if pid == 0:
        _killed_at_the_fourth_run(lab, world)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    again = Lab.open(lab.path)
    assert [len(again.ledger.ablation(2, 4).runs), len(again.ledger.samples(4, "confirm"))] == [1, 2]
    said = verb(monkeypatch, world, "confirm", "--without", 2, "--lab", lab.path)
    assert "5 runs to go (3 are there already)" in said
    assert sorted(s.seed for s in again.ledger.ablation(2, 4).runs) == [1042, 1043, 1044, 1045]
    check(again, lambda weights, lab: True)


def _killed_at_the_fourth_run(lab, world):
    """In a process of its own, which never returns."""
    try:
        own, made = Lab.open(lab.path), []
        real = world.execute

        def execute(request, on_event, stop):
            made.append(request)
            if len(made) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(request, on_event, stop)

        world.execute = execute
        left_out(own, Loop(own, None, world, lambda event: None), [2])
    finally:
        os._exit(1)


def test_a_recipe_that_fails_without_it_is_an_answer(twice, monkeypatch):
    lab, _, world = twice
    world.fails = lambda values: ("crash", "out of memory") if values["EMBEDDING_LR"] == 0.6 else None
    at = len(world.requests)
    said = verb(monkeypatch, world, "confirm", "--without", 2, "--lab", lab.path)
    assert len(world.requests) == at + 5  # one of the four of the recipe that fails
    assert "#2 left out of the best (#4): the recipe without it fails: crash: out of memory" in said
    found = findings(read(lab))
    assert "the recipe without it fails: crash: out of memory" in markdown(found, "now") and not found.idle
    world.fails = lambda values: None
    said = verb(monkeypatch, world, "confirm", "--without", 2, "--lab", lab.path)
    assert "4 runs to go (4 are there already)" in said and lab.ledger.ablation(2, 4).reason == ""


@pytest.mark.parametrize("by", ["lint", "dry build"])
def test_what_lint_or_build_refuse_is_not_run(twice, monkeypatch, by):
    lab, _, world = twice
    if by == "lint":
        world.lint = lambda source: "line 3: no"
    else:
        world.dry_build = lambda *_: "it does not run (crash): NameError: x\nThe end of its log:\n> Traceback"
    at = len(world.requests)
    said = verb(monkeypatch, world, "confirm", "--without", 3, "--lab", lab.path)
    assert {r.source for r in world.requests[at:]} == {lab.best_source()}
    reason = "line 3: no" if by == "lint" else "it does not run (crash): NameError: x"
    assert f"the recipe without it fails: {reason}\n" in said


def test_three_disturbed_runs_in_a_row_end_it(twice):
    lab, loop, world = twice
    noisy = {"others_cores": 1.9, "our_cores": 2.0}
    at = len(world.requests)
    world.healths |= {at + k: noisy for k in (1, 2, 3)}
    done = left_out(lab, loop, [2], seeds=1)
    assert (done.measured, done.left, done.reason[:34]) == (1, 1, "3 runs in a row were disturbed: ot")
    found = lab.ledger.ablation(2, 4)
    assert [s.tainted for s in found.runs] == [True] * 3 and found.reason == ""
    assert of(lab, 2).effect is None and ablations.says(of(lab, 2)) == "not measured yet"
    assert findings(read(lab)).time.wasted["tainted"] == pytest.approx(3 * 319.7)
    world.healths.clear()
    assert left_out(lab, loop, [2], seeds=1) == Done(1, 0, "")


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (1, "experiment 1 is the baseline, which the others change; leave out what was kept: #2, #3"),
        (4, "experiment 4 was taken back: the best (#3) is without it"),
        (5, "experiment 5 ended as discard: the best (#3) is without it"),
        (9, "there is no experiment 9"),
    ],
)
def test_what_is_not_part_of_the_best_cannot_be_left_out(twice, monkeypatch, number, says):
    lab, loop, world = twice
    lab.undo(4)
    loop.judge(edit(lab.best_source().decode(), WEIGHT_DECAY=0.3).encode(), "worse")
    assert says in verb(monkeypatch, world, "confirm", "--without", number, "--lab", lab.path, status=1)
    assert lab.ledger.ablations() == []


def test_without_a_best_or_without_a_change_there_is_nothing_to_leave_out(tmp_path, settings, monkeypatch):
    lab = make_lab(tmp_path / "nov24", settings, FIRST.encode())
    world = World(Clock(monkeypatch))
    said = verb(monkeypatch, world, "confirm", "--without", "all", "--lab", lab.path, status=1)
    assert "has no baseline yet: there is no best; autoresearch run" in said
    Loop(lab, Story(), world, lambda event: None).run(Limits(experiments=1))
    said = verb(monkeypatch, world, "confirm", "--without", "all", "--lab", lab.path, status=1)
    assert "nothing was kept over the baseline (#1)" in said


@pytest.mark.parametrize("more", [["7"], ["--kept"], ["--holdout"]])
def test_options_that_mean_something_else_are_refused(twice, monkeypatch, more):
    lab, _, world = twice
    said = verb(monkeypatch, world, "confirm", "--without", 2, "--lab", lab.path, *more, status=1)
    assert "--without measures the winner alone" in said
    assert "neither the number of an experiment nor 'all'" in verb(
        monkeypatch, world, "confirm", "--without", "some", "--lab", lab.path, status=2
    )


def test_what_cannot_be_left_out_costs_nothing_and_is_on_the_record(tmp_path, settings, monkeypatch):
    lab, _, world = lab_of(tmp_path / "nov24", settings, monkeypatch, STEPS)
    at = len(world.requests)
    said = verb(monkeypatch, world, "confirm", "--without", 3, "--lab", lab.path)
    assert "#3 cannot be left out: #5 builds on it (line 3)" in said and len(world.requests) == at
    assert (lab.ledger.ablation(3, 6).source_sha256, lab.ledger.ablation(3, 6).runs) == (None, ())
    assert "cannot be left out: #5 builds on it (line 3)" in markdown(findings(read(lab)), "now")
    said = verb(monkeypatch, world, "best", lab.path, "--source", "--without", 3, status=1)
    assert "#3 cannot be left out: #5 builds on it (line 3); autoresearch diff 3" in said


# --- who tells it ----------------------------------------------------------------------------------


def test_every_verb_tells_it(twice, monkeypatch):
    lab, loop, world = twice
    confirmed(lab, loop, kept(lab))
    left_out(lab, loop, [2, 3])
    line = ablations.line(of(lab, 2))
    assert line.startswith("left out of the best (#4): ") and line.endswith("a later change does the same now")
    assert f"  {line}\n" in verb(monkeypatch, world, "show", 2, "--lab", lab.path)
    shown = json.loads(verb(monkeypatch, world, "show", 2, "--lab", lab.path, "--json"))["experiment"]["ablations"]
    listed = json.loads(verb(monkeypatch, world, "log", lab.path, "--json"))["experiments"]
    assert [len(e["ablations"]) for e in listed] == [0, 1, 1, 0] and listed[1]["ablations"] == shown
    effect = of(lab, 2).effect
    assert (shown[0]["change"], shown[0]["low"]) == (pytest.approx(effect.gain), pytest.approx(effect.low))
    ends = verb(monkeypatch, world, "confirm", "--without", 2, "--lab", lab.path, "--json").splitlines()[-1]
    assert json.loads(ends)["ablations"] == shown and json.loads(ends)["left"] == 0
    source = verb(monkeypatch, world, "best", lab.path, "--source", "--without", 2)
    assert source.encode() == leave_out(lab, 2).source
    assert "--source --without 2" in verb(monkeypatch, world, "best", lab.path, "--without", 2, status=1)
    assert "The winner was as good without #2" in markdown(findings(read(lab)), "now")


def test_the_source_is_written_as_it_is_and_over_nothing_that_would_be_lost(twice, monkeypatch):
    """A shell's `>` ends lines as it likes, and PowerShell 5.1 writes UTF-16, which the guard refuses."""
    lab, _, world = twice
    monkeypatch.chdir(lab.path)
    write = ("best", "--source", "--without", 2, "--out", "train.py")
    assert verb(monkeypatch, world, *write).endswith("written to train.py\n")
    assert lab.working_source() == leave_out(lab, 2).source != lab.best_source()
    assert "written to" in verb(monkeypatch, world, *write)  # there already
    never_judged = lab.working_source()
    (lab.path / "other.py").write_bytes(never_judged)
    said = verb(monkeypatch, world, "best", "--source", "--out", "other.py", status=1)  # it was not handed in yet
    assert "other.py holds what was never judged" in said and (lab.path / "other.py").read_bytes() == never_judged
    said = verb(monkeypatch, world, "best", "--source", "--out", "train.py")  # of the lab's own, git keeps it
    assert lab.working_source() == lab.best_source() != never_judged
    again = said.partition("is kept: ")[2]
    assert subprocess.run(shlex.split(again), capture_output=True, check=True).stdout == never_judged
    for number in (2, 4):
        (lab.path / "train.py").write_bytes(lab.source(number))
        document = json.loads(verb(monkeypatch, world, *write, "--json"))
        assert document["source"].encode() == lab.working_source() == leave_out(lab, 2).source
    verb(monkeypatch, world, "best", "--source", "--out", "new/idea.py")
    assert (lab.path / "new" / "idea.py").read_bytes() == lab.best_source()
    assert "new cannot be written" in verb(monkeypatch, world, "best", "--source", "--out", "new", status=1)
    assert "best --source --out x.py" in verb(monkeypatch, world, "best", "--out", "x.py", status=1)


def test_finalize_keeps_an_idle_change_and_says_so(twice, monkeypatch):
    lab, loop, world = twice
    confirmed(lab, loop, kept(lab))
    left_out(lab, loop, [2, 3])
    said = json.loads(verb(monkeypatch, world, "finalize", lab.path, "--dry-run", "--json"))
    assert [c["number"] for c in said["commits"]] == [2, 3, 4] and said["idle"] == [2]
    said = verb(monkeypatch, world, "finalize", lab.path)
    assert f"note: #2 is on it; {ablations.line(of(lab, 2))}" in said and "note: #3" not in said
    assert "          autoresearch best --source --without 2 --out train.py\n" in said


def test_of_a_best_that_was_taken_back_it_is_told_as_of_that_one(twice):
    """An older best's stays with its name where that one stands; a newer best has not been asked."""
    lab, loop, world = twice
    confirmed(lab, loop, kept(lab))
    left_out(lab, loop, [2])
    lab.undo(4)
    assert not of(lab, 2).stands and findings(read(lab)).kept[0].without is None
    left_out(lab, loop, [2])
    world.true = lambda source, share=1.0: 1.1
    loop.judge(edit(lab.best_source().decode(), HEAD_DIM=32).encode(), "better")
    found = findings(read(lab)).kept[0].without
    assert (found.winner, found.stands) == (3, False) and kept(lab)[-1] == 5
    assert ablations.line(found).startswith("left out of #3: ") and not ablations.idle(found)


def test_where_nobody_asked_no_column_is_shown_and_nothing_is_read(twice):
    lab, loop, _ = twice
    assert "without it" not in markdown(findings(read(lab)), "now")
    assert ablations.withouts(lab) == {} and choose(lab, None) == [2, 3, 4]
    assert str(Run(4, 1042, False, 2)) == "#4 without #2"
    confirmed(lab, loop, kept(lab))
    assert findings(read(lab)).seconds_without == pytest.approx(3 * 4 * 319.7, abs=5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"state": "replicated"}, "still pays"),
        ({"state": "replicated", "status": "simplify"}, "still costs little"),
        ({"state": "not replicated", "status": "simplify"}, "costs too much by now"),
        ({"state": "open"}, "not settled"),
        ({"state": "not replicated"}, "no longer pays"),
        ({"state": "not replicated", "before": "open"}, "does not pay"),
        ({"state": "not replicated", "replaced": True}, "no longer pays: a later change does the same now"),
        (
            {"state": "not replicated", "replaced": True, "effect": Effect(-0.003, -0.004, -0.002, 4, 4)},
            "no longer pays: beside later changes it harms",
        ),
        ({"state": "open", "reason": "crash: x"}, "not settled (a further seed failed: crash: x)"),
        ({"effect": None}, "not measured yet"),
        ({"possible": False, "reason": "#7 builds on it"}, "cannot be left out: #7 builds on it"),
    ],
)
def test_it_is_said_in_plain_words(given, says):
    known = {"number": 2, "status": "keep", "winner": 9, "stands": True, "possible": True, "reason": "", "twin": None,
             "effect": Effect(0.0001, -0.001, 0.0012, 4, 4), "state": "open", "before": "replicated",
             "replaced": False}  # fmt: skip
    assert ablations.says(Without(**{**known, **given})) == says
