"""Every shipped configuration of the Triton kernels, compiled for every card it is meant for: no GPU is needed."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks.compile_cases import cases, missing
from kernels import targets


@pytest.mark.slow
@pytest.mark.parametrize("target", targets.TARGETS)
def test_every_configuration_fits_its_card(target):
    wrong = []
    for case in cases(target):
        found = case.compile()
        wrong += [f"{case.label}: {problem}" for problem in found.problems()]
        if missing(case, found):
            wrong.append(f"{case.label}: no {case.expected} for sm_{target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("card", "wanted"), [(75, 75), (80, 80), (87, 86), (90, 90), (103, 100), (121, 120)])
def test_a_card_gets_the_newest_target_that_it_runs(card, wanted):
    assert targets.target_of(card) == wanted


def test_a_card_too_old_is_refused():
    with pytest.raises(ValueError, match="75 is the least"):
        targets.target_of(70)
