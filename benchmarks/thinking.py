"""What thinking costs the device: a researcher that thinks for a third of the budget, and one that does not think.

    autoresearch run LAB --budget 60s --experiments 30 --researcher benchmarks.thinking:Simulated
    autoresearch log LAB
    autoresearch run LAB --experiments 30 --researcher benchmarks.thinking:Instant
    python -m benchmarks.thinking LAB

`log` tells the share of the time that the device was idle; the last command the step rates beside each of the two. Both
change one learning rate after the other by next to nothing, so that all experiments of a lab do the same work.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from core.contract import Proposal, View
from core.recipe import constants, replace

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


def main(places: Sequence[str]) -> None:
    for place in places:
        for who, found in rates(Path(place)).items():
            spread = stdev(found) if len(found) > 1 else 0.0
            print(f"{place}, {who}: {mean(found):.2f} steps/s over {len(found)}, standard deviation {spread:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
