"""`run --strict` refuses a machine whose sandbox lacks something, before anything is made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from console.output import Screen
from console.running import run_verb
from core import sandbox
from core.errors import UserError


def test_strict_refuses_a_sandbox_with_a_gap_and_makes_nothing(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lacking = replace(sandbox.abilities(), missing=["Landlock (Linux 5.13): a recipe can read this user's files"])
    monkeypatch.setattr(sandbox, "abilities", lambda: lacking)
    limits = {"experiments": 1, "hours": None, "until": None}
    with pytest.raises(UserError, match=r"lacks 1 thing: Landlock .*doctor tells how"):
        run_verb(Screen(False), "night", researcher="search", demo=False, strict=True, **limits)
    assert not (tmp_path / "labs").exists()
