"""What was tried, by what it changed: read from the sources themselves, not from what was said of them."""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from console.rows import Row
from core.errors import UserError
from core.recipe import Choices, Range, constants, fingerprint
from core.syntax import parse

# The first family with one of these words in a constant's name is its theme.
FAMILIES: tuple[tuple[str, frozenset[str]], ...] = (
    ("schedule", frozenset({"WARMUP", "WARMDOWN", "COOLDOWN", "FINAL", "SCHEDULE", "FRAC"})),
    ("learning rates", frozenset({"LR"})),
    ("batch", frozenset({"BATCH", "ROWS", "ACCUMULATION"})),
    ("regularisation", frozenset({"DECAY", "DROPOUT", "SOFTCAP", "CLIP", "SMOOTHING"})),
    ("optimizer", frozenset({"ADAM", "BETA", "BETA1", "BETA2", "BETAS", "MOMENTUM", "MUON", "EPS"})),
    ("attention", frozenset({"WINDOW", "ATTENTION", "ROPE", "GATE", "HEAD", "HEADS", "KV"})),
    ("model size", frozenset({"DEPTH", "ASPECT", "DIM", "WIDTH", "LAYERS", "MLP", "EXPANSION"})),
)
OTHER, SEVERAL, NOTHING, UNREADABLE = "other constants", "several things at once", "nothing that runs", "not Python"


@dataclass(frozen=True)
class Theme:
    """All experiments that changed one kind of thing. `rows` are oldest first."""

    name: str
    parts: Mapping[str, int]  # constant, function or class -> how often it was changed
    rows: Sequence[Row]

    @property
    def kept(self) -> int:
        return sum(r.kept for r in self.rows)

    @property
    def failed(self) -> int:
        return sum(r.failed for r in self.rows)

    @property
    def closest(self) -> Row | None:
        """The one with the best change against what it had to beat."""
        scored = [r for r in self.rows if r.delta is not None]
        return min(scored, key=lambda r: r.delta or 0.0, default=None)


class Parts:
    """The parts of sources: constants with their values, functions and classes as fingerprints. Reads each once."""

    def __init__(self, source: Callable[[int], bytes]) -> None:
        """`source` of an experiment, by its number; 0 is the lab's first recipe."""
        self._source = source
        self._known: dict[int, tuple[dict[str, Any], dict[str, str]] | None] = {}

    def changed(self, before: int, after: int) -> tuple[set[str], set[str]] | None:
        """Names of the constants, and of the other parts, in which two experiments differ; None where one is no
        Python."""
        old, new = self._read(before), self._read(after)
        if old is None or new is None:
            return None
        names, code = ({n for n in a.keys() | b.keys() if a.get(n) != b.get(n)} for a, b in zip(old, new, strict=True))
        return names, code

    def _read(self, number: int) -> tuple[dict[str, Any], dict[str, str]] | None:
        if number not in self._known:
            self._known[number] = _read(self._source(number))
        return self._known[number]


def _read(source: bytes) -> tuple[dict[str, Any], dict[str, str]] | None:
    try:
        text = source.decode("utf-8")
        values = {name: repr(c.value) for name, c in constants(text).items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = parse(text)
    except (UserError, UnicodeDecodeError, SyntaxError):
        return None
    found: dict[str, str] = {}
    for name, node in _nodes(tree, set(values)):
        found[name] = found.get(name, "") + fingerprint(ast.unparse(node).encode("utf-8", "backslashreplace"))
    return values, found


def _nodes(tree: ast.Module, known: set[str]) -> Iterable[tuple[str, ast.stmt]]:
    """Functions, methods and whatever else stands at the top, with names for people."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                own = f"{node.name}.{inner.name}" if isinstance(inner, ast.FunctionDef) else node.name
                yield own, inner
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield "imports", node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            if not names & known:
                yield ", ".join(sorted(names)) or "module", node
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield "module", node


def family(constant: str) -> str:
    words = set(constant.split("_"))
    return next((name for name, known in FAMILIES if words & known), OTHER)


def theme_of(changed: tuple[set[str], set[str]] | None) -> tuple[str, set[str]]:
    """(theme, parts that were changed)."""
    if changed is None:
        return UNREADABLE, set()
    names, code = changed
    if code:
        tops = {part.split(".")[0] for part in code} - {"imports"}
        return (f"code: {next(iter(tops))}" if len(tops) == 1 else "code in several places"), code | names
    families = {family(name) for name in names}
    if not families:
        return NOTHING, set()
    return (next(iter(families)) if len(families) == 1 else SEVERAL), names


def themes(rows: Sequence[Row], source: Callable[[int], bytes]) -> list[Theme]:
    """Every decided experiment but the first of all, the largest theme first. `source`: as `Parts` takes it."""
    parts = Parts(source)
    grouped: dict[str, list[Row]] = {}
    counts: dict[str, Counter[str]] = {}
    for r in rows:
        if not r.decided or r.parent is None:
            continue
        name, changed = theme_of(parts.changed(r.parent, r.number))
        grouped.setdefault(name, []).append(r)
        counts.setdefault(name, Counter()).update(changed)
    found = [Theme(name, dict(counts[name].most_common()), of_one) for name, of_one in grouped.items()]
    return sorted(found, key=lambda t: (-len(t.rows), t.name))


def untried(rows: Sequence[Row], source: Callable[[int], bytes], best: int) -> list[str]:
    """Constants of the best that have a `# search:` range and that no experiment has changed."""
    try:
        known = constants(source(best).decode("utf-8"))
    except (UserError, UnicodeDecodeError):
        return []
    parts = Parts(source)
    touched: set[str] = set()
    for r in rows:
        if r.decided and r.parent is not None:
            touched |= (parts.changed(r.parent, r.number) or (set(), set()))[0]
    return [name for name, c in known.items() if isinstance(c.search, Range | Choices) and name not in touched]
