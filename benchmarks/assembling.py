"""From what sides have said to what a result holds."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import anonymous
from benchmarks.results import BackendResult, Energy, Fixed, Parity, Peak, Score, Speed, sustained
from benchmarks.work import BenchProfile

UPSTREAM = "upstream"
LAST_SHARE = 10  # the fixed loss is the mean of the last tenth of the steps


@dataclass(frozen=True)
class Contender:
    """Who takes part."""

    name: str  # a backend's, or "upstream"
    recipe: Path  # upstream: its folder
    shipped: bool = True
    obstacle: str = ""  # why it cannot run here


@dataclass
class Taken:
    """What was measured of one contender so far."""

    contender: Contender
    facts: dict[str, Any] = field(default_factory=dict)  # device, dtype, dtype_reason
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # dtype -> of the reference checkpoint
    parity: list[Parity] = field(default_factory=list)
    departs: list[str] = field(default_factory=list)
    failed: str = ""
    compiled_on: str = ""  # the day on which compiling was timed, where its code was kept since (`kept_code`)
    opened: list[dict[str, Any]] = field(default_factory=list)  # first steps, of each process that took turns
    turns: dict[int, dict[str, Any]] = field(default_factory=dict)  # round -> what was measured
    steps: int = 0  # timed in one turn
    starts: list[float] = field(default_factory=list)  # seconds
    scores: list[Score] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        return not (self.contender.obstacle or self.failed or self.departs)


def assembled(taken: Taken, profile: BenchProfile) -> BackendResult:
    contender = taken.contender
    facts = taken.facts | {"attention": anonymous(taken.facts.get("attention", ""))}
    base = BackendResult(
        name=contender.name,
        status="measured",
        recipe=_recipe(contender),
        parity=list(taken.parity),
        **facts,
    )
    if contender.obstacle:
        return replace(base, status="unavailable", reason=contender.obstacle)
    if taken.departs:
        departs = [anonymous(d) for d in taken.departs]
        return replace(base, status="different", reason="it does not compute the reference model", departs=departs)
    if taken.turns:
        base = replace(
            base,
            flops_per_token=taken.opened[0]["flops_per_token"],
            peak=peak(list(taken.turns.values())),
            speed=speed(taken, profile),
            fixed=fixed(taken.opened[0], profile),
            energy=energy(list(taken.turns.values()), taken.steps * profile.batch_tokens),
            scores=list(taken.scores),
        )
    if taken.failed:
        return replace(base, status="crashed", reason=taken.failed)
    if not taken.turns:
        return replace(base, status="crashed", reason="it was not measured: the bench ended before")
    return base


def _recipe(contender: Contender) -> str:
    if contender.name == UPSTREAM:
        return "its own"
    return "shipped" if contender.shipped else hashlib.sha256(contender.recipe.read_bytes()).hexdigest()[:12]


def speed(taken: Taken, profile: BenchProfile) -> Speed:
    turns = list(taken.turns.values())
    return Speed(
        step_seconds=[t["seconds"] for t in turns],
        rounds=list(taken.turns),
        steps=taken.steps,
        batch_tokens=profile.batch_tokens,
        scoring_rates=[t["scored"] for t in turns if "scored" in t],
        startup_seconds=list(taken.starts),
        build_seconds=[o["build"] for o in taken.opened],
        compile_seconds=[o["compile"] for o in taken.opened],
        peak_memory=[float(o["peak_memory"]) for o in taken.opened],
    )


def peak(turns: Sequence[Mapping[str, Any]]) -> Peak | None:
    """Of products the best round counts: what else happens only ever lowers it. Of passes over memory it is
    what is reached in three rounds of four: where a virtual machine's host puts its processors may double it."""
    if any("flops" not in t for t in turns):  # a peer's
        return None
    fastest = max(turns, key=lambda t: float(t["flops"]))
    return Peak(
        flops=fastest["flops"],
        flops_source=fastest["flops_source"],
        bandwidth=sustained([t["bandwidth"] for t in turns]),
        bandwidth_source=turns[0]["bandwidth_source"],
        flops_rounds=[t["flops"] for t in turns],
        bandwidth_rounds=[t["bandwidth"] for t in turns],
    )


def last_loss(losses: Sequence[float]) -> float:
    return statistics.fmean(losses[-max(1, len(losses) // LAST_SHARE) :])


def fixed(opened: Mapping[str, Any], profile: BenchProfile) -> Fixed:
    """Of the process that took all fixed steps."""
    seconds, losses = np.cumsum(opened["seconds"]), opened["losses"]
    curve = [
        (float(s), i + 1, (i + 1) * profile.batch_tokens, float(x)) for i, (s, x) in enumerate(zip(seconds, losses))
    ]
    return Fixed(len(losses), last_loss(losses), curve)


def energy(turns: Sequence[Mapping[str, Any]], tokens: int) -> Energy:
    """Of all timed steps. `tokens`: of one turn."""
    found = [t["energy"] for t in turns]
    told = [e for e in found if e["joules"] is not None]
    if not told:
        return Energy(None, None, anonymous(found[0]["source"]))
    joules, seconds = sum(e["joules"] for e in told), sum(e["seconds"] for e in told)
    return Energy(joules / (tokens * len(told)), joules / seconds, told[0]["source"])
