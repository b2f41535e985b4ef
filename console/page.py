"""The report as one self-contained HTML page: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from console import sections
from console.chart import charts, curve, key
from console.figures import cells, change, fact, number, score, table, time
from console.findings import Findings
from console.rows import Row, Scale
from console.style import STYLE
from console.words import clock, computed_by, count, duration, moment, plural, size


def page(found: Findings, made: str) -> str:
    """The whole page. `made`: when, as text."""
    record, total = found.record, found.total
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(record.tag)}: {escape(plural(total.experiments, "experiment"))}</title>
<style>{STYLE}</style>
<h1 class="says">{escape(record.tag)}</h1>
<p class="scale">{escape(str(record.scale))}; lower is better.{_device(record.scale)}</p>
{sections.answer(found)}
{sections.tiles(found)}
{charts(found)}
{key(found)}
<h2>What was kept</h2>
{sections.kept(found)}
<h2>What was tried</h2>
{sections.tried(found)}
<h2>What to try next</h2>
{sections.following(found)}
<h2>Where the time went</h2>
{sections.time_used(found)}
<h2>How far to trust it</h2>
{sections.trust(found)}
<h2>All experiments</h2>
{_table(found.rows, record.diffs)}
<footer>Made {escape(made)} by autoresearch from the lab's ledger; nothing was trained for it. A failed experiment has
no score. Changes are of val_bpb: below zero is better.</footer>
</html>
"""


def _device(scale: Scale) -> str:
    known = " on ".join(filter(None, [scale.backend and f"backend {scale.backend}", scale.device]))
    return f" {escape(known[0].upper() + known[1:])}." if known else ""


def _table(rows: Sequence[Row], diffs: Mapping[int, str]) -> str:
    head = [
        ("n", "#"), ("w", "status"), ("n", "val_bpb"), ("n", "change"), ("what", "what, and all about it"),
        ("n", "took"), ("n", "ended"),
    ]  # fmt: skip
    return table(head, [_line(r, diffs.get(r.number, "")) for r in rows])


def _line(r: Row, diff: str) -> str:
    kind = "keep" if r.kept else "bad" if r.failed else ""
    inner = f'<p class="says">{escape(r.reason)}</p>' if r.reason else ""
    inner += _facts(r) + curve(r.outcome.get("curve") or []) + _diff(diff)
    what = f'<details><summary class="says">{escape(r.description)}</summary><div>{inner}</div></details>'
    ended = clock(moment(r.finished)) if r.finished else "-"
    of = f"all.{r.number}"
    line = cells(
        ("n head", "#", number(f"{of}.number", r.number)),
        (f"w inline bare status {kind}", "status", escape(r.shown_status)),
        ("n inline bare", "val_bpb", score(f"{of}.val_bpb", r.val_bpb) if r.val_bpb is not None else ""),
        ("n inline bare", "change", change(f"{of}.delta", -r.delta) if r.delta is not None else ""),
        ("what", "what", what),
        ("n inline bare", "took", time(f"{of}.seconds", r.device_seconds) if r.device_seconds else ""),
        ("n inline bare", "ended", fact(f"{of}.finished", r.finished, ended) if r.finished else ""),
    )
    return f'<tr id="e{r.number}">{line}</tr>'


def facts(r: Row) -> list[tuple[str, str]]:
    """(what, figure) of an outcome, for people."""
    o = r.outcome
    rates = o.get("tokens") and o.get("training_seconds")
    found = [
        ("researcher", r.researcher),
        ("disturbed", r.disturbed),
        ("runs", f"{r.runs}, {duration(r.device_seconds)} in all; the last one:" if r.runs > 1 else ""),
        ("steps", count(o["steps"]) if o.get("steps") else ""),
        ("tokens", count(o["tokens"]) if o.get("tokens") else ""),
        ("tokens/s", count(o["tokens"] / o["training_seconds"]) if rates else ""),
        ("passes over the text", f"{o['passes']:.2f}" if o.get("passes") else ""),
        ("parameters", count(o["params"]) if o.get("params") else ""),
        ("MFU", f"{100 * o['mfu']:.1f} %" if o.get("mfu") else ""),
        *computed_by(o.get("describe") or {}).items(),
        ("peak memory", size(o["peak_memory"]) if o.get("peak_memory") else ""),
        ("training", duration(o["training_seconds"]) if o.get("training_seconds") else ""),
        (
            "everything else",
            duration(r.seconds - o["training_seconds"]) if r.seconds and o.get("training_seconds") else "",
        ),
        ("scored", _halved(o.get("describe") or {})),
        ("judged again", "; ".join(map(str, (o.get("health") or {}).get("judged_again") or []))),
        ("device idle before", _idle(r)),
        ("audited", "yes" if o.get("audited") else ""),
        ("commit", r.commit[:10]),
        ("also changed, dropped", "; ".join(map(str, r.detail.get("dropped") or []))),
        ("not isolated", str(r.detail.get("not_isolated") or "")),
    ]
    return [(what, figure) for what, figure in found if figure]


def _halved(describe: Mapping[str, Any]) -> str:
    """Only where memory ended with as many rows as the settings say."""
    if not describe.get("scored_rows_reason"):
        return ""
    return f"in batches of {plural(int(describe['scored_rows']), 'row')}, as memory ended with more"


def _idle(r: Row) -> str:
    """'3 s (2 s thinking)'."""
    parts = [f"{duration(s)} {what}" for what, s in r.idle.items() if what != "seconds" and s >= 0.5]
    return duration(r.idle["seconds"]) + (f" ({', '.join(parts)})" if parts else "") if r.idle else ""


def _facts(r: Row) -> str:
    return "<dl>" + "".join(f'<dt>{escape(a)}</dt><dd class="says">{escape(b)}</dd>' for a, b in facts(r)) + "</dl>"


def _diff(diff: str) -> str:
    if not diff.strip():
        return ""
    lines = []
    for line in diff.splitlines():
        kind = "plus" if line.startswith("+") else "minus" if line.startswith("-") else ""
        lines.append(f'<span class="{kind}">{escape(line)}</span>' if kind else escape(line))
    return "<pre>" + "\n".join(lines) + "</pre>"
