"""Keep or discard, and when a measurement counts as disturbed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.verdict import decide_simple, taint

scores = st.floats(min_value=1e-6, max_value=100.0)
many = st.lists(scores, min_size=1, max_size=8)


def test_the_first_that_finishes_is_the_baseline():
    assert decide_simple([], [1.9], 0.001).status == "keep"
    assert "baseline" in decide_simple([], [1.9], 0.001).reason


@pytest.mark.parametrize(
    ("best", "new", "status", "figure"),
    [
        (1.5, 1.4, "keep", "0.100000 better"),
        (1.5, 1.4995, "discard", "only 0.000500 better"),
        (1.5, 1.5, "discard", "equals"),
        (1.5, 1.6, "discard", "0.100000 worse"),
    ],
)
def test_reasons_have_the_figures(best, new, status, figure):
    said = decide_simple([best], [new], 0.001)
    assert said.status == status
    assert figure in said.reason


def test_exactly_the_minimum_difference_is_not_enough():
    assert decide_simple([1.5], [1.25], 0.25).status == "discard"  # both are exact in binary


@given(many, many, st.floats(min_value=0, max_value=1))
def test_kept_only_if_better_by_more_than_the_difference(best, new, delta):
    gain = math.fsum(best) / len(best) - math.fsum(new) / len(new)
    assert (decide_simple(best, new, delta).status == "keep") == (gain > delta)


@given(many, many, st.floats(min_value=0, max_value=1))
def test_the_order_of_samples_does_not_matter(best, new, delta):
    assert decide_simple(best, new, delta) == decide_simple(best[::-1], new[::-1], delta)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_what_is_no_score_is_refused(bad):
    with pytest.raises(ValueError, match="not a score"):
        decide_simple([1.5], [bad], 0.001)
    with pytest.raises(ValueError, match="not a score"):
        decide_simple([bad], [1.5], 0.001)
    with pytest.raises(ValueError, match="needs a score"):
        decide_simple([1.5], [], 0.001)


def test_work_beside_a_training_taints_it():
    assert taint({"others_cores": 1.2, "our_cores": 1.9}).startswith("other processes kept 1.2")
    own = taint({"others_cores": 1.2, "our_cores": 1.9, "loop_cores": 0.9})
    assert "1.2 cores busy (0.9 of them the researcher and the loop) beside" in own
    assert taint({"others_cores": 0.1, "our_cores": 1.9}) == ""
    assert taint({"others_cores": 2.0, "our_cores": 30.0}) == ""
    assert taint({}) == ""
