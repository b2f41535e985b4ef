"""Several researchers, `A+B`: turns go to what has paid, as gain per hour of the device.

Budgeted Thompson Sampling (Xia, Li, Qin, Yu and Liu, "Thompson Sampling for Budgeted Multi-armed Bandits", IJCAI 2015):
of each researcher's gains and of its costs a Beta posterior, both from a uniform prior; one draw of each, and the turn
goes to the largest ratio. It has no knobs. Gain and cost have to lie in 0..1:

- a gain is what an experiment took off the best in bits per byte, over the median of all gains that there were, 1 at
  most, so that one lucky jump at the start does not decide the night; nothing where nothing was kept;
- a cost is the time that the device was used, over the longest.

As in the paper both become 0 or 1 by a throw with that chance. All throws follow from the past experiments alone, so
that nothing has to be stored: the ledger is the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from core.contract import Past, Proposal, Researcher, View
from core.errors import UserError

SEED = 2015  # of the throws


class Turns:
    """A team of researchers. `name` is their names with "+" between."""

    def __init__(self, members: Sequence[Researcher]) -> None:
        names = [who.name for who in members]
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(
                f"{'+'.join(names)} is no team", "name two or more different researchers, as in claude+search"
            )
        self.members = list(members)
        self.name = "+".join(names)

    def turn(self, view: View, able: Sequence[Researcher]) -> Researcher:
        """Who of `able` proposes next."""
        paid = payoffs(view.past)
        dice = np.random.default_rng([SEED, len(view.past)])
        hopes = []
        for who in able:
            mine = [(gain, cost) for number, name, gain, cost in _thrown(paid) if name == who.name]
            gains, costs = sum(gain for gain, _ in mine), sum(cost for _, cost in mine)
            gain = dice.beta(1 + gains, 1 + len(mine) - gains)
            cost = dice.beta(1 + costs, 1 + len(mine) - costs)
            hopes.append(gain / max(cost, 1e-9))
        return able[int(np.argmax(hopes))]

    def propose(self, view: View) -> Proposal:
        """Whoever has the turn. The loop asks the members itself."""
        return self.turn(view, self.members).propose(view)


def payoffs(past: Sequence[Past]) -> list[tuple[int, str, float, float]]:
    """(number, who, gain 0..1, cost 0..1) of the experiments that members proposed, oldest first. A disturbed loss says
    nothing and is left out."""
    found = []
    for p in past:
        by, seconds = p.detail.get("by"), p.facts.get("seconds")
        kept = p.status in ("keep", "simplify") and p.val_bpb is not None and p.best_before is not None
        if not isinstance(by, str) or (p.tainted and not kept):
            continue
        gain = max(0.0, p.best_before - p.val_bpb) if kept and p.best_before and p.val_bpb else 0.0
        found.append((p.number, by, gain, float(seconds) if isinstance(seconds, int | float) else 0.0))
    usual = median([gain for _, _, gain, _ in found if gain > 0] or [1.0])
    longest = max([seconds for *_, seconds in found], default=0.0) or 1.0
    return [(number, by, min(1.0, gain / usual), seconds / longest) for number, by, gain, seconds in found]


def _thrown(paid: Sequence[tuple[int, str, float, float]]) -> list[tuple[int, str, int, int]]:
    """Gain and cost as 0 or 1; the same for the same experiment and figures."""
    thrown = []
    for number, by, gain, cost in paid:
        first, second = np.random.default_rng([SEED, 1, number]).random(2)
        thrown.append((number, by, int(first < gain), int(second < cost)))
    return thrown
