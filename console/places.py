"""Which lab a verb means, where a new one goes, and what its numbers were measured on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.output import Screen
from console.rows import Row, Scale, Tally, by_number, rows, tally
from console.timeuse import uses
from core.errors import LabError, UserError

if TYPE_CHECKING:
    from core.lab import Lab

LABS = Path("labs")
NO_LAB = "autoresearch run --demo     (or: autoresearch init)"
_TAG = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.IGNORECASE)


def spelled(path: Path) -> str:
    """The path as the user would write it: from here where it lies below."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except (ValueError, OSError):
        return str(path)


def place(given: str) -> Path:
    """LAB as it was given -> folder: a path, else a tag under ./labs."""
    direct = Path(given).expanduser()
    if len(direct.parts) == 1 and not direct.is_absolute() and given not in (".", ".."):
        tagged = LABS / given
        if tagged.is_dir() or not direct.exists():
            return tagged
    return direct


def find(screen: Screen, given: str | None) -> Lab:
    """The lab that a verb means; says which one where it was not given. Raises `LabError`."""
    from core.lab import Lab

    lab, how = Lab.find(str(place(given)) if given else None)
    if given is None:
        screen.say(f"lab {lab.tag} ({how}): {spelled(lab.path)}")
    return lab


def find_or_none(given: str | None) -> tuple[Lab, str] | None:
    """Like `find`, for `run`: None where a lab has to be made."""
    from core.lab import Lab

    if given is not None:
        folder = place(given)
        return Lab.find(str(folder)) if folder.exists() and not _empty(folder) else None
    try:
        return Lab.find(None)
    except LabError:
        return None


def _empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def check_tag(tag: str) -> str:
    if not _TAG.fullmatch(tag) or tag.endswith((".lock", ".")) or ".." in tag:
        raise UserError(f"{tag!r} cannot name a lab", "use letters, digits, '-', '_' and '.', for example nov24")
    return tag


def default_tag(today: date | None = None) -> str:
    """nov24, as upstream names its runs."""
    day = today or date.today()
    months = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
    return f"{months[day.month - 1]}{day.day}"


def free_tag(wanted: str, parent: Path = LABS) -> str:
    """The tag, or tag-2, tag-3, ... where folders of that name are there."""
    if not (parent / wanted).exists():
        return wanted
    number = 2
    while (parent / f"{wanted}-{number}").exists():
        number += 1
    return f"{wanted}-{number}"


def new_folder(given: str | None, tag: str | None) -> tuple[Path, str]:
    """Where a new lab goes, and its tag. Raises `UserError` where something is there already."""
    if given is None:
        chosen = check_tag(tag) if tag else free_tag(default_tag())
        folder = LABS / chosen
    elif tag:
        raise UserError(f"LAB ({given}) and --tag ({tag}) both name the new lab", "give one of them")
    else:
        folder = place(given)
        chosen = check_tag(folder.resolve().name)
    if folder.exists() and not _empty(folder):
        raise UserError(f"{spelled(folder)} exists and is not empty", "choose another LAB or TAG, or `run` that one")
    return folder, chosen


def scale(lab: Lab) -> Scale:
    s = lab.settings
    return Scale(re.sub(r"-[0-9a-f]{8}$", "", s.data), s.sequence_len, s.budget, s.backend, s.device)


@dataclass(frozen=True)
class Picture:
    """A lab's ledger as screens show it."""

    rows: list[Row]
    total: Tally
    scale: Scale
    best: Row | None


def look(lab: Lab) -> Picture:
    experiments, best, samples = lab.ledger.experiments(), lab.best(), by_number(lab.ledger.all_samples())
    found = rows(experiments, samples)
    ablations = [s for a in lab.ledger.ablations() for s in a.runs]
    total = tally(found, best.number if best else None, uses(found, samples, ablations))
    return Picture(found, total, scale(lab), total.best)


def about(lab: Lab) -> dict[str, Any]:
    """The lab in every JSON document."""
    return {"tag": lab.tag, "path": str(lab.path), "record": str(lab.record), "scale": scale(lab).to_json()}
