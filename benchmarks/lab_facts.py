"""What a lab found, as one file that can be sent to another machine: settings, and every change that was tried.

No paths and no names of users are in it; recipes are, whole, so that the best can be run elsewhere. A file that came
from somewhere is data: its recipe runs in the sandbox only, as any candidate does.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from benchmarks.results import Number
from core.doctor import redact
from core.errors import UserError
from core.lab import Lab
from core.rebase import base_of
from core.recipe import constants
from core.settings import Settings

KIND, SCHEMA = "autoresearch-lab", 1
LARGEST = 64 * 2**20  # bytes of such a file
REST = "the rest of the file"  # module-level code that defines nothing


@dataclass(frozen=True)
class Change:
    """One thing that an experiment changed of what it started from."""

    what: str  # a constant's name, or "class Attention", "def lr_multiplier"
    before: str = ""  # a constant's value as it is written; empty where it is no constant
    after: str = ""


@dataclass(frozen=True)
class Tried:
    """One decided experiment that was no baseline."""

    number: int
    status: str  # keep, simplify, discard, crash, timeout, invalid; "undone" for a keep that was taken back
    val_bpb: Number | None
    best_before: Number | None
    description: str
    changes: list[Change]

    @property
    def kept(self) -> bool:
        return self.status in ("keep", "simplify")

    @property
    def gain(self) -> float | None:
        """bpb below the best before it."""
        return None if self.val_bpb is None or self.best_before is None else self.best_before - self.val_bpb


@dataclass(frozen=True)
class Again:
    """Baseline and best measured again on seeds that decided nothing (core.effects): bpb by which the best is better,
    its 95 % interval where the lab has two such runs of one recipe, the runs of each, and whether the gain holds."""

    gain: Number
    low: Number | None
    high: Number | None
    runs_before: int
    runs_after: int
    state: Literal["replicated", "not replicated", "open", "unconfirmed"]

    def text(self) -> str:
        """'measured again -0.0123 (95 %: -0.0150 to -0.0096), holds on fresh seeds'."""
        from console.figures import STATE_WORDS

        known = self.low is not None and self.high is not None
        range_ = f" (95 %: {-(self.high or 0):+.4f} to {-(self.low or 0):+.4f})" if known else ""
        return f"measured again {-self.gain:+.4f}{range_}, {STATE_WORDS[self.state]}"


@dataclass(frozen=True)
class LabFacts:
    """One lab."""

    tag: str
    data: str
    machine: str  # one line for people, of where it was written; the device of the settings
    settings: Mapping[str, str | int | float]
    baseline_bpb: Number | None
    best_bpb: Number | None
    best_number: int | None
    first_source: str
    best_source: str
    tried: list[Tried] = field(default_factory=list)
    again: Again | None = None  # None: the gain was not measured again, or there is none
    disturbed: list[int] = field(default_factory=list)  # of baseline and best: measured while others used the device
    kind: Literal["autoresearch-lab"] = "autoresearch-lab"
    schema: int = SCHEMA

    @property
    def kept(self) -> list[Tried]:
        return [t for t in self.tried if t.kept]

    def locked(self) -> Settings:
        return Settings.from_json(json.dumps(dict(self.settings)))

    def scale(self) -> str:
        """What its val_bpb was measured on."""
        s = self.settings
        return f"{self.data}, {s['sequence_len']} tokens of context, {s['budget']:g} s of training"

    def comparable(self, other: LabFacts) -> str:
        """Why its val_bpb cannot be held against the other's; "" if it can: they are of one text and one budget."""
        names = {"data_sha256": "other data", "sequence_len": "another context", "budget": "another budget",
                 "eval_tokens": "other validation tokens"}  # fmt: skip
        return ", ".join(words for name, words in names.items() if self.settings[name] != other.settings[name])


# --- reading a lab --------------------------------------------------------------------------------


def of_lab(lab: Lab, data: str, machine: str) -> LabFacts:
    """Everything from its ledger; the lab is only read. `data`: its name for people."""
    experiments = lab.ledger.experiments()
    best = lab.best()
    baseline = next((e for e in experiments if e.status in ("keep", "simplify")), None)
    tried = []
    for e in experiments:
        if e.status is None or baseline is None or e.number == baseline.number:
            continue
        before = base_of(lab, e.parent)
        status = "undone" if e.undone else e.status
        found = changes(_text(before), _text(lab.source(e.number)))
        tried.append(Tried(e.number, status, e.val_bpb, e.best_before, redact(e.description), found))
    return LabFacts(
        lab.tag,
        data,
        machine,
        asdict(lab.settings),
        baseline.val_bpb if baseline else None,
        lab.best_bpb(),
        best.number if best else None,
        _text(lab.first_source()),
        _text(lab.best_source()),
        tried,
        _again(lab),
        [e.number for e in experiments if e.tainted and (e is baseline or (best and e.number == best.number))],
    )


def _again(lab: Lab) -> Again | None:
    from console.findings import findings, read  # here, as it loads what only statistics need

    gain = findings(read(lab)).gain
    found = gain.validation if gain else None
    if gain is None or found is None:
        return None
    return Again(found.gain, found.low, found.high, found.runs_before, found.runs_after, gain.state)


def _text(source: bytes) -> str:
    return source.decode("utf-8", "replace")


def changes(before: str, after: str) -> list[Change]:
    """What differs, one entry for each constant and each definition of the module; comments and layout do not count."""
    try:
        old, new = constants(before), constants(after)
        parts_before, parts_after = _parts(before, set(old)), _parts(after, set(new))
    except (UserError, SyntaxError, ValueError):  # no Python: it cannot be told apart further
        return [Change("the whole file")]
    found = []
    for name in dict.fromkeys([*old, *new]):
        values = [repr(c[name].value) if name in c else "none" for c in (old, new)]
        if values[0] != values[1]:
            found.append(Change(name, *values))
    names = dict.fromkeys([*parts_before, *parts_after])
    return found + [Change(name) for name in names if parts_before.get(name) != parts_after.get(name)]


def _parts(source: str, known: set[str]) -> dict[str, str]:
    """Name of each definition -> its syntax tree as text, without docstrings; all else together under REST."""
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            name = f"class {node.name}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"def {node.name}"
        elif _said_elsewhere(node, known):
            continue
        else:
            name = REST
        found[name] = found.get(name, "") + ast.dump(_without_docstrings(node))
    return found


def _said_elsewhere(node: ast.stmt, known: set[str]) -> bool:
    """Constants are told by their values, docstrings not at all."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return set(_targets(node)) <= known
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [t.id if isinstance(t, ast.Name) else "" for t in targets]


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or len(body) < 2:
            continue
        if isinstance(body[0], ast.Expr) and isinstance(getattr(body[0].value, "value", None), str):
            del body[0]
    return tree


# --- files ----------------------------------------------------------------------------------------


def dumps(facts: LabFacts) -> str:
    return json.dumps(asdict(facts), indent=1, ensure_ascii=True) + "\n"


def load(path: Path) -> LabFacts:
    """UserError where the file is damaged, of another schema, or something else."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(
                f"{path} is larger than such a file can be",
                "give what `autoresearch bench labs LAB --export FILE` wrote",
            )
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "name a lab or an exported one") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}", "copy it again") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(f"{path} is no exported lab", "write one: autoresearch bench labs LAB --export FILE")
    if found.get("schema") != SCHEMA:
        raise UserError(f"{path} is of schema {found.get('schema')}, this version reads {SCHEMA}", "export it again")
    try:
        facts: LabFacts = TypeAdapter(LabFacts).validate_python(found)
        facts.locked()
    except (ValidationError, TypeError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}", "export it again") from None
    return facts


def require_several(facts: Sequence[LabFacts]) -> None:
    if len(facts) < 2:
        raise UserError(
            f"{'one lab was' if facts else 'no lab was'} given",
            "name two or more: labs here, or files that `autoresearch bench labs LAB --export FILE` wrote",
        )
