"""Folders that a cloud's client synchronises: it locks files while it copies them, and can damage SQLite's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

CLIENTS = ("Dropbox", "OneDrive", "Google Drive", "GoogleDrive", "iCloud", "Mobile Documents", "CloudStorage")
_VARIABLES = {"OneDrive": "OneDrive", "OneDriveConsumer": "OneDrive", "OneDriveCommercial": "OneDrive"}


def synced_by(folder: PurePath, environ: Mapping[str, str]) -> str:
    """The client's name, "" for none. By a folder's own name ("OneDrive - Company"), and by what OneDrive sets:
    it takes over Documents and Desktop, whose paths need not say so."""
    for part in folder.parts:
        for name in CLIENTS:
            if part == name or part.startswith((f"{name} ", f"{name}-", f"{name}~")):
                return name
    for variable, name in _VARIABLES.items():
        root = environ.get(variable)
        if root and type(folder)(root) in (folder, *folder.parents):
            return name
    return ""
