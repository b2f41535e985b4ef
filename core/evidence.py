"""What the runs of a candidate and of the incumbent say about their difference, look by look."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scipy.special import ndtri, stdtr, stdtrit

from core.noise import RESOLUTION, Noise, Run


@dataclass(frozen=True)
class Evidence:
    """A candidate against the incumbent. `gain` (bpb, positive is better), `sd` of one run and `df` of that estimate,
    `information` (1/sds²: one over the variance of the gain at an sd of one). `share`: of a chance deviation of the
    gain, what is the candidate's on average; the rest is the incumbent's."""

    gain: float
    sd: float
    df: float
    information: float
    share: float

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


@dataclass(frozen=True)
class Prior:
    """What was known of a recipe before it ran: as much as so many `runs` with a mean of `bpb`."""

    bpb: float
    runs: float


def looks(
    incumbent: Sequence[Run], candidate: Sequence[Run], noise: Noise, prior: Prior | None = None
) -> list[Evidence]:
    """The evidence after each run since the candidate's first, of either, by the noise that is known now. `prior`: of
    the incumbent."""
    known, new = (sorted(arm, key=lambda run: run.order) for arm in (incumbent, candidate))
    orders = [[run.order for run in arm] for arm in (known, new)]
    later = sorted({order for arm in orders for order in arm if order >= orders[1][0]})
    parts = [(bisect_right(orders[0], at), bisect_right(orders[1], at)) for at in later]
    if noise.trusted_correlation():
        return list(_rising(compare(known[:m], new[:n], noise, prior) for m, n in parts if m))
    x, y = ([run.bpb for run in arm] for arm in (known, new))
    return list(_rising(_unpaired(x[:m], y[:n], noise, prior) for m, n in parts if m))


def _rising(found: Iterator[Evidence]) -> Iterator[Evidence]:
    """Without what brought nothing new: a run of the one at a seed that only pairing makes worth nothing."""
    most = 0.0
    for one in found:
        if one.information > most * (1 + 1e-5):
            most = one.information
            yield one


def compare(incumbent: Sequence[Run], candidate: Sequence[Run], noise: Noise, prior: Prior | None = None) -> Evidence:
    """The best linear unbiased estimate of the gain. Without trusted correlation the difference of the means; with it,
    runs at one seed are weighed as the pairs that they are, the incumbent's other seeds too (generalised least squares,
    Aitken 1935: the control-variate estimate where the candidate's seeds are among the incumbent's). A seed that an arm
    has run twice is a pair once. The incumbent's `prior` counts as runs of it at seeds of their own."""
    sd, rho = max(noise.sd, RESOLUTION), noise.trusted_correlation()
    if not rho:
        return _unpaired([run.bpb for run in incumbent], [run.bpb for run in candidate], noise, prior)
    n, m = len(candidate), len(incumbent)
    centre = min(run.bpb for run in incumbent)  # what is summed up is small, and in any order the same
    x, y = ([run.bpb - centre for run in arm] for arm in (incumbent, candidate))
    mine, theirs = ({run.seed: run.bpb - centre for run in arm} for arm in (incumbent, candidate))
    pairs = mine.keys() & theirs.keys()
    both = [math.fsum(arm[seed] for seed in pairs) for arm in (mine, theirs)]
    # The normal equations of the two means: a pair's inverse covariance is ((1, -rho), (-rho, 1)) / (1 - rho²).
    weight = len(pairs) / (1 - rho**2)
    more = prior.runs if prior else 0.0
    a, b, off = m + more - len(pairs) + weight, n - len(pairs) + weight, -rho * weight
    u = (
        (more * (prior.bpb - centre) if prior else 0.0)
        + math.fsum(x)
        - both[0]
        + (both[0] - rho * both[1]) / (1 - rho**2)
    )
    v = math.fsum(y) - both[1] + (both[1] - rho * both[0]) / (1 - rho**2)
    determinant, total = a * b - off**2, a + b + 2 * off
    gain = ((b + off) * u - (a + off) * v) / determinant
    return Evidence(gain, sd, noise.df, determinant / total, (a + off) / total)


def _unpaired(incumbent: Sequence[float], candidate: Sequence[float], noise: Noise, prior: Prior | None) -> Evidence:
    """The difference of the means of these scores. Their sums are exact, so the same in any order."""
    m, n = float(len(incumbent)), len(candidate)
    total = math.fsum(incumbent)
    if prior:
        m, total = m + prior.runs, total + prior.runs * prior.bpb
    gain = total / m - math.fsum(candidate) / n
    return Evidence(gain, max(noise.sd, RESOLUTION), noise.df, 1 / (1 / n + 1 / m), m / (m + n))
