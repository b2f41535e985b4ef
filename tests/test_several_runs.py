"""The statistical loop: several seeds for an experiment, the best run again, a machine that moves or is disturbed, and
kills between the runs. Scores come from a script with noise; everything else is real."""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
from scripted import Limits, Loop, check, git, make_lab, recipe
from several import BUSY, SD, SEEDS, Disturbed, Ideas, Looking, Machine, ends, events, loop_of, runs
from test_kill import in_a_process, kill

from console.findings import findings, read
from console.looking import log_verb, show_verb, status_verb
from console.output import Screen
from console.places import look
from console.rows import rows
from console.tables import other_rule_line, verdict_lines
from core import measuring, probing, verdict
from core.deadline import Deadline
from core.eras import eras
from core.errors import UserError
from core.lab import Lab
from core.probing import LEAST_PAIRS


@pytest.fixture
def night(tmp_path, settings):
    return make_lab(tmp_path / "night", replace(settings, verdict="statistical"))


# --- what is kept --------------------------------------------------------------------------------


def test_the_baseline_shows_the_noise(night):
    loop_of(night, researcher=Ideas(2.0)).run(Limits(experiments=1))
    check(night)
    baseline = night.best()
    scores = [s.val_bpb for s in night.ledger.samples(1)]
    assert [seed for seed, _ in runs(night, 1)] == SEEDS
    assert baseline.val_bpb == pytest.approx(sum(scores) / len(scores)) and len(set(scores)) == len(scores)
    assert f"over {len(SEEDS)} seeds" in baseline.reason
    assert [r["seed"] for r in baseline.verdict["all_runs"]] == SEEDS


def test_a_night_of_placebos_keeps_nothing_where_upstream_s_rule_would(night):
    loop_of(night, researcher=Ideas(2.0)).run(Limits(experiments=25))
    check(night)
    found = night.ledger.experiments()
    assert [e.number for e in found if e.is_kept] == [1]
    assert sum(e.verdict["simple"] == "keep" for e in found[1:]) > 3
    assert all(e.verdict["rule"] == "statistical" for e in found)


def test_a_true_gain_is_kept_after_several_seeds_each_of_them_audited(night):
    executor = Machine()
    loop_of(night, executor, Ideas(2.0)).run(Limits(experiments=1))
    e = ends(night, executor, 2.0 - 4 * SD)
    check(night)
    samples = night.ledger.samples(e.number)
    assert e.status == "keep", e.reason
    assert len(samples) == e.verdict["runs"] > 1
    assert len({s.seed for s in samples}) == len(samples)
    assert all(s.outcome["audited"] for s in samples) and executor.audits[False] == 0
    assert e.val_bpb == pytest.approx(sum(s.val_bpb for s in samples) / len(samples))
    assert night.ledger.samples(1)[-1].id > samples[0].id, "the best was run beside it"
    low, high = e.verdict["interval"]
    assert low < 4 * SD < high


def test_a_clear_loser_has_one_run_and_no_audit(night):
    executor = Machine()
    loop_of(night, executor, Ideas(2.0)).run(Limits(experiments=1))
    e = ends(night, executor, 2.1)
    assert (e.status, len(night.ledger.samples(e.number)), executor.audits[False]) == ("discard", 1, 1)


def test_a_smaller_program_that_is_no_worse_simplifies(tmp_path, settings):
    large = recipe(2.0) + b"".join(b"X%d = [1, 2, 3]\n" % k for k in range(9))
    night = make_lab(tmp_path / "night", replace(settings, verdict="statistical"), first=large)
    executor = Machine()
    loop_of(night, executor, Ideas(2.0)).run(Limits(experiments=1))
    e = ends(night, executor, 2.0 - SD / 2)
    check(night)
    assert e.status == "simplify", e.reason
    assert night.best() == e and git(night, "log", "--format=%s", night.branch).splitlines()[0] == e.description


def test_after_a_simplification_the_next_is_held_against_the_last_keep_too(tmp_path, settings, monkeypatch):
    anchors = []
    real = verdict.decide
    monkeypatch.setattr(verdict, "decide", lambda *given: anchors.append(given[-1]) or real(*given))
    large = recipe(2.0) + b"".join(b"X%d = [1, 2, 3]\n" % k for k in range(9))
    night = make_lab(tmp_path / "night", replace(settings, verdict="statistical"), first=large)
    executor = Machine()
    loop_of(night, executor, Ideas(2.0)).run(Limits(experiments=1))
    assert ends(night, executor, 2.0 - SD / 2).status == "simplify"
    assert anchors and not any(anchors), "the best was the last keep itself"
    ends(night, executor, 2.0)
    assert [run.order for run in anchors[-1]] == [s.id for s in night.ledger.samples(1)]
    night.ledger.begin_epoch("the machine has moved", 2)
    ends(night, executor, 2.0)
    assert anchors[-1] == [], "what was run before is not compared with what is run now, and #2 is the best itself"


def test_an_executor_that_never_audits_gets_nothing_kept(night):
    loop_of(night, Machine(), Ideas(2.0)).run(Limits(experiments=1))
    e = ends(night, Machine(audited=False), 1.5)
    assert (e.status, e.val_bpb, night.ledger.samples(e.number)) == ("invalid", None, [])
    assert "was not audited" in e.reason


def test_a_crash_on_a_later_seed_ends_it(night):
    executor = Machine()
    loop_of(night, executor, Ideas(2.0)).run(Limits(experiments=1))
    plain = executor.execute

    def execute(request, on_event, stop):
        outcome = plain(request, on_event, stop)
        if request.seed == 43:
            outcome.status, outcome.reason, outcome.val_bpb = "crash", "the loss is nan", None
        return outcome

    executor.execute = execute
    e = ends(night, executor, 1.9)
    check(night)
    assert (e.status, e.val_bpb) == ("crash", None)
    assert [r["seed"] for r in e.verdict["all_runs"]] == [42], "what it cost stays on the record"


class Seldom(Machine):
    """Experiment 2 crashes on its second seed."""

    def execute(self, request, on_event, stop):
        outcome = super().execute(request, on_event, stop)
        if request.experiment.endswith("-2") and request.seed == 43:
            outcome.status, outcome.reason, outcome.val_bpb = "crash", "the loss is nan", None
        return outcome


def test_every_run_counts_in_what_is_told_of_time(night, capsys):
    """Baseline, a candidate that crashes on its second seed, one that is kept, and runs of the best: what `log`, `show`
    and the report say of the device's time is the sum over all of them."""
    executor = Seldom(timings={"total": 5.0})
    loop_of(night, executor, Ideas(1.9, 1.97, 2.1)).run(Limits(experiments=4))
    assert [e.status for e in night.ledger.experiments()] == ["keep", "crash", "keep", "discard"]
    ran = 5.0 * len(executor.runs)
    of_two = 5.0 * sum(name.endswith("-2") for name in executor.runs)
    assert len(executor.runs) > 9 and of_two == 10.0
    log_verb(Screen(True), str(night.path), False, None, False)
    told = json.loads(capsys.readouterr().out)
    device = told["total"]["device"]
    assert device["busy_seconds"] == pytest.approx(ran)
    assert sum(device["waits"].values()) == pytest.approx(device["idle_seconds"], abs=0.01)
    assert (told["experiments"][1]["runs"], told["experiments"][1]["device_seconds"]) == (2, of_two)
    idle = [s.outcome["idle"]["seconds"] for s in night.ledger.samples(3, "verdict")]
    assert told["experiments"][2]["idle"]["seconds"] == pytest.approx(sum(idle))
    show_verb(Screen(False), str(night.path), 2)
    shown = capsys.readouterr().out
    assert "(seed 42)" in shown and "2, 10 s in all" in shown, "the run that went well before the crash is told"
    found = findings(read(night))
    assert found.time.busy == found.time.watched == pytest.approx(ran)
    assert found.time.wasted["crash"] == of_two
    facts = {p.number: p.facts["seconds"] for p in night.view({}).past}
    assert (facts[2], facts[3]) == (of_two, 5.0 * len(night.ledger.samples(3, "verdict"))), (
        "what turns are shared out by"
    )


def test_what_waits_for_another_run_shows_those_that_it_has(night):
    executor = Machine(timings={"total": 5.0})

    def stop_after_two(event):
        if event.kind == "note" and len(executor.runs) == 2:
            loop.stop()

    loop = loop_of(night, executor, Ideas(2.0), stop_after_two)
    loop.run(Limits())
    (waits,) = look(night).rows
    assert (waits.status, waits.runs, waits.device_seconds) == ("proposed", 2, 10.0)


def test_screens_tell_runs_interval_and_what_the_other_rule_would_have_done(night):
    loop_of(night, Machine(timings={"total": 3.0}), Ideas(2.0, 1.97, 1.985, 1.985)).run(Limits(experiments=5))
    ends(night, Disturbed(6, 99), 1.0)
    found = rows(night.ledger.experiments())
    kept = next(r for r in found[1:] if r.kept)
    assert (kept.runs, kept.device_seconds) == (len(runs(night, kept.number)), 3.0 * kept.runs) and kept.runs > 1
    lines = verdict_lines(kept)
    assert lines[0].startswith("runs  ") and lines[0].count("seed") == kept.runs
    low, high = kept.interval
    assert (
        f"95 % interval {low:+.6f} to {high:+.6f}" in lines[1]
        and low < night.ledger.get(kept.number).verdict["gain"] < high
    )
    assert "upstream's rule would have said: keep" in verdict_lines(found[-1])
    would = [f"#{r.number}" for r in found if r.verdict["simple"] == "keep" and not r.kept]
    assert f"have kept {', '.join(would)} as well" in other_rule_line(found) and "#6" in would
    assert {"runs", "interval", "simple"} <= kept.to_json().keys()


def test_hopeless_runs_are_stopped_early_and_researchers_are_told(tmp_path, settings):
    night = make_lab(tmp_path / "night", replace(settings, verdict="statistical", probe=True))
    researcher = Ideas(*(2.1 + 0.01 * k for k in range(5)))
    loop_of(night, Looking(), researcher).run(Limits(experiments=21))
    check(night)
    found = night.ledger.experiments()
    early = [e for e in found if e.verdict.get("stopped_early")]
    assert len(early) >= 9 and min(e.number for e in early) > LEAST_PAIRS + 1
    assert not {10, 20} & {e.number for e in early}, "one in ten runs to its end"
    for e in early:
        assert (e.status, e.val_bpb, night.ledger.samples(e.number)) == ("discard", None, [])
        assert e.reason.startswith("stopped early: at ") and e.verdict["stopped_early"]["saved_seconds"] > 0
    view = night.view({})
    assert [p.number for p in view.past if p.facts.get("stopped_early")] == [e.number for e in early]
    gain = ends(night, Looking(), 1.9)
    assert gain.status == "keep", gain.reason


def test_a_candidate_with_many_runs_is_one_candidate_to_early_stopping(tmp_path, settings):
    night = make_lab(tmp_path / "night", replace(settings, verdict="statistical", probe=True))
    loop_of(night, Looking(), Ideas(1.97, 2.05)).run(Limits(experiments=4))
    found = night.ledger.experiments()
    assert max(len(night.ledger.samples(e.number)) for e in found[1:]) > 1, "one took several runs"
    known = eras(found, night.ledger.all_samples(), night.best().number, night.ledger.epoch())
    firsts = [night.ledger.samples(e.number)[0].val_bpb for e in found[1:]]
    assert sorted(curve.final for era in known for curve in era.tried) == sorted(firsts)


def test_early_stopping_allows_for_the_luck_that_the_best_was_kept_for(tmp_path, settings, monkeypatch):
    asked = []
    real = probing.judge
    monkeypatch.setattr(
        probing, "judge", lambda *known, **given: asked.append(given["needed"]) or real(*known, **given)
    )
    night = make_lab(tmp_path / "night", replace(settings, verdict="statistical", probe=True))
    loop_of(night, Looking(), Ideas(1.97)).run(Limits(experiments=2))
    (kept,) = [e for e in night.ledger.experiments()[1:] if e.is_kept]
    assert asked == [0.0], "the baseline was not chosen for its score"
    ends(night, Looking(), 2.1)
    assert asked[-1] == pytest.approx(kept.verdict["kept"]["luck"]) and asked[-1] > 0


# --- the best again ------------------------------------------------------------------------------


def test_the_best_is_run_again_at_intervals(night, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "CONTROL_EVERY", 3)
    told = []
    loop_of(night, researcher=Ideas(2.1), on_event=told.append).run(Limits(experiments=15))
    check(night)
    again = [(e.data["number"], e.data["seed"]) for e in told if e.kind == "again"]
    assert again == [(1, s.seed) for s in night.ledger.samples(1, "control")], "a screen can say what runs"
    controls = [s.seed for s in night.ledger.samples(1, "control")]
    assert controls == [*SEEDS[:2], SEEDS[-1] + 1, SEEDS[-1] + 2], "two seeds twice, to know what the machine adds"
    assert night.ledger.epoch() == 0
    last = night.ledger.experiments()[-1].verdict
    assert (last["noise"]["repeat_df"], last["control_runs"]) == (2, len(SEEDS) + 2), "a seed is one draw"
    status_verb(Screen(False), str(night.path))
    assert "0.0000 between two runs of one (2 repeats)" in capsys.readouterr().out


class Ending(Machine):
    """Whatever is not the baseline ends as `how`, without a score."""

    def __init__(self, how, health=None):
        super().__init__()
        self.how, self.sick = how, health or {}

    def execute(self, request, on_event, stop):
        outcome = super().execute(request, on_event, stop)
        if not request.experiment.endswith("-1"):
            outcome.status, outcome.reason, outcome.val_bpb = self.how, "so it goes", None
            outcome.stopped_early = {"reason": "so it goes"} if self.how == "hopeless" else {}
            outcome.health = dict(self.sick)
        return outcome


@pytest.mark.parametrize("how", ["hopeless", "timeout", "crash"])
def test_candidates_without_a_score_count_towards_the_next_run_of_the_best(night, monkeypatch, how):
    monkeypatch.setattr(measuring, "CONTROL_EVERY", 3)
    loop_of(night, researcher=Ideas(2.1)).run(Limits(experiments=2))
    loop_of(night, Ending(how), Ideas(2.1)).run(Limits(experiments=6))
    check(night)
    assert [s.seed for s in night.ledger.samples(1, "control")] == SEEDS[:2]
    assert [s.outcome["decided"] for s in night.ledger.samples(1, "control")] == [4, 7]


@pytest.mark.parametrize("how", ["hopeless", "timeout"])
def test_after_a_disturbed_run_without_a_score_the_best_is_looked_at_once(night, how):
    loop_of(night, Machine(), Ideas(2.0)).run(Limits(experiments=1))
    assert ends(night, Ending(how, BUSY), 2.1).tainted
    for _ in range(2):
        ends(night, Machine(), 2.1)
        assert runs(night, 1, "control") == [(SEEDS[-1] + 1, False)]


def test_a_drift_is_seen_though_all_that_it_makes_worse_is_stopped_early(tmp_path, settings, monkeypatch):
    """A slower machine makes every candidate lag behind what the best was once: none of them would show it."""
    monkeypatch.setattr(measuring, "CONTROL_EVERY", 4)
    night = make_lab(tmp_path / "night", replace(settings, verdict="statistical", probe=True))
    executor = Looking()
    loop_of(night, executor, Ideas(*(2.1 + 0.01 * k for k in range(5)))).run(Limits(experiments=LEAST_PAIRS + 2))
    executor.slower = 0.1
    loop_of(night, executor, Ideas(2.0 - 5 * SD)).run(Limits(experiments=9))
    check(night)
    found = night.ledger.experiments()[LEAST_PAIRS + 2 :]
    early = [bool(e.verdict.get("stopped_early")) for e in found]
    assert early[:2] == [True, True], "before anybody knew"
    (said,) = events(night, "epoch")
    assert "worse than before" in said
    assert any(e.status == "keep" for e in found)


def test_after_a_drift_candidates_are_judged_against_the_new_figure(night, monkeypatch):
    monkeypatch.setattr(measuring, "CONTROL_EVERY", 2)
    executor = Machine()
    loop_of(night, executor, Ideas(2.1)).run(Limits(experiments=2))
    executor.slower = 0.1
    gain = 5 * SD
    loop_of(night, executor, Ideas(2.0 - gain)).run(Limits(experiments=4))
    check(night)
    (said,) = events(night, "epoch")
    assert "worse than before" in said
    first, *later = night.ledger.experiments()[2:]
    assert first.status == "discard", "before anybody knew"
    kept = next(e for e in later if e.status == "keep")
    assert kept.best_before == pytest.approx(2.1, abs=3 * SD)
    assert kept.verdict["gain"] == pytest.approx(gain, abs=3 * SD)
    assert {s.epoch for s in night.ledger.samples(kept.number)} == {1}


def test_a_machine_that_got_faster_makes_no_keep(night):
    """The candidate looks better only because the machine does; the best's own further runs tell."""
    executor = Machine()
    loop_of(night, executor, Ideas(2.1)).run(Limits(experiments=2))
    executor.slower = -0.1
    loop_of(night, executor, Ideas(2.0)).run(Limits(experiments=5))
    check(night)
    assert [e.number for e in night.ledger.experiments() if e.is_kept] == [1]
    assert len(events(night, "epoch")) == 1


def test_a_best_that_fails_on_other_seeds_is_a_clear_error(night, monkeypatch):
    monkeypatch.setattr(measuring, "CONTROL_EVERY", 1)
    loop_of(night, Machine(), Ideas(2.1)).run(Limits(experiments=2))
    broken = Machine(status="crash", reason="the loss is nan", val_bpb=None)
    with pytest.raises(UserError, match=r"best \(#1\) failed 3 times in a row .*the loss is nan.*autoresearch undo 1"):
        loop_of(night, broken, Ideas(2.0)).run(Limits(experiments=3))
    assert len(events(night, "remeasured")) == 3
    check(night)


def test_a_change_of_versions_begins_an_epoch_and_an_undo_into_an_older_one_is_measured_again(night):
    executor = Machine()
    old, new = ({"measured_with": lambda s, v=v: {"torch": v}} for v in ("1", "2"))
    loop_of(night, executor, **old).judge_pending(1)
    loop_of(night, executor, **new).judge(recipe(1.5, mark="a"), "much better")
    assert [s.epoch for s in night.ledger.samples(1)] == [0] * len(SEEDS) + [1] * len(
        night.ledger.samples(1, "control")
    )
    assert night.best().number == 2
    night.undo(2)
    night.ledger.begin_epoch("a drift of the second", 2)
    loop_of(night, executor, **new).judge(recipe(2.1, mark="b"), "worse")
    assert night.ledger.samples(1)[-1].epoch == 2
    assert "it was run before the machine changed" in " ".join(events(night, "note"))


def test_the_best_measured_again_says_why_it_was_disturbed(night):
    old, new = ({"measured_with": lambda s, v=v: {"torch": v}} for v in ("1", "2"))
    loop_of(night, **old).judge_pending(1)
    loop_of(night, Machine(health=BUSY), **new).judge(recipe(2.1), "worse")
    first = night.ledger.samples(1, "control")[0]
    assert first.tainted and "1.5 cores busy" in first.outcome["health"]["disturbed"]


def test_what_upstream_s_rule_would_have_kept_is_its_own_chain(night):
    loop_of(night, researcher=Ideas(1.998, 2.001, 1.996, 2.003, 1.99)).run(Limits(experiments=16))
    firsts = {e.number: night.ledger.samples(e.number, "verdict")[0].val_bpb for e in night.ledger.experiments()}
    best, keeps = firsts.pop(1), []
    for number, first in firsts.items():
        if first < best:
            best, keeps = first, [*keeps, number]
    found = findings(read(night))
    assert [r.number for r in found.rows[1:] if r.simple == "keep"] == keeps
    assert found.rules.simple == len(keeps) > 0 and found.rules.earlier == 0


class Compiling(Machine):
    """Each run compiles something, and finds what it is given."""

    def __init__(self):
        super().__init__()
        self.found = []

    def execute(self, request, on_event, stop):
        names = sorted(p.name for p in request.caches.iterdir()) if request.caches else []
        self.found.append((request.experiment.rpartition("-")[2], names))
        outcome = super().execute(request, on_event, stop)
        outcome.caches = request.workdir / "caches-scorer"
        outcome.caches.mkdir()
        (outcome.caches / f"of {len(self.found)}").touch()
        return outcome


def test_a_run_starts_from_what_the_one_before_it_of_its_recipe_compiled(night):
    """And the first from what the best has."""
    executor = Compiling()
    loop_of(night, executor, Ideas(2.0, 1.9)).run(Limits(experiments=2))
    baseline = [names for number, names in executor.found if number == "1"]
    assert len(baseline) >= 5 and baseline == [[], *([f"of {n}"] for n in range(1, len(baseline)))]
    candidate = [(at, names) for at, (number, names) in enumerate(executor.found, 1) if number == "2"]
    assert candidate[0][1] == [f"of {len(baseline)}"], "what the best's last run compiled"
    assert [names for _, names in candidate[1:]] == [[f"of {at}"] for at, _ in candidate[:-1]]
    assert list((night.record / "work").iterdir()) == []
    check(night)


def test_a_baseline_starts_from_what_its_fitting_compiled(night, tmp_path):
    (tmp_path / "fitting").mkdir()
    (tmp_path / "fitting" / "of the fitting").touch()
    night.products.keep(1, None, tmp_path / "fitting")
    executor = Compiling()
    loop_of(night, executor, Ideas(2.0, 1.9)).run(Limits(experiments=1))
    assert [names for _, names in executor.found[:2]] == [["of the fitting"], ["of 1"]]
    assert [p.name for p in (night.record / "caches").iterdir()] == ["1"]
    check(night)


class Cut(Exception):
    """The process ends here."""


class HalfCopied(Compiling):
    """Its third run is cut off while what it compiled is copied."""

    def execute(self, request, on_event, stop):
        if len(self.found) < 2:
            return super().execute(request, on_event, stop)
        (request.workdir / "caches-scorer").mkdir(parents=True)
        (request.workdir / "caches-scorer" / "half").touch()
        raise Cut


def test_what_a_run_that_was_cut_off_left_half_copied_is_not_begun_with(night):
    with pytest.raises(Cut):
        loop_of(night, HalfCopied(), Ideas(2.0)).run(Limits(experiments=1))
    executor = Compiling()
    loop_of(night, executor, Ideas(2.0)).run(Limits(experiments=1))
    assert executor.found[0] == ("1", ["of 2"])
    check(night)


def test_a_confirmation_decides_nothing(night):
    executor = Machine()
    loop = loop_of(night, executor, Ideas(2.0))
    loop.run(Limits(experiments=1))
    before = night.best_bpb()
    with loop.holding():
        outcome = loop.measure(1, 1042, "confirm", "to see what was gained", holdout=True)
    assert outcome.status == "scored" and outcome.audited
    assert runs(night, 1, "confirm") == [(1042, False)]
    assert night.best_bpb() == before
    assert loop.measure(1, 1043, "confirm", "once more").val_bpb > 0
    check(night)


# --- stops and kills -----------------------------------------------------------------------------

GAINS = [2.01, 2.0, 1.97, 1.97, 1.99, 1.94, 1.98]


def story(lab) -> list:
    """All that a night is: what was decided of what, and on which runs."""
    return [
        (e.description, e.status, e.val_bpb, e.best_before, e.parent,
         [(s.seed, s.val_bpb, s.purpose) for s in lab.ledger.samples(e.number)])
        for e in lab.ledger.experiments() if e.status is not None
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and fork are POSIX")
def test_killed_between_and_within_runs_a_night_ends_as_if_it_had_not_been(tmp_path, settings):
    """No run is lost that was on the record, none is counted twice: the same runs, verdicts and figures come out."""
    statistical = replace(settings, verdict="statistical")
    lab = make_lab(tmp_path / "night", statistical)
    dice = random.Random(5)
    for _ in range(15):
        path, known = lab.path, len(lab.ledger.all_samples())
        lab.ledger.close()

        def act(path=path):
            Loop(Lab.open(path), Ideas(*GAINS), Machine(seconds=0.005), lambda event: None).run(Limits())

        pid = in_a_process(act)
        time.sleep(dice.uniform(0.05, 0.5))
        kill(pid, tree=dice.random() < 0.5)
        lab = Lab.open(path)
        with lab.lock():
            loop_of(lab).recover()
        check(lab)
        assert len(lab.ledger.all_samples()) >= known
    loop_of(lab, researcher=Ideas(*GAINS)).run(Limits(experiments=max(1, 7 - len(story(lab)))))
    told = story(lab)
    calm = make_lab(tmp_path / "calm", statistical)
    loop_of(calm, researcher=Ideas(*GAINS)).run(Limits(experiments=len(told)))
    assert told == story(calm)
    assert any(status == "keep" for _, status, *_ in told[1:])


def test_a_deadline_between_two_runs_leaves_the_experiment_for_the_next_start(night):
    executor = Machine(timings={"total": 100.0})
    loop_of(night, executor, Ideas(1.9)).run(Limits(experiments=1))
    began = []

    def stop_after_one(event):
        if event.kind == "start" and event.data["number"] == 2:
            began.append(event)
        if event.kind == "note" and began:
            loop.stop()

    loop = loop_of(night, executor, Ideas(1.9), stop_after_one)
    loop.run(Limits())
    check(night)
    waits = night.ledger.get(2)
    assert (waits.state, len(runs(night, 2))) == ("proposed", 1)
    late = loop_of(night, executor, Ideas(1.9)).run(Limits(deadline=Deadline.after(50 / 3600)))
    assert (late.decided, night.ledger.get(2).state) == (0, "proposed")
    loop_of(night, executor, Ideas(1.9)).run(Limits(experiments=1))
    assert night.ledger.get(2).status == "keep"
    assert Counter(runs(night, 2)).most_common(1)[0][1] == 1, "no seed twice"
