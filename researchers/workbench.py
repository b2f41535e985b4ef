"""The working copy of train.py that a model edits, and what it may look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.contract import View
from researchers.claude_prompt import changed, experiment

VIEW_LINES = 400
SHOWN = 60  # characters of a text that was not found


class ToolError(Exception):
    """What a tool says to a call that cannot be done."""


class Workbench:
    def __init__(self, view: View, start: bytes) -> None:
        self.view = view
        self.source = start.decode("utf-8", "replace")

    @property
    def candidate(self) -> bytes:
        return self.source.encode("utf-8")

    def start_over(self) -> None:
        self.source = self.view.best_source.decode("utf-8", "replace")

    def look(self, given: Mapping[str, Any]) -> str:
        number = given.get("experiment")
        if number is not None:
            return self._experiment(number)
        lines = self.source.splitlines()
        first, last = _line(given, "first", 1), _line(given, "last", len(lines))
        last = min(last, len(lines), first + VIEW_LINES - 1)
        if not 1 <= first <= last:
            raise ToolError(f"there are {len(lines)} lines; first {first} and last {last} name none of them")
        return f"train.py, lines {first} to {last} of {len(lines)}:\n" + "\n".join(lines[first - 1 : last])

    def _experiment(self, number: object) -> str:
        by_number = {p.number: p for p in self.view.past}
        if not isinstance(number, int) or number not in by_number:
            raise ToolError(f"there is no experiment {str(number)[:20]}; they are 1 to {max(by_number, default=0)}")
        p = by_number[number]
        return f"{experiment(p)}\nWhat it changed:\n{changed(by_number.get(p.parent or 0), p)}"

    def edit(self, given: Mapping[str, Any]) -> str:
        edits = given.get("edits")
        if not isinstance(edits, list) or not edits:
            raise ToolError('`edits` must be a list of {"old": ..., "new": ...}; nothing was changed')
        changed = self.source
        for k, one in enumerate(edits, 1):
            changed = _replaced(changed, one, k)
        self.source = changed
        return f"{len(edits)} {'edit' if len(edits) == 1 else 'edits'} made"


def _line(given: Mapping[str, Any], name: str, default: int) -> int:
    value = given.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ToolError(f"`{name}` must be a whole number")
    return value


def _replaced(source: str, one: object, k: int) -> str:
    old, new = (one.get("old"), one.get("new")) if isinstance(one, dict) else (None, None)
    if not isinstance(old, str) or not isinstance(new, str) or not old:
        raise ToolError(f"edit {k} must have `old` and `new`, both strings, `old` not empty; nothing was changed")
    count = source.count(old)
    if count != 1:
        near = "; view the lines and copy them exactly" if count == 0 else "; give more of the lines around it"
        raise ToolError(
            f"edit {k}: {old[:SHOWN]!r} occurs {count} times in the working copy, must be once{near}; no edit was made"
        )
    return source.replace(old, new)
