"""Times of two sides of `benchmarks.gpu` that do the same: ours and a peer."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import card_time
from benchmarks.gpu_correctness import NotMeasured, Row, first_line, of_a_reference
from kernels.errors import out_of_memory

REPEATS, WARMUP = (15, 3) if torch.cuda.is_available() else (1, 1)
ROUNDS = 2 if torch.cuda.is_available() else 1  # in which the sides take turns, the second from its other end
LAST_LEVEL_CACHE = 128 * 2**20  # bytes, more than any card has: inputs are rotated so that none lies in it

Side = tuple[str, Callable[[], Row]]


def milliseconds(run: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> float:
    """Median time of `run` over inputs that take turns; on a card by its own clock, with Python ahead of it."""
    on_a_card = torch.cuda.is_available()
    if on_a_card:
        card_time.wake()
    take = on_card if on_a_card else by_the_host
    times = [1e3 * take(partial(run, *inputs[i % len(inputs)])) for i in range(WARMUP + REPEATS)]
    return statistics.median(times[WARMUP:])


def on_card(call: Callable[[], Any]) -> float:
    return card_time.seconds(call, torch.device("cuda"))


def by_the_host(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def copies(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """As many sets of inputs as fill the last-level cache twice, at most eight."""
    first = make()
    size = sum(x.numel() * x.element_size() for x in first)
    return [first] + [make() for _ in range(min(7, 2 * LAST_LEVEL_CACHE // max(1, size)))]


def sides(ours: Side, peer: Side, others: Sequence[Side] = ()) -> Iterator[Row]:
    """What each measured, under its name, then how many times as long as ours the peer takes. Where the card is too
    small for ours, or for others of ours, that is a failure; where it is for the peer, there is no ratio."""
    found: dict[str, Row] = {}
    for name, measured in (ours, *others, peer):
        row: Row = {"side": name}
        try:
            with of_a_reference() if name == peer[0] else contextlib.nullcontext():
                row |= measured()
                found[name] = row
        except NotMeasured as why:
            row |= {"not measured": str(why)}
        except RuntimeError as failure:
            if not out_of_memory(failure):
                raise
            row |= {"failed": first_line(failure), "passed": False}
        yield row
        gc.collect()
    mine, other = (found.get(name) for name in (ours[0], peer[0]))
    if mine and other:
        yield ratio(ours, peer, mine, other)


def ratio(ours: Side, peer: Side, mine: Row, other: Row) -> Row:
    """From what they have measured, and from as many more rounds as make `ROUNDS`, each from its other end: a card's
    clock changes meanwhile, and first it favours one side, then the other. The rounds are told, if there were more."""
    times = [(mine["ms"], other["ms"])]
    while len(times) < ROUNDS:
        there = peer[1]()["ms"]
        times.append((ours[1]()["ms"], there))
    row: Row = {"side": "ratio", "speed": sum(theirs for _, theirs in times) / sum(own for own, _ in times)}
    if len(times) > 1:
        row["rounds"] = ", ".join(f"{theirs / own:.3f}" for own, theirs in times)
    return row | ({"memory": mine["mib"] / other["mib"]} if other.get("mib") else {})
