"""report: the night as a page and a picture, and in a few lines here."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from console import places, tables
from console.output import Screen
from console.page import page
from console.picture import draw, title
from console.words import bpb, delta, duration
from core.errors import UserError

if TYPE_CHECKING:
    from core.lab import Lab


def report_verb(screen: Screen, given: str | None, out: Path | None) -> None:
    lab = places.find(screen, given)
    view = places.look(lab)
    if not view.rows:
        raise UserError(f"lab {lab.tag} has no experiment to report", "autoresearch run")
    folder = out.expanduser() if out else lab.path
    html, png = write(lab, view, folder)
    screen.document({
        "lab": places.about(lab), "html": str(html), "png": str(png), "total": view.total.to_json(),
        "kept": [r.to_json() for r in view.rows if r.kept],
    })  # fmt: skip
    if screen.as_json:
        return
    screen.say(f"{view.scale}; lower is better")
    screen.say(tables.tally_line(view.total))
    for r in [r for r in view.rows if r.kept][-12:]:
        screen.say(f"  #{r.number:<4} {bpb(r.val_bpb)}  {delta(r.delta) or 'baseline':<8} {r.description}")
    spent = sum(r.seconds or 0.0 for r in view.rows)
    uses = tables.uses_line(view.total)
    screen.say(f"{duration(spent)} of experiments" + (f"; {uses}" if uses else ""))
    screen.say(f"page     {places.spelled(html)}")
    screen.say(f"picture  {places.spelled(png)}")


def write(lab: Lab, view: places.Picture, folder: Path) -> tuple[Path, Path]:
    """report.html and report.png in the folder, each replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    diffs = {r.number: lab.diff(r.number) for r in view.rows if r.number > view.rows[0].number}
    made = f"{datetime.now():%d %B %Y, %H:%M}".lstrip("0")
    text = page(lab.tag, view.rows, view.scale, view.total, diffs, made)
    html, png = folder / "report.html", folder / "report.png"
    beside = folder / ".report.html.tmp"
    beside.write_text(text, encoding="utf-8")
    beside.replace(html)
    beside = folder / ".report.tmp.png"
    draw(view.rows, view.scale, title(lab.tag, view.rows), beside)
    beside.replace(png)
    return html, png
