"""What whole training steps must move and compute, ours and upstream's, and how fast an H100 could do that at best.

    python -m benchmarks.traffic                            # upstream's shapes: 128 rows of 2048, depth 8, dim 512
    python -m benchmarks.traffic --upstream ~/autoresearch --top 20
    python -m benchmarks.traffic --recipe train.py          # and a candidate's, at the same shapes
    python -m benchmarks.traffic --tokens 262144 --json     # of an optimizer step

CALCULATED FROM REAL LAUNCHES; NO TIME WAS MEASURED. Each side runs on a blank card (benchmarks/blank_card), where what
torch.compile and Triton make for an H100 is launched and not run. Of every launch of the third step is told what it has
to read and write, each tensor once, and the FLOPs of its products (benchmarks/launches.py); that all the launches and
products that the card counted are among them is checked. A launch then takes the longer of bytes / bandwidth and
FLOPs / rate, and a moment to start: a floor, as none of the rates below is reached by every shape.

Not in it: instructions beside products (exponentials, conversions), occupancy, tiles that do not fill the card, gaps
that the host leaves, atomics beyond their tensors' bytes, what the cache spares between two launches or a kernel has to
read twice. Attention runs at FlashAttention 3's published rates on both sides; `--attention 0.8` gives ours that share
of them. The norms and rotations around it are launches of their own in upstream's, and with `--fa3`, ours with
FlashAttention 3 in the place of Triton's attention.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import Order
from benchmarks.gpu_rtx import Shape
from benchmarks.memory import RECIPE, RECIPE_HELP, WITH_FLASH3, published, told, with_recipe
from core.errors import UserError

CARD = "h100"
PUBLISHED = 300.0 / 943  # seconds of a step: upstream's README, 953 steps of which the first ten are not timed
GOAL = 1.15
PHASES = ("forward", "backward", "optimizer")
ATTENTION = ("attention forward", "attention backward")


@dataclass(frozen=True)
class Rates:
    """Of an H100 SXM, per second."""

    # 3.35e12 bytes as sold (NVIDIA, H100 datasheet); 0.9 of it is what large copies get.
    bandwidth: float = 0.9 * 3.35e12
    # 989.5e12 as sold; what cuBLAS reaches with large bfloat16 matrices, within the card's power.
    products: float = 675e12
    # Shah et al. 2024 (FlashAttention-3), figure 5: heads of 128, causal, 2,048 tokens.
    attention_forward: float = 521e12
    # Figure 6 has no causal one: 501e12 without a mask, times what the mask costs the forward (521 / 625).
    attention_backward: float = 418e12
    launch: float = 2e-6  # seconds from the end of a kernel to the start of the next one, an estimate

    def of(self, kind: str) -> float:
        return {ATTENTION[0]: self.attention_forward, ATTENTION[1]: self.attention_backward}.get(kind, self.products)


@dataclass(frozen=True)
class Sum:
    times: int
    bytes: int
    flops: int
    seconds: float


Row = dict[str, Any]  # of benchmarks.launches.Launch


def seconds(row: Row, rates: Rates) -> float:
    """The least that a launch takes."""
    most: float = max(row["bytes"] / rates.bandwidth, row["flops"] / rates.of(row["kind"]))
    return most + row["times"] * rates.launch


def summed(rows: Iterable[Row], rates: Rates) -> Sum:
    found = list(rows)
    times, count, flops = (sum(row[what] for row in found) for what in ("times", "bytes", "flops"))
    return Sum(times, count, flops, sum(seconds(row, rates) for row in found))


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By what it is; of passes over memory, and of the optimizer, by when."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        name = row["kind"]
        if row["phase"] == PHASES[2]:
            name = "optimizer"
        elif name == "passes over memory":
            name = f"passes over memory, {row['phase']}"
        found.setdefault(name, []).append(row)
    return found


def launched(
    name: str, order: Order | Shape, card: str = CARD, module: str = "benchmarks.traffic_side", *more: str
) -> tuple[list[Row], Row]:
    """All launches of a side's third step, and the module's last line. UserError where some are missing."""
    *rows, last = told(module, name, order, card, sys.executable, *more)
    if any(last["missing"].values()):
        raise UserError(f"{name}: not accounted for are {last['missing']} of {last['counted']}", "see launches.py")
    return rows, last


# --- telling ------------------------------------------------------------------------------------


def table(sides: dict[str, list[Row]], rates: dict[str, Rates]) -> Iterator[str]:
    groups = {side: grouped(rows) for side, rows in sides.items()}
    yield f"{'':30}" + "".join(f"{side:>12}{'GB':>9}{'TFLOP':>8}{'ms':>9}" for side in sides)
    for name in sorted({name for group in groups.values() for name in group}):
        yield f"{name:30}" + "".join(_cells(summed(groups[s].get(name, []), rates[s])) for s in sides)
    yield f"{'all':30}" + "".join(_cells(summed(rows, rates[side])) for side, rows in sides.items())


def _cells(of: Sum) -> str:
    return f"{of.times:12,}{of.bytes / 1e9:9.1f}{of.flops / 1e12:8.2f}{1e3 * of.seconds:9.2f}"


def compared(sides: dict[str, list[Row]], rates: dict[str, Rates], known: float | None) -> Iterator[str]:
    """The ratio of both floors, what share of FlashAttention 3's rate it takes, and upstream's time if it is known."""
    ours, theirs = (summed(sides[side], rates[side]).seconds for side in ("ours", "upstream"))
    yield f"upstream / ours: {theirs / ours:.3f}, both calculated; the goal is {GOAL:g}"
    if WITH_FLASH3 in sides:
        other = summed(sides[WITH_FLASH3], rates[WITH_FLASH3]).seconds
        yield f"upstream / {WITH_FLASH3}: {theirs / other:.3f}, too"
    if known is not None:
        beyond = known - theirs
        yield (
            f"upstream as published, of a real H100: {1e3 * known:.1f} ms; calculated are {1e3 * theirs:.1f}, "
            f"{theirs / known:.3f} of it"
        )
        yield (
            f"if ours too takes {1e3 * beyond:.1f} ms more than calculated: {1e3 * (ours + beyond):.1f} ms, "
            f"upstream / ours {known / (ours + beyond):.3f}"
        )
    attention = summed((r for r in sides["ours"] if r["kind"] in ATTENTION), Rates()).seconds
    rest = summed((r for r in sides["ours"] if r["kind"] not in ATTENTION), Rates()).seconds
    left = theirs / GOAL - rest
    share = f"{attention / left:.2f} of its rate" if left > 0 else "no rate of it would do"
    yield f"attention of ours, {1e3 * attention:.1f} ms at FlashAttention 3's rate: {GOAL:g} is missed below {share}"


def longest(rows: Sequence[Row], rates: Rates, top: int) -> Iterator[str]:
    """By name, shapes and phase, the most time first."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["name"][:70], row["phase"], row["shape"]), []).append(row)
    sums = sorted(((summed(group, rates), key) for key, group in found.items()), key=lambda x: -x[0].seconds)
    for of, (name, phase, shape) in sums[:top]:
        yield f"{1e3 * of.seconds:8.2f} ms{of.times:6,}{of.bytes / 1e9:8.2f} GB  {phase:10}{name}  {shape}"


def main(arguments: Sequence[str] | None = None) -> None:
    """What whole training steps must move and compute, and how fast an H100 could do that at best: calculated from
    real launches on a blank card; no time was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=128, help="that go through the model at once")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2**19, help="of an optimizer step")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help=RECIPE_HELP)
    parser.add_argument("--fa3", action="store_true", help="ours with FlashAttention 3, too")
    parser.add_argument("--upstream", type=Path, help="a clone of karpathy/autoresearch")
    parser.add_argument("--attention", type=float, default=1.0, help="our rate as a share of FlashAttention 3's")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="list the N that take longest")
    parser.add_argument("--json", action="store_true", help="every launch, and the sums")
    given = parser.parse_args(arguments)
    order = replace(Order(), rows=given.rows, depth=given.depth, tokens=given.tokens)
    if given.upstream:
        order = replace(order, upstream=str(given.upstream.expanduser().resolve()))
    try:
        orders = {"ours": order}
        if given.recipe:
            orders[RECIPE] = with_recipe(order, given.recipe)
        if given.fa3:
            orders[WITH_FLASH3] = order
        if given.upstream:
            orders["upstream"] = order
        found = {side: launched(side, of) for side, of in orders.items()}
    except UserError as error:
        sys.exit(str(error))
    own = replace(
        Rates(),
        attention_forward=given.attention * Rates().attention_forward,
        attention_backward=given.attention * Rates().attention_backward,
    )
    sides, rates = {side: rows for side, (rows, _) in found.items()}, dict.fromkeys(found, Rates())
    rates |= {side: own for side in ("ours", RECIPE) if side in sides}
    if given.json:
        print(json.dumps(_as_json(sides, rates)))
    else:
        show(sides, rates, order, given.top)


def _as_json(sides: dict[str, list[Row]], rates: dict[str, Rates]) -> Row:
    return {
        side: {
            "rates": asdict(rates[side]),
            "groups": {name: asdict(summed(group, rates[side])) for name, group in grouped(rows).items()},
            "all": asdict(summed(rows, rates[side])),
            "launches": [row | {"seconds": seconds(row, rates[side])} for row in rows],
        }
        for side, rows in sides.items()
    }


def show(sides: dict[str, list[Row]], rates: dict[str, Rates], order: Order, top: int) -> None:
    model = f"depth {order.depth}, dim {order.dim}, vocabulary {order.vocab}"
    print(f"{order.rows} rows of {order.context}, {model}, {order.tokens:,} tokens a step; an H100 at best")
    print("calculated from the launches on a blank card; no time was measured")
    for line in table(sides, rates):
        print(line)
    if RECIPE in sides:
        ours, theirs = (summed(sides[side], rates[side]).seconds for side in ("ours", RECIPE))
        print(f"{RECIPE} / ours: {theirs / ours:.3f} of the time, both calculated")
    if "upstream" in sides:
        for line in compared(sides, rates, PUBLISHED if replace(order, upstream="") == published() else None):
            print(line)
    for side, rows in sides.items() if top else ():
        print(f"{side}: what takes longest")
        for line in longest(rows, rates[side], top):
            print(line)


if __name__ == "__main__":
    main()
