"""What counts as a disturbed run: a departure from the lab's own steady state, sleep, clocks that are set."""

from __future__ import annotations

import os
import random
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.health import Watch
from core.interruptions import Clocks, Interruptions, read_clocks, stalled_seconds
from core.ledger import Sample
from core.runs import Runs
from core.steady import SLOWER, Steady, departure, spread

seconds = st.floats(0.0, 1e6)


@given(trained=seconds, slept=seconds, moved=st.floats(-1e6, 1e6))
def test_sleep_and_set_clocks_are_told_from_training(trained, slept, moved):
    """`trained` seconds go by, the machine sleeps, somebody sets the time of day."""
    reads = iter([Clocks(5.0, 7.0, 1e9), Clocks(5.0 + trained, 7.0 + trained + slept, 1e9 + trained + slept + moved)])
    found = Interruptions(lambda: next(reads)).report()
    assert found["slept_seconds"] == pytest.approx(slept, abs=0.01)
    assert found["clock_set_seconds"] == pytest.approx(moved, abs=0.01)
    assert ("slept" in departure({"health": found}, Steady())) == (found["slept_seconds"] > 1.0)
    if found["slept_seconds"] <= 1.0:
        assert ("clock was set" in departure({"health": found}, Steady())) == (abs(found["clock_set_seconds"]) > 2.0)


def test_the_clocks_of_this_machine_agree_while_nothing_happens():
    began = read_clocks()
    time.sleep(0.05)
    now = read_clocks()
    assert now.awake - began.awake >= 0.05
    assert now.running - began.running == pytest.approx(now.awake - began.awake, abs=0.02)


def test_memory_pressure_is_the_share_of_the_time_in_which_processes_waited(tmp_path):
    file = tmp_path / "memory"

    def stalled(microseconds):
        file.write_text(f"some avg10=0.00 avg60=0.00 avg300=0.00 total={microseconds}\nfull avg10=0.00 total=7\n")

    reads = iter([Clocks(0.0, 0.0, 0.0), Clocks(10.0, 10.0, 10.0)])
    stalled(1_000_000)
    watch = Interruptions(lambda: next(reads), file)
    stalled(3_500_000)
    assert watch.report()["memory_stalled"] == 0.25
    assert stalled_seconds(tmp_path / "nothing") is None
    file.write_text("some text\n")
    assert stalled_seconds(file) is None


def test_the_watch_over_a_training_reports_it_all():
    found = Watch(os.getpid()).report()
    assert {"slept_seconds", "clock_set_seconds", "memory_stalled", "on_battery", "cores"} <= found.keys()
    assert found["slept_seconds"] < 1.0
    if sys.platform == "linux":
        assert (found["memory_stalled"] is None) == (stalled_seconds() is None)


QUIET, BUSY = {"others_cores": 0.1, "our_cores": 1.9}, {"others_cores": 1.0, "our_cores": 1.9}


def run(health, steps=100, training_seconds=10.0):
    return {"health": health, "steps": steps, "training_seconds": training_seconds}


def test_a_departure_is_one_from_the_lab_s_own_state():
    assert departure(run(QUIET), Steady(QUIET, True)) == departure(run(BUSY), Steady(BUSY, True)) == ""
    assert "1.0 cores busy, and 0.1 in this lab" in departure(run(BUSY), Steady(QUIET, True))
    assert "0.1 cores busy, and 1.0 in this lab" in departure(run(QUIET), Steady(BUSY, True)), "quieter is not the same"
    assert "battery" in departure(run({**QUIET, "on_battery": True}), Steady({**QUIET, "on_battery": False}, True))
    assert departure(run({**QUIET, "on_battery": True}), Steady(QUIET, True)) == "", "nobody knows how it was"


def test_beside_a_card_what_runs_on_idle_cores_is_no_departure():
    card = {"card": {"looks": 60, "tainted": ""}, "our_cores": 1.1, "cores": 8}
    quiet, busy, full = ({**card, "others_cores": others} for others in (0.2, 3.0, 6.5))
    assert departure(run(busy), Steady(quiet, True)) == departure(run(quiet), Steady(busy, True)) == ""
    assert "6.5 cores busy" in departure(run(full), Steady(quiet, True))
    assert "slower" in departure(run(busy, training_seconds=12.0), Steady(quiet, True, rates=[10.0, 10.1]))


# Of a night of demo runs on two cores that eight others wanted: our cores, others' cores, steps in 30 s.
CROWDED = [(0.847, 1.15, 130), (1.119, 0.853, 321), (0.466, 1.532, 48), (0.244, 1.75, 28), (0.323, 1.669, 21),
           (0.458, 1.503, 68)]  # fmt: skip


def test_a_starved_run_is_no_good_one_though_others_can_hardly_have_more():
    samples = []
    for number, (ours, others, steps) in enumerate(CROWDED, 1):
        health = {"our_cores": ours, "others_cores": others, "cores": 2}
        outcome = run(health, steps, 30.0)
        why = departure(outcome, Runs(samples, 0, {"torch": "2"}).steady(number))
        samples.append(sample(number, 42, 2.0, id=number, tainted=bool(why), outcome=outcome))
        if number >= 4:
            assert why.endswith(f"cores busy and left us {ours:.2f}, after 1.12 in an earlier run")
    assert all(s.tainted for s in samples)


def test_a_run_that_has_far_fewer_cores_than_the_good_one_is_disturbed():
    def cores(ours, others, **more):
        return {"our_cores": ours, "others_cores": others, "cores": 2, **more}

    good = Steady(cores(0.47, 1.53), True)
    assert "left us 0.24, after 0.47 in this lab's steady state" in departure(run(cores(0.24, 1.75)), good)
    assert departure(run(cores(0.4, 1.6)), good) == "", "no more than others' cores tell"
    assert departure(run(cores(0.24, 1.5)), good) == "", "a core idles: this recipe needs fewer"
    alone = Steady({"our_cores": 1.9, "others_cores": 0.1}, True)
    assert departure(run({"our_cores": 0.9, "others_cores": 0.1}), alone) == "", "others have not taken what it lacks"
    assert (
        departure(run(cores(0.24, 1.75, card={"looks": 9})), Steady(cores(0.47, 1.53, card={"looks": 9}), True)) == ""
    )


def test_before_there_is_a_good_run_a_quiet_machine_is_one():
    assert departure(run(QUIET), Steady()) == "" and "1.0 cores busy" in departure(run(BUSY), Steady())
    assert departure(run(QUIET), Steady(BUSY, False)) == ""
    assert departure(run(BUSY), Steady(BUSY, False)) == "", "as busy as the last time"


@given(st.floats(0.3, 3.0))
def test_step_rates_are_compared_with_those_of_the_same_recipe(factor):
    found = departure(run(QUIET, training_seconds=10.0 / factor), Steady(QUIET, True, rates=[9.9, 10.0, 10.2]))
    if abs(factor - 1) > SLOWER + 1e-9:
        assert ("slower" if factor < 1 else "faster") in found
    elif abs(factor - 1) < SLOWER - 1e-9:
        assert found == ""
    wide = Steady(QUIET, True, rates=[9.0, 10.0, 11.0], spread=0.1)
    assert (departure(run(QUIET, training_seconds=10.0 / 1.3), wide), departure(run(QUIET), wide)) == ("", "")


def test_the_spread_of_step_rates_is_within_recipes():
    assert spread([[10.0], [20.0]]) == spread([]) == 0.0
    assert spread([[10.0, 10.0], [20.0, 20.0]]) == 0.0
    dice = random.Random(2)
    many = [[r * dice.gauss(1.0, 0.02) for _ in range(4)] for r in (5.0, 10.0, 200.0) for _ in range(200)]
    assert spread(many) == pytest.approx(0.02, rel=0.05)
    disturbed = [[*group[:3], group[3] / 2] for group in many]
    assert spread(disturbed) < 0.05, "one in four at half speed"


def sample(number, seed, bpb, **given):
    fields = {"tainted": False, "versions": {"torch": "2"}, "created": "", **given}
    return Sample(number, seed, bpb, **fields)


def test_which_seed_of_the_best_is_run_twice():
    """The oldest that no decision has chosen and that is none of the last two, until two are known."""

    def chosen(seeds, is_baseline):
        """`seeds`: those of its controls negative."""
        made = [
            sample(1, abs(seed), 2.0, id=k, purpose="control" if seed < 0 else "verdict")
            for k, seed in enumerate(seeds, 1)
        ]
        return Runs(made, 0, {"torch": "2"}).to_repeat(1, is_baseline)

    assert chosen([42, 43, 44], True) == 42
    assert chosen([42, 43, 44, -45, -46], False) is None
    assert chosen([42, 43, 44, -45, -46, -47], False) == 45
    assert chosen([42, 43, 44, -42], True) == 43
    assert chosen([42, 43, 44, 45, -42, -43], True) is None
    assert chosen([42, 43], True) is chosen([], True) is None


def test_only_runs_of_this_epoch_and_these_versions_are_compared():
    made = [
        sample(1, 42, 2.0),
        sample(1, 43, 2.1, epoch=1, tainted=True),
        sample(1, 43, 2.2, epoch=1),
        sample(1, 44, 2.3, epoch=1, versions={"torch": "1"}),
        sample(1, 45, 2.4, epoch=1, purpose="control"),
        sample(1, 1042, 2.5, epoch=1, purpose="confirm"),
        sample(2, 42, 1.0, epoch=1, tainted=True),
    ]
    samples = [replace(s, id=10 * k) for k, s in enumerate(made, 1)]
    runs = Runs(samples, 1, {"torch": "2"})
    assert [(r.seed, r.bpb, r.order) for r in runs.scores(1)] == [(43, 2.2, 30), (45, 2.4, 50)]
    assert [r.bpb for r in runs.scores(2)] == [1.0], "there is no other"
    assert [r.bpb for r in runs.with_run(2, 43, 1.5).scores(2)] == [1.5]
    assert runs.since(1, []) == {2: True}
    assert runs.to_repeat(1, is_baseline=True) is None, "it would be one of the last"
    assert runs.noise().df == 2  # 2.2, 2.4 and the confirmation: a confirmation tells of the noise as well
    assert runs.noise(leave_out=samples[2:3]).df == 1
