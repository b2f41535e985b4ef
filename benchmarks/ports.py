"""The RTX recipe's step against the usual path of ports to gaming PCs, on a card that is not there.

    python -m benchmarks.ports                         # an RTX 4060 of 8 GB, 16 rows of 2048 tokens, depth 8 x 512
    python -m benchmarks.ports --card 4090 --rows 32 --top 10
    python -m benchmarks.ports --clone ~/autoresearch-win-rtx     # that port's own step, too
    python -m benchmarks.ports --reached 0.9 --json    # products at 0.9 of the card's peak

Both sides are those of `benchmarks.gpu_rtx`, which measures them where there is a card: the same model, weights,
optimizer, batch and rows at once; the ports' side is eager, with a dense mask for every windowed layer, each layer
checkpointed, all logits at once. Here each runs in a child of its own on a blank card (benchmarks/blank_card). Ours is
there with nothing made again in backward, with the MLP's inside, with whole layers, and with as little as the goal of
memory asks for: "nothing+3" is the recipe's RECOMPUTE = "nothing" and RECOMPUTE_MORE = 3.

MEMORY IS EXACT: PyTorch's own allocator hands it out, in the order of a card. TIME IS CALCULATED FROM REAL LAUNCHES AND
NOT MEASURED (benchmarks/traffic.py): what each has to read, write and multiply, at shares of the card's bandwidth and
peak that are estimates, attention as fast as products on both sides. It favours the ports, as the time that the host
needs for their many launches, and the gaps between these, are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from backends.rtx.cards import known
from backends.rtx.memory import RECOMPUTES, peak, ways
from backends.rtx.memory import Shape as Model
from backends.rtx.profiles import BANDWIDTH, REACHED
from benchmarks import blank_card
from benchmarks.gpu_rtx import Shape, recipe
from benchmarks.traffic import Rates, Row, grouped, launched, longest, summed
from core.errors import UserError

PORTS, CLONE = "ports", "clone"
SPEED, MEMORY = 2.0, 0.6  # the goals: at least so many times as fast, at most so much of the memory
GROUPS = 34  # columns of a group's name


def side(name: str, shape: Shape, card: str, clone: str = "") -> tuple[list[Row], Row]:
    """All launches of a side's third step, and the last line."""
    return launched(name, shape, card, "benchmarks.ports_side", clone)


def constants_of(name: str) -> dict[str, Any]:
    """The recipe's constants of a side of ours: "hidden", or "nothing+3"."""
    recompute, _, more = name.partition("+")
    return {"RECOMPUTE": recompute, "RECOMPUTE_MORE": int(more or 0)}


def measured(shape: Shape, card: str, clone: str) -> dict[str, tuple[list[Row], Row]]:
    """All sides; ours from the fastest to the leanest."""
    others = [PORTS, *([CLONE] if clone else [])]
    sides = {name: side(name, shape, card, clone) for name in (*RECOMPUTES, *others)}
    goal = MEMORY * sides[others[-1]][1]["allocated"]
    for name in enough(shape, {name: last["allocated"] for name, (_, last) in sides.items()}, goal):
        sides[name] = side(name, shape, card)
        if sides[name][1]["allocated"] <= goal:
            break
        del sides[name]
    order = [f"{how}+{more}" if more else how for how, more in ways(shape.depth)] + others
    return {name: sides[name] for name in order if name in sides}


def enough(shape: Shape, held: Mapping[str, float], goal: float) -> Iterator[str]:
    """Sides of ours between those whose memory is known, `held`, of which the first may be within the goal, and no
    other of less time: by the memory model, corrected by what is known. None where nothing need be made again."""
    module = recipe(shape)
    constants = {"DEPTH": shape.depth, "ASPECT_RATIO": shape.ratio, "HEAD_DIM": module.HEAD_DIM}
    model = Model.of(constants, shape.vocab, shape.context)

    def predicted(how: str, more: int) -> float:
        return peak(model, shape.rows, how, shape.tokens, more=more)

    if held[RECOMPUTES[0]] <= goal:
        return
    for how, more in ways(shape.depth):
        if not more and held[how] <= goal:
            return  # this one is within it and known, and those before were not
        by = held[how] / predicted(how, 0)
        if more and predicted(how, more) * by <= goal:
            yield f"{how}+{more}"


def rates(card: str, reached: float, bandwidth: float) -> Rates:
    """Of a GeForce, by its table. UserError for a card that is in none."""
    blank = blank_card.CARDS[card]
    found = known(blank.name)
    if found is None:
        raise UserError(f"nothing is known of the speed of {blank.name}", "give a GeForce, as --card 4060")
    products = reached * found.flops
    return Rates(bandwidth * found.bandwidth, products, products, products)


def seconds(rows: Sequence[Row], at: Rates) -> float:
    return summed(rows, at).seconds


def table(sides: dict[str, tuple[list[Row], Row]], at: Rates) -> Iterator[str]:
    """A line for each side, with what it is of the clone's step, where that is given, else of the ports'."""
    other = CLONE if CLONE in sides else PORTS
    theirs, last = sides[other]
    columns = f"{'MiB':>10}{f'of {other}':>10}{'launches':>10}{'GB':>8}{'TFLOP':>8}{'ms':>9}{'speed':>8}"
    yield f"{'made again in backward':26}{columns}"
    for name, (rows, told_last) in sides.items():
        of = summed(rows, at)
        share, speed = told_last["allocated"] / last["allocated"], seconds(theirs, at) / of.seconds
        yield (
            f"{name:26}{told_last['allocated']:10,.0f}{share:10.3f}{of.times:10,}{of.bytes / 1e9:8.1f}"
            f"{of.flops / 1e12:8.2f}{1e3 * of.seconds:9.1f}{speed:7.2f}x"
        )
    yield f"the goals are {SPEED:g}x the speed and {MEMORY:g} of the memory"


def parted(sides: dict[str, tuple[list[Row], Row]], at: Rates) -> Iterator[str]:
    """Milliseconds of each side, by what a launch is."""
    groups = {name: grouped(rows) for name, (rows, _) in sides.items()}
    yield f"{'ms':{GROUPS}}" + "".join(f"{name:>10}" for name in sides)
    for group in sorted({group for found in groups.values() for group in found}):
        cells = (f"{1e3 * seconds(found.get(group, []), at):10.2f}" for found in groups.values())
        yield f"{group:{GROUPS}}" + "".join(cells)


def as_json(sides: dict[str, tuple[list[Row], Row]], at: Rates) -> dict[str, Any]:
    return {"rates": asdict(at)} | {
        name: {**last, "seconds": seconds(rows, at), "launches": rows} for name, (rows, last) in sides.items()
    }


def folder(given: str) -> Path:
    return Path(given).expanduser().resolve()


def main(arguments: Sequence[str] | None = None) -> None:
    """The RTX recipe's step against the usual path of ports, on a card that is not there: memory by PyTorch's own
    allocator, and the least time, calculated from real launches; no time was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ports", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    geforce = [name for name, card in blank_card.CARDS.items() if known(card.name)]
    parser.add_argument("--card", choices=geforce, default="4060")
    parser.add_argument("--rows", type=int, default=Shape.rows, help="that go through the model at once")
    parser.add_argument("--depth", type=int, default=Shape.depth)
    parser.add_argument("--tokens", type=int, default=Shape.tokens, help="of an optimizer step")
    parser.add_argument("--clone", type=folder, help="of jsegov/autoresearch-win-rtx, whose own step is told, too")
    parser.add_argument("--reached", type=float, default=REACHED, help="share of the peak that products reach")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="share of the memory's bandwidth")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="list the N launches that take longest")
    parser.add_argument("--json", action="store_true", help="every launch, and the sums")
    given = parser.parse_args(arguments)
    shape = replace(Shape(), rows=given.rows, depth=given.depth, tokens=given.tokens)
    try:
        at = rates(given.card, given.reached, given.bandwidth)
        sides = measured(shape, given.card, str(given.clone or ""))
    except UserError as error:
        sys.exit(str(error))
    if given.json:
        print(json.dumps(as_json(sides, at)))
    else:
        for line in lines(sides, shape, at, given):
            print(line)


def lines(sides: dict[str, tuple[list[Row], Row]], shape: Shape, at: Rates, given: argparse.Namespace) -> Iterator[str]:
    """All that is told to people."""
    card, model = blank_card.CARDS[given.card].name, f"depth {shape.depth} x {shape.depth * shape.ratio}"
    batch = f"{shape.tokens:,} tokens a step"
    yield f"{shape.rows} rows of {shape.context}, {model}, vocabulary {shape.vocab}, {batch}; a blank {card}"
    shares = f"{given.reached:g} of the peak and {given.bandwidth:g} of the bandwidth"
    yield f"memory by PyTorch's allocator; time calculated at {shares}, not measured"
    yield from table(sides, at)
    yield from parted(sides, at)
    for name, (rows, _) in sides.items() if given.top else ():
        yield f"{name}: what takes longest"
        yield from longest(rows, at, given.top)


if __name__ == "__main__":
    main()
