"""A pytest plugin (`-p interpreted.quick`): Triton's interpreter in two thirds of its time.

For each call of one kernel's function by another it looks through the whole of triton.language for what it has to
replace, though that was replaced when the launch began. Here it looks once a launch and module.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from triton.runtime import interpreter


class Once:
    """Stands in for `interpreter._patch_lang`. `looked`: what was replaced in this launch, by the modules that a
    function knows; None outside of one."""

    def __init__(self) -> None:
        self.look = interpreter._patch_lang
        self.looked: dict[frozenset[str], Any] | None = None

    def __call__(self, function: Any) -> Any:
        if self.looked is None:
            return self.look(function)
        modules = frozenset(value.__name__ for value in function.__globals__.values() if inspect.ismodule(value))
        if modules not in self.looked:
            self.looked[modules] = self.look(function)
        return self.looked[modules]


@pytest.fixture(autouse=True, scope="session")
def looks_once_a_launch() -> Any:
    once = Once()
    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *given: Any, **named: Any) -> Any:
        once.looked = {}
        try:
            return launch(self, *given, **named)
        finally:
            once.looked = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield
