"""The report as one self-contained HTML page: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from console.picture import scored, staircase, window
from console.rows import Row, Scale, Tally
from console.words import bpb, clock, count, delta, duration, moment, plural, shorten, size

STYLE = """
:root { --ink: #1d2329; --soft: #5b6570; --line: #d9dee3; --ground: #ffffff; --panel: #f6f8f9; --keep: #007a5a;
  --best: #0072b2; --fail: #b34700; --plus: #0b6b50; --minus: #a33f00 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3adb7; --line: #3a424b; --ground: #14181c;
  --panel: #1d2329; --keep: #3fc79c; --best: #64b5f0; --fail: #ff9a52; --plus: #5fd3ae; --minus: #ffab70 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: var(--ground);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
h1 { font-size: 1.7rem; margin: 0; letter-spacing: -.01em }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
.scale, .soft { color: var(--soft) }
.scale { margin: .2rem 0 1.4rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.4rem, 1fr)); gap: .75rem; margin: 0 0 1.4rem }
.tile { background: var(--panel); border-radius: .6rem; padding: .7rem .9rem }
.tile b { display: block; font-size: 1.3rem; white-space: nowrap; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: .87rem }
svg { display: block; width: 100%; height: auto }
svg text { fill: var(--soft); font: 12px system-ui, "Liberation Sans", sans-serif }
svg .name { fill: var(--keep) }
svg .grid { stroke: var(--line) }
svg .stair { fill: none; stroke: var(--best); stroke-width: 2.5 }
svg .kept { fill: var(--keep); stroke: var(--ground); stroke-width: 1.5 }
svg .not { fill: none; stroke: var(--soft); stroke-width: 1.4 }
svg .bad { stroke: var(--fail); stroke-width: 2.2; fill: none }
svg a:hover * { stroke-width: 4 }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: .2rem 0 0; color: var(--soft); font-size: .9rem }
.key svg { width: 1.6rem; height: 1rem; display: inline-block; vertical-align: -2px; margin-right: .35rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .93rem }
th { text-align: left; color: var(--soft); border-bottom: 2px solid var(--line); padding: .3rem .6rem }
td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; vertical-align: top }
a { color: var(--best) }
td.n, th.n { width: 1%; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tr:target { outline: 2px solid var(--best) }
.status { white-space: nowrap }
.status.keep { color: var(--keep); font-weight: 700 }
.status.bad { color: var(--fail); font-weight: 600 }
details summary { cursor: pointer }
details > div { padding: .4rem 0 .6rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; margin: .3rem 0 }
dt { color: var(--soft) } dd { margin: 0 }
pre { background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; overflow-x: auto;
  font-size: .82rem; margin: .5rem 0 }
.plus { color: var(--plus) } .minus { color: var(--minus) }
.curve { max-width: 34rem } .curve polyline { fill: none; stroke: var(--best); stroke-width: 2 }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .87rem }
@media print { details > div { display: block } }
"""

WIDTH, HEIGHT = 1120, 480
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 16, 42


def page(tag: str, rows: Sequence[Row], scale: Scale, total: Tally, diffs: Mapping[int, str], made: str) -> str:
    """The whole page. `diffs`: unified diffs by experiment number; `made`: when, as text."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(tag)}: {escape(plural(total.experiments, "experiment"))}</title>
<style>{STYLE}</style>
<h1>{escape(tag)}</h1>
<p class="scale">{escape(str(scale))}; lower is better.{_device(scale)}</p>
{_tiles(rows, total)}
{chart(rows)}
{_key(rows)}
<h2>What was kept</h2>
{_kept(rows)}
<h2>All experiments</h2>
<div class="wide">{_table(rows, diffs)}</div>
<footer>Made {escape(made)} by autoresearch from the lab's ledger. A failed experiment has no score.</footer>
</html>
"""


def _device(scale: Scale) -> str:
    known = " on ".join(filter(None, [scale.backend and f"backend {scale.backend}", scale.device]))
    return f" {escape(known[0].upper() + known[1:])}." if known else ""


def _tiles(rows: Sequence[Row], total: Tally) -> str:
    seconds = sum(r.seconds or 0.0 for r in rows)
    tiles = [
        (bpb(total.best.val_bpb) if total.best else "-", "best val_bpb"),
        (delta(-total.gain) if total.gain is not None else "-", "against the baseline"),
        (str(total.experiments), "experiments"),
        (str(total.kept), "kept after the baseline"),
        (str(total.discarded), "discarded"),
        (str(total.failed), "failed"),
        (duration(seconds), "spent on experiments"),
    ]
    if total.uses.busy:
        tiles.append((f"{100 * total.uses.idle_share:.1f} %", "of the time the device was idle"))
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles
    )
    return f'<div class="tiles">{inner}</div>'


def nice_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers inside [low, high]."""
    from math import ceil, floor, log10

    if not high > low:
        return [low]
    raw = (high - low) / most
    base = 10.0 ** floor(log10(raw))
    step = next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= raw * 0.999999)
    return [round(i * step, 10) for i in range(ceil(low / step), floor(high / step) + 1)]


def chart(rows: Sequence[Row]) -> str:
    """The picture of the night as SVG; every mark links to its line in the table and names itself."""
    if not scored(rows):
        return '<p class="soft">No experiment has a score yet.</p>'
    low, high = window(rows)
    first, last = min(r.number for r in rows), max(r.number for r in rows)
    span = max(last - first, 1)

    def x(number: float) -> float:
        return LEFT + 14 + (number - first) / span * (WIDTH - LEFT - RIGHT - 120)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(low, high, first, last, x, y)]
    numbers, values = staircase(rows)
    if numbers:
        path = f"M{x(numbers[0]):.1f} {y(values[0]):.1f}" + "".join(
            f"H{x(n):.1f}V{y(v):.1f}" for n, v in zip(numbers[1:], values[1:], strict=True)
        )
        parts.append(f'<path class="stair" d="{path}"/>')
    parts += [_mark(r, x(r.number), y, low, high) for r in rows if r.decided]
    parts += [_name(r, x(r.number), y) for r in _named(rows, span)]
    label = "val_bpb of every experiment and the best so far"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axes(low: float, high: float, first: int, last: int, x: Any, y: Any) -> str:
    parts = []
    ticks = nice_ticks(low, high)
    digits = next((d for d in range(2, 7) if len({f"{t:.{d}f}" for t in ticks}) == len(ticks)), 6)
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.{digits}f}</text>')
    for tick in nice_ticks(first, max(last, first + 1), 10):
        if float(tick).is_integer():
            parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{int(tick)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">experiment</text>')
    return "".join(parts)


def _mark(r: Row, x: float, y: Any, low: float, high: float) -> str:
    if r.failed:
        bottom = HEIGHT - BOTTOM - 8
        shape = f'<path class="bad" d="M{x - 5:.1f} {bottom - 5}l10 10m0 -10l-10 10"/>'
    elif r.kept:
        shape = f'<circle class="kept" cx="{x:.1f}" cy="{y(r.val_bpb):.1f}" r="6"/>'
    elif (r.val_bpb or 0.0) > high:
        shape = f'<path class="not" d="M{x - 5:.1f} {TOP + 10}h10l-5 -9z"/>'
    else:
        shape = f'<circle class="not" cx="{x:.1f}" cy="{y(r.val_bpb):.1f}" r="4"/>'
    says = (
        f"#{r.number} {r.shown_status} {bpb(r.val_bpb) if r.val_bpb else 'no score'} {delta(r.delta)}\n{r.description}"
    )
    return f'<a href="#e{r.number}">{shape}<title>{escape(says)}</title></a>'


def _named(rows: Sequence[Row], span: int) -> list[Row]:
    kept = [r for r in rows if r.kept and r.val_bpb is not None]
    chosen: list[Row] = []
    for r in sorted(kept, key=lambda r: (r is not kept[0], r.delta or 0.0)):
        if all(abs(r.number - other.number) >= span / 30 for other in chosen):
            chosen.append(r)
    return chosen


def _name(r: Row, x: float, y: Any) -> str:
    left, top = x + 7, y(r.val_bpb) - 8
    room = int((WIDTH - 6 - left) / 6.1)  # characters up to the edge, at 12 px and this slant
    text = escape(shorten(r.description, max(8, min(38, room))))
    return f'<text class="name" transform="translate({left:.1f} {top:.1f}) rotate(-24)">{text}</text>'


def _key(rows: Sequence[Row]) -> str:
    def item(shape: str, text: str) -> str:
        return f'<span><svg viewBox="0 0 26 16">{shape}</svg>{text}</span>'

    items = [
        item('<path class="stair" d="M1 4H13V12H25"/>', "best so far"),
        item('<circle class="kept" cx="13" cy="8" r="6"/>', "kept"),
        item('<circle class="not" cx="13" cy="8" r="4"/>', "discarded"),
        item('<path class="not" d="M8 12h10l-5 -9z"/>', "discarded, off the scale"),
        item('<path class="bad" d="M8 3l10 10m0 -10l-10 10"/>', "failed (crash, timeout, invalid): no score"),
    ]
    return f'<p class="key">{"".join(items)}</p>' if scored(rows) else ""


def _kept(rows: Sequence[Row]) -> str:
    kept = [r for r in rows if r.kept]
    if not kept:
        return '<p class="soft">Nothing yet.</p>'
    lines = "".join(
        f'<tr><td class="n"><a href="#e{r.number}">#{r.number}</a></td><td class="n">{bpb(r.val_bpb)}</td>'
        f'<td class="n">{delta(r.delta)}</td><td>{escape(r.description)}</td></tr>'
        for r in kept
    )
    head = '<tr><th class="n">#</th><th class="n">val_bpb</th><th class="n">change</th><th>what</th></tr>'
    return f'<div class="wide"><table>{head}{lines}</table></div>'


def _table(rows: Sequence[Row], diffs: Mapping[int, str]) -> str:
    head = (
        '<tr><th class="n">#</th><th>status</th><th class="n">val_bpb</th><th class="n">change</th>'
        '<th>what, and all about it</th><th class="n">took</th><th class="n">ended</th></tr>'
    )
    return f"<table>{head}{''.join(_line(r, diffs.get(r.number, '')) for r in rows)}</table>"


def _line(r: Row, diff: str) -> str:
    kind = "keep" if r.kept else "bad" if r.failed else ""
    inner = f"<p>{escape(r.reason)}</p>" if r.reason else ""
    inner += _facts(r) + curve(r.outcome.get("curve") or []) + _diff(diff)
    what = f"<details><summary>{escape(r.description)}</summary><div>{inner}</div></details>"
    ended = clock(moment(r.finished)) if r.finished else "-"
    return (
        f'<tr id="e{r.number}"><td class="n">{r.number}</td><td class="status {kind}">{escape(r.shown_status)}</td>'
        f'<td class="n">{bpb(r.val_bpb)}</td><td class="n">{delta(r.delta)}</td><td>{what}</td>'
        f'<td class="n">{duration(r.seconds) if r.seconds else "-"}</td><td class="n">{escape(ended)}</td></tr>'
    )


def facts(r: Row) -> list[tuple[str, str]]:
    """(what, figure) of an outcome, for people."""
    o = r.outcome
    rates = o.get("tokens") and o.get("training_seconds")
    found = [
        ("researcher", r.researcher),
        ("steps", count(o["steps"]) if o.get("steps") else ""),
        ("tokens", count(o["tokens"]) if o.get("tokens") else ""),
        ("tokens/s", count(o["tokens"] / o["training_seconds"]) if rates else ""),
        ("passes over the text", f"{o['passes']:.2f}" if o.get("passes") else ""),
        ("parameters", count(o["params"]) if o.get("params") else ""),
        ("MFU", f"{100 * o['mfu']:.1f} %" if o.get("mfu") else ""),
        ("peak memory", size(o["peak_memory"]) if o.get("peak_memory") else ""),
        ("training", duration(o["training_seconds"]) if o.get("training_seconds") else ""),
        (
            "everything else",
            duration(r.seconds - o["training_seconds"]) if r.seconds and o.get("training_seconds") else "",
        ),
        ("device idle before", _idle(r)),
        ("audited", "yes" if o.get("audited") else ""),
        ("commit", r.commit[:10]),
        ("also changed, dropped", "; ".join(map(str, r.detail.get("dropped") or []))),
        ("not isolated", str(r.detail.get("not_isolated") or "")),
    ]
    return [(what, figure) for what, figure in found if figure]


def _idle(r: Row) -> str:
    """'3 s (2 s thinking)'."""
    parts = [f"{duration(s)} {what}" for what, s in r.idle.items() if what != "seconds" and s >= 0.5]
    return duration(r.idle["seconds"]) + (f" ({', '.join(parts)})" if parts else "") if r.idle else ""


def _facts(r: Row) -> str:
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in facts(r)) + "</dl>"


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
        f'<polyline points="{path}"/><text x="0" y="16">{high:.2f}</text><text x="0" y="{height - 28}">{low:.2f}</text>'
        f'<text x="{width - 10}" y="{height - 8}" text-anchor="end">{escape(duration(latest))}</text>'
        f'<text x="40" y="{height - 8}">training loss (nats per token)</text></svg>'
    )


def _diff(diff: str) -> str:
    if not diff.strip():
        return ""
    lines = []
    for line in diff.splitlines():
        kind = "plus" if line.startswith("+") else "minus" if line.startswith("-") else ""
        lines.append(f'<span class="{kind}">{escape(line)}</span>' if kind else escape(line))
    return "<pre>" + "\n".join(lines) + "</pre>"
