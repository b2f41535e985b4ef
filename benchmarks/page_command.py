"""`autoresearch bench page`: one page of all machines whose results are there."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.results import Result, load
from console import places
from console.options import TypedPath, several_paths
from console.output import Screen
from console.words import plural
from core.errors import UserError
from core.paths import project_root

SENT = Path("benchmarks") / "results"  # what people sent by pull request


@click.command("page")
@click.argument("files", nargs=-1, type=TypedPath(), callback=several_paths, metavar="[FILE]...")
@click.option("--out", type=TypedPath(), default=Path("bench-page"), show_default=True, metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="For programs: JSON on stdout, errors too.")
def command(files: tuple[Path, ...], out: Path, as_json: bool) -> int:
    """A page with plots, PNGs and Markdown of many results; without FILE of those in benchmarks/results.

    Results of one work stand side by side, those of different work in parts of their own. A file that cannot be read is
    told and left out; the exit status is then 1.

    \b
    autoresearch bench page
    autoresearch bench page mine.json theirs.json --out report
    """
    from benchmarks.page import write

    screen = Screen(as_json)
    given = list(files) or sorted((project_root() / SENT).glob("*.json"))
    if not given:
        raise UserError(f"there are no results in {SENT}", "name files that `autoresearch bench` wrote")
    results: list[Result] = []
    left_out: dict[str, str] = {}
    for file in given:
        try:
            results.append(load(file))
        except UserError as error:
            left_out[places.spelled(file)] = str(error)
            click.echo(f"left out: {error}", err=True)
    if not results:
        raise UserError(f"none of {plural(len(given), 'file')} can be read", "see the lines above")
    written = write(results, out)
    screen.document({"files": written, "results": len(results), "left_out": left_out})
    screen.say(f"{plural(len(results), 'result')} on {places.spelled(written[0])}")
    return 1 if left_out else 0
