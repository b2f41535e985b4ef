"""Which lab a verb means, where a new one goes, and what its numbers were measured on."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.output import Screen
from console.rows import Row, Scale, Tally, by_number, rows, tally
from console.timeuse import uses
from core.commands import quoted
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


def command(verb: str, lab: Lab) -> str:
    """'autoresearch run labs/nov24': with the lab, as the last used one may be another by then, and a demo's is not
    gone on with unless it is named."""
    return f"autoresearch {verb} {quoted(spelled(lab.path))}"


def place(given: str) -> Path:
    """LAB as it was given -> folder: a path, else a name under ./labs; inside a lab also its own or one beside it."""
    direct = Path(given).expanduser()
    if len(direct.parts) > 1 or direct.is_absolute() or given in (".", ".."):
        return direct
    tagged = LABS / given
    if direct.exists() and not tagged.is_dir():
        return direct
    here = standing_in()
    if here is not None and not tagged.is_dir() and _is_lab(here.parent / given):
        return here.parent / given
    return tagged


def standing_in() -> Path | None:
    """The folder of the lab that one stands in."""
    return _around(Path.cwd())


def _around(folder: Path) -> Path | None:
    """The lab that a folder, which need not be there, lies in."""
    return next((lab for lab in (folder, *folder.parents) if _is_lab(lab)), None)


def _is_lab(folder: Path) -> bool:
    from core.lab import POINTER

    return (folder / POINTER).is_file()


def beside(folder: Path) -> list[str]:
    """Names of the labs that lie beside this place."""
    parent = folder.absolute().parent
    return sorted(lab.name for lab in parent.iterdir() if _is_lab(lab)) if parent.is_dir() else []


def mistyped(folder: Path) -> str | None:
    """The name of a lab beside this place that was probably meant. One that differs in its numbers only, or goes on
    after a whole name (nov24, nov25, nov24-wide), was not."""
    from difflib import get_close_matches

    def letters(name: str) -> str:
        return re.sub(r"[\d._-]", "", name)

    name = folder.name
    others = [lab for lab in beside(folder) if letters(lab) != letters(name) and not name.startswith(lab)]
    return next(iter(get_close_matches(name, others, 1, 0.75)), None)


def find(screen: Screen, given: str | None) -> Lab:
    """The lab that a verb means; says which one where it was not given. Raises `LabError`."""
    from core.lab import Lab

    if given and not place(given).exists():
        near = mistyped(place(given))
        hint = f"did you mean {near}? " if near else ""
        raise LabError(f"there is no lab {given} at {spelled(place(given))}", f"{hint}`autoresearch labs` lists all")
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
        folder = _usable(LABS / chosen)
    elif tag:
        raise UserError(f"LAB ({given}) and --tag ({tag}) both name the new lab", "give one of them")
    else:
        folder = _usable(place(given))
        chosen = check_tag(folder.resolve().name)
    if folder.exists() and not _empty(folder):
        raise UserError(f"{spelled(folder)} exists and is not empty", "choose another LAB or TAG, or `run` that one")
    if (lab := _around(folder.absolute())) is not None:
        raise UserError(
            f"no lab {chosen} is there, and none is made inside of another one, here {lab}",
            f"leave that folder (cd {quoted(lab.parent)}), or give a path outside of it",
        )
    return folder, chosen


def _usable(folder: Path) -> Path:
    from core.windows import unusable_name

    if sys.platform == "win32" and (bad := unusable_name(folder)):
        raise UserError(f"{bad!r} cannot be the name of a folder on Windows", "choose another, for example nov24")
    return folder


def holder(lab: Lab) -> int | None:
    """The process that runs the lab now; None: nobody."""
    from core import locks

    return locks.holder(lab.record / "run.lock")


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
    runs = holder(lab) is not None  # before the ledger is read: what ends meanwhile has left nothing open
    experiments, best, samples = lab.ledger.experiments(), lab.best(), by_number(lab.ledger.all_samples())
    found = rows(experiments, samples, runs)
    ablations = [s for a in lab.ledger.ablations() for s in a.runs]
    total = tally(found, best.number if best else None, uses(found, samples, ablations))
    return Picture(found, total, scale(lab), total.best)


def about(lab: Lab) -> dict[str, Any]:
    """The lab in every JSON document."""
    return {"tag": lab.tag, "path": str(lab.path), "record": str(lab.record), "scale": scale(lab).to_json()}
