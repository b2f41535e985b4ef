"""What the runs of a candidate and of the incumbent say about their difference, look by look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

from core.noise import RESOLUTION, Noise, Run


@dataclass(frozen=True)
class Evidence:
    """A candidate against the incumbent. `gain` (bpb, positive is better), `sd` of one run and `df` of that estimate,
    `information` (1/sds²: one over the variance of the gain at an sd of one)."""

    gain: float
    sd: float
    df: float
    information: float

    @property
    def error(self) -> float:
        """Standard error of the gain, bpb."""
        return self.sd / math.sqrt(self.information)

    def z(self, shift: float = 0.0) -> float:
        """The normal deviate that is as unlikely as the gain plus `shift` (bpb) is under Student's t: so bounds that
        were worked out for a known sd serve for an estimated one (Jennison and Turnbull 2000, section 4.4)."""
        t = (self.gain + shift) / self.error
        tail = max(float(stdtr(self.df, -abs(t))), 1e-300)
        return math.copysign(-float(ndtri(tail)), t)

    def score(self, shift: float = 0.0) -> float:
        """`z` on the scale of `core.sequential`."""
        return self.z(shift) * math.sqrt(self.information)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Of the gain, in bpb, as if this were the only look: where a test ended early it is a little too good."""
        half = float(stdtrit(self.df, (1 + confidence) / 2)) * self.error
        return self.gain - half, self.gain + half


def looks(incumbent: Sequence[Run], candidate: Sequence[Run], noise: Noise) -> list[Evidence]:
    """The evidence after each run since the candidate's first, of either, by the noise that is known now."""
    first = min(run.order for run in candidate)
    later = sorted({run.order for run in (*incumbent, *candidate) if run.order >= first})
    arms = [([r for r in incumbent if r.order <= at], [r for r in candidate if r.order <= at]) for at in later]
    return list(_rising(compare(known, new, noise) for known, new in arms if known))


def _rising(found: Iterator[Evidence]) -> Iterator[Evidence]:
    """Without what brought nothing new: a run of the one at a seed that only pairing makes worth nothing."""
    most = 0.0
    for one in found:
        if one.information > most * (1 + 1e-5):
            most = one.information
            yield one


def compare(incumbent: Sequence[Run], candidate: Sequence[Run], noise: Noise) -> Evidence:
    """The best linear unbiased estimate of the gain. Without trusted correlation the difference of the means; with it,
    runs at one seed are weighed as the pairs that they are, the incumbent's other seeds too (generalised least squares,
    Aitken 1935: the control-variate estimate where the candidate's seeds are among the incumbent's)."""
    sd, rho = max(noise.sd, RESOLUTION), noise.trusted_correlation()
    n, m = len(candidate), len(incumbent)
    if not rho:
        gain = math.fsum(r.bpb for r in incumbent) / m - math.fsum(r.bpb for r in candidate) / n
        return Evidence(gain, sd, noise.df, 1 / (1 / n + 1 / m))
    # arms: 0 incumbent, 1 candidate; design (n + m, 2), covariance (n + m, n + m) in units of sd squared
    runs, arm = [*incumbent, *candidate], np.repeat([0, 1], [m, n])
    seeds = np.array([r.seed for r in runs])
    covariance = rho * ((seeds[:, None] == seeds) & (arm[:, None] != arm)) + np.eye(n + m)
    design = np.eye(2)[arm]
    scores = np.array([r.bpb for r in runs])
    weighed = np.linalg.solve(covariance, np.column_stack([design, scores - scores.mean()]))
    normal = design.T @ weighed
    contrast = np.array([1.0, -1.0])
    means, inverse = np.linalg.solve(normal[:, :2], normal[:, 2]), np.linalg.inv(normal[:, :2])
    return Evidence(float(contrast @ means), sd, noise.df, float(1 / (contrast @ inverse @ contrast)))
