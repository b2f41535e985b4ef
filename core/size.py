"""How long a recipe is in what it does: comments, docstrings, layout and the length of names do not count."""

from __future__ import annotations

import ast

from core.syntax import parse

_DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_NO_TOKENS = (ast.Module, ast.expr_context)


def syntax_tokens(source: bytes) -> int:
    """The number of nodes of the syntax tree, docstrings left out. Raises `SyntaxError` where there is no tree."""
    tree = parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return sum(not isinstance(node, _NO_TOKENS) for node in ast.walk(tree))
