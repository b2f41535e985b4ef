"""How many rows go through at once for the memory that is free, and what `benchmarks.memory` says of two sides."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch

from benchmarks import memory
from kernels.memory import SPARE, fitted_rows, rows_within


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

    def __init__(self, room: float, each: float = 100 * MIB) -> None:
        self.room, self.each, self.most = room, each, 0.0
        self.tried: list[int] = []

    def trial(self, rows: int) -> None:
        self.tried.append(rows)
        needed = 50 * MIB + rows * self.each + min(rows, 2) * 32 * MIB
        if needed > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
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
    assert card.rows(8, monkeypatch)[0] == 2 and card.tried == [2, 2, 4, 1, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        Card(200 * MIB).rows(8, monkeypatch)


# --- the table of benchmarks.memory -------------------------------------------------------------


def rows(*peaks: float) -> list[memory.Row]:
    """What a side prints: a step for each peak, in MiB."""
    same = dict.fromkeys(memory.COLUMNS, 1) | {"waited by": {}, "torch": "2.14.1"}
    return [{**same, "step": i + 1, "allocated": peak, "reserved": peak + 100.0} for i, peak in enumerate(peaks)]


def test_the_first_step_compiles_and_does_not_count(capsys):
    found = {"ours": rows(40_000.0, 20_000.0, 21_000.0), "upstream": rows(50_000.0, 42_000.0, 41_000.0)}
    memory.show(found, memory.published(), memory.blank_card.CARDS["h100"])
    out = capsys.readouterr().out
    assert "128 rows of 2048, depth 8, dim 512, vocabulary 8192, 524,288 tokens a step; a blank NVIDIA H100" in out
    assert "ours / upstream: 0.500 allocated, 0.501 reserved" in out
    assert f"ours / published: {21_000 / memory.PUBLISHED:.3f}" in out


def test_other_shapes_are_not_held_against_the_published_run(capsys):
    memory.show({"ours": rows(1.0, 2.0, 3.0)}, replace(memory.Order(), rows=64), memory.blank_card.CARDS["h100"])
    assert "published" not in capsys.readouterr().out


def test_a_side_that_fails_says_its_last_line(monkeypatch):
    def failed(*_: object, **__: object) -> memory.subprocess.CompletedProcess[str]:
        return memory.subprocess.CompletedProcess([], 1, "", "Traceback\nTypeError: FlashAttention 3 takes bfloat16\n")

    monkeypatch.setattr(memory.subprocess, "run", failed)
    with pytest.raises(memory.UserError, match="upstream: exit status 1, TypeError: FlashAttention 3 takes bfloat16"):
        memory.side("upstream", memory.Order(), "h100")
