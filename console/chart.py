"""The night as SVG: every experiment, the running best with its band; and small plots of intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from console.findings import Findings, Level
from console.picture import crowd, scored, window
from console.rows import Row
from console.words import bpb, delta, duration, shorten

BOTTOM, TOP = 42, 16


@dataclass(frozen=True)
class Frame:
    """The size of a chart in its own units, and where things stand in it."""

    width: int
    height: int
    left: int
    names: int  # units that are kept free for names at the right edge
    first: int
    last: int
    low: float
    high: float

    def x(self, number: float) -> float:
        span = max(self.last - self.first, 1)
        return self.left + 14 + (number - self.first) / span * (self.width - self.left - 20 - self.names)

    def y(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return TOP + (self.high - inside) / (self.high - self.low) * (self.height - TOP - BOTTOM)


def charts(found: Findings) -> str:
    """Two of the same: a wide one with names, and one that can be read on a phone. The page shows the one that fits."""
    rows = found.rows
    if not scored(rows):
        return '<p class="soft">No experiment has a score yet, so there is nothing to draw.</p>'
    low, high = window(rows, found.levels)
    ends = min(r.number for r in rows), max(r.number for r in rows)
    broad, narrow = Frame(1120, 470, 62, 120, *ends, low, high), Frame(400, 330, 50, 8, *ends, low, high)
    wide, small = chart(found, broad, True), chart(found, narrow, False)
    return f'<div class="broad">{wide}</div><div class="narrow">{small}</div>'


def chart(found: Findings, frame: Frame, named: bool) -> str:
    """Every mark links to its line in the table and names itself. `named`: descriptions beside what was kept, else
    numbers."""
    rows = found.rows
    parts = [_axes(frame, 7, 10 if named else 5)]
    decided = [r for r in rows if r.decided]
    last = decided[-1].number if decided else frame.last
    parts += [band(found.levels, last, frame), line(found.levels, last, frame)]
    parts += [_drift(level, frame) for level in found.levels if level.first != level.number]
    parts += [_mark(r, frame, 6 if named else 5) for r in decided]
    apart = (frame.last - frame.first or 1) / (30 if named else 12)
    parts += [_name(r, frame, named) for r in crowd(rows, apart)]
    label = "val_bpb of every experiment, and the best so far with its 95 % band"
    return f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def nice_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers inside [low, high]."""
    from math import ceil, floor, log10

    if not high > low:
        return [low]
    raw = (high - low) / most
    base = 10.0 ** floor(log10(raw))
    step = next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= raw * 0.999999)
    return [round(i * step, 10) for i in range(ceil(low / step), floor(high / step) + 1)]


def _axes(frame: Frame, most_y: int, most_x: int) -> str:
    parts = []
    ticks = nice_ticks(frame.low, frame.high, most_y)
    digits = next((d for d in range(2, 7) if len({f"{t:.{d}f}" for t in ticks}) == len(ticks)), 6)
    for tick in ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.width - 20}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="axis" x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.{digits}f}</text>'
        )
    for tick in nice_ticks(frame.first, max(frame.last, frame.first + 1), most_x):
        if float(tick).is_integer():
            at = f'x="{frame.x(tick):.1f}" y="{frame.height - 22}"'
            parts.append(f'<text class="axis" {at} text-anchor="middle">{int(tick)}</text>')
    middle = (frame.left + frame.width) / 2
    parts.append(f'<text x="{middle:.0f}" y="{frame.height - 4}" text-anchor="middle">experiment</text>')
    return "".join(parts)


def _stretches(levels: Sequence[Level], last: int, frame: Frame) -> list[tuple[Level, float, float]]:
    """Each level with the x where it begins and ends."""
    starts = [frame.x(level.first) for level in levels]
    ends = [*starts[1:], frame.x(max(last, levels[-1].first)) + 8] if levels else []
    return list(zip(levels, starts, ends, strict=True))


def band(levels: Sequence[Level], last: int, frame: Frame) -> str:
    parts = []
    for level, left, right in _stretches(levels, last, frame):
        low, high = level.estimate.low, level.estimate.high
        if low is not None and high is not None and right > left:
            top, height = frame.y(high), frame.y(low) - frame.y(high)
            at = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{max(height, 0.5):.1f}"'
            parts.append(f'<rect class="band" {at}/>')
    return "".join(parts)


def line(levels: Sequence[Level], last: int, frame: Frame) -> str:
    path = ""
    for level, left, right in _stretches(levels, last, frame):
        y = frame.y(level.estimate.mean)
        path += f"{'V' if path else f'M{left:.1f} '}{y:.1f}H{right:.1f}"
    return f'<path class="stair" d="{path}"/>' if path else ""


def _drift(level: Level, frame: Frame) -> str:
    x, bottom = frame.x(level.first) - 4, frame.height - BOTTOM
    return f'<line class="drift" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"><title>drift</title></line>'


def _mark(r: Row, frame: Frame, size: float) -> str:
    x = frame.x(r.number)
    if r.failed or r.val_bpb is None:
        bottom = frame.height - BOTTOM - 8
        kind = "bad" if r.failed else "not"
        shape = f'<path class="{kind}" d="M{x - 5:.1f} {bottom - 5}l10 10m0 -10l-10 10"/>'
        if not r.failed:
            shape = f'<path class="not" d="M{x - 5:.1f} {bottom}h10"/>'
    elif r.kept:
        shape = f'<circle class="kept" cx="{x:.1f}" cy="{frame.y(r.val_bpb):.1f}" r="{size}"/>'
    elif r.val_bpb > frame.high:
        shape = f'<path class="not" d="M{x - 5:.1f} {TOP + 10}h10l-5 -9z"/>'
    else:
        shape = f'<circle class="not" cx="{x:.1f}" cy="{frame.y(r.val_bpb):.1f}" r="{size - 2}"/>'
    says = f"#{r.number} {r.shown_status} {bpb(r.val_bpb) if r.val_bpb else 'no score'} {delta(r.delta)}"
    return f'<a href="#e{r.number}">{shape}<title>{escape(says)}\n{escape(r.description)}</title></a>'


def _name(r: Row, frame: Frame, named: bool) -> str:
    x, y = frame.x(r.number), frame.y(r.val_bpb or frame.low)
    if not named:
        return f'<text class="name axis" x="{x + 6:.1f}" y="{y - 7:.1f}">#{r.number}</text>'
    left, top = x + 7, y - 8
    room = int((frame.width - 6 - left) / 6.1)  # characters up to the edge, at 12 px and this slant
    text = escape(shorten(f"{'disturbed: ' * r.tainted}{r.description}", max(8, min(38, room))))
    return f'<text class="name says" transform="translate({left:.1f} {top:.1f}) rotate(-24)">{text}</text>'


def key(found: Findings) -> str:
    if not scored(found.rows):
        return ""
    banded = any(level.estimate.low is not None for level in found.levels)
    best = '<rect class="band" x="1" y="1" width="24" height="14"/>' if banded else ""
    items = [
        (f'{best}<path class="stair" d="M1 4H13V12H25"/>', "best so far" + (", 95 % band" if banded else "")),
        ('<circle class="kept" cx="13" cy="8" r="6"/>', "kept"),
        ('<circle class="not" cx="13" cy="8" r="4"/>', "discarded"),
    ]
    if any((r.val_bpb or 0.0) > window(found.rows, found.levels)[1] for r in scored(found.rows)):
        items.append(('<path class="not" d="M8 12h10l-5 -9z"/>', "discarded, off the scale"))
    if any(r.failed for r in found.rows):
        items.append(('<path class="bad" d="M8 3l10 10m0 -10l-10 10"/>', "failed: no score"))
    if any(r.status == "discard" and r.val_bpb is None for r in found.rows):
        items.append(('<path class="not" d="M8 8h10"/>', "stopped early: no score"))
    if any(level.first != level.number for level in found.levels):
        items.append(('<line class="drift" x1="13" x2="13" y1="0" y2="16"/>', "drift"))
    inner = "".join(f'<span><svg viewBox="0 0 26 16">{shape}</svg>{text}</span>' for shape, text in items)
    return f'<p class="key">{inner}</p>'


# --- intervals -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whisker:
    """A change with its interval, in bpb; below zero is better. `pale`: it decides nothing."""

    value: float
    low: float | None = None
    high: float | None = None
    pale: bool = False


def reach(whiskers: Sequence[Whisker]) -> tuple[float, float]:
    """A range that holds all of them, and zero."""
    values = [v for w in whiskers for v in (w.value, w.low, w.high) if v is not None]
    low, high = min([0.0, *values]), max([0.0, *values])
    pad = 0.08 * (high - low) or 1e-4
    return low - pad, high + pad


def whisker(w: Whisker, within: tuple[float, float], width: int = 260) -> str:
    """One interval on a line, with zero marked."""
    low, high = within
    place: Callable[[float], float] = lambda v: (v - low) / (high - low) * width  # noqa: E731
    parts = [f'<line class="zero" x1="{place(0.0):.1f}" x2="{place(0.0):.1f}" y1="0" y2="20"/>']
    if w.low is not None and w.high is not None:
        a, b = place(w.low), place(w.high)
        parts.append(f'<path class="whisker" fill="none" d="M{a:.1f} 6v8M{a:.1f} 10H{b:.1f}M{b:.1f} 6v8"/>')
    parts.append(f'<circle class="{"pale" if w.pale else "dot"}" cx="{place(w.value):.1f}" cy="10" r="4.5"/>')
    return f'<svg viewBox="0 0 {width} 20" aria-hidden="true">{"".join(parts)}</svg>'


def curve(points: Sequence[Sequence[float]]) -> str:
    """[seconds, step, tokens, loss] -> the loss over time as SVG."""
    values = [(float(p[0]), float(p[3])) for p in points if len(p) > 3 and p[3] is not None]
    if len(values) < 2:
        return ""
    width, height = 540, 150
    latest, low, high = values[-1][0] or 1.0, min(v for _, v in values), max(v for _, v in values)
    span = (high - low) or 1.0
    path = " ".join(
        f"{40 + t / latest * (width - 50):.1f},{10 + (high - v) / span * (height - 40):.1f}" for t, v in values
    )
    return (
        f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" aria-label="training loss over time">'
        f'<polyline points="{path}"/><text class="axis" x="0" y="16">{high:.2f}</text>'
        f'<text class="axis" x="0" y="{height - 28}">{low:.2f}</text>'
        f'<text class="axis" x="{width - 10}" y="{height - 8}" text-anchor="end">{escape(duration(latest))}</text>'
        f'<text x="40" y="{height - 8}">training loss (nats per token)</text></svg>'
    )
