"""The statistics under the verdict: noise, the sequential test, the levels of many tests, the size of a recipe."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.discovery import Tested, expected_effect, level
from core.evidence import Prior, compare, looks
from core.noise import Noise, NoisePool, Run, by_seed, drift, estimate_noise
from core.sequential import Design, bounds, luck
from core.size import syntax_tokens

DESIGN = Design(effect=1.0, patience=0.9, first_patience=0.4, information=12.0, spending=0.6)
PATH = (0.83, 1.4, 2.1, 2.9, 3.8, 5.0, 6.5, 8.5, 11.0)
SAFFRON = {"alpha": 0.05, "wealth": 0.8, "decay": 1.6, "lambda_": 0.15}


def runs(scores, order=0, seed=0):
    return [Run(seed + k, score, order + k) for k, score in enumerate(scores)]


# --- noise ---------------------------------------------------------------------------------------------------------


GROUPS = st.lists(st.tuples(st.integers(0, 3), st.lists(st.tuples(st.integers(0, 4), st.floats(1, 3)), max_size=6)))


@settings(deadline=None)
@given(GROUPS)
def test_noise_that_is_kept_up_to_date_is_that_of_all_groups_at_once(changes):
    """Groups that grow, shrink and vanish, in any order."""
    pool, groups = NoisePool(), {}
    for name, found in changes:
        groups[name] = [Run(seed, bpb, order) for order, (seed, bpb) in enumerate(found)]
        pool.put(name, groups[name])
    kept, afresh = pool.noise(), estimate_noise(list(groups.values()))
    assert (kept.df, kept.pairs) == (afresh.df, afresh.pairs)
    assert kept.sd == pytest.approx(afresh.sd, abs=1e-6)
    if afresh.sd > 1e-3:
        assert kept.correlation == pytest.approx(afresh.correlation, abs=1e-6)


def test_the_sd_is_pooled_within_recipes_and_unbiased():
    """Recipes of very different quality; the mean of the estimated variances over many labs is the true one."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        groups = [runs(3 + quality + 0.01 * rng.normal(size=n)) for quality, n in ((0, 5), (0.5, 3), (-0.4, 2), (1, 1))]
        noise = estimate_noise(groups)
        assert noise.df == 7
        found.append(noise.sd**2)
    assert np.mean(found) == pytest.approx(0.01**2, rel=0.1)


@pytest.mark.parametrize("true", [0.0, 0.6, 0.9])
def test_the_correlation_of_paired_seeds_is_found_and_trusted_only_below_what_it_is(true):
    rng = np.random.default_rng(1)
    found, trusted = [], []
    for _ in range(200):
        shared = rng.normal(size=6)
        own = rng.normal(size=(8, 6))
        scores = 3 + 0.01 * (math.sqrt(true) * shared + math.sqrt(1 - true) * own)
        noise = estimate_noise([runs(row) for row in scores])
        assert noise.pairs == 35
        found.append(noise.correlation)
        trusted.append(noise.trusted_correlation())
    assert np.mean(found) == pytest.approx(true, abs=0.12)
    assert np.mean(trusted) <= true + 0.03
    assert all(0 <= t <= max(0.0, f) for t, f in zip(trusted, found))


def test_a_correlation_from_few_pairs_is_not_trusted():
    assert Noise(0.01, 9, correlation=0.99, pairs=3).trusted_correlation() == 0


def test_repeats_of_one_seed_have_an_sd_of_their_own_and_a_seed_twice_counts_once():
    noise = estimate_noise([[Run(1, 2.0), Run(2, 2.2), Run(2, 2.2)]], [[1.0, 1.2], [5.0]])
    assert noise.df == 1
    assert noise.sd == pytest.approx(math.sqrt(0.02))
    assert noise.repeat_sd == pytest.approx(math.sqrt(0.02))
    assert noise.repeat_df == 1


def test_nothing_repeated_is_no_noise_known():
    assert estimate_noise([runs([2.0]), runs([2.1])]) == Noise(0.0, 0.0, 0.0, 0, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_what_is_no_score_is_no_run(bad):
    with pytest.raises(ValueError, match="not a score"):
        Run(1, bad)


def test_drift_is_seldom_seen_where_there_is_none_and_mostly_where_there_is():
    rng = np.random.default_rng(2)
    noise = Noise(0.01, 30)
    still = [drift(runs(3 + 0.01 * rng.normal(size=8)), noise) for _ in range(1000)]
    assert sum(d is not None for d in still) <= 20
    steps = [[*(3 + 0.01 * rng.normal(size=6)), *(3.04 + 0.01 * rng.normal(size=2))] for _ in range(200)]
    moved = [drift(runs(scores), noise) for scores in steps]
    assert sum(d is not None for d in moved) >= 170
    seen = next(d for d in moved if d is not None and d.runs == 2)
    assert "worse than before" in seen.reason and seen.moved == pytest.approx(0.04, abs=0.03)


def test_seeds_that_the_best_has_run_twice_raise_no_false_alarm():
    """As a lab repeats them: the first two seeds again after five, then fresh ones; what a seed has of its own counts
    for nine tenths. At each such control no more alarms than the test may give."""
    rng = np.random.default_rng(3)
    noise, alarms, nights = Noise(0.01, 200), np.zeros(4), 4000
    for shared in rng.normal(size=(nights, 9)):
        seeds = [0, 1, 2, 3, 4, 0, 1, 5, 6]
        own = rng.normal(size=len(seeds))
        scores = 3 + 0.01 * (math.sqrt(0.9) * shared[seeds] + math.sqrt(0.1) * own)
        made = [Run(seed, score, order) for order, (seed, score) in enumerate(zip(seeds, scores))]
        alarms += [drift(made[:n], noise, level=0.05) is not None for n in (6, 7, 8, 9)]
    assert (alarms / nights <= 0.05).all()


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(2, 3)), max_size=9))
@settings(deadline=None)
def test_a_seed_counts_once_with_its_mean_where_its_last_run_stands(made):
    all_runs = [Run(seed, bpb, order) for order, (seed, bpb) in enumerate(made)]
    found = {run.seed: run for run in by_seed(all_runs)}
    assert len(found) == len(by_seed(all_runs)) == len({seed for seed, _ in made})
    for seed, run in found.items():
        own = [r for r in all_runs if r.seed == seed]
        assert (run.bpb, run.order) == (pytest.approx(np.mean([r.bpb for r in own])), own[-1].order)


@pytest.mark.parametrize("scores", [[], [3.0], [3.0, 3.0, 3.0]])
def test_no_drift_of_too_little_or_of_equal_scores(scores):
    assert drift(runs(scores), Noise(0.0, 5)) is None


# --- evidence ------------------------------------------------------------------------------------------------------


def test_a_trusted_correlation_gives_the_information_of_the_control_variate_estimate():
    noise = Noise(0.01, 40, correlation=0.9, pairs=60)
    rho, n, m = noise.trusted_correlation(), 3, 5
    seen = compare(runs([3.0] * m), runs([2.99] * n, order=9), noise)
    assert seen.information == pytest.approx(1 / ((1 - rho**2) / n + (1 - rho) ** 2 / m))
    assert seen.gain == pytest.approx(0.01)
    unpaired = compare(runs([3.0] * m), runs([2.99] * n, order=9), replace(noise, correlation=0.0))
    assert unpaired.information == pytest.approx(1 / (1 / n + 1 / m))


ARM = st.dictionaries(st.integers(0, 9), st.floats(2.9, 3.1), min_size=1, max_size=8)  # seed -> score


@settings(deadline=None)
@given(ARM, ARM, st.sampled_from([0.0, 0.3, 0.7, 0.95]), st.none() | st.builds(Prior, st.just(2.95), st.floats(0.1, 5)))
def test_pairs_are_weighed_by_generalised_least_squares(mine, theirs, correlation, prior):
    """Against the textbook's matrices: (X' V^-1 X)^-1 X' V^-1 y, with V (n + m, n + m) and X (n + m, 2); what was known
    of the incumbent before is one score more, at no seed, of a variance of its own."""
    known, new = ([Run(seed, score) for seed, score in arm.items()] for arm in (mine, theirs))
    noise = Noise(0.01, 30, correlation, 40)
    rho, seeds = noise.trusted_correlation(), np.array([*mine, *theirs])
    arm = np.repeat([0, 1], [len(mine), len(theirs)])
    covariance = rho * ((seeds[:, None] == seeds) & (arm[:, None] != arm)) + np.eye(len(seeds))
    design, scores = np.eye(2)[arm], np.array([run.bpb for run in (*known, *new)])
    if prior:
        covariance = np.pad(covariance, (0, 1))
        covariance[-1, -1] = 1 / prior.runs
        design, scores = np.vstack([design, [1, 0]]), np.append(scores, prior.bpb)
    variance = np.linalg.inv(design.T @ np.linalg.solve(covariance, design))
    means = variance @ design.T @ np.linalg.solve(covariance, scores)
    seen = compare(known, new, noise, prior)
    assert seen.gain == pytest.approx(means[0] - means[1], abs=1e-9)
    assert 1 / seen.information == pytest.approx(variance[0, 0] + variance[1, 1] - 2 * variance[0, 1])
    assert seen.share == pytest.approx((variance[1, 1] - variance[0, 1]) * seen.information)  # regression on the gain


def test_pairs_take_out_what_a_seed_does_to_both():
    noise = Noise(0.1, 40, correlation=0.999, pairs=400)
    seeds = [0.0, 0.3, -0.2, 0.15]
    seen = compare(runs([3 + s for s in seeds]), runs([2.9 + s for s in seeds[:2]], order=9), noise)
    assert seen.gain == pytest.approx(0.1, abs=0.01)


scores = st.lists(st.floats(1.0, 2.0), min_size=1, max_size=6)


@given(scores, scores, st.randoms())
def test_the_order_of_the_lists_does_not_matter(best, new, dice):
    incumbent, candidate, noise = runs(best), runs(new, order=20), Noise(0.1, 9)
    expected = looks(incumbent, candidate, noise)
    dice.shuffle(incumbent)
    dice.shuffle(candidate)
    assert looks(incumbent, candidate, noise) == expected
    assert [e.information for e in expected] == sorted({e.information for e in expected})
    assert len(expected) == len(new)


def test_equal_scores_without_noise_are_no_evidence_and_no_error():
    seen = compare(runs([2.0, 2.0]), runs([2.0], order=5), Noise(0.0, 4))
    assert seen.z() == 0 and seen.gain == 0
    assert compare(runs([2.0, 2.0]), runs([1.5], order=5), Noise(0.0, 4)).z() > 6


# --- the sequential test -------------------------------------------------------------------------------------------


def walk(effect: float, many: int, seed: int, path=PATH) -> np.ndarray:
    """Scores at the looks, (many, looks): Brownian with drift `effect`."""
    steps = np.diff([0.0, *path])
    return np.cumsum(np.random.default_rng(seed).normal(effect * steps, np.sqrt(steps), (many, len(path))), axis=1)


def played(scores: np.ndarray, at_level: float, path=PATH) -> tuple[np.ndarray, np.ndarray]:
    """(was it concluded, at which look it ended)"""
    shown, ended = np.zeros(len(scores), bool), np.full(len(scores), len(path) - 1)
    runs_on = np.ones(len(scores), bool)
    for k in range(len(path)):
        look = bounds(path[: k + 1], at_level, DESIGN)
        over, under = scores[:, k] >= look.upper, scores[:, k] < look.lower
        shown |= runs_on & over
        ended[runs_on & (over | under)] = k
        runs_on &= ~(over | under)
    return shown, ended


@pytest.mark.parametrize("at_level", [0.05, 0.005])
def test_what_is_no_better_is_concluded_no_more_often_than_the_level(at_level):
    many = 200_000
    shown, _ = played(walk(0.0, many, seed=3), at_level)
    error = 4 * math.sqrt(at_level / many)
    assert 0.6 * at_level < shown.mean() <= at_level + error
    worse, _ = played(walk(-0.5, many, seed=4), at_level)
    assert worse.mean() < shown.mean() / 3


def test_what_is_better_is_mostly_concluded_and_what_is_not_ends_early():
    shown, ended = played(walk(2.0, 20_000, seed=5), 0.01)
    assert shown.mean() > 0.85
    _, null_ended = played(walk(0.0, 20_000, seed=6), 0.01)
    assert null_ended.mean() < 2.2 and ended.mean() > null_ended.mean()


def test_survival_is_the_share_of_null_candidates_that_last():
    scores = walk(0.0, 200_000, seed=7)
    passed = scores[:, 0] >= bounds(PATH[:1], 0.05, DESIGN).lower
    _, ended = played(scores, 0.05)
    shown, _ = played(scores, 0.05)
    for k in (2, 4):
        lasted = passed & ((ended > k) | (shown & (ended <= k)))
        assert bounds(PATH[: k + 1], 0.05, DESIGN).survival == pytest.approx(lasted.sum() / passed.sum(), rel=0.03)


@given(st.floats(1e-5, 0.3), st.floats(1e-5, 0.3), st.integers(2, len(PATH)))
@settings(max_examples=30, deadline=None)
def test_a_smaller_level_asks_for_more(one, other, upto):
    low, high = sorted((one, other))
    strict, lax = (bounds(PATH[:upto], at, DESIGN) for at in (low, high))
    assert strict.upper >= lax.upper - 1e-3
    assert strict.lower == lax.lower <= lax.upper


def test_the_first_look_never_concludes_and_no_bound_is_weaker_than_nominal():
    assert bounds(PATH[:1], 0.2, DESIGN).upper == math.inf
    for k in range(2, len(PATH) + 1):
        assert bounds(PATH[:k], 0.3, DESIGN).upper >= 1.95 * math.sqrt(PATH[k - 1])


@pytest.mark.parametrize("path", [(), (0.0,), (1.0, 1.0), (2.0, 1.0)])
def test_informations_that_do_not_rise_are_refused(path):
    with pytest.raises(ValueError, match="rise"):
        bounds(path, 0.05, DESIGN)


@pytest.mark.parametrize("bad", [0.0, 1.0, math.nan])
def test_what_is_no_level_is_refused(bad):
    with pytest.raises(ValueError, match="not a level"):
        bounds(PATH, bad, DESIGN)


def test_the_luck_of_what_was_concluded_is_about_what_its_estimates_are_too_high():
    scores = walk(1.5, 60_000, seed=8)
    shown, ended = played(scores, 0.01)
    estimates = scores[shown, ended[shown]] / np.array(PATH)[ended[shown]]
    bias = estimates.mean() - 1.5
    assert bias > 0.1
    corrected = [luck(PATH[: k + 1], 0.01, DESIGN, float(e)) for k, e in zip(ended[shown][:500], estimates[:500])]
    assert 0.3 * bias < np.mean(corrected) < 1.1 * bias  # one step: rather too little than too much
    assert luck(PATH[:5], 0.01, DESIGN, 6.0) < 0.05  # what is large enough needed no luck


# --- many tests ----------------------------------------------------------------------------------------------------

passed = st.builds(Tested, passed=st.just(True), promising=st.booleans(), found=st.just(False), effect=st.just(1.0))
past = st.lists(passed, max_size=30)


@given(past)
def test_a_find_raises_the_level_and_a_charge_lowers_it(tested):
    now = level(tested, **SAFFRON)
    assert 0 < now <= SAFFRON["lambda_"]
    assert level([*tested, Tested(True, True, True, 2.0)], **SAFFRON) > now
    assert level([*tested, Tested(True, False, False)], **SAFFRON) < now
    assert level([*tested, Tested(False, False, False)], **SAFFRON) == now
    assert level([*tested, Tested(True, True, False)], **SAFFRON) == now


def test_all_that_a_night_without_finds_pays_is_within_the_wealth():
    tested, paid = [], 0.0
    for _ in range(2000):
        paid += level(tested, **SAFFRON)
        tested.append(Tested(True, False, False))
    assert paid <= SAFFRON["alpha"] * SAFFRON["wealth"]


def test_the_level_never_passes_lambda_however_much_is_found():
    assert level([Tested(True, True, True, 3.0)] * 50, **SAFFRON) == SAFFRON["lambda_"]


def test_what_is_looked_for_follows_what_was_kept():
    kept = [Tested(True, True, True, 3.0)]
    assert expected_effect(kept, 1.0, 2.0, 0.75) == 1.0
    assert expected_effect(kept * 2, 1.0, 2.0, 0.75) == 2.0
    assert expected_effect([Tested(True, True, True, 1.6)] * 3, 1.0, 2.0, 0.75) == pytest.approx(1.2)
    assert expected_effect(kept * 2, 5.0, 2.0, 0.75) == 5.0


# --- size ----------------------------------------------------------------------------------------------------------

PLAIN = b"def f(x):\n    return x + 1\n"


@pytest.mark.parametrize(
    "same",
    [
        b'"""What it is."""\n\n\ndef f(x):\n    """More."""\n    # why\n    return (x + 1)  # so\n',
        b"def better_name(longer_argument):\n    return (\n        longer_argument\n        + 100000\n    )\n",
    ],
)
def test_comments_docstrings_layout_and_names_are_no_tokens(same):
    assert syntax_tokens(same) == syntax_tokens(PLAIN)


def test_code_is_tokens_and_no_tree_is_an_error():
    assert syntax_tokens(PLAIN + b"y = f(2)\n") > syntax_tokens(PLAIN)
    assert syntax_tokens(b"x = 'a string'\n") == syntax_tokens(b"x = 1\n")
    assert syntax_tokens(b"") == 0
    with pytest.raises(SyntaxError):
        syntax_tokens(b"def f(:\n")
