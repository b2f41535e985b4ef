"""`autoresearch bench kernels`: each part of the model against its peers, and against what the device can do at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks import kernel_table
from benchmarks.kernel_run import Found
from console import places
from console.options import TypedPath
from console.output import Screen
from core.errors import UserError

if TYPE_CHECKING:
    from benchmarks.results import Result

SECONDS, QUICK_SECONDS = 1.0, 0.2  # of each way of each case
KIND, SCHEMA = "autoresearch-bench-kernels", 1


@click.command("kernels")
@click.option("--backend", "wanted", multiple=True, metavar="NAME", help="Only these; default: all that run here.")
@click.option("--profile", metavar="NAME", help="tiny, small or gpu; default: what fits the machine.")
@click.option("--only", type=click.Choice(["attention", "mlp", "head", "optimizer"]), help="One part of the model.")
@click.option("--quick", is_flag=True, help="A fifth of the time for each, profile tiny.")
@click.option("--into", type=TypedPath(), metavar="FILE", help="Add them to a result of `bench`.")
@click.option("--page", type=TypedPath(), metavar="DIR", help="With --into: also its page, with roofline.")
@click.option("--json", "as_json", is_flag=True, help="Print what was measured as JSON.")
def command(
    wanted: tuple[str, ...],
    profile: str | None,
    only: str | None,
    quick: bool,
    into: Path | None,
    page: Path | None,
    as_json: bool,
) -> int:
    """Attention, MLP, head with loss and the optimizers: ours and their peers, forward and backward.

    Every way is first held to a reference in a wider type, then timed in turns with the others, on inputs that take
    turns as well, so that none lies in a cache. The peak of products and of memory is measured there and then: `of
    the roofline` is the share of what they allow.

    \b
    autoresearch bench kernels
    autoresearch bench kernels --backend cpu --only attention
    autoresearch bench kernels --into bench-tiny-2026-11-28.json --page report
    """
    screen = Screen(as_json)
    if page is not None and into is None:
        raise click.UsageError("--page shows kernels beside a result of `bench`: name it with --into")
    result = _result(into) if into else None
    found, machine = measured(screen, wanted, profile, only, quick)
    show(screen, found)
    screen.document(document(found, machine))
    if result is not None and into is not None:
        _add(screen, result, found, into, page)
    failed = [f for f in found if f.failed]
    wrong = [k for f in found for k in f.kernels if k.ours and not k.passed]
    return 1 if failed or wrong else 0


def measured(
    screen: Screen, wanted: Sequence[str], profile: str | None, only: str | None, quick: bool
) -> tuple[list[Found], dict[str, Any]]:
    """One after the other, each with its device held."""
    import backends
    from benchmarks import kernel_cases, kernel_run, running, work
    from benchmarks.machine import fingerprint
    from console.awake import awake
    from core import locks
    from core.hardware import probe

    hardware = probe()
    contenders = running.contenders(hardware, [*wanted], {}, None)
    chosen = work.profile(profile, hardware, contenders[0].name, quick)
    shape = kernel_cases.shape_of(chosen)
    screen.say(f"{hardware.summary()}; kernels of profile {chosen.name}: {shape.rows} rows of {shape.context} tokens, "
               f"{shape.heads} heads of {shape.head_dim}, depth {shape.depth}, vocabulary {shape.vocab}")  # fmt: skip
    found = []
    with awake():
        for contender in contenders:
            if contender.obstacle:
                found.append(Found(contender.name, failed=contender.obstacle))
                continue
            order = kernel_run.Order(contender.name, shape, QUICK_SECONDS if quick else SECONDS, only or "")
            with locks.hold_device(backends.device_name(contender.name, hardware)):
                found.append(kernel_run.measured(order, _stage(screen, contender.name)))
    return found, asdict(fingerprint(hardware, [c.name for c in contenders]))


def _stage(screen: Screen, backend: str) -> Any:
    def say(text: str) -> None:
        if not screen.as_json:
            click.echo(f"{backend}: {text}", err=True)

    return say


def show(screen: Screen, found: Sequence[Found]) -> None:
    """A table for each piece of work."""
    from rich.table import Table
    from rich.text import Text

    for one in found:
        for line in kernel_table.peak_lines(one.peaks):
            screen.say(line)
        for title, lines in kernel_table.cases(one.kernels, one.peaks):
            made = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
            for i, head in enumerate(kernel_table.HEADS):
                made.add_column(head, justify="right" if i else "left")
            for way in lines:
                made.add_row(*map(Text, way.texts))
            screen.say()
            screen.show(made)
        if one.failed:
            screen.say(f"{one.backend}: {one.failed}; what was measured before stands")


def document(found: Sequence[Found], machine: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "created": _today(),
        "machine": machine,
        "peaks": {key: asdict(peak) for one in found for key, peak in one.peaks.items()},
        "kernels": [asdict(k) for one in found for k in one.kernels],
        "failed": {one.backend: one.failed for one in found if one.failed},
    }


def _today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def _result(path: Path) -> Result:
    """Read before anything is measured: a damaged file must not cost minutes."""
    from benchmarks.results import load

    return load(path.expanduser())


def _add(screen: Screen, result: Result, found: Sequence[Found], into: Path, page: Path | None) -> None:
    """What was measured takes the place of older figures of the same backend."""
    from benchmarks.page import write
    from benchmarks.results import save

    fresh = {key for one in found for key in one.peaks}
    kept = [k for k in result.kernels if f"{k.backend}/{k.dtype}" not in fresh]
    peaks = {**result.kernel_peaks, **{key: peak for one in found for key, peak in one.peaks.items()}}
    if not fresh:
        raise UserError("no kernel was measured", f"{into} is as it was")
    joined = replace(result, kernels=[*kept, *(k for one in found for k in one.kernels)], kernel_peaks=peaks)
    save(joined, into.expanduser())
    screen.say(f"added to {places.spelled(into)}")
    if page is not None:
        for file in write([joined], page.expanduser()):
            screen.say(f"wrote {places.spelled(file)}")
