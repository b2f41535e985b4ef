"""The arithmetic of a score against independent computations, and the audit's plan and rules as pure functions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from core import evaluate

seeds = st.integers(0, 2**32 - 1)


# --- the score -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 9), st.integers(2, 40), st.sampled_from([0.0, 1.0, 30.0, 3e4]))
def test_nats_are_a_log_softmax(seed: int, rows: int, length: int, vocab: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((rows, length, vocab)) * scale).astype(np.float32)
    targets = rng.integers(0, vocab, (rows, length))
    found = evaluate.nats(logits, targets)
    x = logits.astype(np.float64)
    wanted = logsumexp(x, -1) - np.take_along_axis(x, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    assert (found >= 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = np.zeros((2, 3, 5), np.float32)
    logits[1, 2, 3] = bad
    with pytest.raises(ValueError, match="1 of 30 logits"):
        evaluate.nats(logits, np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="shape"):
        evaluate.nats(np.zeros((2, 3, 5), np.float32), np.zeros((2, 4), int))


@settings(deadline=None)
@given(seeds, st.integers(1, 8), st.integers(1, 8))
def test_totals_leave_targets_without_bytes_out(seed: int, rows: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    token_bytes = np.array([0, 1, 3, 0, 7], np.int32)
    targets = rng.integers(0, 5, (rows, length))
    nats = rng.random((rows, length), np.float32) * 10
    total, size = evaluate.totals(nats, targets, token_bytes)
    wanted_nats, wanted_bytes = Fraction(0), 0
    for n, t in zip(nats.flat, targets.flat, strict=True):
        if token_bytes[t]:
            wanted_nats += Fraction(float(n))
            wanted_bytes += int(token_bytes[t])
    assert size == wanted_bytes
    assert total == pytest.approx(float(wanted_nats), rel=1e-12)


def test_bits_per_byte_of_a_uniform_guess() -> None:
    # A guess among 256 single bytes costs 8 bits for each of them.
    assert evaluate.bpb(1000 * math.log(256), 1000) == pytest.approx(8.0)


def test_nats_that_no_distribution_gives_are_refused() -> None:
    evaluate.check_scored(np.array([0.0, 3.0], np.float32))
    with pytest.raises(ValueError, match="do not sum to 1"):
        evaluate.check_scored(np.array([-0.5, 3.0], np.float32))
    with pytest.raises(ValueError, match="1 of 2 nats"):
        evaluate.check_scored(np.array([np.nan, 3.0], np.float32))


@settings(deadline=None)
@given(seeds, st.integers(1, 60), st.integers(1, 20))
def test_batches_hold_every_row_once_in_one_shape(seed: int, count: int, size: int) -> None:
    found = evaluate.batches(count, size, np.random.default_rng(seed))
    assert {len(b) for b in found} == {size}
    real = np.concatenate(found)
    assert sorted(real[real >= 0]) == list(range(count))
    assert (real < 0).sum() < size
    rows = np.arange(count * 5).reshape(count, 5) + 100
    tokens = evaluate.take(rows, found[-1], 7, np.random.default_rng(seed))
    for index, row in zip(found[-1], tokens, strict=True):
        assert (row < 7).all() if index < 0 else (row == rows[index]).all()


# --- the audit's plan ----------------------------------------------------------------------------------


def plan_of(seed: int, count: int, length: int, size: int, points: int) -> tuple[np.ndarray, list[evaluate.AuditBatch]]:
    rng = np.random.default_rng(seed)
    counted = rng.random((count, length)) > 0.1
    counted[0, 0] = True
    chance = evaluate.chances(counted, rng.random((count, length)) * 9, rng.random((count, length)) * 9)
    return counted, evaluate.plan_audit(counted, chance, min(size, count), points, rng)


@settings(deadline=None)
@given(seeds, st.integers(2, 40), st.integers(2, 70), st.integers(1, 16), st.integers(1, 200))
def test_the_plan_gives_no_answer_away(seed: int, count: int, length: int, size: int, points: int) -> None:
    counted, plan = plan_of(seed, count, length, size, points)
    asked: dict[int, int] = {}
    pairs, uniform = [], 0
    for batch in plan:
        real = batch.rows >= 0
        assert len(batch.rows) == len(batch.positions) == min(size, count)
        assert len(set(batch.rows[real])) == real.sum(), "a row twice in one batch shows one answer to the other"
        for row, position in zip(batch.rows[real], batch.positions[real], strict=True):
            assert counted[row, position]
            assert position >= asked.get(row, 0), "an earlier position is asked after a later one was shown"
            asked[row] = position
        if batch.pair:
            pairs.append(set(zip(batch.rows[real], batch.positions[real], strict=True)))
        else:
            uniform += real.sum()
    assert len(pairs) == 2 and pairs[0] == pairs[1]
    if counted.any(1).sum() > 1:
        assert uniform >= points
        assert not {r for r, _ in pairs[0]} & {r for b in plan if not b.pair for r in b.rows if r >= 0}


def test_means_over_the_drawn_positions_are_means_over_all_targets() -> None:
    rng = np.random.default_rng(0)
    counted = rng.random((400, 16)) > 0.1
    scored, unigram = rng.random((2, 400, 16), np.float32) * 9
    chance = evaluate.chances(counted, scored, unigram)
    np.testing.assert_allclose(chance.sum(1), 1.0)
    assert (chance[~counted] == 0).all()
    value = scored + 10 * (np.arange(16) > 11)  # depends on the position and on what steers the chances
    estimates = []
    for seed in range(200):
        plan = evaluate.plan_audit(counted, chance, 8, 400, np.random.default_rng(seed))
        for b in plan:
            assert (b.weights <= 2 + 1e-9).all(), "no position counts more than twice"
        parts = [(value[b.rows, b.positions] * b.weights)[b.rows >= 0] for b in plan if not b.pair]
        estimates.append(np.concatenate(parts).mean())
    # Every row counts the same, as the rows are drawn without regard to how many of their targets count.
    wanted = np.mean([value[r][counted[r]].mean() for r in range(400)])
    assert abs(np.mean(estimates) - wanted) < 5 * np.std(estimates) / math.sqrt(200)


def test_a_rare_lie_about_the_worst_targets_is_mostly_found() -> None:
    found = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        honest = rng.gamma(0.7, 4.0, (512, 64))
        unigram = np.maximum(honest + rng.normal(1.0, 2.0, honest.shape), 0.5)
        lied = np.where(honest > np.quantile(honest, 0.998), 0.0, honest)
        counted = np.ones(honest.shape, bool)
        plan = evaluate.plan_audit(counted, evaluate.chances(counted, lied, unigram), 16, 1024, rng)
        asked = np.concatenate([np.stack([b.rows, b.positions], 1)[b.rows >= 0] for b in plan])
        found += bool((lied != honest)[asked[:, 0], asked[:, 1]].any())
    assert found >= 38


@settings(deadline=None)
@given(seeds, st.integers(2, 12), st.integers(2, 40), st.integers(2, 9))
def test_inputs_are_true_up_to_the_position_and_never_true_behind_it(
    seed: int, count: int, length: int, vocab: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, vocab, (count, length + 1))
    _, plan = plan_of(seed, count, length, 4, 20)
    for batch in plan:
        inputs = evaluate.audit_inputs(batch, rows, vocab, rng)
        assert inputs.dtype == np.int32 and inputs.min() >= 0 and inputs.max() < vocab
        for row, position, tokens in zip(batch.rows, batch.positions, inputs, strict=True):
            if row >= 0:
                np.testing.assert_array_equal(tokens[: position + 1], rows[row, : position + 1])
                assert (tokens[position + 1 :] != rows[row, position + 1 : length]).all()


# --- the audit's rules ---------------------------------------------------------------------------------


def findings(d: np.ndarray, pair_gap: np.ndarray | float = 0.0, pairs: int = 16) -> evaluate.Findings:
    """Uniform answers that differ by `d`, and pairs whose second answer is higher by `pair_gap`."""
    scored = np.full(2 * pairs + len(d), 3.0)
    extra = np.concatenate([np.zeros(pairs), np.broadcast_to(pair_gap, pairs), d])
    rows = np.concatenate([np.arange(pairs), np.arange(pairs), pairs + np.arange(len(d))])
    return evaluate.Findings(
        rows=rows,
        positions=np.full(len(rows), 7),
        weights=np.ones(len(rows)),
        pair=np.arange(len(rows)) < 2 * pairs,
        audited=scored + extra,
        scored=scored,
        spread=np.full(len(rows), 20.0),
    )


def test_equal_nats_pass() -> None:
    verdict = evaluate.judge(findings(np.zeros(1024)))
    assert verdict.problem == "" and verdict.facts["points"] == 1056


@pytest.mark.parametrize("seed", range(50))
def test_symmetric_rounding_passes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noise = np.clip(rng.normal(0, 0.008, 1024), -0.05, 0.05)
    verdict = evaluate.judge(findings(noise, rng.normal(0, 0.011, 16)))
    assert verdict.problem == ""


@pytest.mark.parametrize(
    ("d", "words"),
    [
        (np.where(np.arange(1024) == 500, 0.2, 0.0), "1 of 1056 positions"),
        (np.where(np.arange(1024) == 500, -0.2, 0.0), "1 of 1056 positions"),
        (np.full(1024, 2.5), "1024 of 1056"),
        (np.full(1024, 0.05), "better than its logits"),
        (np.full(1024, 0.0015), "better than its logits"),
        (np.full(1024, -0.0015), "on average"),
        (np.tile([0.05, -0.05], 512), "on average"),
    ],
)
def test_lies_are_named(d: np.ndarray, words: str) -> None:
    assert words in evaluate.judge(findings(d)).problem


def test_own_noise_does_not_buy_a_margin() -> None:
    rng = np.random.default_rng(0)
    noisy = rng.choice([-0.09, 0.095], 1024)
    assert evaluate.judge(findings(noisy, 0.09)).problem


def test_a_pair_that_differs_uses_the_future() -> None:
    verdict = evaluate.judge(findings(np.zeros(64), np.where(np.arange(16) == 3, 0.4, 0.0)))
    assert verdict.future and verdict.problem.startswith("at row 3, position 7")


def test_flat_logits_leave_less_room() -> None:
    flat = findings(np.where(np.arange(1024) == 0, 0.05, 0.0))
    flat.spread[:] = 0.1
    assert evaluate.judge(flat).problem
    flat.spread[:] = 20.0
    assert not evaluate.judge(flat).problem


def test_find_puts_answers_and_scores_together() -> None:
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 11, (20, 9))
    scored = rng.random((20, 8))
    counted = np.ones((20, 8), bool)
    plan = evaluate.plan_audit(counted, counted / 8, 4, 30, rng)
    logits = [rng.standard_normal((4, 11)).astype(np.float32) for _ in plan]
    found = evaluate.find(plan, logits, rows, scored)
    at = 0
    for batch, answer in zip(plan, logits, strict=True):
        for i in np.flatnonzero(batch.rows >= 0):
            row, position = batch.rows[i], batch.positions[i]
            assert (found.rows[at], found.positions[at], found.pair[at]) == (row, position, batch.pair)
            assert found.scored[at] == scored[row, position]
            assert found.audited[at] == pytest.approx(evaluate.nats(answer[i], rows[row, position + 1]))
            at += 1
    assert at == len(found.rows)


@settings(deadline=None)
@given(seeds)
def test_an_untrained_build_may_be_no_better_than_frequencies(seed: int) -> None:
    rng = np.random.default_rng(seed)
    unigram = rng.gamma(4.0, 1.5, 128)
    ones = np.ones(128)
    uniform = np.full(128, math.log(512))
    assert evaluate.untrained_problem(uniform, unigram, ones) == "" or unigram.mean() > math.log(512)
    assert "already predicts" in evaluate.untrained_problem(unigram - rng.gamma(2.0, 1.0, 128), unigram, ones)
