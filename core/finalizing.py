"""The replicated wins as a clean branch: the first recipe, then one commit for each change that holds.

Changes that were not measured to hold are left out where the later ones can be made without them (core.reapply).
Where a later one cannot, the change that it needs stays, with a note. Only objects and one ref are written: the user's
files, index and checked-out branch are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from core.commands import quoted
from core.effects import Effect, Replication
from core.errors import LabError, UserError
from core.lab import PROGRAM, RECIPE, Lab
from core.ledger import Experiment
from core.reapply import reapply

EVENT = "finalized"  # of the ledger: its text is "<ref> <commit>"


@dataclass(frozen=True)
class Win:
    """A kept change, and what it gave when it was measured again."""

    number: int
    again: Effect | None
    state: Replication


@dataclass(frozen=True)
class Step:
    """A change on the branch. `note`: why it is there although it was not measured to hold; else ""."""

    win: Win
    source: bytes  # the recipe with it
    note: str


@dataclass(frozen=True)
class Final:
    """What a branch is made of."""

    steps: tuple[Step, ...]
    left_out: tuple[Win, ...]
    source: bytes  # the recipe that results

    def measured_as(self, experiments: Sequence[Experiment], sources: Mapping[int, bytes]) -> Experiment | None:
        """The experiment that has exactly this recipe, None where it was never measured as it is."""
        return next((e for e in experiments if sources.get(e.number) == self.source), None)


def arrange(lab: Lab, wins: Sequence[Win], also: Sequence[Replication] = ()) -> Final:
    """Which changes stand on the branch. `wins`: all kept changes in order; `also`: states that are taken as they are,
    beside "replicated". Raises `UserError` where nothing is left."""
    kept = [e for e in lab.ledger.experiments() if e.is_kept]
    sources = {e.number: lab.source(e.number) for e in kept}
    wanted = {w.number for w in wins if w.state in ("replicated", *also)}
    if not wanted:
        raise UserError(
            f"none of {len(wins)} kept changes was measured to hold on fresh seeds" if wins else "nothing was kept",
            "autoresearch confirm --kept" if wins else "autoresearch run",
        )
    chosen = set(wanted)
    while (built := _without(lab, kept, sources, chosen)).stuck is not None:
        out = [w.number for w in wins if w.number not in chosen and w.number < built.stuck]
        chosen.add(_needed(lab, kept, sources, chosen, built.stuck, out))
    notes = {w.number: "" if w.number in wanted else _note(w) for w in wins}
    steps = [Step(w, built.after[w.number], notes[w.number]) for w in wins if w.number in chosen]
    return Final(tuple(steps), tuple(w for w in wins if w.number not in chosen), steps[-1].source)


def _needed(
    lab: Lab, kept: Sequence[Experiment], sources: Mapping[int, bytes], chosen: set[int], stuck: int, out: Sequence[int]
) -> int:
    """Which of those that were left out lets the stuck change be made; where no single one does, the newest."""
    for number in reversed(out):
        if _without(lab, kept, sources, chosen | {number}).stuck != stuck:
            return number
    return out[-1]


def _note(win: Win) -> str:
    why = {"not replicated": "it did not replicate", "open": "whether it holds is not settled"}
    return f"{why.get(win.state, 'it is not confirmed')}, but a later change cannot be made without it"


@dataclass(frozen=True)
class _Built:
    after: Mapping[int, bytes]  # the recipe with each change
    stuck: int | None  # the first change that could not be made


def _without(lab: Lab, kept: Sequence[Experiment], sources: Mapping[int, bytes], chosen: set[int]) -> _Built:
    """Make the chosen changes on the first recipe, one after another."""
    now, after = sources[kept[0].number], dict[int, bytes]()
    for before, e in pairwise(kept):
        if e.number not in chosen:
            continue
        base = sources[before.number]
        made = sources[e.number] if now == base else reapply(lab.git, base, sources[e.number], now)
        if made is None:
            return _Built(after, e.number)
        now = after[e.number] = made
    return _Built(after, None)


def write(lab: Lab, final: Final, branch: str | None = None) -> str:
    """The branch, its commits one for each step. Returns its name. The same ledger gives the same commits.

    Raises `UserError` where the name is no branch's or is the lab's own, where the branch is checked out, and where
    somebody has committed to it."""
    name = branch or f"{lab.branch}-final"
    ref = f"refs/heads/{name}"
    with lab.lock():
        _check_name(lab, name, ref)
        kept = [e for e in lab.ledger.experiments() if e.is_kept]
        commit = _base(lab, kept[0])
        for step in final.steps:
            e = lab.ledger.get(step.win.number)
            commit = _commit(lab, step.source, e.program_sha256, commit, message(e, step), e.finished or e.created)
        lab.git.update_refs({ref: commit})
        lab.ledger.event(EVENT, f"{ref} {commit}")
    return name


def _check_name(lab: Lab, name: str, ref: str) -> None:
    if not lab.git.is_branch_name(name):
        raise UserError(f"{name!r} cannot name a branch", "choose another: --branch NAME")
    if ref == lab.branch_ref:
        raise UserError(f"{name} is the lab's own branch", "choose another: --branch NAME")
    if lab.git.head() == ref:
        raise UserError(
            f"the branch {name} is checked out in {lab.path}",
            f"git -C {quoted(lab.path)} checkout {lab.branch}, or choose another: --branch NAME",
        )
    present = lab.git.refs(ref).get(ref)
    ours = {e.text for e in lab.ledger.events() if e.kind == EVENT}
    if present is not None and f"{ref} {present}" not in ours:
        raise UserError(f"the branch {name} has commits that are not autoresearch's", "choose another: --branch NAME")
    inside = [r for r in lab.git.refs("refs/heads") if r.startswith(f"{ref}/") or ref.startswith(f"{r}/")]
    if inside:
        raise UserError(f"the branch {inside[0].removeprefix('refs/heads/')} is in the way of {name}", "choose another")


def _base(lab: Lab, baseline: Experiment) -> str:
    """The commit that the branch starts from: the lab's first, and on top the baseline where it is another recipe."""
    first = lab.first_commit()
    if baseline.source_sha256 == lab.ledger.meta("first")["recipe"]:
        return first
    text = f"{baseline.description}\n\nThe baseline, experiment {baseline.number}.\n"
    when = baseline.finished or baseline.created
    return _commit(lab, lab.source(baseline.number), baseline.program_sha256, first, text, when)


def _commit(lab: Lab, recipe: bytes, program: str, parent: str, text: str, when: str) -> str:
    git = lab.git
    blobs = {RECIPE: git.blob(recipe), PROGRAM: git.blob(lab.ledger.source(program))}
    commit = git.commit(git.tree(blobs), [parent], text, when)
    if not git.has(commit):
        raise LabError(f"commit {commit} could not be written", f"see `git fsck` in {lab.path}")
    return commit


def message(e: Experiment, step: Step) -> str:
    """What the commit says: the change, its effect, where it comes from."""
    lines = [e.description, "", effect_line(step.win.again)]
    if step.note:
        lines.append(f"Note: {step.note}.")
    lines.append(f"Experiment {e.number}, by {e.researcher}; when it was kept: {e.reason}.")
    return "\n".join(lines) + "\n"


def effect_line(again: Effect | None) -> str:
    """'val_bpb -0.0151 (95 %: -0.0200 to -0.0102) on fresh seeds, 4 and 4 runs.'"""
    if again is None:
        return "Not measured again on fresh seeds."
    interval = ""
    if again.low is not None and again.high is not None:
        interval = f" (95 %: {-again.high:+.4f} to {-again.low:+.4f})"
    return f"val_bpb {-again.gain:+.4f}{interval} on fresh seeds, {again.runs_before} and {again.runs_after} runs."
