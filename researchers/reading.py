"""What the search needs of a source text, read fast: a night has hundreds of files that differ in a few constants."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.errors import UserError
from core.recipe import Constant, constants, fingerprint, replace
from researchers.space import Dim, dims
from researchers.structural import width

_REFERENCES = 4  # files that new ones are compared with


@dataclass(frozen=True)
class Read:
    values: Mapping[str, Any]  # of all constants
    skeleton: str  # fingerprint with the searched constants blanked: equal code has equal skeletons
    key: str  # equal for files that do the same: the skeleton and the values of the searched constants


@dataclass
class Reader:
    """Reads each text once. Holds nothing that could not be read again."""

    _known: dict[bytes, Read] = field(default_factory=dict)
    _references: list[_Reference] = field(default_factory=list)

    def read(self, source: bytes) -> Read:
        if source not in self._known:
            self._known[source] = self._by_difference(source) or self._whole(source)
        return self._known[source]

    def _whole(self, source: bytes) -> Read:
        try:
            text = source.decode("utf-8")
            found = constants(text)
            space = dims(found)
            skeleton = fingerprint(replace(text, {d.name: d.value(0) for d in space}).encode("utf-8"))
        except (UserError, UnicodeDecodeError):  # an agent's broken file: it failed, and has no constants to learn from
            whole = fingerprint(source)
            return Read({}, whole, whole)
        read = _make({n: c.value for n, c in found.items()}, space, skeleton)
        self._references = [_Reference(read, space, found, source.split(b"\n")), *self._references[: _REFERENCES - 1]]
        return read

    def _by_difference(self, source: bytes) -> Read | None:
        """From a file that was read whole, if only one-line searched constants differ: 50 times as fast."""
        lines = source.split(b"\n")
        for reference in self._references:
            read = reference.read(lines)
            if read is not None:
                return read
        return None


@dataclass(frozen=True)
class _Reference:
    read_whole: Read
    space: list[Dim]
    found: Mapping[str, Constant]
    lines: list[bytes]

    def read(self, lines: list[bytes]) -> Read | None:
        if len(lines) != len(self.lines):
            return None
        named = {self.found[d.name].line - 1: d.name for d in self.space}
        values = dict(self.read_whole.values)
        for i, (new, old) in enumerate(zip(lines, self.lines, strict=True)):
            if new == old:
                continue
            if i not in named:
                return None
            try:
                here = constants(new.decode("utf-8"))
                before = constants(old.decode("utf-8"))
            except (UserError, UnicodeDecodeError):  # a value of several lines
                return None
            name = named[i]
            if list(here) != [name] or list(before) != [name] or here[name].search != before[name].search:
                return None
            if new.partition(b"=")[0] != old.partition(b"=")[0]:
                return None
            values[name] = here[name].value
        return _make(values, self.space, self.read_whole.skeleton)


def _make(values: Mapping[str, Any], space: list[Dim], skeleton: str) -> Read:
    # Upstream rounds the width up to whole heads, so that many ASPECT_RATIOs are one model.
    same = {"ASPECT_RATIO": width(values) or values.get("ASPECT_RATIO")}
    searched = [(d.name, same.get(d.name, values[d.name])) for d in space]
    return Read(values, skeleton, hashlib.sha256(f"{skeleton} {searched!r}".encode()).hexdigest()[:16])
