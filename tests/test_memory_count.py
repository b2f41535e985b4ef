"""What a micro-batch holds, counted on the meta device, and how many rows are taken for the memory that is free."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks import memory
from benchmarks.gpu import Order
from kernels.memory import SPARE, rows_within

SMALL = replace(Order(), rows=2, context=64, heads=2, head_dim=32, depth=2, vocab=128, tokens=128)


def held(order):
    return sum(size for _, size in memory.saved(memory.built(order), order).values())


def test_what_is_held_is_a_fixed_part_and_one_that_grows_with_the_rows():
    one, two, four = (held(replace(SMALL, rows=rows)) for rows in (2, 4, 8))
    assert four - two == 2 * (two - one) > 0


def test_hidden_units_and_attention_are_counted_once():
    order = replace(SMALL, depth=4)
    found = memory.saved(memory.built(order), order)
    tokens, dim = order.rows * order.context, order.dim
    assert found[(tokens, 4 * dim)] == (4, 4 * tokens * 4 * dim * 2)  # bfloat16, one for each layer
    wide = [size for shape, (_, size) in found.items() if shape == (order.rows, order.context, order.heads, 32)]
    assert wide and wide[0] >= 4 * 4 * tokens * dim * 2  # q, k, v as one storage and y, for each layer


@given(
    st.integers(1, 512), st.floats(1e6, 1e11), st.floats(0, 1e10), st.floats(0, 1e9), st.sampled_from([(1, 2), (2, 8)])
)
def test_rows_fit_and_no_halving_is_made_without_need(wanted, free, fixed, each, trials):
    rows = rows_within(wanted, free, {n: fixed + n * each for n in trials})
    room = free * (1 - SPARE)
    assert 1 <= rows <= wanted
    assert rows == 1 or fixed + rows * each <= room * (1 + 1e-6) + 1
    if rows < wanted:
        assert fixed + min(wanted, 2 * rows) * each > room * (1 - 1e-6) - 1


def test_nonsense_is_refused():
    for wanted, trials in ((0, {1: 1.0, 2: 2.0}), (4, {1: 1.0})):
        with pytest.raises(ValueError, match="two trials wanted"):
            rows_within(wanted, 1e9, trials)
