"""What a run or a training shows while it goes on: one redrawn line for a person, plain lines for everything else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from console.keyboard import Keyboard
from console.looking import RATES, progress_parts
from console.output import Screen, plain, terminal_width
from console.words import duration, plural, shorten

if TYPE_CHECKING:
    from rich.live import Live

QUIET = 60.0  # seconds between two plain progress lines where nothing is redrawn
FRAMES = 5  # redrawings per second at most
BAR = ((100, 20), (60, 10))  # from so many columns on, so many signs of a bar
BESIDE = 12  # columns of a description below which it is left out
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Event(Protocol):
    """The referee's and the loop's."""

    @property
    def kind(self) -> str: ...

    @property
    def data(self) -> Mapping[str, Any]: ...


class Ticker:
    """The line of the running experiment. Enter it; feed it events; say lines above it."""

    def __init__(self, screen: Screen, heartbeat: float = QUIET, events: bool = False) -> None:
        self.screen = screen
        self._heartbeat = heartbeat
        self._events = events  # with --json: every progress event as a line too
        self._live: Live | None = None
        self._state: dict[str, Any] = {}
        self._title = self._description = ""
        self._spoken = time.monotonic()
        self._keyboard = Keyboard()
        self._hint: Callable[[bool], str] | None = None
        self._held = ExitStack()

    def __enter__(self) -> Ticker:
        if self.screen.interactive:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._render,
                console=self.screen.console,
                refresh_per_second=FRAMES,
                transient=True,
            )
            self._held.enter_context(self._keyboard)
            self._held.enter_context(self._live)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()
        self._live = None

    def listen(self, on_key: Callable[[str], None], hint: Callable[[bool], str]) -> None:
        """Keys that a person presses go to `on_key`; `hint`, told whether something runs, says what they do."""
        if self._live is not None and self._keyboard.is_there:
            self._keyboard.on_key, self._hint = on_key, hint

    def begin(self, title: str, description: str = "") -> None:
        """A new experiment; `title` stands before its progress, `description` behind it, as far as there is room."""
        self._title, self._description = title, description
        self._state = {}
        self._spoken = time.monotonic()

    def wait(self, what: str = "waits") -> None:
        """Nothing runs at the moment; why was said."""
        self.begin(what)

    def end(self) -> None:
        self._title, self._description, self._state = "", "", {}

    def say(self, line: str, style: str | None = None) -> None:
        """A line that stays."""
        if self._live is not None:
            self.screen.console.print(self.screen.laid_out(line), style=style, soft_wrap=True)
        else:
            self.screen.say(line, style if self.screen.interactive else None)
        self._spoken = time.monotonic()

    def feed(self, event: Event) -> None:
        """An event of the referee or of the loop."""
        if event.kind in ("phase", "progress"):
            data = dict(event.data)
            if event.kind == "phase":
                name = data.pop("phase", None) or data.pop("name", None)
                self._state = {"phase": name, **data}
            else:
                self._state.update(data)
            if self._events:
                self.screen.line({"event": event.kind, **event.data})
        self._beat()

    def line(self) -> str:
        """The present state in one line of text."""
        parts = progress_parts(self._state)
        return "  ".join(part for part in (self._title, ", ".join(parts), self._description) if part)

    def _beat(self) -> None:
        """Where nothing is redrawn, a sign of life now and then."""
        if self._live is None and not self.screen.as_json and time.monotonic() - self._spoken > self._heartbeat:
            self._spoken = time.monotonic()
            self.screen.say(f"     {self.line()}")

    def _render(self) -> Any:
        from rich.text import Text

        width = terminal_width()
        return Text("\n".join(plain(row) for row in self.rows(width)), no_wrap=True, overflow="crop")

    def rows(self, width: int) -> list[str]:
        """What is redrawn, each row within `width` columns: the progress, and below it what is tried and the keys."""
        mark = "" if self.screen.ascii else SPINNER[int(time.monotonic() * FRAMES) % len(SPINNER)] + " "
        head = mark + self._bar(next((signs for least, signs in BAR if width >= least), 0))
        parts, rates = progress_parts(self._state), progress_parts(self._state, RATES)
        if len(head + self._with_title(parts)) > width:  # how fast it goes is told first by how long it takes
            parts = [part for part in parts if part not in rates]
        line = head + self._with_title(parts)
        hint = self._hint(bool(self._state)) if self._hint else ""
        if not self._title and not self._state:
            return [shorten(mark + hint, width)] if hint else []
        if not hint:
            beside = shorten(self._description, width - len(line) - 2) if len(line) + 2 + BESIDE <= width else ""
            return [shorten(f"{line}  {beside}".rstrip(), width)]
        room = width - len(mark) - len(hint) - 2
        below = shorten(self._description, room) if room >= BESIDE else ""
        return [shorten(line, width), shorten(f"{' ' * len(mark)}{below}{'  ' if below else ''}{hint}", width)]

    def _with_title(self, parts: list[str]) -> str:
        return "  ".join(part for part in (self._title, ", ".join(parts)) if part)

    def _bar(self, signs: int) -> str:
        share = self._state.get("fraction")
        if not isinstance(share, int | float) or not signs:
            return ""
        full = round(min(max(share, 0.0), 1.0) * signs)
        return "[" + "#" * full + "." * (signs - full) + f"] {100 * min(share, 1.0):3.0f} %  "


def expected(budget: float, overheads: list[float], guess: float) -> float:
    """Seconds that one experiment takes: the budget and the usual overhead (median of those measured, else `guess`)."""
    if not overheads:
        return budget + guess
    ordered = sorted(overheads)
    return budget + ordered[len(ordered) // 2]


def finish_line(each: float, experiments: int | None, seconds: float | None, baseline: float = 0.0) -> str:
    """'about 7 experiments (31 s each), done in about 3 min 37 s' for limits in experiments, in seconds, in both or in
    none. `baseline`: seconds that it takes, as the first of the experiments; 0 where it is measured already."""
    took = f"{duration(each)} each" + (f"; the baseline {duration(baseline)}" if baseline else "")
    if experiments is None and seconds is None:
        return f"about {3600 / each:.0f} experiments an hour ({took}), until it is stopped"
    first = 1 if baseline else 0
    fits = max(1, first + max(0, int((seconds - baseline) / each))) if seconds is not None else None
    number = min(x for x in (experiments, fits) if x is not None)
    total = duration(baseline + (number - first) * each if experiments == number else seconds)
    return f"about {plural(number, 'experiment')} ({took}), done in about {total}"
