"""What thinking costs the device: a researcher that thinks for a third of the budget, and one that does not think.

    autoresearch run LAB --budget 60s --experiments 30 --researcher benchmarks.thinking:Simulated
    autoresearch log LAB
    autoresearch run LAB --experiments 30 --researcher benchmarks.thinking:Instant
    python -m benchmarks.thinking LAB

`log` tells the share of the time that the device was idle; the last command the step rates beside each of the two, and
those of one training while there was thought over those while there was none, which a machine whose speed drifts
cannot blur. Both change one learning rate after the other by next to nothing, so that all experiments of a lab do the
same work.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from core.contract import Proposal, View
from core.recipe import constants, replace

MARGIN = 2.0  # seconds around the end of the thought, and at both ends of a training, that belong to neither side
CONSTANTS = ("MATRIX_LR", "EMBEDDING_LR", "UNEMBEDDING_LR", "SCALAR_LR")


class Simulated:
    """Thinks, has its edit tried out as a paid researcher does, and proposes it."""

    name = "simulated"
    thinks_ahead = True

    def propose(self, view: View) -> Proposal:
        time.sleep(float(view.settings["budget"]) / 3)
        proposal = _next(view)
        problem = view.check(proposal.source)
        return Proposal(proposal.source, f"{proposal.description} {problem}".strip(), proposal.detail)


class Instant:
    """The same edits, without a thought."""

    name = "instant"

    def propose(self, view: View) -> Proposal:
        return _next(view)


def _next(view: View) -> Proposal:
    text = view.best_source.decode()
    turn = len(view.past) + sum("is being measured" in note for note in view.notes)
    name = CONSTANTS[turn % len(CONSTANTS)]
    value = float(constants(text)[name].value) * (1 + 0.0001 * turn)
    return Proposal(replace(text, {name: value}).encode(), f"turn {turn}: {name} {value:.6g}")


def rates(place: Path) -> dict[str, list[float]]:
    """Steps per second of a lab's scored experiments, by who proposed them."""
    from core.lab import Lab

    found = defaultdict(list)
    for e in Lab.open(place).ledger.experiments():
        if e.outcome and e.val_bpb:
            found[e.researcher].append(e.outcome["steps"] / e.outcome["training_seconds"])
    return found


def beside_thought(place: Path) -> list[float]:
    """For each untainted training beside which the next proposal was thought of: steps per second in its first third,
    while `Simulated` thinks, over those of the rest."""
    from core.lab import Lab

    lab, found = Lab.open(place), []
    budget = lab.settings.budget
    for e in lab.ledger.experiments():
        outcome = e.outcome or {}
        if e.researcher != Simulated.name or e.tainted or not e.val_bpb:
            continue
        seconds, steps = np.array(outcome["curve"])[:, :2].T

        def rate(start: float, end: float, seconds: np.ndarray = seconds, steps: np.ndarray = steps) -> float:
            done = np.interp([start, end], seconds, steps)
            return float(done[1] - done[0]) / (end - start)

        third = budget / 3
        found.append(rate(MARGIN, third - MARGIN) / rate(third + MARGIN, budget - MARGIN))
    return found


def main(places: Sequence[str]) -> None:
    for place in places:
        for who, found in rates(Path(place)).items():
            spread = stdev(found) if len(found) > 1 else 0.0
            print(f"{place}, {who}: {mean(found):.2f} steps/s over {len(found)}, standard deviation {spread:.2f}")
        ratios = beside_thought(Path(place))
        if len(ratios) > 1:
            error = stdev(ratios) / math.sqrt(len(ratios))
            told = f"{mean(ratios):.3f} ± {error:.3f} of the rate without thought, over {len(ratios)} trainings"
            print(f"{place}: {told}")


if __name__ == "__main__":
    main(sys.argv[1:])
