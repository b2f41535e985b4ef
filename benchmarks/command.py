"""`autoresearch bench`: which machine, which backend, which kernel is better, on the same work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from console.options import Number, TypedPath

SUBCOMMANDS = {  # name -> (module with a click command called `command`, what it says in the help)
    "compare": ("benchmarks.compare_command", "Lay result files of several machines side by side."),
    "page": ("benchmarks.page_command", "One page of all machines whose results are there."),
    "kernels": ("benchmarks.kernel_command", "The kernels against their peers and the measured roofline."),
    "labs": ("benchmarks.labs", "What the loop found on different hardware, and what of it transfers."),
}


class Lazy(click.Group):
    """Loads a subcommand when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUBCOMMANDS:
            return None
        from importlib import import_module

        command: click.Command = import_module(SUBCOMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in SUBCOMMANDS.items()])


class RecipeOf(click.ParamType):
    """BACKEND=FILE."""

    name = "backend=file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        backend, sign, file = str(value).partition("=")
        if not (backend and sign and file):
            self.fail(f"{value!r} is not BACKEND=FILE, for example cpu=train.py", param, ctx)
        return backend, TypedPath().convert(file, param, ctx)


@click.group("bench", cls=Lazy, invoke_without_command=True)
@click.option("--backend", "wanted", multiple=True, metavar="NAME", help="Only these; default: all that run here.")
@click.option("--profile", metavar="NAME", help="tiny, small or gpu; default: what fits the machine.")
@click.option("--quick", is_flag=True, help="Two minutes on two cores: profile tiny, fewer rounds, one seed.")
@click.option("--fresh", is_flag=True, help="With --quick: compile anew, not with what an earlier bench has kept.")
@click.option("--upstream", type=TypedPath(), metavar="DIR", help="A clone of upstream, as a peer.")
@click.option("--recipe", "recipes", type=RecipeOf(), multiple=True, metavar="BACKEND=FILE", help="Another train.py.")
@click.option("--repeats", type=Number(int, 1), metavar="N", help="Rounds of turns; default: till ratios are known.")
@click.option("--seeds", type=Number(int, 0), metavar="N", help="Scored experiments; default 3, quick 1.")
@click.option("--out", type=TypedPath(), metavar="FILE", help="The result; default: here, by its date.")
@click.option("--page", type=TypedPath(), metavar="DIR", help="Also an HTML page, plots and Markdown.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def bench(ctx: click.Context, **options: Any) -> int | None:
    """Benchmark the backends of this machine against each other, on the same work.

    Each first proves that it computes the reference model; one that does not is shown with where it parts. Then speed,
    memory, start-up and energy, the loss after equal steps, and val_bpb in a fixed budget. The result is one file,
    without names of users or folders, that can be sent to someone.

    \b
    autoresearch bench --quick
    autoresearch bench --backend cpu --backend mlx
    autoresearch bench --upstream ~/autoresearch --page report
    autoresearch bench compare mine.json theirs.json
    """
    if ctx.invoked_subcommand is not None:
        return None
    from benchmarks.bench import bench_verb

    return bench_verb(**options)


def shown(results: Sequence[Any], screen: Any, markdown: bool, page: Path | None) -> None:
    """Results as their user wants to see them."""
    from benchmarks import tables

    if markdown and not screen.as_json:
        from benchmarks.markdown import table

        click.echo(table(results))
    else:
        tables.show(screen, results)
    if page is not None:
        from benchmarks.page import write

        for file in write(results, page):
            screen.say(f"wrote {file}")
