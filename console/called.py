"""This program's commands, as they work in the shell that called it. Loads nothing: every page of help needs it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from console.verbs import VERBS

NAME = "autoresearch"
_COMMAND = re.compile(rf"(?<![\w/\\.-]){NAME}(?= (?:(?:{'|'.join(VERBS)}|--help)\b|\[OPTIONS\]))")


def as_called(text: str) -> str:
    """The text with this program's commands as they work in the shell that called it: a virtual environment that is not
    activated has `autoresearch` nowhere but at its path."""
    name = program()
    return text if name == NAME else _COMMAND.sub(lambda _: name, text)


@cache
def program() -> str:
    """What a command of this program begins with."""
    called = Path(sys.argv[0]) if sys.argv else Path(NAME)
    if called.name == "cli.py":  # python -m cli
        from core.commands import started

        return started() or NAME
    if called.name not in (NAME, f"{NAME}.exe") or not os.path.dirname(sys.argv[0]):  # noqa: PTH120 - as it was given
        return NAME  # a module, a test, a program that imports this
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # `uv run` puts it on the path of this process only
        return f"uv run {NAME}"
    found = shutil.which(NAME)
    if found and os.path.realpath(Path(found).with_suffix("")) == os.path.realpath(called.with_suffix("")):
        return NAME
    with suppress(ValueError, OSError):  # it lies elsewhere
        called = called.relative_to(Path.cwd())
    word = str(called) if len(called.parts) > 1 else f".{os.sep}{called}"
    if re.fullmatch(rf"[\w@%+=:,./{re.escape(os.sep)}-]+", word, re.ASCII):
        return word
    from core.commands import beginning

    return beginning(word)
