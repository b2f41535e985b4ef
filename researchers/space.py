"""The searched constants of a recipe as coordinates: values to and from the unit interval, and their neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.recipe import Choices, Constant, Range


@dataclass(frozen=True)
class Dim:
    """One searched constant. Numbers map to 0..1 along their scale; choices have no order and map to an index."""

    name: str
    search: Range | Choices

    @property
    def ordered(self) -> bool:
        return isinstance(self.search, Range)

    def unit(self, value: Any) -> float:
        """0..1 for a number (clipped to the range), the index for a choice (-1: none of them)."""
        if isinstance(self.search, Choices):
            return next((i for i, v in enumerate(self.search.values) if repr(v) == repr(value)), -1)
        r = self.search
        x = r.clip(float(value))
        if r.scale == "linear":
            return (x - r.low) / (r.high - r.low)
        return (math.log(x) - math.log(r.low)) / (math.log(r.high) - math.log(r.low))

    def value(self, unit: float) -> Any:
        """The nearest value that can be written: whole numbers, powers of two, no more digits than matter."""
        if isinstance(self.search, Choices):
            return self.search.values[int(unit) % len(self.search.values)]
        r, u = self.search, min(max(unit, 0.0), 1.0)
        if r.scale == "pow2":
            low, high = math.log2(r.low), math.log2(r.high)
            return 2 ** round(low + u * (high - low))
        if r.scale == "log":
            x = math.exp(math.log(r.low) + u * (math.log(r.high) - math.log(r.low)))
        else:
            x = r.low + u * (r.high - r.low)
        if r.integer:
            return round(r.clip(round(x)))
        if r.scale == "log":
            return float(r.clip(round_to(x, 3)))
        return float(r.clip(round(x, max(0, 2 - math.floor(math.log10(r.high - r.low))))))  # a hundredth of the range

    def moved(self, value: Any, step: float) -> Any:
        """The value `step` (signed, in units of the range) away; at least one notch where values are discrete.

        None at the end of the range. Ordered constants only.
        """
        new = self.value(self.unit(value) + step)
        if new == value and isinstance(self.search, Range):
            notch = self._notch(value, 1 if step > 0 else -1)
            new = value if notch is None else notch
        return None if new == value else new

    def _notch(self, value: Any, sign: int) -> Any | None:
        r = self.search
        if isinstance(r, Choices) or not r.integer:
            return None
        near = 2 ** (round(math.log2(max(value, 1))) + sign) if r.scale == "pow2" else value + sign
        return near if r.contains(near) else None

    def size(self) -> int:
        """How many values there are; 0 where they are too many to count (not whole numbers)."""
        if isinstance(self.search, Choices):
            return len(self.search.values)
        if self.search.scale == "pow2":
            return round(math.log2(self.search.high / self.search.low)) + 1
        return int(self.search.high - self.search.low) + 1 if self.search.integer else 0

    def grid(self) -> list[Any]:
        """All values of a countable constant."""
        if isinstance(self.search, Choices):
            return list(self.search.values)
        low = self.search.low
        if self.search.scale == "pow2":
            return [round(low) * 2**i for i in range(self.size())]
        return [round(low) + i for i in range(self.size())]


def dims(found: Mapping[str, Constant]) -> list[Dim]:
    """The searched constants in the order of the file."""
    return [Dim(name, c.search) for name, c in found.items() if c.search is not None and _fits(c)]


def _fits(constant: Constant) -> bool:
    """A number in a range; a choice may stand outside its list (a hand's edit), then any member is a move."""
    if isinstance(constant.search, Range):
        return isinstance(constant.value, (int, float)) and not isinstance(constant.value, bool)
    return True


def round_to(x: float, digits: int) -> float:
    """To so many significant digits."""
    if x == 0 or not math.isfinite(x):
        return x
    return round(x, digits - 1 - math.floor(math.log10(abs(x))))
