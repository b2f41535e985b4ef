"""Reading Python: `ast.parse`, one thread at a time.

CPython 3.11 counts how deep it is in a tree that it makes, for all threads together. When the collector runs a
finalizer on the way, another thread may go on and make a tree of its own: the counts no longer agree, and one of the
two fails with "SystemError: AST constructor recursion depth mismatch" (python/cpython #106905 is about the same count).
A night reads recipes in two threads, that of the loop and that of the researcher who thinks ahead.
"""

from __future__ import annotations

import ast
import threading

_ONE = threading.RLock()  # a finalizer may read Python too


def parse(source: str | bytes, filename: str = "<unknown>") -> ast.Module:
    """Raises what `ast.parse` does: SyntaxError, ValueError (null bytes), RecursionError, MemoryError."""
    with _ONE:
        return ast.parse(source, filename)


def expression(source: str) -> ast.expr:
    """The same for one expression."""
    with _ONE:
        return ast.parse(source, mode="eval").body
