"""An edit of `train.py` that comes to its turn when another best stands than the one that it was made to.

Judged as it is written it would take back every change that was kept meanwhile. So it is made to the new best, by a
merge (core.reapply), or it ends there where the two do not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.lab import Lab
from core.ledger import Experiment
from core.objections import change
from core.reapply import reapply
from core.recipe import fingerprint


@dataclass(frozen=True)
class Rebased:
    """`source`: the edit made to the new best. `refused`: why it cannot be, then there is no source."""

    source: bytes | None
    refused: str = ""


def base_of(lab: Lab, parent: int | None) -> bytes:
    """The recipe that an experiment with this parent changes: the parent's, without one the lab's first."""
    return lab.source(parent) if parent else lab.first_source()


def named(parent: int | None) -> str:
    return f"#{parent}" if parent else "the first recipe"


def onto(lab: Lab, parent: int | None, edited: bytes, best: Experiment, lint: Callable[[bytes], str]) -> Rebased:
    """`edited`, which was made to experiment `parent` (None: to the lab's first recipe), made to `best`."""
    base = base_of(lab, parent)
    now = lab.ledger.source(best.source_sha256)
    made = f"it was made to {named(parent)}, and #{best.number} is the best now"
    merged = edited if base == now else reapply(lab.git, base, edited, now)
    if merged is None:
        return Rebased(None, f"{made}: both change the same lines (`autoresearch diff {best.number}`)")
    if base != now and fingerprint(merged) == best.fingerprint:
        return Rebased(None, f"{made}, which has the same change already")
    if base != now and (refused := lint(merged)):
        return Rebased(None, f"{made}: with both changes it is no recipe ({refused})")
    return Rebased(merged)


def began_from(lab: Lab, source: bytes) -> Experiment | None:
    """The best that an edit of `train.py` was made to. None before there is one.

    The lab's file is the best's whenever nothing lies there that was not judged, so an edit began from what was put
    there last, or, where somebody has taken a later best over by hand, from that: from whichever of these it differs
    least, and from the first of several, as it changes what the later ones change."""
    kept = [e for e in lab.ledger.experiments() if e.is_kept]
    there = lab.put_there()
    first = next((at for at in reversed(range(len(kept))) if kept[at].source_sha256 == there), len(kept) - 1)
    return min(kept[max(0, first) :], key=lambda e: _distance(lab, e, source), default=None)


def takes_back(lab: Lab, source: bytes) -> Experiment | None:
    """The earlier best that an edit of the present one is nearer to: it takes back what was kept since."""
    kept = [e for e in lab.ledger.experiments() if e.is_kept]
    nearest = min(reversed(kept), key=lambda e: _distance(lab, e, source), default=None)
    return nearest if nearest is not None and nearest.number != kept[-1].number else None


def _distance(lab: Lab, e: Experiment, source: bytes) -> int:
    """Changed lines."""
    return len(change(lab.ledger.source(e.source_sha256), source))
