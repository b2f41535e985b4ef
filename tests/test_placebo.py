"""A night of real runs in which nothing changes but a comment or the seed: it ends as it began."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted import check, make_lab
from test_kill import are_tensors

from core.contract import Exhausted, Proposal
from core.executor import LocalExecutor
from core.loop import Limits, Loop


class Placebos:
    """The same recipe with another comment, and with another seed."""

    name = "placebos"

    def propose(self, view):
        source = view.best_source
        tried = [
            Proposal(source + b"\n# the same\n", "a comment"),
            Proposal(source.replace(b"manual_seed(spec.seed)", b"manual_seed(spec.seed + 1000)"), "another seed"),
        ]
        if len(view.past) > len(tried):
            raise Exhausted("no more placebos")
        return tried[len(view.past) - 1]


@pytest.mark.slow
def test_a_placebo_night_keeps_nothing(tmp_path, settings, tiny_recipe):
    chosen = replace(settings, verdict="statistical", budget=2.0, eval_tokens=1024, audit_points=64)
    lab = make_lab(tmp_path / "night", chosen, first=tiny_recipe.encode())
    said = Loop(lab, Placebos(), LocalExecutor(), lambda event: None).run(Limits(experiments=3))
    found = lab.ledger.experiments()
    assert said.decided == len(found) == 3
    assert [e.number for e in found if e.is_kept] == [1], [e.reason for e in found]
    assert all(s.outcome["audited"] for s in lab.ledger.samples(1))
    assert all(s.outcome["health"]["our_cores"] >= 0 for s in lab.ledger.all_samples())
    check(lab, are_tensors)
