"""A group-sequential test with an error-spending boundary: may one more look be taken, or is it decided?

A candidate is looked at again after each further run. Testing at 5 % each time would find something in noise much more
often than 5 %; so the allowed error is spent bit by bit, in proportion to the information gained (Lan and DeMets,
"Discrete sequential boundaries for clinical trials", Biometrika 1983). A lower line ends what has become hopeless:
Wald's of the sequential probability ratio test (1945). It is kept to, and so is counted in the boundary (a binding
futility boundary; Jennison and Turnbull, "Group Sequential Methods", 2000, chapters 4, 7 and 19).

Scales. Effects are in noise sds, positive is better. The difference of two means has the information I, one over its
variance (1/n + 1/m for n and m runs, unpaired), and the score S = I * difference. Under an effect d it is normal with
mean d * I and variance I, and its increments are independent, whichever of the two arms further runs went to
(Scharfstein, Tsiatis and Robins, JASA 1997). So only the information at each look matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

NODES = 40  # of the Gauss-Legendre rule: crossing probabilities are exact to 1e-6 relative to the level
FAR = 7.5  # standard deviations: beyond lies less than 1e-13
FURTHER = 40  # looks at most that are taken to follow
LEVEL_STEP = 0.1  # of the logarithm
WEAKEST = 0.025  # one-sided: no look concludes on less than this nominal level, however much may be spent


@dataclass(frozen=True)
class Design:
    """One test. `effect` (sds): the gain that the lower line is made for. `patience`: the log of Wald's lower ratio;
    with more of it hopeful ones go on longer. `first_patience`: the same for the first look, which most candidates do
    not pass. `information`: at which all error is spent and the test ends. `spending`: the power of the share of
    information that is the share of error spent by then (Kim and DeMets, Biometrika 1987)."""

    effect: float
    patience: float
    first_patience: float
    information: float
    spending: float = 1.0

    def lower(self, look: int, information: float) -> float:
        """The score below which look number `look` (from 0) ends the test."""
        patience = self.first_patience if look == 0 else self.patience
        return self.effect * information / 2 - patience / self.effect

    def passes(self, information: float) -> float:
        """How likely something without any gain passes the first look."""
        return float(ndtr(-self.lower(0, information) / math.sqrt(information)))


@dataclass(frozen=True)
class Look:
    """The bounds of one look, on the score's scale: below `lower` it is futile, from `upper` on it is shown.
    `survival`: how likely a null candidate that passed the first look is not futile by now."""

    lower: float
    upper: float
    survival: float


@dataclass(frozen=True)
class _State:
    """After a look: the bounds, the error spent so far, and the score's density for a null candidate that still runs:
    values and weights of a quadrature rule, both of shape (NODES,)."""

    look: Look
    spent: float
    values: NDArray[np.float64]
    weights: NDArray[np.float64]


def bounds(informations: Sequence[float], level: float, design: Design) -> Look:
    """The bounds of the last of these looks. `level`: how likely a null candidate may ever cross the upper one.

    The first look cannot conclude, only end. Raises `ValueError` for a level outside (0, 1) and for informations that
    do not rise: a look without anything new is not one."""
    if not 0 < level < 1:
        raise ValueError(f"{level} is not a level: between 0 and 1")
    if not informations or informations[0] <= 0 or any(b <= a for a, b in pairwise(informations)):
        raise ValueError(f"informations must be positive and rise from look to look: {list(informations)}")
    return _state(tuple(_rounded(i) for i in informations), _rounded_level(level), design).look


def _rounded(information: float) -> float:
    return float(f"{information:.6g}")


def _rounded_level(level: float) -> float:
    """Down to one of a few, so that the states of one candidate serve for others: at most a tenth of the level."""
    return math.exp(math.floor(math.log(level) / LEVEL_STEP) * LEVEL_STEP)


@lru_cache(maxsize=32768)
def _state(informations: tuple[float, ...], level: float, design: Design) -> _State:
    """By recursive integration (Armitage, McPherson and Rowe, JRSS A 1969)."""
    now, number = informations[-1], len(informations) - 1
    lower = design.lower(number, now)
    if number == 0:
        values, weights = _quadrature(lower, FAR * math.sqrt(now))
        return _State(Look(lower, math.inf, 1.0), 0.0, values, weights * _normal(values, now))
    before = _state(informations[:-1], level, design)
    step = now - informations[-2]
    may_spend = level * min(1.0, now / design.information) ** design.spending - before.spent
    upper = max(_upper(before, step, may_spend, now), lower)
    spent = before.spent + _crossing(before, step, upper)
    values, weights = _quadrature(lower, min(upper, FAR * math.sqrt(now)))
    weights = weights * (_normal(values[:, None] - before.values, step) @ before.weights)
    survival = (spent + float(weights.sum())) / design.passes(informations[0])
    return _State(Look(lower, upper, min(1.0, survival)), spent, values, weights)


def luck(informations: Sequence[float], level: float, design: Design, estimate: float) -> float:
    """By how much (sds) `estimate` is too high on average because the test concluded: what crosses a bound was lucky.

    The bias of the estimate given that the upper bound is crossed, at these looks or at later ones at the present pace,
    were the estimate the true effect (Whitehead, "On the bias of maximum likelihood estimation following a sequential
    test", Biometrika 1986; one step of his adjustment, which corrects too little rather than too much). At least 0."""
    path = list(informations)
    pace = max(path[-1] - path[-2], design.information / FURTHER)
    path += list(np.arange(path[-1] + pace, design.information, pace))
    rounded, down = tuple(_rounded(i) for i in path), _rounded_level(level)
    states = [_state(rounded[: k + 1], down, design) for k in range(len(path))]
    found = [
        _crossed(before, after, now - then, now)
        for (before, after), (then, now) in zip(pairwise(states), pairwise(rounded))
        if math.isfinite(after.look.upper)
    ]
    scores, weights, reached = (np.concatenate(part) for part in zip(*found))
    tilted = weights * np.exp(estimate * scores - estimate**2 * reached / 2)  # from no effect to this one
    return max(0.0, float(tilted @ (scores / reached) / tilted.sum()) - estimate)


def _crossed(before: _State, after: _State, step: float, now: float) -> tuple[NDArray[np.float64], ...]:
    """Of a look: scores above its upper bound, their weights under the null, and its information, each (NODES,)."""
    values, weights = _quadrature(after.look.upper, after.look.upper + FAR * math.sqrt(step))
    density = _normal(values[:, None] - before.values, step) @ before.weights
    return values, weights * density, np.full(NODES, now)


def _upper(before: _State, step: float, may_spend: float, now: float) -> float:
    """The bound that a null candidate crosses now with probability `may_spend`, not having done so before."""
    least, most = -float(ndtri(WEAKEST)) * math.sqrt(now), FAR * math.sqrt(now)
    if may_spend <= _crossing(before, step, most):
        return math.inf
    if may_spend >= _crossing(before, step, least):
        return least
    return float(brentq(lambda b: _crossing(before, step, b) - may_spend, least, most, xtol=1e-6 * math.sqrt(now)))


def _crossing(before: _State, step: float, bound: float) -> float:
    return float(before.weights @ ndtr((before.values - bound) / math.sqrt(step)))


def _normal(x: NDArray[np.float64], variance: float) -> NDArray[np.float64]:
    return np.exp(-x * x / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def _quadrature(low: float, high: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    nodes, weights = _rule()
    half = max(0.0, (high - low) / 2)
    return low + half * (nodes + 1), half * weights


@lru_cache(maxsize=1)
def _rule() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return nodes, weights
