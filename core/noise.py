"""How much a score moves when nothing but the seed changes, and whether the machine itself has moved.

Everything here is estimated from runs that were made anyway: the baseline's first seeds, the further seeds of would-be
keeps, the re-runs of the incumbent. bpb: validation bits per byte, lower is better.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtr

RESOLUTION = 1e-6  # bpb: scores are told to six decimals, and no noise is taken for smaller than that
MIN_PAIRS = 8  # degrees of freedom from which a correlation of paired seeds is believed at all
CHANGE_POINTS = 3  # the incumbent's last 1, 2, 3 runs are compared with those before


@dataclass(frozen=True)
class Run:
    """One untainted score of a recipe. `order`: its place in time among all runs of the lab."""

    seed: int
    bpb: float
    order: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bpb) and self.bpb > 0):
            raise ValueError(f"{self.bpb} is not a score: bits per byte are positive and finite")


@dataclass(frozen=True)
class Noise:
    """What is known of a lab's noise. `sd` (bpb): between seeds of one recipe, pooled over recipes, with `df` degrees
    of freedom (0: nothing is known). `correlation`: of two recipes' scores at the same seed, from `pairs` degrees of
    freedom. `repeat_sd` (bpb): of one recipe and seed again on this machine; None where nothing was repeated."""

    sd: float
    df: float
    correlation: float = 0.0
    pairs: int = 0
    repeat_sd: float | None = None

    def trusted_correlation(self) -> float:
        """The correlation that a verdict counts on: the lower end of its one-sided 95 % interval by Fisher's z, and 0
        where that is below 0 or too few pairs are known. So pairing is used only where it has been seen to pay."""
        if self.pairs < MIN_PAIRS:
            return 0.0
        z = math.atanh(min(max(self.correlation, -0.999), 0.999))
        return max(0.0, math.tanh(z - float(ndtri(0.95)) / math.sqrt(self.pairs - 2)))


def estimate_noise(groups: Sequence[Sequence[Run]], repeats: Sequence[Sequence[float]] = ()) -> Noise:
    """From the runs of several recipes (one group each, of one drift epoch each) and repeats of one recipe and seed.

    The sd is the usual pooled one: within groups, so recipes of different quality do not widen it. A seed that a group
    holds twice counts once, with its mean.
    """
    centred = [c for c in (_centred(group) for group in groups) if len(c) > 1]
    squares, df = sum(r * r for c in centred for r in c.values()), sum(len(c) - 1 for c in centred)
    correlation, pairs = _correlation(centred)
    again = [np.asarray(r, dtype=float) for r in repeats if len(r) > 1]
    repeat_df = sum(len(r) - 1 for r in again)
    repeat_sd = math.sqrt(sum(float(np.var(r)) * len(r) for r in again) / repeat_df) if repeat_df else None
    return Noise(math.sqrt(squares / df) if df else 0.0, float(df), correlation, pairs, repeat_sd)


def _centred(group: Sequence[Run]) -> dict[int, float]:
    """Seed -> score less the group's mean."""
    scores = defaultdict(list)
    for run in group:
        scores[run.seed].append(run.bpb)
    means = {seed: math.fsum(found) / len(found) for seed, found in scores.items()}
    centre = math.fsum(means.values()) / max(1, len(means))
    return {seed: value - centre for seed, value in means.items()}


def _correlation(centred: Sequence[dict[int, float]]) -> tuple[float, int]:
    """(correlation of two recipes at the same seed, degrees of freedom): the products of all pairs of recipes at one
    seed over their squares, as in an intraclass correlation (Fisher 1925). Degrees of freedom as in a two-way table:
    (recipes - 1)(seeds - 1) where it is complete, fewer where cells are missing."""
    by_seed = defaultdict(list)
    for recipe, scores in enumerate(centred):
        for seed, value in scores.items():
            by_seed[seed].append((recipe, value))
    shared = [found for found in by_seed.values() if len(found) > 1]
    products = squares = 0.0
    for found in shared:
        own = math.fsum(value * value for _, value in found)
        products += math.fsum(value for _, value in found) ** 2 - own
        squares += (len(found) - 1) * own
    recipes = {recipe for found in shared for recipe, _ in found}
    pairs = sum(len(found) - 1 for found in shared) - max(0, len(recipes) - 1)
    if pairs < 1 or not squares:
        return 0.0, 0
    return products / squares, pairs


@dataclass(frozen=True)
class Drift:
    """The incumbent's last `runs` runs lie `moved` bpb above those before (below, if negative); `p`: how likely noise
    alone makes that. `reason` for people."""

    moved: float
    runs: int
    p: float
    reason: str


def drift(incumbent: Sequence[Run], noise: Noise, level: float = 0.01) -> Drift | None:
    """Has the machine moved? The change-point test of the last 1 to 3 runs of one recipe against those before them, two
    sided, by Student's t with the pooled sd, Bonferroni over the change points. None: not more than noise allows.

    What it is for: after a yes only the last runs are the control of later candidates. It sees a step of three noise
    sds at the first re-run and one of two sds at the second; less than one sd it cannot see.
    """
    runs = sorted(incumbent, key=lambda r: r.order)
    points = range(1, min(CHANGE_POINTS, len(runs) - 1) + 1)
    if not points or noise.df < 1:
        return None
    found = [_change(runs[:-k], runs[-k:], noise, len(points)) for k in points]
    best = min(found, key=lambda d: d.p)
    return best if best.p <= level else None


def _change(before: Sequence[Run], after: Sequence[Run], noise: Noise, tests: int) -> Drift:
    old, new = (math.fsum(r.bpb for r in part) / len(part) for part in (before, after))
    error = max(noise.sd, RESOLUTION) * math.sqrt(1 / len(before) + 1 / len(after))
    p = min(1.0, tests * 2 * float(stdtr(noise.df, -abs(new - old) / error)))
    way = "worse" if new > old else "better"
    reason = (
        f"the best came out {abs(new - old):.6f} {way} than before ({new:.6f} over its last {len(after)}, {old:.6f} "
        f"over the {len(before)} before), more than noise of {noise.sd:.6f} allows (p = {p:.2g})"
    )
    return Drift(new - old, len(after), p, reason)
