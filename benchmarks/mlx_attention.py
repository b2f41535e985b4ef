"""Training attention of the MLX recipe (keys sliced per query block) against the dense mask that MLX ports use.

    python -m benchmarks.mlx_attention
    python -m benchmarks.mlx_attention --context 2048 --rows 2 --block 64 --block 128 --block 256 --block 512

Forward and backward, each variant in a process of its own, rounds alternating; the dense side is MLX's
scaled_dot_product_attention with an additive mask of T x T. Both are compiled. The gradients are compared first.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import click
import numpy as np

from core.errors import UserError
from core.paths import project_root
from core.sandbox import preloaded

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest entry of a gradient
CHILD_SECONDS = 600


@dataclass(frozen=True)
class Case:
    """(rows, heads, context, head_dim) queries, keys and values; block 0 is the dense side."""

    rows: int
    heads: int
    context: int
    head_dim: int
    window: int  # tokens that each one looks back
    dtype: str
    block: int
    repeats: int


# --- one variant, in a process of its own ---------------------------------------------------------


def attention(case: Case) -> Callable[[Any, Any, Any], Any]:
    """q, k, v (B, H, T, D), scaled -> y."""
    import mlx.core as mx

    if case.block:
        recipe: Any = importlib.import_module("backends.mlx.train")
        recipe.QUERY_BLOCK = case.block
        found: Callable[[Any, Any, Any], Any] = recipe.make_attention(case.context, case.window)
        return found
    distance = mx.arange(case.context)[:, None] - mx.arange(case.context)
    mask = mx.where((distance >= 0) & (distance <= case.window), 0.0, -mx.inf).astype(getattr(mx, case.dtype))
    return lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)


def gradients(case: Case) -> tuple[Callable[[], list[Any]], Any]:
    """A function that makes (dq, dk, dv) for one fixed input, and MLX."""
    import mlx.core as mx

    shape, dtype = (case.rows, case.heads, case.context, case.head_dim), getattr(mx, case.dtype)
    keys = mx.random.split(mx.random.key(0), 4)
    q, k, v, dy = (mx.random.normal(shape, key=key).astype(dtype) for key in keys)
    q = q * case.head_dim**-0.5
    attend = attention(case)
    run = mx.compile(lambda q, k, v: mx.vjp(attend, [q, k, v], [dy])[1])
    mx.eval(q, k, v, dy)
    return lambda: run(q, k, v), mx


def child(case: Case) -> dict[str, Any]:
    run, mx = gradients(case)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())  # compiles
    seconds = []
    for _ in range(case.repeats):
        start = time.perf_counter()
        mx.eval(run())
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "memory": mx.get_peak_memory() - held}


def in_process(case: Case) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.mlx_attention", "--child", json.dumps(asdict(case))]
    done = subprocess.run(
        command,
        cwd=project_root(),
        env={**os.environ, **preloaded("mlx")},
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    if done.returncode:
        raise UserError(f"a variant failed: {done.stderr.strip()[-400:]}", "try smaller shapes")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- both -----------------------------------------------------------------------------------------


def differences(case: Case, block: int) -> float:
    """The largest difference of a gradient from the dense side's, as a share of its largest entry."""
    import mlx.core as mx

    ours, dense = (gradients(Case(**{**asdict(case), "block": b}))[0]() for b in (block, 0))
    pairs = [[np.array(x.astype(mx.float32)) for x in pair] for pair in zip(ours, dense, strict=True)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@click.command()
@click.option("--rows", default=4, show_default=True)
@click.option("--heads", default=2, show_default=True)
@click.option("--context", default=1024, show_default=True)
@click.option("--head-dim", default=128, show_default=True)
@click.option("--dtype", type=click.Choice(list(TOLERANCE)), default="float32", show_default=True)
@click.option("--block", "block_sizes", multiple=True, type=int, default=(64, 128, 256), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.option("--child", "order", hidden=True)
def main(
    rows: int,
    heads: int,
    context: int,
    head_dim: int,
    dtype: str,
    block_sizes: tuple[int, ...],
    rounds: int,
    repeats: int,
    as_json: bool,
    order: str | None,
) -> None:
    """Milliseconds and peak memory of attention forward and backward, per window and block size."""
    if order:
        click.echo(json.dumps(child(Case(**json.loads(order)))))
        return
    results = []
    for name, window in (("full", context), ("half", context // 2), ("eighth", context // 8)):
        dense = Case(rows, heads, context, head_dim, window, dtype, 0, repeats)
        sides = {b: Case(**{**asdict(dense), "block": b}) for b in (0, *block_sizes)}
        for block in block_sizes:
            if differences(dense, block) > TOLERANCE[dtype]:
                raise click.ClickException(f"blocks of {block} do not compute what the dense mask does ({name} window)")
        found: dict[int, list[dict[str, Any]]] = {b: [] for b in sides}
        for _ in range(rounds):
            for b, case in sides.items():
                found[b].append(in_process(case))
        for block in block_sizes:
            speed = statistics.median(d["seconds"] / o["seconds"] for d, o in zip(found[0], found[block], strict=True))
            results.append(
                {
                    "window": name,
                    "block": block,
                    "seconds": statistics.median(r["seconds"] for r in found[block]),
                    "dense_seconds": statistics.median(r["seconds"] for r in found[0]),
                    "speed": speed,
                    "memory": found[block][0]["memory"],
                    "dense_memory": found[0][0]["memory"],
                }
            )
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    click.echo(f"{rows} rows, {heads} heads of {head_dim}, {context} tokens, {dtype}; against the dense mask:")
    for r in results:
        click.echo(
            f"{r['window']:6} window, blocks of {r['block']:4}: {r['seconds'] * 1e3:7.1f} ms against "
            f"{r['dense_seconds'] * 1e3:7.1f}, {r['speed']:.2f}x; memory {r['memory'] / 2**20:6.1f} MiB, "
            f"{r['memory'] / r['dense_memory']:.2f}x"
        )


if __name__ == "__main__":
    main()
