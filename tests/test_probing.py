"""The rule for stopping early, by itself: what it foretells, when it keeps silent, how often it is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import probing
from core.outcome import Outcome
from core.probing import CHANCE, LEAST_PAIRS, LEAST_RUNS, SHARES, Curve, Era, Forecast, exempt, forecast, judge

Pairs = list[tuple[float, float]]
FIRST, SECOND = SHARES


def lab_pairs(rng: np.random.Generator, count: int, slope: float = 0.5, noise: float = 0.01) -> Pairs:
    x = rng.normal(0.03, 0.05, count)
    y = slope * x + noise * rng.standard_normal(count)
    return list(zip(x.tolist(), y.tolist()))


def told(pairs: Pairs, gap: float, needed: float = 0.0) -> Forecast:
    found = forecast(pairs, 0.3, gap, needed)
    assert found is not None
    return found


# --- one forecast --------------------------------------------------------------------------------------


def test_the_interval_is_that_of_linear_regression() -> None:
    """Against the textbook's matrix form, computed another way."""
    pairs = lab_pairs(np.random.default_rng(1), 12)
    found = told(pairs, 0.2)
    x, y = np.array(pairs).T
    design = np.stack([np.ones_like(x), x], 1)
    beta, (rss,), *_ = np.linalg.lstsq(design, y, rcond=None)
    at = np.array([1.0, 0.2])
    error = np.sqrt(rss / 10 * (1 + at @ np.linalg.inv(design.T @ design) @ at))
    assert found.expected == pytest.approx(at @ beta)
    assert found.spread == pytest.approx(2.228138852 * error)  # t table: 10 degrees of freedom, 97.5 %
    assert found.runs == 12


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(-0.1, 0.4), st.floats(0.001, 0.3))
def test_worse_at_the_probe_is_never_more_hopeful(seed: int, gap: float, worse: float) -> None:
    pairs = lab_pairs(np.random.default_rng(seed), 20)
    x, y = np.array(pairs).T
    if np.polyfit(x, y, 1)[0] <= 0:
        assert forecast(pairs, 0.3, gap) is None
        return
    better, other = told(pairs, gap), told(pairs, gap + worse)
    assert other.expected > better.expected
    assert told(pairs, gap, needed=0.05).chance >= better.chance
    assert not better.hopeless or better.chance < CHANCE


def test_a_luckier_run_than_foretold_makes_the_rule_careful() -> None:
    """The bound that assumes no distribution: what happened once, by so much, may happen again."""
    pairs = lab_pairs(np.random.default_rng(2), 200, noise=0.002)
    gap = 0.05
    assert told(pairs, gap).hopeless
    crossed = [*pairs, (gap, -0.001)]  # one late crossing among 200 hardly moves the normal interval
    assert told(crossed, gap).chance < CHANCE and not told(crossed, gap).hopeless


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(-0.1, 0.4))
def test_the_second_bound_is_the_jackknife_plus(seed: int, gap: float) -> None:
    """Against the same fits made one by one: a run is hopeless exactly when both bounds say so."""
    pairs = lab_pairs(np.random.default_rng(seed), 15)
    found = forecast(pairs, 0.3, gap)
    if found is None:
        return
    lowest = []
    for i, (x, y) in enumerate(pairs):
        others = np.array(pairs[:i] + pairs[i + 1 :]).T
        slope, intercept = np.polyfit(*others, 1)
        lowest.append(intercept + slope * gap + y - (intercept + slope * x))
    if abs(bound := min(lowest)) > 1e-9:
        assert found.hopeless == (found.chance < CHANCE and bound > 0)


def test_it_keeps_silent_when_nothing_can_be_foretold() -> None:
    pairs = lab_pairs(np.random.default_rng(3), LEAST_PAIRS)
    assert forecast(pairs, 0.3, 0.1) is not None
    assert forecast(pairs[:-1], 0.3, 0.1) is None, "too few"
    assert forecast([(x, -y) for x, y in pairs], 0.3, 0.1) is None, "the worse the better: the probe says nothing"
    assert forecast([(0.1, y) for _, y in pairs], 0.3, 0.1) is None, "no run differs at the probe"
    assert forecast([*pairs[1:], (float("nan"), 0.0)], 0.3, 0.1) is None
    assert forecast(pairs, 0.3, float("inf")) is None


def test_few_good_runs_are_stopped() -> None:
    """Of 4,000 runs that would beat the best, in labs whose probes foretell the end well, fewer than 2 % are."""
    rng = np.random.default_rng(4)
    stopped = good = bad = bad_stopped = 0
    for _ in range(400):
        pairs = lab_pairs(rng, int(rng.integers(LEAST_PAIRS, 40)))
        for gap, final in lab_pairs(rng, 20):
            found = forecast(pairs, 0.3, gap)
            hopeless = found is not None and found.hopeless
            good, stopped = good + (final < 0), stopped + (final < 0 and hopeless)
            bad, bad_stopped = bad + (final >= 0), bad_stopped + (final >= 0 and hopeless)
    assert good > 1500
    assert stopped / good < 0.02
    assert bad_stopped / bad > 0.2, "and it is of use"


# --- what a lab has recorded ---------------------------------------------------------------------------


def era(level: float, runs: int, gaps: Pairs) -> Era:
    best = [Curve({FIRST: level + 0.5, SECOND: level + 0.2}, level) for _ in range(runs)]
    return Era(best, [Curve({FIRST: level + 0.5 + x, SECOND: level + 0.2 + x}, level + y) for x, y in gaps])


def test_nothing_is_stopped_before_enough_is_known() -> None:
    gaps = lab_pairs(np.random.default_rng(5), 30)
    hopeless = 2.0 + 0.5 + 0.3
    assert judge([])(0, hopeless) is None
    assert judge([era(2.0, LEAST_RUNS - 1, gaps)])(0, hopeless) is None
    found = judge([era(2.0, LEAST_RUNS, gaps)])(0, hopeless)
    assert found is not None and found.hopeless and found.gap == pytest.approx(0.3)
    assert f"at {FIRST:.0%} of the budget" in found.sentence() and "30 earlier runs" in found.sentence()
    same = judge([era(2.0, LEAST_RUNS, gaps)])(0, 2.5)
    assert same is not None and not same.hopeless


def test_runs_against_an_earlier_best_count_by_their_gaps() -> None:
    gaps = lab_pairs(np.random.default_rng(6), 30)
    whole = judge([era(2.0, 3, gaps)])(1, 2.2 + 0.1)
    parts = judge([era(2.4, 3, gaps[:17]), era(2.0, 3, gaps[17:])])(1, 2.2 + 0.1)
    assert whole is not None and parts is not None
    assert parts.chance == pytest.approx(whole.chance) and parts.expected == pytest.approx(whole.expected)


def test_the_same_seed_is_compared_where_there_is_one() -> None:
    """A seed that is 0.2 above the others everywhere: a run on it that is 0.2 above the mean is no worse."""
    shift = {1: 0.0, 2: 0.0, 3: 0.2}
    best = [Curve({FIRST: 2.5 + d}, 2.0 + d, seed) for seed, d in shift.items()]
    gaps = lab_pairs(np.random.default_rng(8), 30)
    tried = [
        Curve({FIRST: 2.5 + shift[1 + i % 3] + x}, 2.0 + shift[1 + i % 3] + y, 1 + i % 3)
        for i, (x, y) in enumerate(gaps)
    ]
    assert Era(best, tried).pairs(FIRST, same_seed=True) == [pytest.approx(pair) for pair in gaps]
    unlucky = judge([Era(best, tried)], seed=3)(0, 2.7)
    assert unlucky is not None and not unlucky.hopeless and unlucky.gap == pytest.approx(0.0)
    unknown = judge([Era(best, tried)], seed=9)(0, 2.7)
    assert unknown is not None and unknown.gap == pytest.approx(0.2 - 0.2 / 3)


def lucky_once(by: float) -> Era:
    """A best whose run on the seed that all candidates begin on is `by` better than the others, from the first look on;
    nothing was compared with it yet."""
    runs = {42: -by, 43: by / 3, 44: by / 3, 45: by / 3}
    return Era([Curve({FIRST: 2.5 + d, SECOND: 2.2 + d}, 2.0 + d, seed) for seed, d in runs.items()])


def test_a_run_is_not_stopped_for_being_worse_than_the_best_s_luckiest() -> None:
    """The run that got it kept was 0.06 too good. What ends as well as the best on average is no hopeless run."""
    gaps = lab_pairs(np.random.default_rng(11), 30, slope=1.0, noise=0.005)
    known = [era(2.2, 3, gaps), lucky_once(0.06)]
    equal = judge(known, seed=42)(0, 2.5)
    assert equal is not None and not equal.hopeless and equal.gap == pytest.approx(0.0)
    worse = judge(known, seed=42)(0, 2.6)
    assert worse is not None and worse.hopeless, "worse than either"


def test_a_seed_on_which_all_do_badly_stops_nothing() -> None:
    """The other way round: the best's own run on that seed is 0.06 worse than its mean, and so is everybody's."""
    gaps = lab_pairs(np.random.default_rng(12), 30, slope=1.0, noise=0.005)
    equal = judge([era(2.2, 3, gaps), lucky_once(-0.06)], seed=42)(0, 2.56)
    assert equal is not None and not equal.hopeless and equal.gap == pytest.approx(0.0)


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(-0.1, 0.4), st.floats(-0.1, 0.1))
def test_hopeless_means_against_the_mean_and_against_the_same_seed(seed: int, gap: float, by: float) -> None:
    known = [era(2.2, 3, lab_pairs(np.random.default_rng(seed), 20)), lucky_once(by)]
    both, mean = judge(known, seed=42)(0, 2.5 + gap), judge(known)(0, 2.5 + gap)
    only = judge([known[0], Era(known[1].incumbent[:1] * LEAST_RUNS)])(0, 2.5 + gap)
    found = [one for one in (mean, only) if one is not None]
    assert (both is None) == (len(found) < 2)
    assert both is None or both.hopeless == all(one.hopeless for one in found)


def test_curves_come_from_outcomes() -> None:
    outcome = Outcome(status="scored", val_bpb=1.5, probes=[[0.3, 3.01, 1.9], [0.6, 6.0, 1.7]])
    read = Outcome.from_dict(json.loads(json.dumps(outcome.to_dict())))
    assert Curve.of(read.probes, read.val_bpb) == Curve({0.3: 1.9, 0.6: 1.7}, 1.5)
    assert Curve.of(read.probes, None) is None
    unprobed = Era([Curve({}, 2.0)] * 3, [Curve({}, 2.1)])
    assert unprobed.level(0.3) is None and unprobed.pairs(0.3, same_seed=True) == []


def test_one_experiment_in_ten_runs_to_its_end() -> None:
    assert sum(exempt(n) for n in range(1, 101)) == 10


def test_the_record_is_plain() -> None:
    found = told(lab_pairs(np.random.default_rng(7), 20), 0.3)
    record = json.loads(json.dumps(probing.as_record(found, 2.8, 210.0)))
    assert record["saved_seconds"] == 210.0 and record["probe"] == 2.8 and record["reason"] == found.sentence()
