"""Two threads read Python at once, as those of the loop and of a researcher do."""

from __future__ import annotations

import ast
import gc
import threading
import time

from core import syntax
from core.guard import check
from core.paths import project_root


class Slow:
    """Garbage whose finalizer lets other threads go on, in the middle of whatever the collector was called by."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        time.sleep(0.0002)


def test_threads_do_not_count_for_one_another():
    """Without the lock CPython 3.11 fails here in most runs; it has to be one that ran out of nothing."""
    source, failed, read = "\n".join(f"a{i} = [f(x, {i}) for x in range({i})]" for i in range(60)), [], []
    until = time.monotonic() + 3.0

    def work():
        while time.monotonic() < until and not failed:
            Slow()
            try:
                read.append(len(syntax.parse(source).body))
            except SystemError as error:
                failed.append(error)

    before = gc.get_threshold()
    gc.set_threshold(50)
    try:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*before)
    assert failed == [] and set(read) == {60}


def test_nobody_who_may_be_one_of_two_threads_reads_without_it():
    """What a night's process runs: the loop, researchers, the console's report. Children read in one thread."""
    root = project_root()
    for folder in ("core", "console", "researchers"):
        for path in (root / folder).rglob("*.py"):
            if path != root / "core/syntax.py":
                assert "ast.parse(" not in path.read_text("utf-8"), f"{path.name}: core.syntax.parse"
    assert ast.unparse(syntax.expression(" (1 + 2)".strip())) == "1 + 2"
    assert check(b"x = (\n")[0].rule == "syntax"
