"""What a result is read by: each metric with its repeats, its unit and which way is better."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.results import BackendResult, sustained
from console.words import count, duration, size


@dataclass(frozen=True)
class Metric:
    """`repeats` gives one figure for each repeat; none where a backend was not measured by it."""

    name: str
    repeats: Callable[[BackendResult], Sequence[float]]
    show: Callable[[float], str]
    higher: bool  # is better
    resolution: float = 0.05  # share below which a difference is called noise whatever the repeats say
    least: float = 0.0  # below it a figure is noise, and no ratio is taken
    fewest: int = 1  # repeats from which on a ratio is taken
    alone: bool = False  # a single figure tells: it comes from arithmetic and not from a clock
    middle: Callable[[Sequence[float]], float] = statistics.median  # of the repeats; what is shown and compared
    rounds: Callable[[BackendResult], Sequence[int]] = lambda b: ()  # of each repeat, where they are taken in turns

    def value(self, backend: BackendResult) -> float | None:
        found = self.repeats(backend)
        return self.middle(found) if found else None

    def text(self, backend: BackendResult) -> str:
        value = self.value(backend)
        if value is None:
            return "-"
        return self.show(value) if value >= self.least else f"under {self.show(self.least)}"


def _speed(pick: Callable[[BackendResult], Sequence[float]]) -> Callable[[BackendResult], Sequence[float]]:
    return lambda b: pick(b) if b.speed is not None else ()


def _mfu(b: BackendResult) -> Sequence[float]:
    if b.speed is None or b.peak is None or not b.peak.flops or not b.flops_per_token:
        return ()
    return [b.flops_per_token * rate / b.peak.flops for rate in b.speed.tokens_per_second()]


def _rounds(b: BackendResult) -> Sequence[int]:
    return b.speed.rounds if b.speed else ()


def _flops(b: BackendResult) -> Sequence[float]:
    return (b.peak.flops_rounds or [b.peak.flops]) if b.peak else ()


def _bandwidth(b: BackendResult) -> Sequence[float]:
    return (b.peak.bandwidth_rounds or [b.peak.bandwidth]) if b.peak else ()


def _overheads(b: BackendResult) -> list[float]:
    return [s.total_seconds - s.training_seconds for s in b.scores if s.val_bpb is not None]


def _night(b: BackendResult) -> Sequence[float]:
    found = b.experiments_per_night()
    return () if found is None else (found,)


def _energy(b: BackendResult) -> Sequence[float]:
    joules = b.energy.joules_per_token if b.energy else None
    return () if joules is None else (joules,)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else duration(value)


METRICS: Sequence[Metric] = (
    Metric("tokens/s", _speed(lambda b: b.speed.tokens_per_second() if b.speed else ()), count, True, rounds=_rounds),
    Metric("step", _speed(lambda b: b.speed.step_seconds if b.speed else ()), _seconds, False, rounds=_rounds),
    Metric("share of peak (MFU)", _mfu, lambda x: f"{x:.1%}", True, rounds=_rounds),
    Metric("peak memory", _speed(lambda b: b.speed.peak_memory if b.speed else ()), size, False),
    # Whatever else goes on only adds to a start: the fastest tells most (as of `timeit`).
    Metric("start-up", _speed(lambda b: b.speed.startup_seconds if b.speed else ()), _seconds, False, middle=min),
    Metric(
        "compile, first time",
        _speed(lambda b: b.speed.compile_seconds[:1] if b.speed else ()),
        _seconds,
        False,
        least=0.5,
    ),
    Metric(
        "loss after equal steps",
        lambda b: (b.fixed.loss,) if b.fixed else (),
        lambda x: f"{x:.4f}",
        False,
        0.01,
        alone=True,
    ),
    Metric("val_bpb in the budget", lambda b: b.bpbs(), lambda x: f"{x:.4f}", False, 0.002),
    Metric(
        "tokens/s in scoring", _speed(lambda b: b.speed.scoring_rates if b.speed else ()), count, True, rounds=_rounds
    ),
    Metric("overhead of an experiment", _overheads, _seconds, False, fewest=3),
    Metric("experiments a night", _night, lambda x: f"{x:.0f}", True),
    Metric("energy per 1,000 tokens", _energy, lambda x: f"{x * 1e3:.3g} J", False),
    Metric("matmul peak", _flops, lambda x: f"{x / 1e12:.3g} TFLOP/s", True, middle=max),
    Metric("memory bandwidth", _bandwidth, lambda x: f"{x / 1e9:.3g} GB/s", True, middle=sustained),
)


def spread(backend: BackendResult) -> str:
    """ "±1.2 %": half the distance between the slowest and the fastest repeat, as a share of the median."""
    if backend.speed is None or len(backend.speed.step_seconds) < 2:
        return ""
    found = backend.speed.step_seconds
    return f"±{(max(found) - min(found)) / 2 / statistics.median(found):.1%}"
