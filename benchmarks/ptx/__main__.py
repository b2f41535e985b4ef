"""Every kernel as a card would run it, without one: python -m benchmarks.ptx --target 90"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from benchmarks.gpu import Order

ORDER = Order(rows=8, context=256, heads=2, head_dim=128, depth=2, vocab=1000, device="cpu")
KNOWN = ("75", "80", "86", "89", "90", "100", "120")
OLDER = 80  # what has no bfloat16


@click.command()
@click.option("--target", "targets", multiple=True, type=click.Choice(KNOWN), help="Compute capability; default: all.")
@click.option("--only", metavar="WORD", default="", help="Checks that have it in their name.")
@click.option("--head", type=click.IntRange(32, 128), default=128, show_default=True, help="Channels of a head.")
@click.option("--context", type=click.IntRange(38, 4096), default=256, show_default=True, help="Tokens of a row.")
@click.option(
    "--fences",
    type=click.Choice(["all", "stores"]),
    default="all",
    show_default=True,
    help="stores: none is asked for between cp.async and a product; Triton makes it from 3.8 on, for sm_100 from 3.9.",
)
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each check.")
def main(targets: tuple[str, ...], only: str, head: int, context: int, fences: str, as_json: bool) -> None:
    """Every kernel as Triton compiles it for a card, run on the CPU: the checks `correctness` of benchmarks.gpu.

    Outputs and gradients against float64, and a watch over memory, copies, fences and barriers, which ends a check with
    the line of the PTX. A target takes some minutes. The exit status is 1 if a check fails.

    \b
    python -m benchmarks.ptx --target 90
    python -m benchmarks.ptx --target 86 --head 64 --only attention
    python -m benchmarks.ptx --target 90 --context 2048 --only "attention, heads of 128" --json
    """
    from dataclasses import replace

    if why := obstacle():
        raise click.ClickException(why)
    order, done, failed = replace(ORDER, head_dim=head, context=context), 0, 0
    for target in targets or KNOWN:
        for row in rows(int(target), order, lambda name, _: only in name, fences):
            done += 1
            failed += not row.get("passed", "not measured" in row)
            click.echo(json.dumps(row) if as_json else told(row))
    if not done:
        raise click.UsageError(
            f"no check has {only!r} in its name; try --only attention, mlp, feed, norm, loss or muon"
        )
    raise SystemExit(1 if failed else 0)


def obstacle() -> str:
    """Why nothing can be compiled here; "" where it can."""
    if missing := [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed; Triton comes with torch on Linux: pip install torch triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 has kernels interpreted, and nothing is compiled; unset it"
    return ""


def rows(
    target: int, order: Order, wanted: Callable[[str, str], bool], fences: str = "all"
) -> Iterator[dict[str, Any]]:
    """What each check finds, with the kernels that ran, their instructions and the seconds that it took.

    wanted: of a check's name and dtype.
    """
    import torch

    from benchmarks import gpu_correctness
    from benchmarks.ptx import emulated

    first = torch.float16 if target < OLDER else torch.bfloat16
    named = {(name, dtype): check for name, check, dtype in gpu_correctness.checks(order, first) if dtype is not None}
    for (name, dtype), check in named.items():
        if not wanted(name, str(dtype)[6:]):
            continue
        torch.manual_seed(0)
        began = time.monotonic()
        with emulated(target, fences=fences) as launched:
            row = gpu_correctness.attempt(name, check, dtype)
        ran = {"kernels": sorted(set(launched)), "instructions": launched.instructions}
        yield {"target": target, **row, **ran, "seconds": round(time.monotonic() - began, 1)}


def told(row: dict[str, Any]) -> str:
    state = "----" if "not measured" in row else "PASS" if row.get("passed") else "FAIL"
    found = row.get("failed") or row.get("not measured") or f"error {row['error']:.1e}"
    ran = f"{row['instructions']:,} instructions of {', '.join(row['kernels']) or 'no kernel'}, {row['seconds']} s"
    return f"{state}  sm_{row['target']}  {row['dtype']:8}  {row['kernel']}: {found}; {ran}"


if __name__ == "__main__":
    main()
