"""report: the night as a page, a picture and a text; never trains anything."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from console import ablations, places, tables
from console.findings import Findings, findings, read
from console.markdown import answer, markdown
from console.output import Screen
from console.page import page
from console.picture import draw, title
from console.words import bpb, delta, duration
from core.errors import UserError


def report_verb(screen: Screen, given: str | None, out: Path | None) -> None:
    lab = places.find(screen, given)
    record = read(lab)
    if not record.rows:
        raise UserError(f"lab {lab.tag} has no experiment to report", "autoresearch run")
    found = findings(record)
    folder = out.expanduser() if out else lab.path
    html, png, text = write(found, folder)
    screen.document({
        "lab": places.about(lab), "html": str(html), "png": str(png), "markdown": str(text),
        "total": found.total.to_json(), "kept": [r.to_json() for r in found.rows if r.kept],
        "ablations": [ablations.to_json(k.without) for k in found.kept if k.without],
    })  # fmt: skip
    if screen.as_json:
        return
    screen.say(f"{record.scale}; lower is better")
    screen.say(tables.tally_line(found.total))
    for line in answer(found):
        screen.say(line)
    for r in [r for r in found.rows if r.kept][-12:]:
        what = f"{r.description}{', disturbed' * r.tainted}"
        screen.say(f"  #{r.number:<4} {bpb(r.val_bpb)}  {delta(r.delta):<8} {what}")
    uses = tables.uses_line(found.total)
    screen.say(f"{duration(found.time.busy)} of experiments" + (f"; {uses}" if uses else ""))
    screen.say(f"page     {places.spelled(html)}")
    screen.say(f"picture  {places.spelled(png)}")
    screen.say(f"text     {places.spelled(text)}")


def write(found: Findings, folder: Path) -> tuple[Path, Path, Path]:
    """report.html, report.png and report.md in the folder, each replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    made = f"{datetime.now():%d %B %Y, %H:%M}".lstrip("0")
    html, png, text = (folder / f"report.{kind}" for kind in ("html", "png", "md"))
    for file, content in ((html, page(found, made)), (text, markdown(found, made))):
        beside = folder / f".{file.name}.tmp"
        beside.write_text(content, encoding="utf-8")
        beside.replace(file)
    beside = folder / ".report.tmp.png"
    draw(found.rows, found.record.scale, title(found.record.tag, found.rows), beside, found.levels)
    beside.replace(png)
    return html, png, text
