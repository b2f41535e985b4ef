"""An experiment that was measured again on fresh seeds: what it is compared with, and how that is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from console.figures import words_of
from console.markdown import changed
from core import effects
from core.ablation import Known
from core.effects import Effect, Replication

if TYPE_CHECKING:
    from core.lab import Lab
    from core.ledger import Experiment


@dataclass(frozen=True)
class Again:
    status: str  # of the experiment
    before: int  # the experiment that it is compared with
    effect: Effect
    state: Replication


def compared_with(e: Experiment, standing: Sequence[int]) -> int | None:
    """`standing`: what is kept. A keep is compared with the one before it, anything else with the best that it was
    judged against; the baseline with nothing."""
    return max((n for n in standing if n < e.number), default=None) if e.is_kept else e.parent


def again(lab: Lab, number: int) -> Again | None:
    """None where it, or what it is compared with, was not measured again."""
    e, known = lab.ledger.get(number), Known.of(lab.ledger.experiments(), lab.ledger.all_samples())
    before = compared_with(e, list(known.kept))
    if e.status is None or before is None:
        return None
    spread = effects.spread_of(known.samples, next(iter(known.kept), None), ablations=lab.ledger.ablations())
    found = effects.remeasured(known.samples, before, number, spread)
    if found is None:
        return None
    return Again(e.status, before, found, effects.settled(e.status, found, lab.settings.min_delta, spread))


def line(of: Again) -> str:
    """'against #4, on fresh seeds: −0.0021 (95 %: −0.0040 to −0.0002), 4 and 4 runs: better after all'."""
    runs = f"{of.effect.runs_before} and {of.effect.runs_after} runs"
    return f"against #{of.before}, on fresh seeds: {changed(of.effect)}, {runs}: {words_of(of.status, of.state)}"


def to_json(of: Again) -> dict[str, Any]:
    """`change`: of val_bpb; below zero is better."""
    e = of.effect
    return {
        "against": of.before, "change": -e.gain, "low": None if e.high is None else -e.high,
        "high": None if e.low is None else -e.low, "runs_before": e.runs_before, "runs_after": e.runs_after,
        "state": of.state, "says": words_of(of.status, of.state),
    }  # fmt: skip
