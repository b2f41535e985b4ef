"""What a backend compiled in one quick bench, kept for the next: two minutes are for rounds, not for the same compiler
run again.

MLX's build for CPUs compiles for half a minute, a quarter of a quick bench. What lies here is taken only for the same
recipe, profile, software and processor, and with it the seconds that compiling took from nothing and the day: a result
tells those, and says in a note that they were measured then. `--fresh` compiles anew, and so does every bench that is
not quick.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import code
from benchmarks.results import Machine
from benchmarks.work import BenchProfile
from core import caches, files, paths
from core.recipe import replace

LEAST_SECONDS = 2.0  # what is compiled in less is compiled each time
MOST = 6  # of different recipes, profiles or software; the oldest go
FACTS, CODE = "kept.json", "code"


@dataclass(frozen=True)
class Kept:
    """`seconds` that it took to compile from nothing, on the `day` (ISO)."""

    code: Path
    seconds: float
    day: str


def place(backend: str, recipe: Path, profile: BenchProfile, machine: Machine) -> Path:
    """The folder of what this backend compiles for this recipe here. It need not exist."""
    source = replace(recipe.read_text(encoding="utf-8"), profile.constants())
    what = [backend, source, asdict(profile), asdict(dataclasses.replace(machine, code=code([backend])))]
    key = hashlib.sha256(json.dumps(what, sort_keys=True, default=dict).encode()).hexdigest()[:16]
    return root() / f"{backend}-{profile.name}-{key}"


def root() -> Path:
    return paths.home() / "bench"


def find(folder: Path) -> Kept | None:
    """What is kept there; None where nothing is, or what cannot be read."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        kept = Kept(folder / CODE, float(facts["seconds"]), str(facts["day"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if kept.code.is_dir() else None


def keep(folder: Path, compiled: Path, seconds: float, day: str) -> None:
    """Keep what lies in `compiled`, if it took long enough. A disk that is full keeps nothing, and that is all."""
    if seconds < LEAST_SECONDS or not compiled.is_dir():
        return
    with suppress(OSError):
        root().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=root()) as made:
            new = Path(made) / folder.name
            caches.copy(compiled, new / CODE)
            (new / FACTS).write_text(json.dumps({"seconds": seconds, "day": day}), encoding="utf-8")
            files.remove(folder)
            new.rename(folder)
        _tidy()


def _tidy() -> None:
    """Only the newest few stay."""
    known = [f for f in root().iterdir() if (f / FACTS).is_file()]
    for old in sorted(known, key=lambda f: (f / FACTS).stat().st_mtime)[:-MOST]:
        files.remove(old)
