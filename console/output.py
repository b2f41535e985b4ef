"""Where a verb writes: people read stdout as text, programs read it as JSON; errors go to stderr."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from functools import cache
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

from console.verbs import VERBS

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "autoresearch"
_COMMAND = re.compile(rf"(?<![\w./\\-]){PROGRAM}(?= (?:--\w|(?:{'|'.join(VERBS)})\b))")
_ASCII = str.maketrans({"→": "->", "·": "-", "–": "-", "—": "-", "−": "-", "±": "+-", "…": "...", "²": "2", "×": "x",
                        "Δ": "delta", "≈": "~", "≤": "<=", "≥": ">=", "°": "", "✓": "+", "✗": "x", "○": "o",
                        "“": '"', "”": '"', "’": "'"})  # fmt: skip


def ascii_only(stream: Any = None) -> bool:
    """Whether the terminal cannot show more than ASCII for certain."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "ascii"
    return encoding.lower().replace("-", "") not in ("utf8", "utf16", "utf32")


def plain(text: str, stream: Any = None) -> str:
    """The text with its typographic signs spelled in ASCII where the stream needs that."""
    return text.translate(_ASCII) if ascii_only(stream) else text


def typed(text: str) -> str:
    """The text with its commands as they have to be typed here: README's first line calls the program by its path, in
    an environment that nobody has activated."""
    called = _called()
    return text if called == PROGRAM else _COMMAND.sub(lambda found: called, text)


@cache
def _called() -> str:
    """The program as it was called where a shell would not find it by its name alone."""
    from core.commands import quoted  # here, because a page of help loads nothing of core

    called = Path(sys.argv[0])
    if called.stem != PROGRAM or which(PROGRAM) is not None:
        return PROGRAM
    below = called.is_absolute() and called.is_relative_to(Path.cwd())
    word = quoted(f".{os.sep}{called.relative_to(Path.cwd())}" if below else sys.argv[0])
    return f"& {word}" if word.startswith('"') else word  # PowerShell would print a quoted word, and not run it


def tidy(value: Any) -> Any:
    """JSON has no NaN and no infinity: both become null. Paths become strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): tidy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(v) for v in value]
    return str(value) if isinstance(value, Path) else value


class Screen:
    """One verb's standard output. With `as_json`, all that is meant for people is left out."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        for stream in (sys.stdout, sys.stderr):
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:  # a description may hold what the terminal's encoding lacks
                reconfigure(errors="replace")
        self._console: Console | None = None

    @property
    def interactive(self) -> bool:
        """Whether a person watches: lines may be redrawn."""
        return not self.as_json and sys.stdout.isatty() and os.environ.get("TERM", "") != "dumb"

    @property
    def ascii(self) -> bool:
        return ascii_only()

    @property
    def width(self) -> int:
        return self.console.width

    @property
    def console(self) -> Console:
        if self._console is None:
            from rich.console import Console

            piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
            # Not cut for a pipe: `autoresearch log | grep LR` has to see the whole description.
            self._console = Console(highlight=False, markup=False, emoji=False, width=200 if piped else None)
        return self._console

    def say(self, text: str = "", style: str | None = None) -> None:
        """One or more lines for people; `style` never carries a meaning of its own."""
        if self.as_json:
            return
        if style is None:
            print(plain(typed(text)), flush=True)
        else:
            self.console.print(plain(typed(text)), style=style, soft_wrap=True)

    def show(self, renderable: Any) -> None:
        """A rich table or text for people."""
        if self.as_json:
            return
        if sys.stdout.isatty():
            self.console.print(renderable)
            return
        with self.console.capture() as captured:
            self.console.print(renderable)
        print("\n".join(line.rstrip() for line in captured.get().rstrip().splitlines()), flush=True)

    def document(self, value: Any) -> None:
        """The one JSON document of a verb."""
        if self.as_json:
            print(json.dumps(tidy(value), indent=1, ensure_ascii=True), flush=True)

    def line(self, value: Any) -> None:
        """One JSON line of a stream."""
        if self.as_json:
            print(json.dumps(tidy(value), ensure_ascii=True), flush=True)


def complain(kind: str, fact: str, action: str, as_json: bool) -> None:
    """An error, on stderr: one clear line for people, one JSON object for programs."""
    action = typed(action)
    if as_json:
        error = {"error": {"kind": kind, "fact": fact, "action": action}}
        print(json.dumps(error, ensure_ascii=True), file=sys.stderr, flush=True)
        return
    text = typed(" ".join(f"{fact}; {action}".split()) if action else " ".join(fact.split()))
    print(plain(f"error: {text}", sys.stderr), file=sys.stderr, flush=True)
