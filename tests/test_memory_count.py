"""What a micro-batch holds, counted on the meta device, and how many rows are taken for the memory that is free."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch

from benchmarks import memory
from benchmarks.gpu import Order
from kernels.errors import out_of_memory
from kernels.memory import SPARE, fitted_rows, rows_within

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


MIB = 2**20


class Card:
    """What PyTorch says of a card's memory, for a model with a part per row and a buffer that is full at two rows."""

    def __init__(self, room: float, each: float = 100 * MIB, error: Exception | None = None) -> None:
        self.room, self.each, self.most = room, each, 0.0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.tried: list[int] = []

    def trial(self, rows: int) -> None:
        self.tried.append(rows)
        needed = 50 * MIB + rows * self.each + min(rows, 2) * 32 * MIB
        if needed > self.room:
            raise self.error
        self.most = max(self.most, needed)

    def rows(self, wanted: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
        said = {"synchronize": None, "memory_allocated": 0, "memory_reserved": 0, "mem_get_info": (self.room, 0)}
        for name, value in said.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "most", 0.0))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.most)
        return fitted_rows(self.trial, wanted, torch.device("cpu"))


def test_a_buffer_that_grows_at_the_first_rows_only_counts_once(monkeypatch):
    room = (50 + 64 + 64 * 100) * MIB / (1 - SPARE)  # just enough for 64 rows
    assert Card(room + 1).rows(128, monkeypatch) == (64, "100 MiB a row of 6.9 GiB free; 128 were wanted")


def test_where_four_rows_find_no_room_one_and_two_are_tried(monkeypatch):
    card = Card(400 * MIB)
    assert card.rows(8, monkeypatch)[0] == 2 and card.tried == [1, 2, 4, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        Card(200 * MIB).rows(8, monkeypatch)


ASSERTED = (
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1154, please report a bug to '
    "PyTorch."
)


def test_an_assertion_about_nvml_is_a_card_without_memory(monkeypatch):
    """All that PyTorch's allocator says where NVML does not answer."""
    for error in (
        *(RuntimeError(ASSERTED), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()),
        *(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    ):
        assert out_of_memory(error), error
    others = [
        "INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp",
        "NVML_SUCCESS == r at Driver.cpp",
        "a shape is wrong",
    ]
    assert not any(out_of_memory(RuntimeError(text)) for text in others)
    assert not out_of_memory(ValueError(ASSERTED))

    card = Card(400 * MIB, error=RuntimeError(ASSERTED))
    assert card.rows(8, monkeypatch)[0] == 2 and card.tried == [1, 2, 4, 1, 2]
    with pytest.raises(RuntimeError, match="NVML_SUCCESS"):
        Card(200 * MIB, error=RuntimeError(ASSERTED)).rows(8, monkeypatch)
    with pytest.raises(RuntimeError, match="wrong shape"):
        Card(400 * MIB, error=RuntimeError("wrong shape")).rows(8, monkeypatch)


def test_worker_and_rtx_recipe_know_it_too():
    from backends import worker
    from backends.rtx import train

    assert worker.out_of_memory is train.out_of_memory is out_of_memory


def test_no_kernel_is_given_up_for_want_of_memory(monkeypatch):
    """A card that is full says nothing about what was tried on it just then."""
    from kernels import attention_choice, portable

    def full(*given: object, **options: object) -> None:
        raise RuntimeError(ASSERTED)

    monkeypatch.setattr(attention_choice, "PEERS", {"peer": SimpleNamespace(compiles=False, make=full)})
    with pytest.raises(RuntimeError, match="NVML_SUCCESS"):
        attention_choice._timed(None, ["peer"], 1.0)
    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(RuntimeError, match="NVML_SUCCESS"):
        portable.obstacle(torch.device("cuda"))
