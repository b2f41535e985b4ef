"""Whether a training is worth its time to the end, from looks at it on the way.

At fixed shares of the budget the referee scores the weights so far on a small fixed part of the *training* text, by
trusted code in a process of its own, while the clock stands still (core/pausing.py). Here is what follows from these
figures; it is pure.

The rule is the predictive termination criterion of Domhan, Springenberg and Hutter (2015): a run is ended when the
chance that its final score beats the best falls below CHANCE. The prediction is a normal linear regression of the final
gap (score minus the best's) on the gap at the probe, over the runs that this lab has finished, with Student's t for a
new observation. Schedules make learning curves cross in ways that are not normal, so a second bound has to agree which
assumes no distribution: the lowest of the jackknife+ (Barber, Candes, Ramdas and Tibshirani 2021), where each earlier
run is foretold without itself, and the new run may be as much better than foretold. For n exchangeable runs that errs
in at most 2 of n + 1 cases, and about 1 in n + 1 where no single run decides the fit. A lab's runs are that only
nearly: the best changes, and what was stopped shows nothing. So what the rule is worth is measured, not proved
(docs/early_stopping.md).

The best's score is one of luck as well. Where seeds do nothing alike, its mean is the fair figure, and its run on the
candidate's seed may be the one that got it kept. Where they do, that run is the fair figure, and the mean does wrong to
all candidates alike, as all begin on one seed. So a run has to be hopeless against both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHARES = (0.4, 0.7)  # of the budget, at which is looked: docs/early_stopping.md compares others
TOKENS = 8192  # of training text that are scored at a look
CHANCE = 0.02  # of beating the best; below it a run is hopeless
LEAST_RUNS = 3  # probed runs of the best, before anything is compared with it
LEAST_PAIRS = 8  # candidates of this lab whose first run was finished, before anything is predicted
LATE = 0.05  # of the budget; a look that came so much later than its share compares with nothing
EXEMPT_EVERY = 10  # each so manieth experiment is never stopped: it shows what stopping would have missed


@dataclass(frozen=True)
class Forecast:
    """What is expected of a run, in bits per byte against the best's score (negative: better)."""

    share: float  # of the budget, at which was looked
    gap: float  # of the probe, against the best's at the same share
    expected: float  # final gap
    spread: float  # half of the interval that holds the final gap with 95 %
    chance: float  # that the final gap is below what is needed
    runs: int  # that the forecast rests on
    hopeless: bool

    def sentence(self) -> str:
        """For people."""
        chance = f"{self.chance:.1%}" if self.chance >= 0.001 else "less than 0.1%"
        return (
            f"at {self.share:.0%} of the budget the probe was {self.gap:+.4f} bpb against the best; by {self.runs} "
            f"earlier runs it would end {self.expected:+.4f} ± {self.spread:.4f} against it, with a chance of "
            f"{chance} to be better"
        )


Judge = Callable[[int, float], "Forecast | None"]  # index of the share, probe's bpb -> what to expect; None: unknown


def never(index: int, bpb: float) -> Forecast | None:
    """For runs that are wanted to the end whatever they are."""
    return None


@dataclass(frozen=True)
class Probe:
    """What a request asks for: when to look, on how much text, and who judges."""

    shares: Sequence[float] = SHARES
    tokens: int = TOKENS
    judge: Judge = never


def exempt(number: int) -> bool:
    """Whether experiment `number` runs to its end in any case."""
    return number % EXEMPT_EVERY == 0


# --- what is known of a lab ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A run that got a score: its probes, by share of the budget, the score, and its seed where that is known."""

    probes: Mapping[float, float]
    final: float
    seed: int | None = None

    @classmethod
    def of(cls, probes: Sequence[Sequence[float]], val_bpb: float | None, seed: int | None = None) -> Curve | None:
        """From `Outcome.probes` and `Outcome.val_bpb`; None where there is no score."""
        return None if val_bpb is None else cls({share: bpb for share, _, bpb in probes}, val_bpb, seed)


@dataclass(frozen=True)
class Era:
    """The time of one best candidate: its own runs, and those that were compared with it, the first of each candidate:
    further runs of one recipe say little that is new."""

    incumbent: Sequence[Curve]
    tried: Sequence[Curve] = field(default_factory=tuple)

    def level(self, share: float, seed: int | None = None) -> tuple[float, float] | None:
        """The best's mean probe at this share and its mean score; None without a probed run. With a seed, of its runs
        on this one where there are any: they saw the same text in the same order, and an edit that changes little
        shares their luck."""
        runs = [curve for curve in self.incumbent if share in curve.probes]
        runs = [curve for curve in runs if seed is not None and curve.seed == seed] or runs
        if not runs:
            return None
        return float(np.mean([c.probes[share] for c in runs])), float(np.mean([c.final for c in runs]))

    def pairs(self, share: float, same_seed: bool) -> list[tuple[float, float]]:
        """(gap at the probe, final gap) of every run that was compared and has been looked at: against the best's run
        on the same seed, or against its mean."""
        found = []
        for curve in self.tried:
            level = self.level(share, curve.seed if same_seed else None)
            if share in curve.probes and level is not None:
                found.append((curve.probes[share] - level[0], curve.final - level[1]))
        return found


def judge(eras: Sequence[Era], shares: Sequence[float] = SHARES, needed: float = 0.0, seed: int | None = None) -> Judge:
    """Who decides for the next run, on this seed. `eras`: of the whole lab, the present one last. `needed`: the final
    gap at which the run would still matter; 0: it beats the best."""

    def ask(index: int, bpb: float) -> Forecast | None:
        """The more hopeful of two forecasts: against the best's mean, and against its run on the same seed."""
        share = shares[index]
        present = eras[-1] if eras else Era(())
        if sum(share in curve.probes for curve in present.incumbent) < LEAST_RUNS:
            return None
        found = [_against(eras, share, bpb, needed, of) for of in (None, seed)]
        known = [one for one in found if one is not None]
        return max(known, key=lambda one: (not one.hopeless, one.chance)) if len(known) == len(found) else None

    return ask


def _against(eras: Sequence[Era], share: float, bpb: float, needed: float, seed: int | None) -> Forecast | None:
    """By the best's runs on this seed; None: by all of them."""
    level = eras[-1].level(share, seed)
    pairs = [pair for era in eras for pair in era.pairs(share, same_seed=seed is not None)]
    return None if level is None else forecast(pairs, share, bpb - level[0], needed)


# --- the rule ------------------------------------------------------------------------------------------


def forecast(pairs: Sequence[tuple[float, float]], share: float, gap: float, needed: float = 0.0) -> Forecast | None:
    """What becomes of a run that is `gap` behind at the probe. `pairs`: (gap at the probe, final gap) of earlier runs.

    None where too few are known, or where they show that probes and scores do not go together.
    """
    fit = _fit(pairs)
    if fit is None or not math.isfinite(gap):
        return None
    from scipy.special import stdtr, stdtrit  # here, as it takes a tenth of a second

    expected = fit.intercept + fit.slope * gap
    deviation = fit.deviation * math.sqrt(1 + 1 / fit.runs + (gap - fit.middle) ** 2 / fit.extent)
    chance = float(stdtr(fit.runs - 2, (needed - expected) / deviation))
    cross = 1 / fit.runs + (gap - fit.middle) * fit.offsets / fit.extent
    lowest = float((expected + fit.left_out * (1 - cross)).min())  # of the jackknife+
    return Forecast(
        share=share,
        gap=gap,
        expected=expected,
        spread=float(stdtrit(fit.runs - 2, 0.975)) * deviation,
        chance=chance,
        runs=fit.runs,
        hopeless=chance < CHANCE and lowest > needed,
    )


@dataclass(frozen=True)
class _Line:
    """Least squares over (x, y) pairs, and how far they lie from it."""

    intercept: float
    slope: float
    runs: int
    middle: float  # mean of x
    extent: float  # sum of squares of x about its mean
    deviation: float  # residual standard deviation, n - 2 degrees of freedom
    offsets: np.ndarray  # (n,) x about its mean
    left_out: np.ndarray  # (n,) by how much y is above what the other pairs foretell


def _fit(pairs: Sequence[tuple[float, float]]) -> _Line | None:
    x, y = (np.array([pair[i] for pair in pairs], np.float64) for i in range(2))
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < LEAST_PAIRS:
        return None
    middle = float(x.mean())
    extent = float(np.square(x - middle).sum())
    if extent <= 0:
        return None
    slope = float((x - middle) @ y / extent)
    intercept = float(y.mean()) - slope * middle
    residuals = y - intercept - slope * x
    deviation = math.sqrt(float(residuals @ residuals) / (len(x) - 2))
    if slope <= 0 or deviation <= 0:
        return None
    leverage = 1 / len(x) + np.square(x - middle) / extent
    left_out = residuals / np.maximum(1 - leverage, 1e-9)
    return _Line(intercept, slope, len(x), middle, extent, deviation, x - middle, left_out)


def as_record(found: Forecast, bpb: float, saved: float) -> dict[str, Any]:
    """`Outcome.stopped_early`: JSON. `saved`: seconds of training that were left."""
    return {
        "share": found.share,
        "probe": bpb,
        "gap": round(found.gap, 6),
        "expected": round(found.expected, 6),
        "spread": round(found.spread, 6),
        "chance": found.chance,
        "runs": found.runs,
        "reason": found.sentence(),
        "saved_seconds": round(saved, 3),
    }
