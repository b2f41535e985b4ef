"""The statistical loop on a machine that others disturb: repeated, passed by, or the new steady state."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted import Limits, check, make_lab
from several import BUSY, SEEDS, Disturbed, Ideas, Machine, ends, events, loop_of, runs

from console.findings import findings, read
from console.markdown import markdown
from core import measuring


@pytest.fixture
def night(tmp_path, settings):
    return make_lab(tmp_path / "night", replace(settings, verdict="statistical"))


def test_a_disturbed_run_is_repeated_and_does_not_count(night):
    loop_of(night, Machine(), Ideas(2.0)).run(Limits(experiments=1))
    e = ends(night, Disturbed(2, 1), 2.1)
    check(night)
    assert (e.status, e.tainted, runs(night, 2)) == ("discard", False, [(42, True), (42, False)])
    assert e.val_bpb == night.ledger.samples(2)[-1].val_bpb
    assert "1.5 cores busy" in night.ledger.samples(2)[0].outcome["health"]["disturbed"]


def test_the_report_counts_every_disturbed_run(night):
    """Ten that were repeated and so left no experiment tainted, and three of one that was passed by."""
    quiet = {"others_cores": 0.1, "our_cores": 1.0}
    loop_of(night, Machine(health=quiet), Ideas(2.0)).run(Limits(experiments=1))
    for number, times in ((2, 2), (3, 2), (4, 2), (5, 2), (6, 2), (7, 99)):
        executor = Disturbed(number, times)
        executor.changes["health"] = quiet
        ends(night, executor, 2.1)
    assert [e.number for e in night.ledger.experiments() if e.tainted] == [7]
    found = findings(read(night)).machine
    assert (found.tainted, found.experiments, found.again) == (13, 6, 0)
    assert found.runs == len(night.ledger.all_samples())
    assert found.reasons and all("1.5 cores busy" in reason for reason in found.reasons)
    assert "disturbed: 13, of 6 experiments" in markdown(findings(read(night)), "now")


def test_what_is_always_disturbed_is_passed_by_and_then_the_best_is_looked_at(night):
    loop_of(night, Machine(), Ideas(2.0)).run(Limits(experiments=1))
    e = ends(night, Disturbed(2, 99), 1.0)
    check(night)
    assert (e.status, e.tainted, runs(night, 2)) == ("discard", True, [(42, True)] * 3)
    assert "passed by: run 3 times" in e.reason and e.verdict["simple"] == "keep"
    ends(night, Machine(), 2.1)
    assert runs(night, 1, "control") == [(SEEDS[-1] + 1, False)]
    assert night.ledger.epoch() == 0


def test_a_machine_that_stays_busy_becomes_the_new_steady_state(night):
    loop_of(night, Machine(), Ideas(2.0)).run(Limits(experiments=1))
    busy = Machine(health=BUSY)
    passed_by = ends(night, busy, 2.1)
    after = [ends(night, busy, 2.1) for _ in range(2)]
    check(night)
    assert passed_by.tainted and not any(e.tainted for e in after)
    assert [len(runs(night, e.number)) for e in after] == [1, 1]
    (said,) = events(night, "epoch")
    assert "the machine is not what it was: other processes kept 1.5 cores busy" in said


def test_a_machine_that_is_never_quiet_has_a_baseline_all_the_same(night):
    loop_of(night, Machine(health=BUSY), Ideas(2.0)).run(Limits(experiments=2))
    check(night)
    assert night.ledger.get(1).status == "keep"
    assert runs(night, 1)[:2] == [(42, True), (42, False)], "as busy as the last time: that is how it is"


class Restless(Machine):
    """Only its first run is quiet."""

    def __init__(self, health):
        super().__init__()
        self.sick = health

    def execute(self, request, on_event, stop):
        outcome = super().execute(request, on_event, stop)
        assert len(self.runs) < 50, "it goes on without end"
        outcome.health = dict(self.sick) if len(self.runs) > 1 else {}
        return outcome


def test_a_load_that_comes_during_the_baseline_and_stays_begins_an_epoch(night):
    loop_of(night, Restless(BUSY), Ideas(2.0)).run(Limits(experiments=2))
    check(night)
    (said,) = events(night, "epoch")
    assert said.startswith("the machine is not what it was: other processes kept 1.5 cores busy")
    busy = [43, 42, *SEEDS[2:]]
    assert runs(night, 1)[:9] == [(42, False), *[(43, True)] * 3, *[(seed, False) for seed in busy]]
    assert (night.best().number, f"over {len(SEEDS)} seeds" in night.best().reason) == (1, True)


def test_a_baseline_whose_every_further_run_is_interrupted_ends_all_the_same(night):
    loop_of(night, Restless({"slept_seconds": 60.0}), Ideas(2.0)).run(Limits(experiments=1))
    check(night)
    assert night.ledger.get(1).status == "keep"


@pytest.mark.parametrize(
    ("health", "why"),
    [
        ({"slept_seconds": 3600.0}, "slept for 3600 s"),
        ({"clock_set_seconds": -7200.0}, "clock was set back by 7200 s"),
        ({"memory_stalled": 0.4}, "waited for memory 40%"),
    ],
)
def test_sleep_clocks_and_memory_disturb(night, health, why):
    loop_of(night, Machine(), Ideas(2.0)).run(Limits(experiments=1))
    e = ends(night, Disturbed(2, 1, health), 2.1)
    assert not e.tainted
    assert why in night.ledger.samples(2)[0].outcome["health"]["disturbed"]


def test_a_slower_machine_shows_in_the_steps_of_the_best(night, monkeypatch):
    monkeypatch.setattr(measuring, "CONTROL_EVERY", 1)
    loop_of(night, Machine(training_seconds=10.0), Ideas(2.1)).run(Limits(experiments=2))
    loop_of(night, Machine(training_seconds=13.0), Ideas(2.1)).run(Limits(experiments=1))
    said = night.ledger.samples(1, "control")[0].outcome["health"]["disturbed"]
    assert said == "it trained 23% slower than the same recipe before (0.7692 steps/s, 1 before)"
    assert night.ledger.epoch() == 1
