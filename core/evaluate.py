"""The arithmetic of a score, and of doubting it: the reference that every backend is held to. Numpy only.

Shapes: N rows of text, B rows in one batch, T targets in a row, V vocabulary entries. A row has T + 1 tokens: inputs
`[:, :-1]`, targets `[:, 1:]`; target t of a row is what stands after input t. nats: natural-log loss of one target.

How a score is audited
----------------------
What was scored is s = nats per target, as the scorer's process reported them. The auditor's process, which has never
seen a whole row, gets rows that are true up to a position p and random after it, and gives its logits at p. The
referee computes a = nats of the true next token itself and looks at d = a - s: a score that was bought with the
future, with memory of earlier calls or with wrong arithmetic is too low, so d is too high. Within the auditor the
positions asked in one row only grow, and no batch holds a row twice, so that nothing shown there gives a later
answer away either. Rules (`judge`):

1. Anywhere |d| <= 2^-6 of the spread of the logits there, but not below 0.004 or three times the measured noise, and
   0.1 at most. Low-precision arithmetic rounds logits by about 2^-8 of their size, and a matmul may sum in another
   order when a row stands elsewhere in its batch. A recipe that looks ahead is off by whole nats at most positions.
2. On average over all targets, estimated from the positions that were drawn, mean(d) <= 0.001 + 3 standard errors,
   where the standard deviation counts for 0.02 at most. Rounding is symmetric and averages out; a lie is one-sided.
   The cap keeps a recipe from widening its own margin by adding noise: that is worth 0.003 nats per token at most.
3. mean|d| <= max(0.001, three times the mean difference of the pairs), that mean counting for 0.005 at most. Pairs
   are the same position asked twice with other random tokens after it; an honest recipe differs in them by its
   rounding only.
4. In a pair, both answers agree within the tolerance of 1: else later tokens change an earlier prediction.

A rare lie is worth most where an honest model loses most, and shows as a target that was scored far better than its
frequency lets expect. So half of the positions are drawn by that (`chances`), the other half uniformly; in means each
position counts by one over its chance, which keeps them unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

ANYWHERE = 0.1  # nats by which one position may differ at most
ROUNDING = 2.0**-6  # of the spread of the logits at a position
LEAST = 0.004  # nats: float32 arithmetic and the scorer's float32 nats
AVERAGE = 1e-3  # nats, mean
NOISE_COUNTS = 0.02  # nats: standard deviation of d that is believed to be rounding
PAIR_NOISE_COUNTS = 0.005  # nats: mean difference of pairs that is believed to be rounding
EDGES = (0, 1, 2, 3, 7, 15, 31, 63, 127, 255, 511, 1023)  # positions where blocks of kernels begin or end
UNTRAINED_POINTS = 512  # their mean is known to about 0.1 nats


def nats(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(..., V) logits, (...) targets -> (...) float64 nats. `ValueError` on other shapes and non-finite values."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits of shape {logits.shape} for targets of shape {targets.shape}")
    if not np.isfinite(logits).all():
        bad = int(np.count_nonzero(~np.isfinite(logits)))
        raise ValueError(f"{bad} of {logits.size} logits are not finite")
    x = logits.astype(np.float64)
    top = x.max(-1)
    log_sum = top + np.log(np.exp(x - top[..., None]).sum(-1))
    return log_sum - np.take_along_axis(x, targets[..., None].astype(np.int64), -1)[..., 0]


def totals(nats_: np.ndarray, targets: np.ndarray, token_bytes: np.ndarray) -> tuple[float, int]:
    """Sum of nats and of UTF-8 bytes over the targets that have bytes."""
    sizes = token_bytes[targets]
    return float(nats_[sizes > 0].sum(dtype=np.float64)), int(sizes.sum(dtype=np.int64))


def bpb(total_nats: float, total_bytes: int) -> float:
    """Bits per byte."""
    return total_nats / (math.log(2) * total_bytes)


def check_scored(scored: np.ndarray) -> None:
    """`ValueError` unless nats per target are what a distribution can give: finite, and not below 0."""
    if not np.isfinite(scored).all():
        raise ValueError(f"{int(np.count_nonzero(~np.isfinite(scored)))} of {scored.size} nats are not finite")
    if (scored < -1e-4).any():
        raise ValueError(f"nats of {float(scored.min()):.4g}: the probabilities do not sum to 1")


def batches(count: int, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Every row 0..count-1 once, in random order, in batches of exactly `size`; -1 fills the last one up."""
    order = rng.permutation(count)
    padded = np.full(-(-count // size) * size, -1, np.int64)
    padded[:count] = order
    return list(padded.reshape(-1, size))


def take(rows: np.ndarray, index: np.ndarray, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """(N, T+1) rows at `index` (B,), int32; random tokens where the index is -1."""
    picked = rows[np.maximum(index, 0)].astype(np.int32)
    filler = index < 0
    picked[filler] = rng.integers(0, vocab_size, (int(filler.sum()), rows.shape[1]), dtype=np.int32)
    return picked


# --- the audit ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AuditBatch:
    """One batch for the auditor. Rows of index -1 are filling."""

    rows: np.ndarray  # (B,) indices into the scored rows; none twice
    positions: np.ndarray  # (B,)
    weights: np.ndarray  # (B,) of each position in a mean over all targets
    pair: bool  # edge positions, asked in two successive batches; else drawn by chance


@dataclass
class Findings:
    """What was measured at the audited positions. All arrays have one entry for each of K answers, in order."""

    rows: np.ndarray
    positions: np.ndarray
    weights: np.ndarray  # in a mean over all targets
    pair: np.ndarray  # bool
    audited: np.ndarray  # nats from the auditor's logits
    scored: np.ndarray  # nats that were scored
    spread: np.ndarray  # max - min of the logits


@dataclass(frozen=True)
class AuditVerdict:
    problem: str  # empty: nothing was found
    future: bool = False  # pairs differ: what stands behind a position changes the answer there
    suspects: list[int] = field(default_factory=list)  # answers (indices into Findings), the most suspect first
    facts: dict[str, float] = field(default_factory=dict)


def chances(counted: np.ndarray, scored: np.ndarray, unigram: np.ndarray) -> np.ndarray:
    """(N, T) chance of each target within its row; 0 where it does not count.

    Half of it is equal for all, half is by how many nats a target was scored better than its frequency gives.
    """
    equal = counted / np.maximum(1, counted.sum(1, keepdims=True))
    gain = np.where(counted, np.maximum(0.0, unigram.astype(np.float64) - scored), 0.0)
    total = gain.sum(1, keepdims=True)
    return np.where(total > 0, 0.5 * equal + 0.5 * gain / np.where(total > 0, total, 1.0), equal)


def plan_audit(
    counted: np.ndarray, chance: np.ndarray, size: int, points: int, rng: np.random.Generator
) -> list[AuditBatch]:
    """Which positions of which rows are audited, in which batches of `size` rows.

    `counted`: (N, T) bool, the targets that have bytes; `chance`: (N, T) of each target within its row. Two batches of
    edge positions come first, the same positions in both; then `points` positions of the other rows by chance.
    """
    usable = rng.permutation(np.flatnonzero(counted.any(1)))
    pairs = usable[: min(size, max(1, len(usable) // 4))]
    others = usable[len(pairs) :]
    edge = np.array([_edge_position(counted[row], rng) for row in pairs], np.int64)
    same = np.ones(len(pairs))
    plan = [_batch(rng.permutation(len(pairs)), pairs, edge, same, size, True) for _ in range(2)]
    if len(others):
        plan += _by_chance(chance, others, size, points, rng)
    return plan


def _edge_position(counted: np.ndarray, rng: np.random.Generator) -> int:
    """A counted target near the start or the end of a row or of a block of a kernel; else any counted one."""
    length = len(counted)
    near = {p for e in EDGES for p in (e, e + 1, length - 1 - e)}
    edges = [p for p in near if 0 <= p < length and counted[p]]
    return int(rng.choice(sorted(edges) if edges else np.flatnonzero(counted)))


def _by_chance(
    chance: np.ndarray, rows: np.ndarray, size: int, points: int, rng: np.random.Generator
) -> list[AuditBatch]:
    """`points` positions in rounds over the rows, the positions that are asked in one row never falling."""
    chosen = rows[: min(len(rows), points)]
    visits = np.full(len(chosen), points // len(chosen))
    visits[: points % len(chosen)] += 1
    length = chance.shape[1]
    drawn = [np.sort(rng.choice(length, n, p=chance[r])) for r, n in zip(chosen, visits, strict=True)]
    plan = []
    for visit in range(int(visits.max())):
        order = rng.permutation(np.flatnonzero(visits > visit))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            positions = np.array([drawn[i][visit] for i in part])
            found = chance[chosen[part]]
            weights = 1.0 / ((found > 0).sum(1) * found[np.arange(len(part)), positions])
            plan.append(_batch(np.arange(len(part)), chosen[part], positions, weights, size, False))
    return plan


def _batch(
    order: np.ndarray, rows: np.ndarray, positions: np.ndarray, weights: np.ndarray, size: int, pair: bool
) -> AuditBatch:
    """These rows in this order, filled up to `size`."""
    filled = np.full(size, -1, np.int64), np.zeros(size, np.int64), np.zeros(size)
    for target, source in zip(filled, (rows, positions, weights), strict=True):
        target[: len(order)] = source[order]
    return AuditBatch(*filled, pair)


def audit_inputs(batch: AuditBatch, rows: np.ndarray, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """(B, T) int32 inputs: true tokens up to each position, random ones after it, never the true next one there."""
    inputs = take(rows, batch.rows, vocab_size, rng)[:, :-1]
    length = inputs.shape[1]
    noise = rng.integers(0, vocab_size, inputs.shape, dtype=np.int32)
    # The true next token must not turn up by chance in the place where a recipe that looks ahead would find it.
    noise = np.where(noise == inputs, (noise + 1) % vocab_size, noise)
    after = np.arange(length) > batch.positions[:, None]
    return np.where(after & (batch.rows >= 0)[:, None], noise, inputs)


def find(plan: Sequence[AuditBatch], logits: Sequence[np.ndarray], rows: np.ndarray, scored: np.ndarray) -> Findings:
    """Nats of the true next tokens from the auditor's logits, one (B, V) array for each batch of the plan.

    `rows`: (N, T+1); `scored`: (N, T). `ValueError` on logits that are not finite.
    """
    parts = []
    for batch, answer in zip(plan, logits, strict=True):
        real = batch.rows >= 0
        row, position = batch.rows[real], batch.positions[real]
        x = answer[real]
        audited = nats(x, rows[row, position + 1])
        spread = x.max(-1).astype(np.float64) - x.min(-1)
        pair = np.full(len(row), batch.pair)
        parts.append((row, position, batch.weights[real], pair, audited, scored[row, position], spread))
    return Findings(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def judge(findings: Findings) -> AuditVerdict:
    """Apply the rules of the module's text to what was measured."""
    d = findings.audited - findings.scored
    first, second = _pairs(findings)
    gap = np.abs(findings.audited[first] - findings.audited[second])
    pair_noise = float(gap.mean()) if len(gap) else 0.0
    tolerance = np.clip(ROUNDING * findings.spread, max(LEAST, min(3 * pair_noise, ANYWHERE)), ANYWHERE)
    weighted = (d * findings.weights)[~findings.pair]
    sigma = float(weighted.std()) if len(weighted) else 0.0
    facts = {
        "points": len(d),
        "largest": float(np.abs(d).max(initial=0.0)),
        "mean": float(weighted.mean()) if len(weighted) else 0.0,
        "mean_absolute": float(np.abs(weighted).mean()) if len(weighted) else 0.0,
        "pairs": len(gap),
        "pair_noise": pair_noise,
    }
    order = [int(i) for i in np.argsort(-np.abs(d))]
    bad = np.flatnonzero(gap > np.maximum(tolerance[first], tolerance[second]))
    if len(bad):
        i = bad[np.argmax(gap[bad])]
        return AuditVerdict(_pair_problem(findings, int(first[i]), gap, len(bad)), True, [int(first[i]), *order], facts)
    worst = [i for i in order if abs(d[i]) > tolerance[i]]
    problem = _point_problem(findings, worst, tolerance) or _mean_problem(facts, sigma, max(1, len(weighted)))
    return AuditVerdict(problem, False, order, facts)


def _pairs(findings: Findings) -> tuple[np.ndarray, np.ndarray]:
    """Answers to the same (row, position), as two equally long index arrays."""
    index = np.flatnonzero(findings.pair)
    order = index[np.lexsort((findings.positions[index], findings.rows[index]))]
    return order[0::2], order[1::2]


def _pair_problem(f: Findings, at: int, gap: np.ndarray, bad: int) -> str:
    return (
        f"at row {f.rows[at]}, position {f.positions[at]} the loss of the next token changes by {gap.max():.3g} nats "
        f"when only later tokens are others ({bad} of {len(gap)} pairs differ)"
    )


def _point_problem(f: Findings, worst: list[int], tolerance: np.ndarray) -> str:
    if not worst:
        return ""
    i = worst[0]
    return (
        f"at row {f.rows[i]}, position {f.positions[i]} it was scored {f.scored[i]:.4f} nats, but logits from the "
        f"tokens up to there give {f.audited[i]:.4f} ({tolerance[i]:.2g} is allowed; {len(worst)} of {len(f.rows)} "
        f"positions differ)"
    )


def _mean_problem(facts: dict[str, float], sigma: float, count: int) -> str:
    allowed = AVERAGE + 3 * min(sigma, NOISE_COUNTS) / math.sqrt(count)
    if facts["mean"] > allowed:
        return f"scored {facts['mean']:.4f} nats per token better than its logits give ({allowed:.4f} is allowed)"
    allowed = max(AVERAGE, 3 * min(facts["pair_noise"], PAIR_NOISE_COUNTS))
    if facts["mean_absolute"] > allowed:
        return (
            f"scored and audited nats differ by {facts['mean_absolute']:.4f} on average ({allowed:.4f} is allowed): "
            "logits must be a pure function of the tokens and the weights"
        )
    return ""


def untrained_problem(untrained: np.ndarray, unigram: np.ndarray, weights: np.ndarray) -> str:
    """Empty, or why an untrained build is not one: (K,) nats of an untrained build and of the training text's unigram
    frequencies at the same targets, and what each counts in a mean. Better by more than three standard errors of the
    difference is knowledge that was there before the training."""
    d = (untrained - unigram) * weights
    margin = 3 * float(d.std()) / math.sqrt(len(d)) if len(d) > 1 else math.inf
    if float(d.mean()) >= -margin:
        return ""
    own, expected = float((untrained * weights).mean()), float((unigram * weights).mean())
    return (
        f"an untrained build already predicts the text: {own:.3f} nats per token at {len(d)} positions, "
        f"where token frequencies alone give {expected:.3f}"
    )
