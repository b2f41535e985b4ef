"""Ratios of two sides that took turns, and how well they are known.

Method: the median of the ratios of single rounds, with the sign test's interval. Its ends are order statistics of the
ratios, and its coverage is a binomial's whatever they are distributed like (Conover, Practical Nonparametric
Statistics, 3.2). A round in which the machine changed its speed between two turns is an outlier, which a median bears.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

CONFIDENCE = 0.95


def ratios(base: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """other / base of each round that both took part in."""
    return [other[number] / value for number, value in base.items() if number in other and value > 0]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Of the median of what these were drawn from: 95 % at least. None with fewer than six, which tell too little."""
    from scipy.special import bdtr

    count, rank = len(values), 0  # of the order statistic that the interval begins with
    while rank < count / 2 and bdtr(rank, count, 0.5) <= (1 - CONFIDENCE) / 2:
        rank += 1
    if rank == 0:
        return None
    found = sorted(values)
    return found[rank - 1], found[-rank]


def unsure(values: Sequence[float]) -> float:
    """Half the width of that interval, as a share of the median; infinite where there is none."""
    found = interval(values)
    return (found[1] - found[0]) / 2 / statistics.median(values) if found else float("inf")


def unsure_sides(turns: Mapping[str, Mapping[int, Mapping[str, Any]]], figure: str) -> list[tuple[str, float]]:
    """(name, `unsure` of its ratio) of every side but the first; of a single side that of its own figures. `turns`: of
    each side what it told in each round. One that does not tell `figure` (upstream does not score) is left out."""
    told = {name: {n: turn[figure] for n, turn in of.items() if figure in turn} for name, of in turns.items()}
    first, *others = [one for one in told.items() if one[1]] or [("", {})]
    if not others:
        return [(first[0], unsure(list(first[1].values())))]
    return [(name, unsure(ratios(first[1], found))) for name, found in others]
