"""Speed of one training step of a recipe, alone or against a peer's clone on the same machine.

    python -m benchmarks.step
    python -m benchmarks.step --peer ~/autoresearch      # a clone of karpathy/autoresearch
    python -m benchmarks.step --backend mlx --peer ~/autoresearch-mlx    # a clone of trevin-creator/autoresearch-mlx

Both train on the same shapes, on random tokens, each in a process of its own; with `--peer`, rounds alternate and the
ratio is taken within each round, so that whatever else the machine does hits both. The peer is the model and the
optimizer of its train.py as they stand, compiled and under bfloat16 autocast as there; only FlashAttention 3, which no
CPU has, is replaced by PyTorch's scaled_dot_product_attention.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np

from benchmarks.peers import PEER_NAMES, load_peer, rates, windowed_sdpa
from benchmarks.shapes import Shapes, Side
from core.errors import UserError
from core.paths import project_root
from core.sandbox import preloaded
from core.trees import own_peak

WARM_STEPS = 5
CHILD_SECONDS = 900  # a first compilation of the peer included


# --- one side, in a process of its own ----------------------------------------------------------


def measure(side: Side, shapes: Shapes) -> dict[str, Any]:
    """Seconds of each step, the mean split of a step, peak bytes of this process."""
    rng = np.random.default_rng(0)

    def tokens() -> np.ndarray:
        return rng.integers(0, shapes.vocab, (shapes.tokens // shapes.context, shapes.context + 1))

    for _ in range(WARM_STEPS):
        side.step(tokens())
    gc.collect()
    gc.freeze()
    seconds = []
    for _ in range(shapes.steps):
        batch = tokens()
        start = time.perf_counter()
        loss = side.step(batch)
        seconds.append(time.perf_counter() - start)
    if loss != loss:
        raise UserError("the loss is not a number", "the figures would mean nothing")
    parts: list[dict[str, float]] = []
    for _ in range(shapes.steps if side.split else 0):
        start = time.perf_counter()
        batch = tokens()
        data = time.perf_counter() - start
        parts.append({"data": data, **(side.split(batch) if side.split else {})})
    split = {name: statistics.median(p[name] for p in parts) for name in (parts[0] if parts else {})}
    return {"seconds": seconds, "split": split, "peak_memory": side.peak_memory(), "note": side.note}


def our_side(shapes: Shapes) -> Side:
    """The shipped recipe with these shapes."""
    import torch

    from backends.cpu.device import open_device
    from core.contract import Spec

    recipe = importlib.import_module("backends.cpu.train")
    for name, value in shapes.constants().items():
        setattr(recipe, name, value)
    device = open_device()
    training = recipe.build(Spec(shapes.vocab, shapes.context, shapes.vocab - 1, "cpu", device.dtype.value, 42, 0))
    shapes.require_dim(training.model.dim)

    def step(tokens: np.ndarray) -> float:
        batch = torch.from_numpy(tokens)
        return float(training.step(SimpleNamespace(next=lambda rows, length: batch), 0.0))

    def split(tokens: np.ndarray) -> dict[str, float]:
        times = [time.perf_counter()]
        loss = training.model.loss(torch.from_numpy(tokens))
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        training.update(0.0)
        times.append(time.perf_counter())
        spent = [after - before for before, after in itertools.pairwise(times)]
        return dict(zip(("forward and loss", "backward", "optimizer"), spent, strict=True))

    return Side(step, lambda: device.memory().peak, split=split)


def peer_side(shapes: Shapes, folder: Path, compiled: bool) -> Side:
    """Model and optimizer of an upstream clone's train.py, on the CPU, with PyTorch as it is set by default."""
    import torch

    attention = {"fa3": SimpleNamespace(flash_attn_func=windowed_sdpa)}
    peer = load_peer(folder / "train.py", attention, ("GPT", "GPTConfig", *PEER_NAMES))
    config = peer["GPTConfig"](
        sequence_len=shapes.context,
        vocab_size=shapes.vocab,
        n_layer=shapes.depth,
        n_head=shapes.dim // shapes.head_dim,
        n_kv_head=shapes.dim // shapes.head_dim,
        n_embd=shapes.dim,
        window_pattern=shapes.window_pattern,
    )
    torch.manual_seed(42)
    with torch.device("meta"):
        model = peer["GPT"](config)
    model.to_empty(device="cpu")
    model.init_weights()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a scaling factor
        optimizer = model.setup_optimizer(
            **rates(peer),
        )
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step(tokens: np.ndarray) -> float:
        batch = torch.from_numpy(tokens)
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()  # as its loader gives them
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(inputs, targets)
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return float(loss.detach())

    note = uncompiled_where_it_fails(peer, lambda: optimizer.step(), model)
    return Side(step, own_peak, note)


def uncompiled_where_it_fails(peer: dict[str, Any], optimizer_step: Callable[[], Any], model: Any) -> str:
    """Runs the optimizer once on zero gradients; fused functions run as plain Python where they do not compile.

    PyTorch 2.13 and 2.14 cannot compile upstream's `muon_step_fused` for a CPU (InductorError: KeyError 'buf10').
    """
    import torch
    from torch._inductor.exc import InductorError

    fused = {name: f for name, f in peer.items() if hasattr(f, "_torchdynamo_orig_callable")}
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    note = ""
    try:
        optimizer_step()
    except InductorError as error:
        failing = [name for name in fused if "muon" in name]
        peer.update({name: fused[name]._torchdynamo_orig_callable for name in failing})
        note = f"{', '.join(failing)} not compiled, as PyTorch {torch.__version__} fails on it: {error}".splitlines()[0]
        optimizer_step()
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
            p.grad = None
    return note


# --- both sides, from outside ---------------------------------------------------------------------


def in_process(side: str, shapes: Shapes, peer: Path | None, how: Mapping[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own. `how`: backend, compiled, dtype."""
    order = json.dumps({"side": side, "shapes": asdict(shapes), "peer": str(peer or ""), **how})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", "--child", order],
        cwd=project_root(),
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        env={**os.environ, **preloaded(how["backend"])},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no message")
        raise UserError(f"{side} ended with {done.returncode}: {reason.strip()}", "see that it runs by itself")
    found = json.loads(done.stdout.splitlines()[-1])
    found["tokens_per_second"] = shapes.tokens / statistics.median(found["seconds"])
    return found


def child(order: str) -> None:
    given = json.loads(order)
    shapes = Shapes(**given["shapes"])
    folder, ours = Path(given["peer"]), given["side"] == "ours"
    if given["backend"] == "mlx":
        from benchmarks import mlx_step

        dtype = given["dtype"]
        side = mlx_step.our_side(shapes, dtype) if ours else mlx_step.peer_side(shapes, folder, dtype)
    else:
        side = our_side(shapes) if ours else peer_side(shapes, folder, given["compiled"])
    click.echo(json.dumps(measure(side, shapes)))


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Over rounds: median tokens/s, lowest and highest, peak bytes, mean split."""
    speeds = [r["tokens_per_second"] for r in rounds]
    split = {name: statistics.median(r["split"][name] for r in rounds) for name in rounds[0]["split"]}
    return {
        "tokens_per_second": statistics.median(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
        "peak_memory": max(r["peak_memory"] for r in rounds),
        "split_seconds": split,
        "note": rounds[0]["note"],
    }


def show(name: str, found: dict[str, Any]) -> None:
    click.echo(
        f"{name:6} {found['tokens_per_second']:9,.0f} tokens/s  ({found['lowest']:,.0f} to {found['highest']:,.0f})"
        f"  peak {found['peak_memory'] / 2**20:,.0f} MiB"
    )
    if found["note"]:
        click.echo(f"         {found['note']}")
    for part, seconds in found["split_seconds"].items():
        click.echo(f"         {part:17} {seconds * 1e3:7.1f} ms")


@click.command()
@click.option("--depth", default=Shapes.depth, show_default=True)
@click.option("--dim", default=Shapes.dim, show_default=True)
@click.option("--head-dim", default=Shapes.head_dim, show_default=True)
@click.option("--context", default=Shapes.context, show_default=True)
@click.option("--vocab", default=Shapes.vocab, show_default=True)
@click.option("--tokens", default=Shapes.tokens, show_default=True, help="Tokens of one optimizer step.")
@click.option("--window-pattern", default=Shapes.window_pattern, show_default=True)
@click.option("--steps", default=Shapes.steps, show_default=True, help="Timed steps of one round.")
@click.option("--rounds", default=3, show_default=True, help="Rounds; the sides alternate.")
@click.option("--peer", type=click.Path(path_type=Path), help="Folder of an upstream clone to compare with.")
@click.option("--peer-eager", is_flag=True, help="Do not compile the peer's model (its optimizer still is).")
@click.option("--backend", type=click.Choice(["cpu", "mlx"]), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="With mlx: of both sides; else their own.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--child", "order", hidden=True)
def main(
    rounds: int,
    peer: Path | None,
    peer_eager: bool,
    backend: str,
    dtype: str | None,
    as_json: bool,
    order: str | None,
    **shape: Any,
) -> None:
    """Tokens per second of a recipe, and where a step's time goes."""
    if order:
        child(order)
        return
    shapes = Shapes(**shape)
    how = {"backend": backend, "compiled": not peer_eager, "dtype": dtype or ""}
    sides = ["ours"] + (["peer"] if peer else [])
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    try:
        for _ in range(rounds):
            for side in sides:
                found[side].append(in_process(side, shapes, peer, how))
    except UserError as error:
        raise click.ClickException(str(error)) from error
    result: dict[str, Any] = {"shapes": asdict(shapes), **{side: summary(found[side]) for side in sides}}
    if peer:
        ratios = [
            a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(found["ours"], found["peer"], strict=True)
        ]
        result["ratio"] = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(", ".join(f"{name} {value}" for name, value in asdict(shapes).items()))
    for side in sides:
        show(side, result[side])
    if peer:
        ratio = result["ratio"]
        click.echo(f"ratio  {ratio['median']:.2f}x  ({ratio['lowest']:.2f} to {ratio['highest']:.2f} by round)")


if __name__ == "__main__":
    main()
