"""A night of real runs in which nothing changes but a comment or the seed: it ends as it began."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted import check, make_lab
from test_kill import are_tensors

from benchmarks.placebo import night
from core.measuring import Measuring


@pytest.mark.slow
def test_a_placebo_night_keeps_nothing(tmp_path, settings, tiny_recipe, monkeypatch):
    monkeypatch.setattr(Measuring, "disturbed", lambda *_: "")  # what else this machine does is no part of this test
    # What is worth keeping is far above the noise, even on a busy machine (0.04 seen), so that the night is short.
    chosen = replace(settings, verdict="statistical", min_delta=0.1, eval_tokens=1024, audit_points=64)
    lab = make_lab(tmp_path / "night", chosen, first=tiny_recipe.encode())
    found = list(night(lab, 2))  # a comment, and another seed
    assert [p.status for p in found] == ["discard", "discard"], [p.reason for p in found]
    assert all(p.runs >= 1 and p.simple in ("keep", "discard") for p in found)
    assert all(e.verdict["noise"]["df"] >= 4 for e in lab.ledger.experiments()[1:])
    assert [e.number for e in lab.ledger.experiments() if e.is_kept] == [1]
    assert all(s.outcome["audited"] for s in lab.ledger.samples(1))
    check(lab, are_tensors)
