"""The memory of whole training steps, ours and upstream's, as PyTorch's own allocator counts it; no card is needed.

    python -m benchmarks.memory                     # upstream's shapes: 128 rows of 2048, depth 8, dim 512
    python -m benchmarks.memory --rows 64 --depth 9 --card h200
    python -m benchmarks.memory --upstream ~/autoresearch --upstream-python ~/autoresearch/.venv/bin/python
    python -m benchmarks.memory --recipe train.py   # and a candidate's, at the same shapes
    python -m benchmarks.memory --fa3               # and ours with FlashAttention 3 in the place of Triton's attention
    python -m benchmarks.memory --peak 20           # what is held when the most is held

Each side runs in a child of its own on a blank card (benchmarks/blank_card): what torch.compile and Triton make for
that card is launched and not run, and the allocator hands out what it would on a card, in the same order. Upstream's
recipe at its published shapes comes within 0.1 % of the peak that its README publishes of an H100. A peak here is the
allocator's, exactly; the figure of `nvidia-smi` has the driver's context in it, too.

Of a step is told what the allocator held at most (allocated) and took from the card (reserved), the most of the second
and third step; and what a step launches, copies and waits for. The loader's two waits are for its own earlier copies.
FlashAttention 3 is an operator that allocates what it does (benchmarks/memory_side.py), and upstream's norm keeps its
dtype, as in the torch 2.9.1 that upstream pins (`norm` in benchmarks/upstream_side.py): both give the
same peak. `--upstream-python` names an interpreter that has another torch, with numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import blank_card
from benchmarks.gpu import Order
from benchmarks.gpu_rtx import Shape
from core.errors import UserError
from core.paths import home, project_root

PUBLISHED = 45_060.2  # MiB, `peak_vram_mb` of the run that upstream's README shows
GOAL = 0.55  # share of it, at the same shapes
LIMIT = 1200.0  # seconds of one side, which compiles for one or two minutes
WITH_FLASH3 = "ours, fa3"  # the side
RECIPE = "recipe"  # the side of a candidate
RECIPE_HELP = "a train.py of the cuda backend, as a side of its own; it gets the same shapes"
COLUMNS = ("allocated", "reserved", "launches", "products", "waits", "to card", "bytes to card", "to host")

Row = dict[str, Any]


def side(name: str, order: Order, card: str, interpreter: str = sys.executable, top: int = 0) -> list[Row]:
    """What `benchmarks.memory_side` printed; UserError where it failed, with its last line."""
    return told("benchmarks.memory_side", name, order, card, interpreter, str(top))


def told(module: str, name: str, order: Order | Shape, card: str, interpreter: str, *more: str) -> list[Row]:
    """The lines of JSON that a side's module prints on a blank card."""
    child = [interpreter, "-m", module, name, json.dumps(asdict(order)), *more]
    command = [interpreter, "-m", "benchmarks.blank_card", card, "--", *child]
    environment = {**os.environ, "AUTORESEARCH_HOME": str(home()), "PYTHONPATH": str(project_root())}
    done = subprocess.run(
        command, cwd=project_root(), env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it printed nothing")
        raise UserError(f"{name}: exit status {done.returncode}, {last.strip()[:400]}", f"{interpreter} was used")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def step(rows: Sequence[Row]) -> Row:
    """A step once all is compiled: the third, with the higher peaks of the second and third."""
    second, third = (row for row in rows if row.get("step", 0) > 1)
    return third | {what: max(second[what], third[what]) for what in ("allocated", "reserved")}


def table(sides: dict[str, Row]) -> Iterator[str]:
    yield f"{'':22}" + "".join(f"{column:>15}" for column in COLUMNS)
    for name, row in sides.items():
        yield f"{name:22}" + "".join(f"{_cell(row[column]):>15}" for column in COLUMNS)


def _cell(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def ratios(sides: dict[str, Row], order: Order) -> Iterator[str]:
    if RECIPE in sides:
        yield f"{RECIPE} / ours: {sides[RECIPE]['allocated'] / sides['ours']['allocated']:.3f} allocated"
    own = {name: row for name, row in sides.items() if name != "upstream"}
    for name, row in own.items() if "upstream" in sides else ():
        yield f"{name} / upstream: {row['allocated'] / sides['upstream']['allocated']:.3f} allocated, " + (
            f"{row['reserved'] / sides['upstream']['reserved']:.3f} reserved"
        )
    if order == published():
        shares = ", ".join(f"{name} / published: {row['allocated'] / PUBLISHED:.3f}" for name, row in own.items())
        yield f"upstream as published, of a real H100: {PUBLISHED:,.1f} MiB; {shares}"
        yield f"the goal is {GOAL:g} of it, {GOAL * PUBLISHED:,.0f} MiB"


def with_recipe(order: Order, file: Path) -> Order:
    """UserError where there is no such file."""
    found = file.expanduser().resolve()
    if not found.is_file():
        raise UserError(f"{file} is no file", "give --recipe the train.py of a lab of the cuda backend")
    return replace(order, recipe=str(found))


def published() -> Order:
    """The shapes of upstream's published run."""
    return replace(Order(), rows=128, tokens=2**19)


def alive(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if "held before the step" in row:
            yield f"held before the step: {row['held before the step']:,.0f} MiB; beside it at the peak, in MiB:"
        elif "mib" in row:
            yield f"{row['mib']:9,.0f} {row['count']:4} x {row['each']:8,.1f}  {row['by']}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The memory of whole training steps, as PyTorch's allocator counts it, without a card."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=main.__doc__)
    parser.add_argument("--rows", type=int, default=128, help="that go through the model at once")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2**19, help="of an optimizer step")
    parser.add_argument("--card", choices=list(blank_card.CARDS), default="h100")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help=RECIPE_HELP)
    parser.add_argument("--fa3", action="store_true", help="ours with FlashAttention 3, too")
    parser.add_argument("--upstream", type=Path, help="a clone of karpathy/autoresearch")
    parser.add_argument("--upstream-python", default=sys.executable, help="an interpreter with the torch that it pins")
    parser.add_argument("--peak", type=int, default=0, metavar="N", help="list the N largest of what is held then")
    given = parser.parse_args(arguments)
    order = replace(Order(), rows=given.rows, depth=given.depth, tokens=given.tokens)
    if given.upstream:
        order = replace(order, upstream=str(given.upstream.expanduser().resolve()))
    try:
        found = {"ours": side("ours", order, given.card, top=given.peak)}
        if given.recipe:
            found[RECIPE] = side(RECIPE, with_recipe(order, given.recipe), given.card, top=given.peak)
        if given.fa3:
            found[WITH_FLASH3] = side(WITH_FLASH3, order, given.card, top=given.peak)
        if given.upstream:
            found["upstream"] = side("upstream", order, given.card, given.upstream_python, given.peak)
    except UserError as error:
        sys.exit(str(error))
    show(found, replace(order, upstream=""), blank_card.CARDS[given.card])


def show(found: dict[str, list[Row]], order: Order, card: blank_card.Card) -> None:
    sides = {name: step(rows) for name, rows in found.items()}
    model = f"depth {order.depth}, dim {order.dim}, vocabulary {order.vocab}"
    print(f"{order.rows} rows of {order.context}, {model}, {order.tokens:,} tokens a step; a blank {card.name}")
    for line in (*table(sides), *ratios(sides, order)):
        print(line)
    for name, rows in found.items():
        print(f"{name}: torch {sides[name]['torch']}; waits: {sides[name]['waited by'] or 'none'}")
        for line in alive(rows):
            print(line)


if __name__ == "__main__":
    main()
