"""Keep or discard: a pure function of the samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.apple import departure

TAINTING_SHARE = 0.25  # of our own cores' time, taken by other processes: steps and so the score suffer


@dataclass(frozen=True)
class Verdict:
    status: str  # "keep" or "discard"
    reason: str  # with the figures, for people


def decide(best: Sequence[float], candidate: Sequence[float], min_delta: float) -> Verdict:
    """Is the candidate better than the incumbent by more than `min_delta`? All in bits per byte, lower is better.

    `best` holds the incumbent's samples and is empty for the first experiment that finished: the baseline.
    Raises `ValueError` on a sample that is not a positive, finite number and on a candidate without samples.
    """
    if not candidate:
        raise ValueError("a verdict needs a score of the candidate")
    for value in (*best, *candidate):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{value} is not a score: bits per byte are positive and finite")
    new = math.fsum(candidate) / len(candidate)
    if not best:
        return Verdict("keep", f"the baseline: {new:.6f}")
    old = math.fsum(best) / len(best)
    gain = old - new
    if gain > min_delta:
        return Verdict("keep", f"{new:.6f} is {gain:.6f} better than the best, {old:.6f}")
    if gain > 0:
        return Verdict(
            "discard",
            f"{new:.6f} is only {gain:.6f} better than the best, {old:.6f} (more than {min_delta:g} is asked)",
        )
    if gain == 0:
        return Verdict("discard", f"{new:.6f} equals the best")
    return Verdict("discard", f"{new:.6f} is {-gain:.6f} worse than the best, {old:.6f}")


def taint(health: Mapping[str, Any], steady: Mapping[str, Any] | None = None) -> str:
    """Why a measurement is to be taken again, "" if it is not. `health`: what the referee saw beside the training;
    `steady`: the same of the lab's baseline, from which a Mac's conditions may not depart."""
    others, ours = float(health.get("others_cores") or 0.0), float(health.get("our_cores") or 0.0)
    if others > TAINTING_SHARE * max(1.0, ours):
        loop = float(health.get("loop_cores") or 0.0)
        own = f" ({loop:.1f} of them the researcher and the loop)" if loop >= 0.1 else ""
        return f"other processes kept {others:.1f} cores busy{own} beside our {ours:.1f}"
    changed = departure(health.get("conditions") or {}, steady.get("conditions") or {}) if steady else ""
    return changed or str(health.get("tainted") or "")
