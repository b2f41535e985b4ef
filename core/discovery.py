"""Online control of false discoveries: how sure must one be of the next candidate, after all that was tried?

A night tries a hundred candidates. Each test may err; what is bounded is the share of errors among what is kept (the
false discovery rate). SAFFRON (Ramdas, Zrnic, Wainwright and Jordan, "SAFFRON: an adaptive algorithm for online control
of the false discovery rate", ICML 2018; built on LORD, Javanmard and Montanari, Annals of Statistics 2018) pays each
test's level from a wealth of error that a find refills, and charges only for candidates that look like no gain. What
falls at the first look is discarded without a charge, as in ADDIS (Tian and Ramdas, NeurIPS 2019): a level is therefore
one *given that the first look was passed*, which `core.sequential` accounts for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from scipy.special import zeta


@dataclass(frozen=True)
class Tested:
    """An earlier candidate. `passed`: the first look. `promising`: it lasted until a null candidate that passed would
    have been given up with probability 1 - lambda (SAFFRON's candidate event in a sequential test). `found`: the
    test concluded for it. `effect` (sds): the estimate at the end."""

    passed: bool
    promising: bool
    found: bool
    effect: float = 0.0


def level(tested: Sequence[Tested], alpha: float, wealth: float, decay: float, lambda_: float) -> float:
    """The level of the next test, given that it passes its first look: SAFFRON at false discovery rate `alpha`.

    `wealth` in (0, 1]: the part of alpha that is there at the start, and the most that a night of pure noise keeps
    anything with. `decay` > 1: the k-th test that is charged gets 1 / k ** decay of a wealth, made to sum to one.
    `lambda_` in (0, 1): see `Tested.promising`. Always in (0, lambda_]."""
    clock, finds = 0, []
    for one in tested:
        clock += one.passed and not one.promising
        if one.found:
            finds.append(clock)
    start = alpha * wealth
    refills = [alpha - start] + [alpha] * (len(finds) - 1)
    paid = start * _share(clock + 1, decay)
    paid += sum(refill * _share(clock + 1 - found, decay) for refill, found in zip(refills, finds))
    return min(lambda_, (1 - lambda_) * paid)


@lru_cache(maxsize=4096)
def _share(k: int, decay: float) -> float:
    """Of a wealth, what the k-th charge (from 1) after it gets."""
    return float(k**-decay / zeta(decay))


def expected_effect(tested: Sequence[Tested], least: float, most: float, shrink: float) -> float:
    """The gain (sds) to look for next: `shrink` times the mean of what was kept, from two keeps on. Estimates of what
    was kept are too high; `shrink` takes that back. It only says when to give up: it makes no false keep likelier."""
    kept = [one.effect for one in tested if one.found]
    if len(kept) < 2:
        return least
    tenths = round(10 * shrink * sum(kept) / len(kept))  # no finer, so that one night's bounds serve for the next
    return min(max(tenths / 10, least), max(least, most))
