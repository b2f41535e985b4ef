"""The record of a lab for a reader with little room: what was kept and by how much, what was near, what failed and why.

Its size is bounded: each section has a most, so that the digest of experiment 500 is hardly longer than that of
experiment 50. All words in it that others wrote (descriptions, reasons, logs) are quoted, short and on one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core.contract import Past, View
from core.errors import UserError
from core.quoting import one_line
from core.recipe import constants

KEPT, NEAR, FAILED, RECENT, NOTES, HISTORY = 10, 8, 8, 10, 6, 8  # entries of each section
CONSTANTS, VALUES = 20, 4  # constants that are listed, and values of each
TOGETHER = 2  # constants changed at once, beyond which a result says little about each of them
WORDS = 140  # characters of a description
REASON = 160
KEEPS = ("keep", "simplify")
FAILURES = ("crash", "timeout", "invalid")


def digest(view: View) -> str:
    """Plain text, some 8,000 characters at most."""
    past = list(view.past)
    kept = [p for p in past if p.status in KEEPS and not p.undone]
    lines = [_summary(view, past, kept)]
    sections = {
        "Kept, oldest first (the change is in bits per byte; below zero is better)": _kept(kept),
        "Nearly kept, the nearest first": _near(past),
        "Failed, newest last": [_line(p, _why(p)) for p in past if p.status in FAILURES][-FAILED:],
        "The last experiments, newest last": [_line(p, _why(p)) for p in past[-RECENT:]],
        "What single constants did (value: change, experiment)": _constants(past),
        "Proposals that were refused since the last experiment": [f"- {one_line(n, REASON)!r}" for n in view.notes][
            -NOTES:
        ],
        "An earlier project on other terms, whose scores do not compare": _history(view.history),
    }
    for title, found in sections.items():
        if found:
            lines += ["", f"## {title}", *found]
    return "\n".join(lines)


def _summary(view: View, past: Sequence[Past], kept: Sequence[Past]) -> str:
    if not past:
        return "Nothing was tried yet."
    counts = {status: sum(p.status == status for p in past) for status in ("discard", *FAILURES)}
    parts = [f"{len(past)} experiments", f"{len(kept)} kept", *(f"{n} {status}" for status, n in counts.items() if n)]
    first = next((p.val_bpb for p in past if p.val_bpb is not None), None)
    scores = f"; val_bpb {first:.6f} at the start" if first is not None else ""
    return ", ".join(parts) + scores + (f", {view.best_bpb:.6f} now" if view.best_bpb is not None else "")


def change(p: Past) -> float | None:
    """bits per byte against what it had to beat; below zero is better."""
    return p.val_bpb - p.best_before if p.val_bpb is not None and p.best_before is not None else None


def _line(p: Past, more: str = "") -> str:
    delta = change(p)
    score = f" {p.val_bpb:.6f}" if p.val_bpb is not None else ""
    score += f" ({delta:+.4f})" if delta is not None else ""
    marks = (", tainted" if p.tainted else "") + (", taken back" if p.undone else "")
    return f"- #{p.number} {p.status}{marks}{score} {one_line(p.description, WORDS)!r}{more}"


def _why(p: Past) -> str:
    return f": {one_line(p.reason, REASON)!r}" if p.status in FAILURES and p.reason else ""


def _kept(kept: Sequence[Past]) -> list[str]:
    early, shown = kept[:-KEPT], kept[-KEPT:]
    gained = sum(change(p) or 0.0 for p in early)
    before = [f"- {len(early)} earlier ones, {gained:+.4f} together"] if early else []
    return before + [_line(p) for p in shown]


def _near(past: Sequence[Past]) -> list[str]:
    lost = [p for p in past if p.status == "discard" and change(p) is not None]
    return [_line(p) for p in sorted(lost, key=lambda p: change(p) or 0.0)[:NEAR]]


def _history(history: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = [one_line(", ".join(f"{k} {v}" for k, v in entry.items()), WORDS) for entry in history]
    return [f"- {line!r}" for line in lines[-HISTORY:]]


def _constants(past: Sequence[Past]) -> list[str]:
    """For each constant that was changed alone or with one other: its values, the best first."""
    sources = {p.number: p.source for p in past}
    tried: dict[str, list[tuple[float, Any, int]]] = {}
    for p in past:
        delta = change(p)
        if delta is not None and p.parent in sources:
            for name, value in _changed(sources[p.parent], p.source).items():
                tried.setdefault(name, []).append((delta, value, p.number))
    ranked = sorted(tried.items(), key=lambda entry: -max(number for _, _, number in entry[1]))
    return [_values(name, results) for name, results in ranked[:CONSTANTS]]


def _changed(before: bytes, after: bytes) -> dict[str, Any]:
    """The new values, where a few constants on lines of their own are all that differs; only those lines are parsed."""
    old, new = before.split(b"\n"), after.split(b"\n")
    pairs = [(a, b) for a, b in zip(old, new) if a != b] if len(old) == len(new) else []
    if not 1 <= len(pairs) <= TOGETHER:
        return {}
    values: dict[str, Any] = {}
    for a, b in pairs:
        try:
            was, now = constants(a.decode("utf-8")), constants(b.decode("utf-8"))
        except (UserError, UnicodeDecodeError):  # a part of a longer statement
            return {}
        if len(now) != 1 or list(was) != list(now):
            return {}
        values |= {name: constant.value for name, constant in now.items()}
    return values


def _values(name: str, results: list[tuple[float, Any, int]]) -> str:
    shown = [
        f"{one_line(repr(v), 24)}: {delta:+.4f} #{n}" for delta, v, n in sorted(results, key=lambda r: r[0])[:VALUES]
    ]
    more = f"; {len(results) - VALUES} more" if len(results) > VALUES else ""
    return f"- {name}  {', '.join(shown)}{more}"
