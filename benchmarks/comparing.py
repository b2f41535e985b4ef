"""Results side by side: refuses different work, and says of every difference whether it is more than noise.

Method, for what two backends of one file measured in turns: the median of the ratios of single rounds, with the sign
test's interval (benchmarks/agreeing.py). In a round both share the machine's state of these seconds, and it cancels.

For all else, and between files: the ratio of medians, with Welch's t interval (95 %) on the logarithms of the repeats,
so on the ratio of their geometric means. Repeats within one bench share the machine's state of those minutes, so an
interval of theirs is too narrow for two benches: below a metric's resolution a difference is called noise whatever the
interval says. Of matrix products the best repeat counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks import agreeing
from benchmarks.metrics import METRICS, Metric
from benchmarks.results import BackendResult, Result, Work
from core.errors import UserError

CONFIDENCE = 0.95
TINY = 1e-18  # a variance of logarithms that is rounding
Verdict = Literal["better", "worse", "within noise", "not told"]


@dataclass(frozen=True)
class Column:
    """One backend of one file."""

    label: str  # "A cpu"
    machine: str
    backend: BackendResult
    file: int = 0


@dataclass(frozen=True)
class Difference:
    """A metric of one column against the first."""

    metric: str
    base: float | None
    value: float | None
    ratio: float | None  # value / base; of what was measured in turns the median of the rounds' ratios
    low: float | None  # of the ratio, 95 %; None where repeats are too few
    high: float | None
    verdict: Verdict
    why: str  # of the verdict, for people


def require_equal_work(results: Sequence[Result], names: Sequence[str]) -> None:
    """UserError that says what differs."""
    first = results[0].work
    for result, name in zip(results[1:], names[1:], strict=True):
        found = differences(first, result.work)
        if found:
            raise UserError(
                f"{names[0]} and {name} did different work: {'; '.join(found[:4])}",
                "run both with the same --profile and version (of "
                f"{names[0]}: `autoresearch bench --profile {first.profile}`)",
            )


def differences(a: Work, b: Work) -> list[str]:
    """ "context 256 and 512", one for each field."""
    left, right = asdict(a), asdict(b)
    found = []
    for name in left:
        if name == "model" and left[name] != right[name]:
            keys = sorted({*left[name], *right[name]})
            found += [
                f"{key} {left[name].get(key)} and {right[name].get(key)}"
                for key in keys
                if left[name].get(key) != right[name].get(key)
            ]
        elif left[name] != right[name]:
            found.append(f"{name} {_short(left[name])} and {_short(right[name])}")
    return found


def _short(value: Any) -> str:
    return f"{value[:8]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def columns(results: Sequence[Result]) -> list[Column]:
    """The measured backends of all files; of several files each has a letter."""
    many = len(results) > 1
    return [
        Column(f"{letter(i)} {backend.name}" if many else backend.name, result.machine.label, backend, i)
        for i, result in enumerate(results)
        for backend in result.measured()
    ]


def letter(index: int) -> str:
    """A, B, ... Z, A2, ..."""
    return chr(ord("A") + index % 26) + (str(index // 26 + 1) if index >= 26 else "")


def compare(base: Column, other: Column) -> list[Difference]:
    together = base.file == other.file
    return [difference(metric, base.backend, other.backend, together) for metric in METRICS]


def difference(metric: Metric, base: BackendResult, other: BackendResult, together: bool = False) -> Difference:
    """`together`: they were measured in one bench, in turns."""
    a, b = list(metric.repeats(base)), list(metric.repeats(other))
    if not a or not b:
        missing = "the first" if not a else "this one"
        return _not_told(metric, base, other, f"{missing} was not measured by it")
    middle_a, middle_b, fewest = metric.middle(a), metric.middle(b), min(len(a), len(b))
    if min(middle_a, middle_b) < metric.least:
        return _not_told(metric, base, other, f"under {metric.show(metric.least)} is noise")
    if fewest < metric.fewest:
        return _not_told(metric, base, other, f"a ratio is taken from {metric.fewest} repeats on, here are {fewest}")
    ratio = middle_b / middle_a if middle_a > 0 else None
    low, high = interval(a, b)
    found = in_turns(metric, base, other) if together else []
    if found:
        ratio = statistics.median(found)
        low, high = agreeing.interval(found) or (low, high)
    verdict, why = _judge(metric, ratio, low, high, fewest)
    return Difference(metric.name, middle_a, middle_b, ratio, low, high, verdict, why)


def _not_told(metric: Metric, base: BackendResult, other: BackendResult, why: str) -> Difference:
    return Difference(metric.name, metric.value(base), metric.value(other), None, None, None, "not told", why)


def in_turns(metric: Metric, base: BackendResult, other: BackendResult) -> list[float]:
    """The ratio of each round that both took part in; none where this is not measured in rounds."""
    figures = [dict(zip(metric.rounds(b), metric.repeats(b), strict=False)) for b in (base, other)]
    return agreeing.ratios(*figures)


def interval(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, float | None]:
    """Welch's interval of the ratio b / a of geometric means; (None, None) with fewer than two repeats, or where
    logarithms do not exist."""
    if min(len(a), len(b)) < 2 or min(*a, *b) <= 0:
        return None, None
    x, y = [math.log(v) for v in a], [math.log(v) for v in b]
    middle = statistics.fmean(y) - statistics.fmean(x)
    parts = [(statistics.variance(side) / len(side), len(side) - 1) for side in (x, y)]  # variance of the mean, freedom
    variance = sum(v for v, _ in parts)
    if variance < TINY:  # repeats that do not differ at all
        return math.exp(middle), math.exp(middle)
    from scipy.special import stdtrit

    freedom = variance**2 / sum(v**2 / n for v, n in parts)  # Welch and Satterthwaite
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return math.exp(middle - half), math.exp(middle + half)


def _judge(
    metric: Metric, ratio: float | None, low: float | None, high: float | None, repeats: int
) -> tuple[Verdict, str]:
    if ratio is None:
        return "not told", "the first is zero"
    if abs(ratio - 1) < metric.resolution:
        return "within noise", f"below {metric.resolution:.1%}, which two benches of one machine may differ by"
    better: Verdict = "better" if (ratio > 1) == metric.higher else "worse"
    if metric.alone:
        return better, "the same work gives the same figure"
    if low is None or high is None:
        return "not told", f"{repeats} repeat{'s' if repeats > 1 else ''} cannot tell it from noise"
    verdict: Verdict = "within noise" if low <= 1 <= high else better
    return verdict, f"95 % interval of the ratio {low:.3f} to {high:.3f}"
