"""Where a verb writes: people read stdout as text, programs read it as JSON; errors go to stderr."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.called import as_called
from console.words import wrapped

if TYPE_CHECKING:
    from rich.console import Console

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


def terminal_width() -> int:
    """Columns that a line may take; the last one stays free, as some terminals begin a new line after it."""
    return max(20, shutil.get_terminal_size().columns - 1)


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

    def say(self, text: str = "", style: str | None = None, wrap: bool = True) -> None:
        """One or more lines for people; `style` never carries a meaning of its own. On a terminal they are broken
        between words, unless `wrap` says that they have to stay as they are."""
        if self.as_json:
            return
        said = self.laid_out(text) if wrap else plain(text)
        if style is None:
            print(said, flush=True)
        else:
            self.console.print(said, style=style, soft_wrap=True)

    def laid_out(self, text: str) -> str:
        """As it is printed: in the stream's signs, with this program's name, and as wide as the terminal."""
        said = plain(as_called(text))
        return wrapped(said, terminal_width()) if sys.stdout.isatty() else said

    def commands(self, pairs: Sequence[tuple[str, str]]) -> None:
        """(command, what it does): what does not fit behind its command stands below it, as a command that is broken
        in two cannot be copied."""
        called = [(as_called(command), what) for command, what in pairs]
        room = terminal_width() if sys.stdout.isatty() else 10_000
        fits = [len(command) for command, what in called if len(command) + len(what) + 5 <= room]
        wide = max(fits, default=0)
        for command, what in called:
            apart = "   " if 2 + max(wide, len(command)) + 3 + len(what) <= room else "\n      "
            pad = wide if apart == "   " else 0
            self.say(f"  {command:<{pad}}{apart}{what}", wrap=False)

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
    if as_json:
        error = {"error": {"kind": kind, "fact": fact, "action": as_called(action)}}
        print(json.dumps(error, ensure_ascii=True), file=sys.stderr, flush=True)
        return
    text = " ".join(f"{fact}; {action}".split()) if action else " ".join(fact.split())
    said = plain(as_called(f"error: {text}"), sys.stderr)
    print(wrapped(said, terminal_width()) if sys.stderr.isatty() else said, file=sys.stderr, flush=True)
