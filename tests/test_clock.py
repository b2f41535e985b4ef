"""The budget: progress, whether a step fits, what overrun is allowed. Time is given, never waited for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clock import Budget, Limit, StepTimes, Stopwatch

seconds = st.floats(1e-4, 1e4)


@given(budget=seconds, started=st.floats(0, 1e6), passed=st.floats(-10, 1e5))
def test_progress_is_the_used_share(budget: float, started: float, passed: float) -> None:
    clock = Budget(budget, started, lambda: started + passed)
    assert 0.0 <= clock.progress() <= 1.0
    assert clock.left() == pytest.approx(budget - passed, abs=1e-6)
    assert clock.progress() == pytest.approx(min(1, max(0, passed / budget)), abs=1e-5)


@given(st.lists(seconds, min_size=1, max_size=60), st.floats(0.01, 1e5))
def test_a_step_that_fits_ends_in_time_when_it_is_no_slower_than_usual(steps: list[float], left: float) -> None:
    times = StepTimes()
    for s in steps:
        times.add(s)
    recent = sorted(steps[-StepTimes.RECENT :])
    assert times.fits(left) == (times.expected() <= left)
    assert times.median() <= recent[-1]
    assert times.expected() in recent
    assert times.expected() >= times.median() or len(recent) < 3


def test_one_hiccup_does_not_end_a_training_but_regular_heavy_steps_are_seen() -> None:
    times = StepTimes()
    for i in range(100):
        times.add(5.0 if i == 95 else 0.1)
    assert times.fits(0.2)
    for i in range(100):
        times.add(1.0 if i % 10 == 0 else 0.1)
    assert not times.fits(0.5)


def test_the_first_step_is_always_tried_unless_the_time_is_over() -> None:
    assert StepTimes().fits(0.001)
    assert not StepTimes().fits(0.0)
    assert not StepTimes().fits(-1.0)


def test_several_steps_must_fit_together() -> None:
    times = StepTimes()
    times.add(1.0)
    assert times.fits(2.5) and times.fits(2.5, steps=2) and not times.fits(2.5, steps=3)


@given(budget=st.floats(0.1, 1e5), claimed=st.floats(0, 1e9))
def test_no_claim_buys_more_than_two_percent(budget: float, claimed: float) -> None:
    limit = Limit(budget)
    allowed = limit.overrun(claimed)
    assert allowed >= 0.01 * budget
    assert allowed <= max(0.02 * budget, 0.5) * (1 + 1e-9)
    assert budget + allowed <= limit.longest() * (1 + 1e-9)
    assert limit.overrun(claimed) >= min(claimed, 0.02 * budget)


@given(budget=st.floats(0.1, 1e5), size=st.integers(0, 2**50))
def test_padding_the_weights_buys_next_to_nothing(budget: float, size: int) -> None:
    allowed = Limit(budget).handover(size)
    assert 0.5 <= allowed <= 0.5 + 0.02 * budget * (1 + 1e-9)


@given(st.lists(st.tuples(st.sampled_from(["stop", "go on", "never mind"]), st.floats(0.01, 50)), max_size=20))
def test_a_stopwatch_counts_what_is_not_paused(events: list[tuple[str, float]]) -> None:
    """Against a plain sum of the stretches, each counted as long as the clock ran; a stop that was none counts."""
    time = [100.0]
    clock, budget = Stopwatch(100.0, lambda: time[0]), Budget(1000.0, 100.0, lambda: time[0])
    ran, held, standing = 0.0, 0.0, False
    for event, passed in events:
        if event == "stop":
            clock.stop()
            standing = True
        elif event == "go on":
            paused = clock.go_on()
            budget.pause(paused)
            assert paused == pytest.approx(held)
            held, standing = 0.0, False
        else:
            clock.never_mind()
            ran, held, standing = ran + held, 0.0, False
        time[0] += passed
        ran, held = (ran, held + passed) if standing else (ran + passed, held)
        assert clock.elapsed() == pytest.approx(ran)
        if not standing:
            assert budget.elapsed() == pytest.approx(ran), "the trainer's view is the same once it is told"
