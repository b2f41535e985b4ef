"""What a change gave when it was measured again: differences of means with intervals, from runs that decided nothing.

An experiment was kept because its runs came out low, so those runs flatter it (the winner's curse). An effect is
therefore estimated from fresh runs only: confirmations, and re-runs of an incumbent. Its interval is Student's, with
the standard deviation between seeds pooled over all recipes that have fresh runs: the error mean square of a one-way
analysis of variance, whose degrees of freedom are the runs less the recipes. All in bits per byte, lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from core.ledger import Ablation, Sample

CONFIDENCE = 0.95
FRESH = ("control", "confirm")  # purposes of runs that no selection has touched

Replication = Literal["replicated", "not replicated", "open", "unconfirmed"]


@dataclass(frozen=True)
class Spread:
    """How far runs of one recipe lie apart. `sd` is None while no recipe has two."""

    sd: float | None
    df: int
    recipes: int
    runs: int

    def half_width(self, runs: float) -> float | None:
        """Of the interval of a mean of so many runs (of a difference: of n*m/(n+m) runs)."""
        return None if self.sd is None else _quantile(self.df) * self.sd / math.sqrt(runs)


def pooled(groups: Iterable[Sequence[float]]) -> Spread:
    """`groups`: the scores of one recipe each. Groups of one run tell nothing and do not count."""
    several = [list(group) for group in groups if len(group) > 1]
    runs = sum(map(len, several))
    df = runs - len(several)
    if not df:
        return Spread(None, 0, 0, 0)
    squares = math.fsum((x - math.fsum(group) / len(group)) ** 2 for group in several for x in group)
    return Spread(math.sqrt(squares / df), df, len(several), runs)


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; without one while no recipe of the lab has two fresh runs."""

    mean: float
    low: float | None
    high: float | None
    runs: int


def estimate(scores: Sequence[float], spread: Spread) -> Estimate:
    """Of at least one score."""
    return around(math.fsum(scores) / len(scores), len(scores), spread)


def around(mean: float, runs: int, spread: Spread) -> Estimate:
    """A mean that is known, of so many runs."""
    half = spread.half_width(runs)
    return Estimate(mean, None if half is None else mean - half, None if half is None else mean + half, runs)


@dataclass(frozen=True)
class Effect:
    """By how much the later recipe is better: above zero is a gain."""

    gain: float
    low: float | None
    high: float | None
    runs_before: int
    runs_after: int


def effect(before: Sequence[float], after: Sequence[float], spread: Spread) -> Effect | None:
    """None while either has no run."""
    if not before or not after:
        return None
    n, m = len(before), len(after)
    gain = math.fsum(before) / n - math.fsum(after) / m
    half = spread.half_width(n * m / (n + m))
    return Effect(gain, None if half is None else gain - half, None if half is None else gain + half, n, m)


def replication(found: Effect | None, least: float = 0.0, asked: float = 0.0) -> Replication:
    """Whether a keep holds on fresh seeds. Yes and no both take the whole interval, so each is said of at most 2.5 % of
    the changes of which it is not true; all else is open.

    `least`: the gain above which it holds; where the interval lies above it, it does. `asked`: the gain that it had to
    have to be of use; where the interval lies below that, it has not.
    """
    if found is None:
        return "unconfirmed"
    if found.low is None or found.high is None:
        return "open"
    if found.low > least:
        return "replicated"
    return "not replicated" if found.high < max(least, asked) else "open"


def settled(status: str, again: Effect | None, worth: float, spread: Spread) -> Replication:
    """`status` of the keep: another than a simplification has to gain, and to be of use what is `worth` keeping; a
    simplification may lose what the verdict lets it lose, by the noise that is known now."""
    if status != "simplify":
        return replication(again, 0.0, worth)
    from core.verdict import Rule  # here, because it takes scipy along, which most verbs do without

    most = max(worth, Rule.margin * (spread.sd or 0.0))
    return replication(again, -most, -most)


def shrunk(then: Effect | None, there: Effect | None, spread: Spread) -> bool:
    """Whether a change gives less in one place than it gave in another, beyond noise: the interval of the difference of
    both effects, four means of runs of which no two are the same, lies above zero."""
    if then is None or there is None:
        return False
    each = (then.runs_before, then.runs_after, there.runs_before, there.runs_after)
    half = spread.half_width(1 / math.fsum(1 / n for n in each))
    return half is not None and then.gain - there.gain > half


# --- which runs may be compared --------------------------------------------------------------------


def conditions(sample: Sample) -> Hashable:
    """Runs with equal ones may be compared: the same versions of everything, and no drift between them."""
    return (tuple(sorted((k, str(v)) for k, v in sample.versions.items())), sample.epoch)


def groups(samples: Iterable[Sample], purposes: Sequence[str]) -> dict[Hashable, list[Sample]]:
    """Untainted runs of these purposes by their conditions, each group and the groups oldest first."""
    found: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        if sample.purpose in purposes and not sample.tainted:
            found.setdefault(conditions(sample), []).append(sample)
    return found


def together(
    before: Iterable[Sample], after: Iterable[Sample], purposes: Sequence[str] = ("confirm",)
) -> tuple[list[Sample], list[Sample]]:
    """Runs of two recipes that may be compared: those of the newest conditions that both were measured under."""
    first, second = groups(before, purposes), groups(after, purposes)
    shared = [key for key in second if key in first]
    return (first[shared[-1]], second[shared[-1]]) if shared else ([], [])


def remeasured(samples: Mapping[int, Sequence[Sample]], before: int, after: int, spread: Spread) -> Effect | None:
    """What the later of two recipes gives, by their confirmations."""
    first, second = together(samples.get(before, ()), samples.get(after, ()))
    return effect(scores(first), scores(second), spread)


def spread_of(
    samples: Mapping[int, Sequence[Sample]],
    baseline: int | None,
    part: str = "val",
    ablations: Iterable[Ablation] = (),
) -> Spread:
    """Of a lab: from all fresh runs, and the baseline's own, which no selection has touched either. `part`: of what
    the scores are, "val" or "holdout"."""
    found = [scores(group, part) for a in ablations for group in groups(a.runs, FRESH).values()]
    for number, of_one in samples.items():
        purposes = (*FRESH, "verdict") if number == baseline else FRESH
        found += [scores(group, part) for group in groups(of_one, purposes).values()]
    return pooled(found)


def scores(samples: Iterable[Sample], part: str = "val") -> list[float]:
    """Validation scores, or those of the holdout where it was scored; of a seed that ran twice the mean."""
    found: dict[int, list[float]] = {}
    for s in samples:
        score = s.val_bpb if part == "val" else s.holdout_bpb
        if score is not None:
            found.setdefault(s.seed, []).append(score)
    return [math.fsum(of_seed) / len(of_seed) for of_seed in found.values()]


def _quantile(df: int) -> float:
    """Student's t for a two-sided interval of CONFIDENCE."""
    from scipy.special import stdtrit

    found: Any = stdtrit(df, 0.5 + CONFIDENCE / 2)
    return float(found)
