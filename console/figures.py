"""Figures on the page: each says which one it is and what it is exactly, so that it can be traced to the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from console.words import bpb, delta, duration, roughly
from core.effects import Effect, Estimate, Replication

STATES = {"replicated": "✓", "not replicated": "✗", "open": "~", "unconfirmed": "○"}
STATE_WORDS = {
    "replicated": "holds on fresh seeds",
    "not replicated": "did not replicate",
    "open": "not settled",
    "unconfirmed": "not confirmed",
}


def words_of(status: str, state: Replication) -> str:
    """What fresh seeds say of an experiment with this status."""
    if status != "discard":
        return STATE_WORDS[state]
    return {
        "replicated": "better after all",
        "not replicated": "no gain worth keeping",
        "open": "no clear gain",
        "unconfirmed": STATE_WORDS[state],
    }[state]


def fact(key: str, value: float | int | str | None, text: str) -> str:
    """`key`: which figure of `Findings` it is; `value`: in full precision; `text`: as people read it."""
    return f'<span class="f" data-of="{escape(key)}" data-value="{escape(repr(value))}">{escape(text)}</span>'


def number(key: str, value: int) -> str:
    return fact(key, value, str(value))


def score(key: str, value: float | None) -> str:
    return fact(key, value, bpb(value))


def change(key: str, gain: float | None) -> str:
    """A gain as the change of val_bpb that it is: below zero is better."""
    return "" if gain is None else fact(key, -gain, signed(-gain))


def time(key: str, seconds: float) -> str:
    return fact(key, seconds, duration(seconds))


def cost(key: str, seconds: float) -> str:
    return fact(key, seconds, f"about {roughly(seconds)}")


def link(number_: int) -> str:
    """'#12', leading to its line."""
    return f'<a href="#e{number_}">#{number_}</a>'


def signed(value: float) -> str:
    """With a real minus sign, and none for zero."""
    return delta(value).replace("-", "−") if f"{value:.4f}".strip("-0.") else "0.0000"


def interval(key: str, found: Effect | None) -> str:
    """'−0.0200 to −0.0102' of a change; "" where there is none."""
    if found is None or found.low is None or found.high is None:
        return ""
    return f"{change(f'{key}.high', found.high)} to {change(f'{key}.low', found.low)}"


def spans(found: Estimate | Effect | None) -> bool:
    """Is there an interval?"""
    return found is not None and found.low is not None


def state(of: str, more: str = "") -> str:
    """A mark, a word and a colour: none of them says it alone."""
    return mark(of, STATE_WORDS[of] + more)


def mark(of: str, words: str) -> str:
    """The same with other words, as HTML."""
    kind = {"replicated": "good", "not replicated": "bad"}.get(of, "open")
    return f'<span class="state {kind}"><i aria-hidden="true">{STATES[of]}</i> {words}</span>'


def cells(*of: tuple[str, str, str]) -> str:
    """Table cells from (class, label for narrow screens, content); a cell without content is left out there."""
    return "".join(
        f'<td class="{kind}{"" if content else " none"}" data-label="{escape(label)}"><div>{content}</div></td>'
        for kind, label, content in of
    )


def table(head: Sequence[tuple[str, str]], lines: Sequence[str], kind: str = "cards") -> str:
    """`head`: (class, title). On a narrow screen each line becomes a card."""
    titles = "".join(f'<th class="{cls}">{escape(title)}</th>' for cls, title in head)
    return f'<table class="{kind}"><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
