"""Take over from an upstream clone or fork: constants, results as history, program.md. Nothing of it is run."""

from __future__ import annotations

import ast
import csv
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.syntax import parse

MOST_BYTES = 2**20
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """What an upstream folder offers to a lab."""

    path: Path
    constants: dict[str, Any]  # carried over: ours has the same name and kind, and another value
    same: list[str]  # ours already has this value
    unknown: dict[str, Any]  # constants that our recipe does not know
    mismatched: dict[str, Any]  # known name, another kind of value
    unread: list[str]  # constants whose value is not a simple expression
    not_carried: list[str]  # classes, functions and other statements that stay behind
    history: list[dict[str, Any]] = field(default_factory=list)
    program: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path, "carried": self.constants, "same": self.same, "unknown": self.unknown,
            "mismatched": self.mismatched, "unread": self.unread, "not_carried": self.not_carried,
            "history": len(self.history), "program": self.program is not None,
        }  # fmt: skip


def evaluate(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """The value of an expression such as `2**19`, `(0.8, 0.95)`, `-DEPTH * 64`; `ValueError` for others."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | type(None)):
        return node.value
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.Tuple | ast.List):
        items = [evaluate(item, known) for item in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _number(evaluate(node.operand, known))
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _number(evaluate(node.left, known)), _number(evaluate(node.right, known))
        return _compute(node.op, left, right)
    raise ValueError("not a simple expression")


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    return value


def _compute(op: ast.operator, left: int | float, right: int | float) -> Any:
    """One arithmetic step, bounded: a hostile `9**9**9` must not take the machine's memory."""
    if isinstance(op, ast.Pow) and (abs(right) > 64 or abs(left) > 1e6):
        raise ValueError("a power out of range")
    try:
        result = _BINARY[type(op)](left, right)
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(str(error)) from error
    if isinstance(result, complex) or abs(result) > 1e30:
        raise ValueError("out of range")
    return result


def read_constants(source: str) -> tuple[dict[str, Any], list[str]]:
    """Top-level UPPER_CASE assignments of a file: values, and the names whose value could not be evaluated."""
    values: dict[str, Any] = {}
    unread: list[str] = []
    for node in parse(source).body:
        name, expression = _assignment(node)
        if name is None or expression is None:
            continue
        try:
            values[name] = evaluate(expression, values)
        except ValueError:
            values.pop(name, None)
            unread.append(name)
    return values, [name for name in dict.fromkeys(unread) if name not in values]


def _assignment(node: ast.stmt) -> tuple[str | None, ast.expr | None]:
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target, value = node.targets[0], node.value
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        target, value = node.target, node.value
    else:
        return None, None
    if isinstance(target, ast.Name) and target.id.isupper() and not target.id.startswith("_"):
        return target.id, value
    return None, None


def left_behind(source: str) -> list[str]:
    """What else the file holds, as a person would list it: 'class GPT (line 112)', 'training loop (line 543)'."""
    found: list[str] = []
    for node in parse(source).body:
        if isinstance(node, ast.ClassDef):
            found.append(f"class {node.name} (line {node.lineno})")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(f"function {node.name} (line {node.lineno})")
        elif isinstance(node, ast.While | ast.For | ast.If | ast.With | ast.Try):
            found.append(f"{type(node).__name__.lower()} block (lines {node.lineno}-{node.end_lineno})")
    return found


def same_kind(ours: Any, theirs: Any) -> bool:
    """Whether a value may take another's place: numbers for numbers, text for text, tuples of the same length."""
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return isinstance(ours, bool) and isinstance(theirs, bool)
    if isinstance(ours, int):
        return isinstance(theirs, int) or (isinstance(theirs, float) and theirs.is_integer())
    if isinstance(ours, float):
        return isinstance(theirs, int | float)
    if isinstance(ours, tuple | list):
        return isinstance(theirs, tuple | list) and len(ours) == len(theirs) and all(map(same_kind, ours, theirs))
    return type(ours) is type(theirs)


def read(folder: Path, ours: Mapping[str, Any]) -> Import:
    """Look through an upstream clone. `ours`: constants of the recipe that the lab starts from.

    Raises `UserError` where there is no readable train.py.
    """
    source = _source(folder)
    try:
        values, unread = read_constants(source)
        rest = left_behind(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / 'train.py'} is not valid Python: {error}", "repair it or choose another folder"
        ) from None
    carried, same, unknown, mismatched = {}, [], {}, {}
    for name, value in values.items():
        if name not in ours:
            unknown[name] = value
        elif not same_kind(ours[name], value):
            mismatched[name] = value
        elif ours[name] == value:
            same.append(name)
        else:
            carried[name] = int(value) if isinstance(ours[name], int) and not isinstance(value, bool) else value
    return Import(folder, carried, same, unknown, mismatched, unread, rest, _history(folder), _program(folder))


def _source(folder: Path) -> str:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", "give --from the folder of an upstream clone or fork")
    path = folder / "train.py"
    if not path.is_file():
        raise UserError(f"{folder} holds no train.py", "give --from the folder of an upstream clone or fork")
    return _text(path)


def _text(path: Path) -> str:
    if path.stat().st_size > MOST_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, more than {MOST_BYTES}", "this is not an upstream file"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})", "convert or remove it") from None


def _program(folder: Path) -> str | None:
    path = folder / "program.md"
    return _text(path) if path.is_file() else None


def _history(folder: Path) -> list[dict[str, Any]]:
    """results.tsv as notes for researchers. A crash has no number, though upstream writes 0.000000."""
    path = folder / "results.tsv"
    if not path.is_file():
        return []
    lines = csv.DictReader(_text(path).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    if "description" not in (lines.fieldnames or []) or "val_bpb" not in (lines.fieldnames or []):
        raise UserError(
            f"{path} does not begin with upstream's columns (found: {', '.join(lines.fieldnames or []) or 'nothing'})",
            "expected: commit, val_bpb, memory_gb, status, description; repair or remove it",
        )
    return [_past(entry) for entry in lines]


def _past(entry: Mapping[str, Any]) -> dict[str, Any]:
    status = (entry.get("status") or "").strip().lower()
    try:
        claimed = float(entry.get("val_bpb") or "nan")
    except ValueError:
        claimed = float("nan")
    usable = status != "crash" and 0 < claimed < 100
    return {
        "commit": (entry.get("commit") or "").strip(),
        "status": status,
        "claimed_bpb": claimed if usable else None,  # measured elsewhere by another program: never a score here
        "description": (entry.get("description") or "").strip(),
    }
