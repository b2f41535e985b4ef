"""How much a score moves when nothing but the seed changes, and whether the machine itself has moved.

Everything here is estimated from runs that were made anyway: the baseline's first seeds, the further seeds of would-be
keeps, the re-runs of the incumbent. bpb: validation bits per byte, lower is better.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
    freedom. `repeat_sd` (bpb): of one recipe and seed again on this machine, with `repeat_df` degrees of freedom; None
    where nothing was repeated."""

    sd: float
    df: float
    correlation: float = 0.0
    pairs: int = 0
    repeat_sd: float | None = None
    repeat_df: int = 0

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
    pool = NoisePool()
    for name, group in enumerate(groups):
        pool.put(name, group)
    return pool.noise(repeats)


class NoisePool:
    """What `estimate_noise` sums up, kept so that one more run costs its own group only."""

    def __init__(self) -> None:
        self._centred: dict[int, dict[int, float]] = {}  # group -> seed -> score less the group's mean
        self._seeds: defaultdict[int, _Sums] = defaultdict(_Sums)
        self._squares, self._df = 0.0, 0

    def put(self, name: int, group: Sequence[Run]) -> None:
        """The runs that the group of this name has now, in place of those that it had."""
        self._add(self._centred.pop(name, {}), -1)
        centred = _centred(group)
        if len(centred) > 1:
            self._centred[name] = centred
            self._add(centred, 1)

    def _add(self, centred: Mapping[int, float], sign: int) -> None:
        for seed, value in centred.items():
            sums = self._seeds[seed]
            sums.many += sign
            sums.values += sign * value
            sums.squares += sign * value * value
            self._squares += sign * value * value
        self._df += sign * max(0, len(centred) - 1)

    def noise(self, repeats: Sequence[Sequence[float]] = ()) -> Noise:
        correlation, pairs = self._correlation()
        again = [np.asarray(r, dtype=float) for r in repeats if len(r) > 1]
        repeat_df = sum(len(r) - 1 for r in again)
        repeat_sd = math.sqrt(sum(float(np.var(r)) * len(r) for r in again) / repeat_df) if repeat_df else None
        sd = math.sqrt(max(0.0, self._squares) / self._df) if self._df else 0.0
        return Noise(sd, float(self._df), correlation, pairs, repeat_sd, repeat_df)

    def _correlation(self) -> tuple[float, int]:
        """(correlation of two recipes at the same seed, degrees of freedom): the products of all pairs of recipes at
        one seed over their squares, as in an intraclass correlation (Fisher 1925). Degrees of freedom as in a two-way
        table: (recipes - 1)(seeds - 1) where it is complete, fewer where cells are missing."""
        shared = {seed: sums for seed, sums in self._seeds.items() if sums.many > 1}
        products = math.fsum(sums.values**2 - sums.squares for sums in shared.values())
        squares = math.fsum((sums.many - 1) * sums.squares for sums in shared.values())
        recipes = sum(not shared.keys().isdisjoint(centred) for centred in self._centred.values())
        pairs = sum(sums.many - 1 for sums in shared.values()) - max(0, recipes - 1)
        if pairs < 1 or squares <= 0:
            return 0.0, 0
        return products / squares, pairs


@dataclass
class _Sums:
    """Of all groups' centred scores at one seed."""

    many: int = 0
    values: float = 0.0
    squares: float = 0.0


def _centred(group: Sequence[Run]) -> dict[int, float]:
    """Seed -> score less the group's mean."""
    scores = defaultdict(list)
    for run in group:
        scores[run.seed].append(run.bpb)
    means = {seed: math.fsum(found) / len(found) for seed, found in scores.items()}
    centre = math.fsum(means.values()) / max(1, len(means))
    return {seed: value - centre for seed, value in means.items()}


def by_seed(runs: Sequence[Run]) -> list[Run]:
    """One run for each seed: a seed that was run again is no second draw. It has the mean, and its last run's place."""
    seeds = defaultdict(list)
    for run in runs:
        seeds[run.seed].append(run)
    if len(seeds) == len(runs):
        return list(runs)
    means = {seed: math.fsum(r.bpb for r in found) / len(found) for seed, found in seeds.items()}
    return [replace(max(found, key=lambda r: r.order), bpb=means[seed]) for seed, found in seeds.items()]


@dataclass(frozen=True)
class Drift:
    """The incumbent's last `runs` runs lie `moved` bpb above those before (below, if negative); `p`: how likely noise
    alone makes that. `reason` for people."""

    moved: float
    runs: int
    p: float
    reason: str


def drift(incumbent: Sequence[Run], noise: Noise, level: float = 0.002) -> Drift | None:
    """Has the machine moved? The change-point test of the last 1 to 3 runs of one recipe against those before them, two
    sided, by Student's t with the pooled sd, Bonferroni over the change points. None: not more than noise allows.

    A seed may be among the last runs and among those before, which makes the test only more careful, as both sides
    share its luck; it may not be twice among the last.

    After a yes only the last runs are the control of later candidates. A step of three sds is seen by its third re-run
    in two of three cases, one of four sds by its second in four of five; less than one sd cannot be seen.
    """
    runs = sorted(incumbent, key=lambda r: r.order)
    points = range(1, min(CHANGE_POINTS, len(runs) - 1) + 1)
    if not points or noise.df < 1:
        return None
    found = [_change(by_seed(runs[:-k]), runs[-k:], noise, len(points)) for k in points]
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
