"""Whether an idea was tried already: the same program, or the same change of another one."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.contract import Past, View
from core.objections import change
from core.recipe import fingerprint


@dataclass
class Tried:
    """Remembers what it has worked out of past experiments, and nothing that could not be worked out again."""

    _changes: dict[int, tuple[str, ...]] = field(default_factory=dict)  # experiment -> its change
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
        wanted = change(view.best_source, source)
        for p in view.past:
            if p.parent in sources and wanted and self._change(p, sources[p.parent]) == wanted:
                return f"this is the same change as {_pointer(p)}, made to another base"
        return ""

    def _mark(self, p: Past) -> str:
        if p.number not in self._marks:
            self._marks[p.number] = p.fingerprint or fingerprint(p.source)
        return self._marks[p.number]

    def _change(self, p: Past, base: bytes) -> tuple[str, ...]:
        if p.number not in self._changes:
            self._changes[p.number] = change(base, p.source)
        return self._changes[p.number]


def _pointer(p: Past) -> str:
    score = f" at {p.val_bpb:.6f}" if p.val_bpb is not None else ""
    against = f" against {p.best_before:.6f}" if p.val_bpb is not None and p.best_before is not None else ""
    return f"experiment {p.number} ({p.status}{score}{against}); view(experiment={p.number}) shows it"
