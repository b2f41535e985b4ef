"""Measured kernels as lines of a table: rates, share of the roofline, and how peers stand to ours."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.results import KernelResult, Peak

DIRECTIONS = {"forward": "forward", "backward": "backward", "both": "forward + backward", "step": "step"}
HEADS = ("way", "time", "rate", "traffic", "of the roofline", "against ours", "error")


@dataclass(frozen=True)
class Line:
    """One way of one case: a text under each of HEADS."""

    texts: list[str]
    ours: bool


@dataclass(frozen=True)
class Ratio:
    """How many times as long as ours a peer takes: median and quartiles over the rounds in which both ran."""

    median: float
    low: float
    high: float

    @property
    def noise(self) -> bool:
        return self.low <= 1 <= self.high


def part(k: KernelResult) -> str:
    """The part of the model: "attention" of "attention, window 128"."""
    return k.kernel.partition(",")[0]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value three times that one."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def roof(k: KernelResult, peak: Peak) -> float:
    """FLOP/s that the roofline allows this work (Williams, Waterman and Patterson 2009)."""
    return min(peak.flops, peak.bandwidth * k.flops / k.bytes)


def same_work(k: KernelResult, other: KernelResult) -> bool:
    mine, its = ((x.backend, x.dtype, x.kernel, x.shape, x.direction) for x in (k, other))
    return mine == its


def ratio(k: KernelResult, all_of_them: Sequence[KernelResult]) -> Ratio | None:
    """None for ours, for what was not measured, and where ours was not."""
    ours = next((o for o in all_of_them if o.ours and o.seconds and same_work(o, k)), None)
    if ours is None or k.ours or not k.seconds:
        return None
    if len(k.seconds) == len(ours.seconds):  # they took turns: round by round
        values = [its / mine for its, mine in zip(k.seconds, ours.seconds, strict=True)]
    else:
        values = [its / statistics.median(ours.seconds) for its in k.seconds]
    low, middle, high = quartiles(values)
    return Ratio(middle, low, high)


def cases(kernels: Sequence[KernelResult], peaks: Mapping[str, Peak]) -> Iterator[tuple[str, list[Line]]]:
    """(title, its ways) of each piece of work, in the order in which they ran."""
    titles = dict.fromkeys(title(k) for k in kernels)
    for one in titles:
        yield one, [_line(k, kernels, peaks) for k in kernels if title(k) == one]


def title(k: KernelResult) -> str:
    return f"{k.backend} {k.dtype}, {k.kernel}, {DIRECTIONS[k.direction]}: {k.shape}"


def _line(k: KernelResult, kernels: Sequence[KernelResult], peaks: Mapping[str, Peak]) -> Line:
    if not k.seconds:
        return Line([k.way, f"not measured: {k.note}", "", "", "", "", _error(k)], k.ours)
    found, peak = ratio(k, kernels), peaks.get(f"{k.backend}/{k.dtype}")
    share = f"{100 * k.flops_per_second() / roof(k, peak):.0f} %" if peak else "-"
    rates = [rate_text(k.flops_per_second()), byte_text(k.bytes_per_second()), share]
    return Line([k.way, _times(k.seconds), *rates, "ours" if k.ours else _against(found), _error(k)], k.ours)


def _times(seconds: Sequence[float]) -> str:
    low, middle, high = (1e3 * s for s in quartiles(seconds))
    return f"{_ms(middle)} ms ({_ms(low)} to {_ms(high)})"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _against(found: Ratio | None) -> str:
    if found is None:
        return "-"
    words = f"{found.median:.2f}x the time ({found.low:.2f} to {found.high:.2f})"
    return words + ("; noise" if found.noise else "")


def _error(k: KernelResult) -> str:
    return f"{k.error:.1e}" if k.error is not None else "-"


def peak_lines(peaks: Mapping[str, Peak]) -> Iterator[str]:
    for name, peak in peaks.items():
        products, memory = rate_text(peak.flops), byte_text(peak.bandwidth)
        yield f"{name}: {products} ({peak.flops_source}), {memory} ({peak.bandwidth_source})"


def rate_text(value: float) -> str:
    """FLOP/s with a unit: '219 GFLOP/s'."""
    return f"{_scaled(value)}FLOP/s"


def byte_text(value: float) -> str:
    return f"{_scaled(value)}B/s"


def _scaled(value: float) -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit * 0.9995:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g} "
