"""`autoresearch bench labs`: what the loop found on different hardware, and what of it transfers."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks import lab_page, lab_table
from benchmarks.lab_facts import LabFacts, dumps, load, of_lab, require_several
from benchmarks.writing import replace_text
from console import places
from console.options import TypedPath
from console.output import Screen
from console.words import duration, plural
from core.errors import UserError

if TYPE_CHECKING:
    from benchmarks.transfer import Run
    from core.hardware import Hardware


@click.command("labs")
@click.argument("labs", nargs=-1, metavar="LAB...")
@click.option("--export", type=TypedPath(), metavar="FILE", help="Write one lab as a file to be sent.")
@click.option("--transfer", is_flag=True, help="Run every lab's best under the others' settings, on this machine.")
@click.option("--home", metavar="TAG", help="With --transfer: under this lab's settings only.")
@click.option("--seeds", type=click.IntRange(1, 20), default=2, show_default=True, metavar="N", help="Of --transfer.")
@click.option("--page", type=TypedPath(), metavar="DIR", help="Write a page with plots, and Markdown.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@click.option("--json", "as_json", is_flag=True, help="For programs: JSON on stdout, errors too.")
def command(labs: tuple[str, ...], as_json: bool, export: Path | None, **options: Any) -> int:
    """What the loop kept in each of several labs, aligned by what was changed.

    A LAB is one of this machine, or a file that `--export` wrote on another. Labs of different text, context or budget
    are laid side by side, but their val_bpb are not compared. No lab is changed.

    \b
    autoresearch bench labs nov24 --export nov24.json
    autoresearch bench labs nov24 from-the-h100.json
    autoresearch bench labs nov24 from-the-h100.json --transfer --home nov24 --page out
    """
    screen = Screen(as_json)
    if export is not None:
        return _export(screen, labs, export)
    found = distinct([_read(given) for given in labs])
    require_several(found)
    lines = lab_table.align(found)
    if options["home"] and not options["transfer"]:
        raise click.UsageError("--home says where --transfer measures; give both")
    if not options["markdown"]:
        _show(screen, found, lines)
    runs, status = _transfer(screen, found, options["home"], options["seeds"]) if options["transfer"] else ([], 0)
    if options["markdown"]:
        screen.say(lab_page.markdown(found, lines, runs).rstrip())
    elif runs:
        screen.show(_table(lab_page.TRANSFER_HEADS, list(lab_page.transfers(runs, found))))
    written = lab_page.write(found, lines, runs, options["page"].expanduser()) if options["page"] else []
    screen.document(_document(found, lines, runs, written))
    if written:
        screen.say(f"page     {places.spelled(written[0])}")
    return status


# --- reading and showing --------------------------------------------------------------------------


def _read(given: str) -> LabFacts:
    """A lab by path or tag, or an exported file."""
    from core.hardware import probe
    from core.lab import Lab

    folder = places.place(given)
    if Path(given).expanduser().is_file():
        return load(Path(given).expanduser())
    lab = Lab.open(folder)
    try:
        return of_lab(lab, places.scale(lab).data, probe().summary())
    finally:
        lab.ledger.close()


def distinct(labs: Sequence[LabFacts]) -> list[LabFacts]:
    """Two labs of one tag (from two machines) get numbers, so that a column's head says which it is."""
    from dataclasses import replace

    seen: dict[str, int] = {}
    found = []
    for lab in labs:
        seen[lab.tag] = seen.get(lab.tag, 0) + 1
        found.append(replace(lab, tag=f"{lab.tag}-{seen[lab.tag]}") if seen[lab.tag] > 1 else lab)
    return found


def _export(screen: Screen, labs: Sequence[str], target: Path) -> int:
    if len(labs) != 1:
        raise click.UsageError(f"--export writes one lab, {len(labs)} were given")
    facts = _read(labs[0])
    target = target.expanduser()
    replace_text(target, dumps(facts))
    screen.document({"lab": facts.tag, "file": target, "kept": len(facts.kept), "tried": len(facts.tried)})
    screen.say(f"{facts.tag} with {plural(len(facts.tried), 'candidate')} written to {places.spelled(target)}")
    screen.say("it holds the recipes and their descriptions, no text that was trained on")
    return 0


def _show(screen: Screen, labs: Sequence[LabFacts], lines: Sequence[lab_table.Line]) -> None:
    for fact in [*lab_page.facts(labs), *lab_table.sentences(labs)]:
        screen.say(fact)
    if lines:
        screen.show(_table(lab_page.heads(labs), [lab_page.texts(line) for line in lines]))
    else:
        screen.say("no lab has kept anything yet")


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        made.add_column(head)
    for line in lines:
        made.add_row(*map(Text, line))
    return made


def _document(
    labs: Sequence[LabFacts], lines: Sequence[lab_table.Line], runs: Sequence[Run], written: Sequence[Path]
) -> dict[str, Any]:
    return {
        "labs": [
            {"tag": lab.tag, "backend": lab.settings["backend"], "machine": lab.machine, "scale": lab.scale(),
             "baseline_bpb": lab.baseline_bpb, "best_bpb": lab.best_bpb, "tried": len(lab.tried),
             "kept": [t.number for t in lab.kept], "again": asdict(lab.again) if lab.again else None,
             "disturbed": lab.disturbed} for lab in labs
        ],
        "notes": list(lab_table.sentences(labs)),
        "changes": [
            {"what": line.what, "together": line.verdict,
             "labs": {lab.tag: {"start": c.start, "end": c.end, "kept": list(c.kept), "gain": c.gain, "in_vain": c.lost}
                      for lab, c in zip(labs, line.cells, strict=True)}} for line in lines
        ],
        "transfer": [run.to_json() for run in runs],
        "files": list(written),
    }  # fmt: skip


# --- measuring ------------------------------------------------------------------------------------


def _transfer(screen: Screen, labs: Sequence[LabFacts], home: str | None, seeds: int) -> tuple[list[Run], int]:
    """(runs, exit status). Every home that can be run here, or the named one."""
    from benchmarks.transfer import transfer
    from console.awake import awake
    from console.display import Ticker
    from console.signals import ends
    from core.hardware import probe

    homes = _homes(screen, labs, home, probe())
    found: list[Run] = []
    stop = threading.Event()
    with awake(), Ticker(screen, heartbeat=15.0) as ticker, ends(stop.set) as asked:
        ticker.begin("transfer")
        for lab in homes:
            others = [other for other in labs if other is not lab]
            seconds = float(lab.settings["budget"]) * seeds * len(labs)
            ticker.say(f"at {lab.tag}: {seeds * len(labs)} runs, {duration(seconds)} of training; no lab is changed")
            found += transfer(lab, others, ticker.say, ticker.feed, stop, seeds)
    return found, asked.status or 0


def _homes(screen: Screen, labs: Sequence[LabFacts], home: str | None, hardware: Hardware) -> list[LabFacts]:
    """Labs whose settings can be run on this machine. UserError where the named one or none of them can."""
    from benchmarks.transfer import data_of
    from core.hardware import choose

    if home is not None and home not in [lab.tag for lab in labs]:
        raise UserError(f"no lab here is called {home!r}", f"given are: {', '.join(lab.tag for lab in labs)}")
    found, reasons = [], []
    for lab in labs:
        if home not in (None, lab.tag):
            continue
        try:
            choose(hardware, str(lab.settings["backend"]))
            data_of(lab)
            found.append(lab)
        except UserError as error:
            if home is not None:
                raise
            reasons.append(f"nothing is measured at {lab.tag}: {re.sub(r'[.;]$', '', str(error))}")
    for reason in reasons:
        screen.say(reason)
    if not found:
        raise UserError(f"none of {plural(len(labs), 'lab')} can be run here: {'; '.join(reasons)}",
                        "make a lab of one of these settings here, or leave --transfer out")  # fmt: skip
    return found
