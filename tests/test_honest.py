"""Honest recipes that look unlike the shipped ones: the guard lets them pass, the audit finds nothing, they are scored.

What a researcher may do is wide. A wall that turned these away would be as wrong as one that lets a cheat through.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from core import guard
from core.outcome import Outcome
from core.probing import Probe
from core.settings import Settings

FOLDER = Path(__file__).resolve().parent / "tamper"
ALL_LOOKED = os.environ.get("TAMPER_LOOKS") == "all"  # as in tests/test_tamper.py
RECIPES = sorted(p.stem for p in (FOLDER / "honest").glob("*.py"))

pytestmark = pytest.mark.slow


def whole(name: str) -> str:
    """The recipe as one file, the shared small model in the place of the line that imports it."""
    shared = (FOLDER / "common.py").read_text("utf-8")
    return re.sub(
        r"^from common import .*$",
        lambda _: shared,
        (FOLDER / "honest" / f"{name}.py").read_text("utf-8"),
        flags=re.M,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_scored_and_audited(name: str, settings: Settings, run_recipe: Callable[..., Outcome]) -> None:
    source = whole(name)
    assert guard.check(source.encode()) == []
    looks = {"probe": Probe((0.3, 0.6), 2048)} if ALL_LOOKED else {}
    limits = replace(settings, budget=2.0 if looks else 1.2, audit_points=1024)
    outcome = run_recipe(source, settings=limits, audit="auto", **looks)
    assert bool(outcome.probes) == bool(looks) and not outcome.unprobed, outcome.unprobed
    assert outcome.status == "scored", outcome.reason
    assert outcome.audited and outcome.val_bpb is not None
    assert outcome.audit["points"] >= 1024
    assert outcome.steps > 1 and 0.5 < outcome.val_bpb < 4.5  # uniform guessing is 9 bits a token, near 5 a byte


def test_there_are_enough() -> None:
    assert len(RECIPES) >= 10
