"""`autoresearch bench compare`: result files side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks import comparing
from benchmarks.command import shown
from benchmarks.results import Result, load
from console.options import TypedPath, several_paths
from console.output import Screen
from core.errors import UserError


@click.command("compare")
@click.argument("files", nargs=-1, required=True, type=TypedPath(), callback=several_paths, metavar="FILE...")
@click.option("--page", type=TypedPath(), metavar="DIR", help="Also an HTML page, plots and Markdown.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print what was compared as JSON.")
def command(files: Sequence[Path], page: Path | None, markdown: bool, as_json: bool) -> None:
    """Lay results side by side: an H100, a Mac and a gaming PC on the same work.

    The first backend of the first file is what the others are held against. Different work is refused, with what
    differs; a difference within noise is called `same`.

    \b
    autoresearch bench compare h100.json mac.json
    autoresearch bench compare *.json --markdown
    """
    results = [load(file) for file in files]
    names = [file.name for file in files]
    comparing.require_equal_work(results, names)
    if not comparing.columns(results):
        raise UserError("nothing was measured in these files", "run `autoresearch bench` to make one")
    screen = Screen(as_json)
    screen.document(document(results, names))
    shown(results, screen, markdown, page)


def document(results: Sequence[Result], names: Sequence[str]) -> dict[str, Any]:
    found = comparing.columns(results)
    return {
        "work": asdict(results[0].work),
        "files": [{"file": n, "machine": asdict(r.machine)} for n, r in zip(names, results, strict=True)],
        "columns": [column.label for column in found],
        "base": found[0].label,
        "differences": {column.label: [asdict(d) for d in comparing.compare(found[0], column)] for column in found[1:]},
        "not_measured": [
            {"file": n, "backend": b.name, "status": b.status, "why": "; ".join(b.departs) or b.reason}
            for n, r in zip(names, results, strict=True)
            for b in r.backends
            if b.status != "measured"
        ],
    }
