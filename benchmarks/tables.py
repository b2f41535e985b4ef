"""Results in a terminal: one column a backend, one line a metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import shown
from benchmarks.comparing import Column, Difference, columns, compare, letter
from benchmarks.metrics import METRICS, spread
from benchmarks.results import Result
from console.output import Screen, plain
from console.words import duration

MARKS = {"better": "better", "worse": "worse", "within noise": "same", "not told": "?"}


def show(screen: Screen, results: Sequence[Result]) -> None:
    """The machines, the table, what could not be compared, how to read it."""
    many = len(results) > 1
    for i, result in enumerate(results):
        name = f"{letter(i)}: " if many else ""
        quick = "quick bench" if result.quick else "bench"
        software = ", ".join(f"{k} {v}" for k, v in result.machine.software.items() if k in ("torch", "mlx", "driver"))
        screen.say(
            f"{name}{result.machine.label} ({software}), {quick} of {result.created}, {duration(result.seconds)}"
        )
    work = results[0].work
    screen.say(
        f"work {results[0].work_id}: profile {work.profile}, {work.params / 1e6:.1f}M parameters, {work.data}, context "
        f"{work.context}, {work.batch_tokens:,} tokens a step, {work.budget:g} s for val_bpb"
    )
    found = columns(results)
    if found:
        screen.show(table(found))
    for i, result in enumerate(results):
        for backend in result.backends:
            if backend.status != "measured":
                where = f"{letter(i)} " if many else ""
                why = "; ".join(backend.departs) or backend.reason
                screen.say(f"{where}{backend.name}: {backend.status}: {why}")
    if len(found) > 1:
        screen.say(f"ratios are against {found[0].label}; `same`: within noise, `?`: too few repeats to tell")
    for line in shown.attentions(results):
        screen.say(line)
    for result in results:
        for note in result.notes:
            screen.say(f"note: {note}")


def table(found: Sequence[Column]) -> Any:
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("")
    for column in found:
        made.add_column(column.label, justify="right")
    against = [{d.metric: d for d in compare(found[0], column)} for column in found[1:]]
    for metric in METRICS:
        if all(metric.value(column.backend) is None for column in found):
            continue
        cells = [metric.text(found[0].backend)]
        for column, differences in zip(found[1:], against, strict=True):
            cells.append(cell(metric.text(column.backend), differences[metric.name]))
        made.add_row(metric.name, *(plain(c) for c in cells))
        if metric.name == "tokens/s":
            made.add_row("  spread of repeats", *(plain(spread(column.backend)) for column in found))
    made.add_row("dtype", *(column.backend.dtype for column in found))
    made.add_row("parity", *(parity(column) for column in found))
    energy = [column.backend.energy for column in found]
    if all(e is None or e.joules_per_token is None for e in energy):
        made.add_row("energy", *(e.source if e else "-" for e in energy))
    return made


def cell(text: str, found: Difference) -> str:
    """ "9.4k (0.52x, worse)"."""
    if found.ratio is None:
        return text
    return f"{text} ({found.ratio:.2f}x, {MARKS[found.verdict]})"


def parity(column: Column) -> str:
    rows = [p for p in column.backend.parity if p.against == "reference"]
    if not rows:
        return "by its loss" if column.backend.parity else "-"
    return "PASS" if all(p.passed for p in rows) else "FAIL"
