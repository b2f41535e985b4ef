"""The file by which a folder is a lab, and which lab was used last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core import paths

POINTER = ".autoresearch.json"


def pointer_of(path: Path) -> dict[str, Any] | None:
    """The lab's pointer to its record; None where there is none that can be read."""
    try:
        found = json.loads((path / POINTER).read_bytes())
    except (OSError, ValueError):
        return None
    good = isinstance(found, dict) and all(
        isinstance(found.get(key), str) and found[key] and Path(found[key]).name == found[key]
        for key in ("record", "tag")
    )
    return found if good else None


def last_used() -> Path | None:
    file = paths.home() / "last-lab"
    try:
        last = Path(file.read_text("utf-8"))
    except OSError:
        return None
    return last if (last / POINTER).is_file() else None
