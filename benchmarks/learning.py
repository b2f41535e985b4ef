"""How much our recipe learns in equal steps beside upstream's: the same model, batch and text, each from its own start.

    python -m benchmarks.learning --upstream ~/autoresearch --data FOLDER    # a clone; what `prepare` made

On an NVIDIA card the `cuda` recipe at the shapes that upstream publishes, else the `rtx` recipe in plain torch at small
ones; both in bfloat16, as upstream. Three sides: upstream; ours with upstream's constants; ours with those that an H100
learns most by (backends/cuda/learning.py). Each seed has other weights and another part of the text. No time is
measured: what counts is the mean loss of the last ten steps, and of its difference from upstream's the mean over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT, Order, without_card
from core.data import Dataset
from core.errors import DataError
from core.files import replace_file

UPSTREAM, ALIKE, OURS = "upstream", "ours, upstream's constants", "ours"
SIDES = (UPSTREAM, ALIKE, OURS)
LAST = 10  # steps whose losses are averaged
PARTS = 4  # of the steps, after each of which there is a figure
ON_CPU = Order(rows=16, context=256, heads=2, head_dim=128, depth=4, tokens=4096, device="cpu")


# --- one training, in a process of its own ----------------------------------------------------


def train(side: str, order: Order) -> None:
    """Prints the loss of each of the order's steps."""
    import torch

    from benchmarks import gpu_sections

    if side == UPSTREAM:
        if order.device == "cpu":  # where torch cannot compile upstream's Muon it runs as it stands
            torch._dynamo.config.suppress_errors = True
        one = gpu_sections.upstream_step(order, gpu_sections.standing(order).call)
    else:
        module = gpu_sections.recipe(order)
        if side == OURS:
            vars(module).update(gpu_sections.learning())
        one = module.build(replace(gpu_sections.spec(order), dtype="bfloat16")).step
    tokens = gpu_sections.Tokens(order)
    for i in range(order.steps):
        print(json.dumps({"loss": float(one(tokens, i / order.steps))}), flush=True)


def in_process(side: str, order: Order) -> list[float]:
    """`train`, whose losses are told as they come. Ends the command where it fails."""
    command = [sys.executable, "-m", "benchmarks.learning", "--side", side, "--order", json.dumps(asdict(order))]
    losses: list[float] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complained:  # a pipe might fill
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=complained, text=True) as process:
            assert process.stdout is not None  # it is a pipe
            for line in process.stdout:
                if line.startswith('{"loss"'):
                    losses.append(json.loads(line)["loss"])
                    progress(side, order, losses)
        complained.seek(0)
        said = complained.read()
    if process.returncode or len(losses) != order.steps:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "no message")
        sys.exit(f"{side} ended after {len(losses)} of {order.steps} steps: {last}")
    return losses


def progress(side: str, order: Order, losses: Sequence[float]) -> None:
    if sys.stderr.isatty():
        end = "\n" if len(losses) == order.steps else ""
        print(
            f"\rseed {order.seed}, {side}: {len(losses)} of {order.steps}, {losses[-1]:.4f}  ", end=end, file=sys.stderr
        )


# --- over seeds -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learnt:
    """Of a side after some steps, over seeds."""

    steps: int
    side: str
    losses: list[float]  # nats a token, the mean of the last steps; one for each seed
    difference: float  # from upstream's of the same seed, the mean
    error: float | None  # standard error of that mean, of two seeds or more


def learnt(losses: Mapping[str, Sequence[Sequence[float]]]) -> list[Learnt]:
    """losses: of each side one row for each seed, a loss for each step."""
    found = []
    steps = len(losses[UPSTREAM][0])
    for part in range(1, PARTS + 1):
        after = steps * part // PARTS
        means = {
            side: [statistics.fmean(row[max(0, after - LAST) : after]) for row in rows] for side, rows in losses.items()
        }
        for side, own in means.items():
            differences = [a - b for a, b in zip(own, means[UPSTREAM], strict=True)]
            error = statistics.stdev(differences) / len(own) ** 0.5 if len(own) > 1 else None
            found.append(Learnt(after, side, own, statistics.fmean(differences), error))
    return found


def table(found: Sequence[Learnt]) -> str:
    lines = ["| steps | side | loss, each seed | less upstream's |", "| --- | --- | --- | --- |"]
    for one in found:
        error = "" if one.error is None else f" ± {one.error:.4f}"
        less = "" if one.side == UPSTREAM else f"{one.difference:+.4f}{error}"
        lines.append(f"| {one.steps} | {one.side} | {', '.join(f'{x:.4f}' for x in one.losses)} | {less} |")
    return "\n".join(lines)


def opened(data: Path) -> Dataset:
    try:
        return Dataset.open(data, verify="quick")
    except DataError as error:
        sys.exit(f"{data} is no data set: {error.fact}; `autoresearch prepare` makes one and says where")


def plan(order: Order, seed: int, seeds: int, tokens: int) -> Order:
    """Another start of the weights, and another of as many parts of the text as there are seeds."""
    return replace(order, seed=order.seed + seed, text=tokens // seeds * seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Losses of our recipe and of upstream's after equal steps on the same text, over seeds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=main.__doc__)
    parser.add_argument("--upstream", type=Path, help="a clone of karpathy/autoresearch")
    parser.add_argument("--data", type=Path, help="a data set that `prepare` made; upstream's has a vocabulary of 8192")
    parser.add_argument("--steps", type=int, default=200, help="default 200")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_argument("--out", type=Path, help="a file for all losses, as JSON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--order", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.side:
        train(given.side, Order(**json.loads(given.order)))
        return
    for option, folder in (("--upstream", given.upstream), ("--data", given.data)):
        if folder is None or not folder.is_dir():
            sys.exit(f"{option} is to be a folder, and {folder} is none" if folder else f"{option} is missing")
    if given.steps < PARTS or given.seeds < 1:
        sys.exit(f"--steps {given.steps} --seeds {given.seeds}: at least {PARTS} steps and one seed are needed")
    compare(given.upstream, given.data, given.steps, given.seeds, given.out)


def compare(upstream: Path, data: Path, steps: int, seeds: int, out: Path | None) -> None:
    dataset = opened(data)
    first = dataset.parts["train"].shards[0]  # from which batches are read
    tokens = first.size // dataset.token_dtype.itemsize
    order = Order() if not without_card() else replace(ON_CPU, recipe=str(ROOT / "backends" / "rtx" / "train.py"))
    order = replace(order, steps=steps, upstream=str(upstream), data=str(data), vocab=dataset.vocab_size)
    losses: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for seed in range(seeds):
        for side in SIDES:
            losses[side].append(in_process(side, plan(order, seed, seeds, tokens)))
        if out:
            told: dict[str, Any] = {"order": asdict(order), "seeds": seed + 1, "losses": losses}
            replace_file(out, json.dumps(told).encode())
    print(
        f"depth {order.depth} of {order.dim}, vocabulary {order.vocab}, {order.context} tokens of context, "
        f"{order.tokens:,} a step"
    )
    print(table(learnt(losses)))


if __name__ == "__main__":
    main()
