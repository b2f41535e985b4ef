"""What several labs kept, aligned by what they changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.lab_facts import Change, LabFacts, Tried
from console.words import plural
from core.recipe import constants


@dataclass(frozen=True)
class Cell:
    """What one lab found out about one constant or definition."""

    start: str  # a constant's value in its first recipe; "" where it is no constant, or has none of that name
    end: str  # in its best
    kept: tuple[int, ...]  # experiments that were kept and changed it
    gain: float | None  # bpb that these won in all; shared with what else they changed
    lost: int  # experiments that changed it and were not kept

    @property
    def direction(self) -> str:
        """ "up", "down", "changed" or "" (not kept)."""
        if not self.kept:
            return ""
        try:
            before, after = float(self.start), float(self.end)
        except ValueError:
            return "changed"
        return "up" if after > before else "down" if after < before else "changed"

    def text(self) -> str:
        """'0.04 -> 0.055 (#4, -0.0123)', 'kept (#7, -0.0010)', '0.04, tried 3 times', or where it stands."""
        tried = f"; {_times(self.lost)} more in vain" if self.lost else ""
        if not self.kept:
            stands = self.start or "as it was"
            return f"{stands}, tried {_times(self.lost)} in vain" if self.lost else (self.start or "-")
        numbers = ", ".join(f"#{n}" for n in self.kept)
        moved = f"{self.start} -> {self.end}" if self.start or self.end else "changed"
        won = f", {-self.gain:+.4f}" if self.gain is not None else ""
        return f"{moved} ({numbers}{won}){tried}"


@dataclass(frozen=True)
class Line:
    """One constant or definition over all labs."""

    what: str
    cells: tuple[Cell, ...]

    @property
    def keeps(self) -> int:
        return sum(bool(c.kept) for c in self.cells)

    @property
    def verdict(self) -> str:
        """What the labs say together."""
        directions = {c.direction for c in self.cells if c.kept}
        if self.keeps == len(self.cells):
            if len(directions) > 1:
                return "kept by all, in opposite directions"
            return "kept by all, the same way" if directions != {"changed"} else "kept by all"
        only = self.keeps == 1
        refused = any(not c.kept and c.lost for c in self.cells)
        who = "kept by one" if only else f"kept by {self.keeps} of {len(self.cells)}"
        return f"{who}, tried in vain elsewhere" if refused else f"{who}, not tried elsewhere"


def align(labs: Sequence[LabFacts]) -> list[Line]:
    """A line for everything that at least one lab kept: what most kept first, then what won most."""
    kept = dict.fromkeys(change.what for lab in labs for t in lab.kept for change in t.changes)
    starts = [_values(lab.first_source) for lab in labs]
    ends = [_values(lab.best_source) for lab in labs]
    lines = [
        Line(what, tuple(_cell(lab, what, s, e) for lab, s, e in zip(labs, starts, ends, strict=True))) for what in kept
    ]
    return sorted(lines, key=lambda line: (-line.keeps, -sum(c.gain or 0.0 for c in line.cells)))


def _values(source: str) -> dict[str, str]:
    return {name: repr(c.value) for name, c in constants(source).items()}


def _cell(lab: LabFacts, what: str, start: dict[str, str], end: dict[str, str]) -> Cell:
    touched = [t for t in lab.tried if any(change.what == what for change in t.changes)]
    kept = [t for t in touched if t.kept]
    gains = [t.gain for t in kept if t.gain is not None]
    return Cell(
        start.get(what, ""), end.get(what, ""), tuple(t.number for t in kept), sum(gains) if gains else None,
        len(touched) - len(kept),
    )  # fmt: skip


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"


def sentences(labs: Sequence[LabFacts]) -> Iterator[str]:
    """What has to be said before a table is read."""
    for lab in labs:
        if lab.best_bpb is None or lab.baseline_bpb is None:
            yield f"{lab.tag} has no score yet"
            continue
        yield f"{lab.tag}: {_found(lab, lab.baseline_bpb, lab.best_bpb)}, on {lab.scale()}"
        if lab.disturbed:
            numbers = " and ".join(f"#{n}" for n in lab.disturbed)
            yield f"{lab.tag}: {numbers} ran while other programs used the device, so these figures may say little"
    for lab in labs[1:]:
        if why := labs[0].comparable(lab):
            yield f"{labs[0].tag} and {lab.tag} were measured with {why}: their val_bpb are not compared"


def _found(lab: LabFacts, baseline: float, best: float) -> str:
    """What a lab kept, and what that gave: as it was decided, which flatters, and on fresh seeds."""
    tries = plural(len(lab.tried), "candidate")
    if not lab.kept:
        back = ", ".join(f"#{t.number}" for t in lab.tried if t.status == "undone")
        return f"none of {tries} is kept{f' ({back} taken back)' if back else ''}; its baseline has {baseline:.4f}"
    again = lab.again.text() if lab.again else "not confirmed"
    return f"{len(lab.kept)} of {tries} kept, {baseline:.4f} to {best:.4f} ({best - baseline:+.4f}; {again})"


def moved(tried: Tried) -> str:
    """What an experiment changed, in one line."""
    return ", ".join(_moved(change) for change in tried.changes) or "nothing that counts"


def _moved(change: Change) -> str:
    return f"{change.what} {change.before} -> {change.after}" if change.before or change.after else change.what
