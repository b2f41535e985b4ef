"""Numbers and moments as people read them. No dependency, so that every verb starts at once."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from typing import Any

_UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """'60', '60s', '5m', '8h', '1.5h' or '1h30m' -> seconds. Raises `ValueError` that says what is accepted."""
    compact = text.strip().lower().replace(" ", "")
    pieces = re.findall(r"(\d+(?:\.\d+)?|\.\d+)([a-z]*)", compact)
    rebuilt = "".join(number + unit for number, unit in pieces)
    if not pieces or rebuilt != compact or any(unit not in _UNITS for _, unit in pieces):
        raise ValueError(f"{text!r} is not a duration; write seconds or use a unit: 60, 60s, 5m, 8h, 1h30m")
    if len(pieces) > 1 and any(unit == "" for _, unit in pieces):
        raise ValueError(f"{text!r} mixes units and bare numbers; write for example 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in pieces)


def duration(seconds: float | None) -> str:
    """42 -> '42 s', 305 -> '5 min 05 s', 8000 -> '2 h 13 min'."""
    if seconds is None:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min" if minutes % 60 else f"{minutes // 60} h"
    return f"{minutes / 1440:.1f} days"


def roughly(seconds: float) -> str:
    """An estimate, to the minute where it takes some: 1279 -> '21 min'."""
    return duration(60 * round(seconds / 60) if seconds >= 90 else seconds)


def size(count: float | None) -> str:
    """Bytes in binary units: 1536 -> '1.5 KiB'."""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def count(number: float | None) -> str:
    """12345 -> '12.3k', 1234567 -> '1.23M'."""
    if number is None:
        return "?"
    for limit, divisor, unit in ((1e3, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e15, 1e9, "B")):
        if abs(number) < limit * 0.9995 or unit == "B":
            value = number / divisor
            return f"{value:.0f}{unit}" if not unit or abs(value) >= 99.95 else f"{value:.3g}{unit}"
    return f"{number:.3g}"


def bpb(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def delta(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def below(gain: float) -> str:
    """'0.0490 below the baseline'; of a loss 'above'."""
    return f"{abs(gain):.4f} {'below' if gain > 0 else 'above'} the baseline"


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def moment(iso: str | None) -> datetime | None:
    """The ledger's UTC time stamp as local time."""
    if not iso:
        return None
    parsed = datetime.fromisoformat(iso.replace("Z", "+00:00"))
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)).astimezone()


def clock(when: datetime | None, now: datetime | None = None) -> str:
    """'07:15', with the day where it is not today's."""
    if when is None:
        return "-"
    today = (now or datetime.now(when.tzinfo)).date()
    if when.date() == today:
        return f"{when:%H:%M}"
    if when.date() == today + timedelta(days=1):
        return f"tomorrow {when:%H:%M}"
    return f"{when:%b} {when.day} {when:%H:%M}"


def shorten(text: str, width: int) -> str:
    """At most `width` characters of the first line."""
    line = next(iter(text.strip().splitlines()), "")
    return line if len(line) <= width else line[: max(width - 3, 0)].rstrip() + "..."


_WHOLE = "\x00"  # stands for a blank that no line ends at


def wrapped(text: str, width: int) -> str:
    """Lines longer than `width` broken between words. What follows stands under the last column of the line's left
    half: columns are two blanks apart. A command between backquotes stays whole where it fits in a line."""
    return "\n".join(_wrapped(line, width) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = len(line) - len(line.lstrip())
    columns = [found.end() for found in re.finditer(r"(?<=\S) {2,}(?=\S)", line) if found.end() <= width // 2]
    hang = max([indent or 2, *columns])
    room = width - hang
    whole = re.sub(r"`[^`]+`", lambda m: m[0].replace(" ", _WHOLE) if len(m[0]) <= room else m[0], line)
    made = textwrap.fill(
        whole, max(width, hang + 20), subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False
    )
    return made.replace(_WHOLE, " ")


def computed_by(described: Mapping[str, Any]) -> dict[str, str]:
    """Of what a recipe says of itself, the kernels that compute it: {"kernels": "torch: triton is not installed"},
    {"attention over 256": "triton: ...", "mlp": "torch: ..."}; empty for a backend that has no choice."""
    return {
        name: said
        for name, said in described.items()
        if (name in ("kernels", "mlp") or name.startswith("attention over")) and isinstance(said, str) and said
    }


_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-~=+*#"


def sparkline(values: list[float], width: int = 40, ascii_only: bool = False) -> str:
    """A curve in one line of text; each column is the mean of its share of the values."""
    if not values:
        return ""
    bars = _ASCII_BARS if ascii_only else _BARS
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges) if b > a]
    low, span = min(means), max(means) - min(means)
    return "".join(bars[int((value - low) / span * (len(bars) - 1) + 0.5) if span else 0] for value in means)


def unfinished(left: int, cut_short: str, otherwise: str) -> str:
    """What is said of the runs that a confirmation leaves; "" where there is none and nothing has cut it short."""
    if cut_short:
        return f"ended early ({cut_short}), {plural(left, 'run')} to go: the same command goes on"
    return f"{plural(left, 'run')} came to no score that counts: {otherwise}" if left else ""
