"""labs: every lab that has a record here, with what it has reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from console import places, tables
from console.output import Screen
from core.errors import LabError


def labs_verb(screen: Screen) -> None:
    """The one that was last measured first. Looks only: none of them is the last used one afterwards."""
    found = sorted((_told(*known) for known in _known()), key=lambda told: told[0]["last"] or "", reverse=True)
    screen.document({"labs": [lab for lab, _ in found]})
    if not found:
        screen.say(f"No lab yet. Next: {places.NO_LAB}")
    for _, lines in found:
        for line in lines:
            screen.say(line)


def _known() -> list[tuple[Path, str]]:
    """(folder, tag) of every record."""
    from core import paths

    known = []
    for file in sorted(paths.records_root().glob("*/lab.json")):
        try:
            facts = json.loads(file.read_bytes())
            known.append((Path(facts["path"]), str(facts["tag"])))
        except (OSError, ValueError, KeyError, TypeError):  # of a lab that is being made or removed
            continue
    return known


def _told(folder: Path, tag: str) -> tuple[dict[str, Any], list[str]]:
    """A lab for programs and for people. `problem`: why it cannot be looked at; the rest is unknown then."""
    from core.lab import Lab

    try:
        lab = Lab.open(folder, used=False)
    except LabError as error:
        unknown = dict.fromkeys(("running", "backend", "scale", "total", "best", "last"))
        problem = {"tag": tag, "path": str(folder), "problem": error.fact, **unknown}
        return problem, [f"{tag}  {places.spelled(folder)}", f"  {error.fact}"]
    try:
        view, runs = places.look(lab), places.holder(lab) is not None
    finally:
        lab.ledger.close()
    known: dict[str, Any] = {
        "tag": lab.tag, "path": str(lab.path), "problem": None, "running": runs, "backend": lab.settings.backend,
        "scale": view.scale.to_json(), "total": view.total.to_json(),
        "best": view.best and {"number": view.best.number, "val_bpb": view.best.val_bpb},
        "last": max((r.finished for r in view.rows if r.finished), default=None),
    }  # fmt: skip
    reached = tables.tally_line(view.total) if view.total.experiments else "no experiment yet"
    where = f"{lab.tag}  {places.spelled(lab.path)}{'  (running)' if runs else ''}"
    return known, [where, f"  {reached}", f"  backend {lab.settings.backend}; {view.scale}"]
