"""The learning curves that a lab has recorded, as early stopping compares them: those of each best in turn, and those
of the candidates that were measured against it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from core.ledger import Experiment, Sample
from core.probing import Curve, Era
from core.runs import DECIDING


def eras(experiments: Sequence[Experiment], samples: Sequence[Sample], best: int, epoch: int) -> list[Era]:
    """One for each best of each epoch, the present one last. Disturbed runs, and those not looked at, are left out. Of
    each candidate the first run counts: it is what a new candidate's first run can be compared with, and eight runs of
    one recipe are not eight candidates."""
    own: dict[tuple[int, int], list[Curve]] = defaultdict(list)  # by experiment and epoch
    tried: dict[tuple[int, int], list[Curve]] = defaultdict(list)  # by the best that it was compared with, and epoch
    parents, seen = {e.number: e.parent for e in experiments}, set[int]()
    for s in samples:
        probes, parent = (s.outcome or {}).get("probes"), parents.get(s.number)
        curve = Curve.of(probes, s.val_bpb, s.seed) if probes and s.purpose in DECIDING and not s.tainted else None
        if curve is None:
            continue
        own[s.number, s.epoch].append(curve)
        if parent is not None and s.purpose == "verdict" and s.number not in seen:
            seen.add(s.number)
            tried[parent, s.epoch].append(curve)
    present = (best, epoch)
    return [Era(own[key], tried[key]) for key in [*sorted(tried.keys() - {present}), present] if own[key]]
