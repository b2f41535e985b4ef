"""Where data, records and caches live: under AUTORESEARCH_HOME, else the platform's own place for data (on a
Mac ~/.autoresearch)."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def project_root() -> Path:
    """The folder that holds `core`, `backends`, ... and is the children's import path."""
    return Path(__file__).resolve().parent.parent


def home() -> Path:
    chosen = os.environ.get("AUTORESEARCH_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs  # here, because children in the sandbox do without it

    usual = Path(platformdirs.user_data_dir("autoresearch", appauthor=False))  # else Windows' has the name twice
    if " " not in str(usual) or usual.exists():
        return usual
    # A Mac's is below "Application Support", and torch.compile hands paths to the C++ compiler without quotes.
    # Elsewhere the space is in the user's own name, which this place does not avoid: only what is there already counts.
    short = Path.home() / ".autoresearch"
    return short if sys.platform == "darwin" or (short / "records").is_dir() else usual


def data_root() -> Path:
    """One folder for each prepared data set."""
    return home() / "data"


def records_root() -> Path:
    """One folder for each lab: ledger.sqlite, settings.json, logs/, best/, caches/."""
    return home() / "records"


def locks_root() -> Path:
    return home() / "locks"
