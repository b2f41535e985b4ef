"""A placebo night: real runs of candidates that change nothing but a comment or the seed. It should end as it began.

    autoresearch init labs/placebo --budget 5s
    python -m benchmarks.placebo labs/placebo --candidates 30
    autoresearch report labs/placebo

Everything is a real lab's: trainer, scorer, audits, early stopping, controls, verdicts. Beside each verdict stands what
upstream's rule would have done with the first run of the same candidate. Called again, it goes on with the next ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from core.errors import UserError
from core.executor import LocalExecutor
from core.lab import Lab
from core.ledger import Experiment
from core.loop import Loop

SEED = "spec.seed"  # what the shipped recipes begin their random numbers from


@dataclass(frozen=True)
class Placebo:
    """One candidate and what became of it. `gain` (bpb) and its standard error: nothing but noise made them."""

    number: int
    change: str
    status: str
    gain: float | None
    error: float | None
    runs: int
    simple: str  # what upstream's rule says of its first run
    reason: str


def placebo(source: str, number: int) -> tuple[str, str]:
    """(what changes, the recipe with it): by turns a comment and the seed. Raises `UserError` for a recipe whose seed
    is not found."""
    if number % 2:
        return f"a comment, {number}", f"{source}\n# placebo {number}\n"
    if SEED not in source:
        raise UserError(f"the recipe does not mention {SEED}, so its seed cannot be changed", "take a shipped recipe")
    return f"another seed, {number}", source.replace(SEED, f"({SEED} + {1000 * number})")


def night(lab: Lab, many: int) -> Iterator[Placebo]:
    """`many` placebos of the lab's first recipe, judged one after the other."""
    done = len(lab.ledger.experiments())
    source = (lab.source(1) if done else lab.best_source()).decode()
    loop = Loop(lab, None, LocalExecutor(), lambda event: None)  # by hand: of a researcher it takes no program twice
    for number in range(max(1, done), max(1, done) + many):
        change, candidate = placebo(source, number)
        yield outcome(loop.judge(candidate.encode(), change))


def outcome(e: Experiment) -> Placebo:
    record = e.verdict or {}
    runs, simple = int(record.get("runs", 0)), str(record.get("simple", ""))
    return Placebo(
        e.number, e.description, str(e.status), record.get("gain"), record.get("error"), runs, simple, e.reason
    )


def table(found: list[Placebo]) -> Table:
    shown = Table("#", "change", "verdict", "gain", "runs", "upstream's rule")
    for p in found:
        gain = "" if p.gain is None else f"{p.gain:+.6f} ± {p.error:.6f}"
        shown.add_row(str(p.number), p.change, p.status, gain, str(p.runs or ""), p.simple)
    return shown


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("lab", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--candidates", default=30, show_default=True, type=click.IntRange(1), help="How many are tried.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list of all candidates.")
def main(lab: Path, candidates: int, as_json: bool) -> None:
    console, found = Console(stderr=True), []
    with console.status("the baseline, and the first candidate") as status:
        for one in night(Lab.open(lab), candidates):
            found.append(one)
            status.update(f"{len(found)} of {candidates}: #{one.number}, {one.change}: {one.status}")
    if as_json:
        click.echo(json.dumps([asdict(p) for p in found], indent=1))
        return
    Console().print(table(found))
    kept, simple = (sum(getattr(p, name) == "keep" for p in found) for name in ("status", "simple"))
    click.echo(f"{kept} of {len(found)} kept; upstream's rule: {simple}")


if __name__ == "__main__":
    main()
