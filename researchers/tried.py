"""Whether an idea was tried already: the same program, or the same change of another one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from core.contract import Past, View
from core.recipe import fingerprint

_COMMENT = re.compile(r"(^|\s)#.*$")


def change_key(before: bytes, after: bytes) -> str:
    """Equal for equal changes, wherever in the file they are and whatever else is in it; "" when nothing but comments
    and layout differs."""
    old, new = _lines(before), _lines(after)
    while old and new and old[-1] == new[-1]:  # most of a file; the matcher is slow
        del old[-1], new[-1]
    same = next((k for k, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
    old, new = old[same:], new[same:]
    changed = [
        f"{sign}{line}"
        for tag, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if tag != "equal"
        for sign, lines in (("-", old[a:b]), ("+", new[c:d]))
        for line in lines
    ]
    return hashlib.sha256("\n".join(changed).encode()).hexdigest()[:16] if changed else ""


def _lines(source: bytes) -> list[str]:
    """The lines that do something, without comments and runs of blanks; indentation counts."""
    return list(_meaningful(source.decode("utf-8", "replace")))


def _meaningful(text: str) -> Iterator[str]:
    for line in text.splitlines():
        code = _COMMENT.sub("", line).rstrip()
        if code.strip():
            indent = len(code) - len(code.lstrip())
            yield " " * indent + " ".join(code.split())


@dataclass
class Tried:
    """Remembers what it has worked out of past experiments, and nothing that could not be worked out again."""

    _changes: dict[int, str] = field(default_factory=dict)  # experiment -> key of its change
    _marks: dict[int, str] = field(default_factory=dict)  # experiment -> fingerprint

    def before(self, view: View, source: bytes) -> str:
        """Why this candidate was tried already, with a pointer to the result; "" when it was not."""
        mark = fingerprint(source)
        if mark == fingerprint(view.best_source):
            return "this is the present best: nothing but comments or layout was changed"
        sources = {p.number: p.source for p in view.past}
        for p in view.past:
            if self._mark(p) == mark:
                return f"this is the same program as {_pointer(p)}"
        key = change_key(view.best_source, source)
        for p in view.past:
            if p.parent in sources and key and self._change(p, sources[p.parent]) == key:
                return f"this is the same change as {_pointer(p)}, made to another base"
        return ""

    def _mark(self, p: Past) -> str:
        if p.number not in self._marks:
            self._marks[p.number] = p.fingerprint or fingerprint(p.source)
        return self._marks[p.number]

    def _change(self, p: Past, base: bytes) -> str:
        if p.number not in self._changes:
            self._changes[p.number] = change_key(base, p.source)
        return self._changes[p.number]


def _pointer(p: Past) -> str:
    score = f" at {p.val_bpb:.6f}" if p.val_bpb is not None else ""
    against = f" against {p.best_before:.6f}" if p.val_bpb is not None and p.best_before is not None else ""
    return f"experiment {p.number} ({p.status}{score}{against}); view(experiment={p.number}) shows it"
