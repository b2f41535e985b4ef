"""The constants of a recipe: reading them with their search ranges, changing them, comparing whole files.

A constant is a top-level `UPPER_CASE = literal` that is assigned once. A literal may be simple arithmetic
(`2**18`, `12 * 64`). The comment behind it can carry what the offline search may try:

    DEPTH = 4  # search: 2..12
    MATRIX_LR = 0.04  # for the orthogonalised matrices; search: 0.005..0.2 log
    TOTAL_BATCH_SIZE = 2**14  # search: 2**10..2**16 pow2  tokens in one optimizer step
    WINDOW_PATTERN = "SSSL"  # search: SL | SSL | SSSL | L

The file is read as a syntax tree and never run.
"""

from __future__ import annotations

import ast
import hashlib
import io
import math
import operator
import re
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import UserError
from core.syntax import expression, parse

_NAME = re.compile(r"[A-Z][A-Z0-9_]*\Z")
_SEARCH = re.compile(r"\bsearch:\s*(.*?)(?=\s*(?:[;#]|\s{2}|$))")  # prose may follow after ";" or two spaces
_BOM = "\ufeff"  # some Windows editors put it first
_OPERATORS: Mapping[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


@dataclass(frozen=True)
class Range:
    """`low..high`, both included. `scale` says in which steps a search should think."""

    low: float
    high: float
    scale: str = "linear"  # "linear", "log" or "pow2" (only powers of two)
    integer: bool = False

    def contains(self, value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    def clip(self, value: float) -> float:
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Choices:
    """`A | B | C`: one of these and nothing between them."""

    values: tuple[Any, ...]

    def contains(self, value: Any) -> bool:
        return any(value == v and type(value) is type(v) for v in self.values)


@dataclass(frozen=True)
class Constant:
    name: str
    value: Any
    line: int  # from 1
    search: Range | Choices | None  # None: not to be searched
    comment: str  # as it stands behind the value, without the "#"
    problem: str = ""  # why a `search:` comment could not be read


@dataclass(frozen=True)
class _Found:
    """Where a constant's value stands, in bytes of the UTF-8 source."""

    constant: Constant
    start: int
    end: int
    text: str


# --- reading -----------------------------------------------------------------------------------


def constants(source: str) -> dict[str, Constant]:
    """All constants in the order of the file. Raises UserError if it is not Python."""
    return {name: found.constant for name, found in _find(source.removeprefix(_BOM)).items()}


def _find(source: str) -> dict[str, _Found]:
    tree = _parse(source)
    lines = source.encode("utf-8", "surrogatepass").splitlines(keepends=True)
    starts = [0]
    for text in lines:
        starts.append(starts[-1] + len(text))
    data = b"".join(lines)
    stores = Counter(_stored_names(tree))
    comments = _comments(source)
    found: dict[str, _Found] = {}
    for node in tree.body:
        target, value_node = _assignment(node)
        if target is None or value_node is None or not _NAME.match(target) or stores[target] != 1:
            continue
        try:
            value = _evaluate(value_node)
        except (ValueError, ArithmeticError, TypeError):
            continue  # computed from something else: not a constant
        start = starts[value_node.lineno - 1] + value_node.col_offset
        end = starts[(value_node.end_lineno or 0) - 1] + (value_node.end_col_offset or 0)
        comment = comments.get(node.end_lineno or node.lineno, "")
        search, problem = _read_search(comment, value)
        constant = Constant(target, value, node.lineno, search, comment, problem)
        found[target] = _Found(constant, start, end, data[start:end].decode("utf-8", "replace"))
    return found


def _parse(source: str | bytes) -> ast.Module:
    try:
        with warnings.catch_warnings():  # an odd escape in somebody's recipe is no news for the console
            warnings.simplefilter("ignore")
            return parse(source)
    except SyntaxError as error:
        raise UserError(f"train.py is not valid Python: line {error.lineno or 1}: {error.msg}", "correct it") from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; nested too deeply
        raise UserError(f"train.py cannot be read as Python: {error or type(error).__name__}", "correct it") from None


def _assignment(node: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """Name and value node of `NAME = value` or `NAME: type = value`."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id, node.value
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id, node.value
    return None, None


def _stored_names(tree: ast.Module) -> Iterator[str]:
    """Every name that module-level code, or a function through `global`, binds; with repetitions."""
    stack: list[tuple[ast.AST, bool]] = [(tree, True)]
    while stack:
        node, top = stack.pop()
        if isinstance(node, ast.Global):
            yield from node.names
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if top:
                yield node.name
            top = False
        elif isinstance(node, ast.Lambda):
            top = False
        elif top and isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif top and isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        stack.extend((child, top) for child in ast.iter_child_nodes(node))


def _evaluate(node: ast.expr) -> Any:
    """Value of a literal or of simple arithmetic on numbers; ValueError for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluate(node.left), _evaluate(node.right)
        if not all(isinstance(x, (int, float)) for x in (left, right)):
            raise ValueError("not a number")
        if isinstance(node.op, ast.Pow) and (abs(right) > 128 or abs(left) > 2**16):
            raise ValueError("power too large")
        value = _OPERATORS[type(node.op)](left, right)
        if isinstance(value, complex) or abs(value) > 2**128:
            raise ValueError("out of range")
        return value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _evaluate(node.operand)
        if not isinstance(value, (int, float)):
            raise ValueError("not a number")
        return -value if isinstance(node.op, ast.USub) else +value
    if isinstance(node, ast.Tuple):
        return tuple(_evaluate(item) for item in node.elts)
    if isinstance(node, ast.List):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool, type(None))):
        return node.value
    raise ValueError("not a literal")


def _comments(source: str) -> dict[int, str]:
    """Line number -> comment text. `source` is known to parse."""
    found: dict[int, str] = {}
    # Since Python 3.12 it cuts letters of several bytes in two behind a carriage return that ends a line by itself.
    lines = io.StringIO(source.replace("\r\n", "\n").replace("\r", "\n"))
    try:
        for token in tokenize.generate_tokens(lines.readline):
            if token.type == tokenize.COMMENT:
                found[token.start[0]] = token.string.lstrip("#").strip()
    except (tokenize.TokenError, SyntaxError):
        pass  # tokenize is stricter than the parser about a few odd endings; what was read so far holds
    return found


def _read_search(comment: str, value: Any) -> tuple[Range | Choices | None, str]:
    match = _SEARCH.search(comment)
    if match is None:
        return None, ""
    try:
        return _parse_search(match.group(1), value), ""
    except (ValueError, ArithmeticError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        return None, f"search: {match.group(1)!r} cannot be read ({error})"


def _parse_search(text: str, value: Any) -> Range | Choices:
    if ".." in text and "|" not in text:
        low_text, _, rest = text.partition("..")
        words = rest.split()
        scale = words[1] if len(words) > 1 else "linear"
        if not words or len(words) > 2 or scale not in ("linear", "log", "pow2"):
            raise ValueError("expected low..high, optionally followed by log or pow2")
        low, high = _number(low_text), _number(words[0])
        if not low < high:
            raise ValueError("low is not below high")
        if scale in ("log", "pow2") and low <= 0:
            raise ValueError(f"{scale} needs positive limits")
        integer = all(isinstance(x, int) and not isinstance(x, bool) for x in (low, high, value))
        if scale == "pow2" and not (integer and _is_power(low) and _is_power(high)):
            raise ValueError("pow2 needs powers of two as limits and an integer as value")
        return Range(low, high, scale, integer)
    values = tuple(_choice(item.strip(), value) for item in text.split("|"))
    if len(values) < 2 or any(v == w for i, v in enumerate(values) for w in values[:i]):
        raise ValueError("expected at least two different choices")
    return Choices(values)


def _number(text: str) -> float:
    value = _evaluate(expression(text.strip()))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{text.strip()!r} is not a number")
    return value


def _choice(text: str, value: Any) -> Any:
    """One item of `A | B`: a literal, or (for string constants) a bare word."""
    try:
        read = _evaluate(expression(text))
    except (SyntaxError, ValueError):
        read = text
    if isinstance(value, str) and not isinstance(read, str):
        return text
    if isinstance(read, str) and not isinstance(value, str):
        raise ValueError(f"{text!r} is not a value like {value!r}")
    if isinstance(value, float) and isinstance(read, int) and not isinstance(read, bool):
        return float(read)
    return read


def _is_power(value: float) -> bool:
    return isinstance(value, int) and value > 0 and value & (value - 1) == 0


# --- changing ----------------------------------------------------------------------------------


def replace(source: str, values: Mapping[str, Any]) -> str:
    """The same file with other values; layout, comments and the style of numbers stay.

    A value equal to the present one leaves its text untouched. Raises UserError for a name that is no
    constant of the file and for a value that has no literal.
    """
    if source.startswith(_BOM):
        return _BOM + replace(source[1:], values)
    found = _find(source)
    unknown = sorted(set(values) - set(found))
    if unknown:
        known = ", ".join(found) or "none"
        raise UserError(f"train.py has no constant {', '.join(unknown)}", f"known are: {known}")
    data = source.encode("utf-8", "surrogatepass")
    for name in sorted(values, key=lambda n: found[n].start, reverse=True):
        at, value = found[name], values[name]
        if repr(value) == repr(at.constant.value):
            continue
        data = data[: at.start] + _literal(name, value, at).encode() + data[at.end :]
    return data.decode("utf-8", "surrogatepass")


def _literal(name: str, value: Any, at: _Found) -> str:
    old = at.constant.value
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, int) and "**" in at.text and _is_power(value):
        return f"2**{value.bit_length() - 1}"
    return _spell(name, value)


def _spell(name: str, value: Any) -> str:
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{name} = {value} cannot be written as a constant", "give a finite number")
        return repr(value)
    if isinstance(value, str):
        text = repr(value)
        return f'"{text[1:-1]}"' if '"' not in text else text
    if isinstance(value, (tuple, list)):
        items = [_spell(name, item) for item in value]
        if isinstance(value, list):
            return f"[{', '.join(items)}]"
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    raise UserError(f"{name} cannot be a {type(value).__name__}", "give a number, a string, or a tuple of these")


# --- comparing ---------------------------------------------------------------------------------


def fingerprint(source: bytes) -> str:
    """16 hex digits, equal for files that differ in comments, docstrings or formatting only.

    A file that is no Python is identified by its bytes. Never raises.
    """
    digest = hashlib.sha256()
    try:
        for item in _walk(_parse(source)):
            digest.update(item.encode("utf-8", "backslashreplace") + b"\0")
    except UserError:
        digest = hashlib.sha256(b"bytes\0" + source)
    return digest.hexdigest()[:16]


def _walk(tree: ast.AST) -> Iterator[str]:
    """The tree as a flat list of strings. Own walk: `ast.dump` differs between Python versions and recurses."""
    stack: list[Any] = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, ast.AST):
            if isinstance(item, (ast.expr_context, ast.Load, ast.Store, ast.Del)):
                continue
            yield type(item).__name__
            for field in reversed(item._fields):
                value = getattr(item, field, None)
                if field in ("kind", "type_comment", "type_ignores", "type_params") and not value:
                    continue
                if field == "body" and isinstance(value, list):
                    value = _without_docstring(item, value)
                if value is not None and value != []:
                    stack.extend((_Text(")"), value, _Text(f"{field}")))
                elif isinstance(item, ast.Constant) and field == "value":
                    stack.append(_Text("None"))
        elif isinstance(item, list):
            stack.append(_Text(")"))
            for part in reversed(item):
                stack.append(_Text("None") if part is None else part)
            stack.append(_Text("("))
        elif isinstance(item, _Text):
            yield item.text
        else:
            yield repr(item)


@dataclass(frozen=True)
class _Text:
    text: str


def _without_docstring(node: ast.AST, body: list[Any]) -> list[Any]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and body:
        first = body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            return body[1:]
    return body
