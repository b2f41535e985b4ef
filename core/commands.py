"""Commands that a user is told to type: into sh, on Windows into PowerShell."""

from __future__ import annotations

import os
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


def beginning(word: str | Path) -> str:
    """As the first word of a command. PowerShell would print a quoted word, and not run it."""
    text = quoted(word)
    return f"& {text}" if text.startswith('"') else text


def python() -> str:
    """This Python, as a command begins."""
    return beginning(sys.executable)


def started() -> str:
    """What this process was started by, without the arguments: `.venv/bin/python -m prepare`, `python cli.py`; "" where
    that was no module and no file."""
    words, at = sys.orig_argv, 1
    while at < len(words) and words[at].startswith("-") and words[at] != "-m":
        if words[at].startswith("-c"):
            return ""
        at += 2 if words[at] in ("-X", "-W") else 1
    at += at < len(words) and words[at] == "-m"
    if at >= len(words):
        return ""
    own = not os.path.dirname(words[0]) and "UV_RUN_RECURSION_DEPTH" in os.environ  # noqa: PTH120 - as it was given
    first = "uv run python" if own else beginning(words[0])  # `uv run` puts it on the path of this process only
    return " ".join([first, *map(quoted, words[1 : at + 1])])


def pip_install(*what: str) -> str:
    return " ".join([python(), "-m", "pip", "install", *map(quoted, what)])


def setting(name: str, value: str) -> str:
    """Sets an environment variable for what is called later."""
    return f"$env:{name} = '{value}'" if sys.platform == "win32" else f"export {name}={value}"
