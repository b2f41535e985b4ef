"""What a recipe may import from `kernels`, as kernels/README.md tells it: for whoever rewrites the recipe without
seeing this project's folders."""

from __future__ import annotations

import re

from core.paths import project_root

_IMPORTS = re.compile(rb"^\s*(?:from|import)\s+kernels\b", re.MULTILINE)


def text() -> str:
    return (project_root() / "kernels" / "README.md").read_text("utf-8")


def told(source: bytes) -> str:
    """The text for a recipe that imports some of it, "" for one that does not."""
    return text() if _IMPORTS.search(source) else ""
