"""Commands that a user is told to type: into sh, on Windows into PowerShell."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path


def quoted(word: str | Path) -> str:
    """As one word. In double quotes on Windows, which PowerShell and cmd both take; only where it needs any."""
    text = str(word)
    if sys.platform != "win32":
        return shlex.quote(text)
    return text if re.fullmatch(r"[\w@%+=:,./\\~-]+", text) else f'"{text}"'


def python() -> str:
    """This Python, as a command begins."""
    word = quoted(sys.executable)
    return f"& {word}" if word.startswith('"') else word  # PowerShell would print a quoted word, and not run it


def pip_install(*what: str) -> str:
    return " ".join([python(), "-m", "pip", "install", *map(quoted, what)])


def setting(name: str, value: str) -> str:
    """Sets an environment variable for what is called later."""
    return f"$env:{name} = '{value}'" if sys.platform == "win32" else f"export {name}={value}"
