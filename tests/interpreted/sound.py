"""Every kernel's loads, stores and atomics, watched (watched.py); and kernels with one fault each, which must be found.

Of faults that only many programs at once show (races), or that only another memory shows (what lies beyond the end),
a comparison of results in the interpreter says nothing.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants TRITON_INTERPRET=1", allow_module_level=True)

import torch
import triton
import triton.language as tl
from interpreted.watched import watched

from kernels import attention_tiles, lean, linear_relu2, muon, recomputed, residual_norm, softcapped_loss
from kernels.attention import attention
from kernels.attention_tiles import Tile

WIDE = [torch.float32, torch.bfloat16]


@triton.jit
def beyond_the_end(X, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + at, tl.load(X + at) * 2)


@triton.jit
def overlapping(X, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(X + at, at.to(tl.float32), mask=at < N)


@triton.jit
def of_the_one_before(X, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(X + at - BLOCK, mask=(at >= BLOCK) & (at < N), other=0.0)
    tl.store(X + at, before + 1, mask=at < N)


@triton.jit
def added_without_atomics(X, N, BLOCK: tl.constexpr):
    tl.store(X, tl.load(X) + 1.0)


@triton.jit
def stored_beside_atomics(X, N, BLOCK: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(X, 0.0)
    tl.atomic_add(X, 1.0)


@triton.jit
def turned_round(X, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    other = tl.program_id(0) * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)
    tl.store(X + other, tl.load(X + at, mask=at < N, other=0.0), mask=other < N)


@triton.jit
def twice_in_one_store(X, N, BLOCK: tl.constexpr):
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) // 2 * 2
    tl.store(X + at, at.to(tl.float32), mask=at < N)


@triton.jit
def stored_by_two(X, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    other = tl.program_id(0) * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)
    tl.store(X + at, 1.0, mask=at < N)
    tl.store(X + other, 2.0, mask=other < N)


@triton.jit
def read_by_all_stored_by_one(X, N, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    at = start + tl.arange(0, BLOCK)
    first = tl.load(X + start + tl.arange(0, BLOCK) * 0, mask=at < N, other=0.0)
    tl.store(X + at, first + 1, mask=at < N)


@triton.jit
def read_after_adding(X, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(X + at, 1.0, mask=at < N)
    tl.store(X + at, tl.load(X + at, mask=at < N) * 2, mask=at < N)


@triton.jit
def no_multiple(X, N, BLOCK: tl.constexpr):
    start = tl.multiple_of(tl.program_id(0) * BLOCK, 2 * BLOCK)
    at = start + tl.arange(0, BLOCK)
    tl.store(X + at, at.to(tl.float32), mask=at < N)


@triton.jit
def of_its_own_block(X, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + at, tl.load(X + at, mask=at < N, other=0.0) + 1, mask=at < N)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (beyond_the_end, "outside"),
        (overlapping, "race: two programs store"),
        (of_the_one_before, "race: a program"),
        (added_without_atomics, "race: a program"),
        (stored_beside_atomics, "race: a program"),
        (turned_round, "lanes: one stores what another"),
        (twice_in_one_store, "lanes: two of one store"),
        (stored_by_two, "lanes: one stores what another of the program has stored"),
        (read_by_all_stored_by_one, "lanes: one stores what another of the program has read"),
        (read_after_adding, "lanes: the program reads what it adds to"),
        (no_multiple, "promise: a multiple of [32]"),
        (of_its_own_block, None),
    ],
    ids=lambda value: value.fn.__name__ if hasattr(value, "fn") else "",
)
def test_a_kernel_with_a_fault_is_found(kernel: Any, said: str | None) -> None:
    x = torch.zeros(52)
    with watched() as watch:
        kernel[(4,)](x, 52, BLOCK=16)
    assert watch.launches == 1 and watch.accesses
    assert any(said in line for line in watch.found) if said else watch.found == []


def test_what_was_never_written_is_found() -> None:
    with watched() as watch:
        of_its_own_block[(4,)](torch.empty(52), 52, BLOCK=16)
    assert [line for line in watch.found if "undefined" in line]
    with watched() as watch:
        of_its_own_block[(4,)](torch.empty(52).fill_(1), 52, BLOCK=16)
    assert watch.found == []


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def through(output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    """Backward, too."""
    outputs = output if isinstance(output, tuple) else (output,)
    torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])


def angles(T: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.outer(torch.arange(T).float(), 10000.0 ** (-torch.arange(0, D, 2) / D))
    return angle.cos(), angle.sin()


def some_attention(dtype: torch.dtype, T: int, heads: int, groups: int, D: int, window: int) -> None:
    q, k, v = leaves((2, T, heads, D), (2, T, heads // groups, D), (2, T, heads // groups, D), dtype=dtype)
    through(attention(q, k, v, *angles(T, D), window))


def some_half_of_a_layer(dtype: torch.dtype, T: int, D: int, window: int, by: str | None = None) -> None:
    """Attention in the place of q and k, which lie beside v in one tensor; or torch's, for which they are turned."""
    C = 2 * D
    x, x0, w, a, b, gate, table = leaves((2, T, C), (2, T, C), (3 * C, C), (1,), (1,), (2, 8), (5, C))
    x, x0, w, gate = (t.to(dtype) for t in (x, x0, w, gate))
    through(lean.attend(x, x0, a, b, w, gate, table, torch.randint(5, (2, T)), *angles(T, D), window, by))


def some_mlp(patch: pytest.MonkeyPatch, how: str, C: int, F: int, dtype: torch.dtype) -> None:
    tiles = linear_relu2.Tiles(16, 32, 16, warps=4, stages=2, group=2, tma=how == "tma")
    patch.setattr(linear_relu2, "choose", lambda configs, x: tiles)
    by = "torch" if how == "torch" else "triton"
    through(linear_relu2.mlp(*leaves((37, C), (F, C), (C, F), dtype=dtype), by=by))


def some_norms(scaled: bool, dtype: torch.dtype) -> None:
    x, x0, a, b = leaves((70, 72), (70, 72), (1,), (1,))
    rows, rows0 = x.to(dtype), x0.to(dtype)
    through(residual_norm.residual_norm(rows, rows0, *((a, b) if scaled else ()), dtype=torch.bfloat16))


def some_loss(V: int, dtype: torch.dtype, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(softcapped_loss, "choose", lambda configs, x: softcapped_loss.Row(held=64, block=32))
    patch.setattr(softcapped_loss, "CHUNK_BYTES", 8 * V * 4)
    x, head = leaves((21, 24), (V, 24))
    softcapped_loss.softcapped_loss(x.to(dtype), head, torch.randint(V, (21,)), 15.0).backward()


def some_values(dtype: torch.dtype) -> None:
    """Value embeddings and the norm of an embedding; two tokens of one entry add to one row."""
    N, H, D, V = 40, 3, 24, 5
    tokens = torch.randint(V, (N,))
    x, x0, w, a, b, gate, table = leaves((N, H * D), (N, H * D), (3 * H * D, H * D), (1,), (1,), (H, 8), (V, H * D))
    through(lean.project(x.to(dtype), x0.to(dtype), a, b, w.to(dtype), gate.to(dtype), table, tokens))
    through(recomputed.embedded_norm(tokens, table, dtype))


def some_muon(L: int, m: int, n: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(muon, "choose", lambda configs, x: muon.Tiles(16, 16, warps=4, stages=2))
    weights, grads, momentum = (torch.randn(L, m, n) for _ in range(3))
    second = torch.rand(L, m if m >= n else 1, 1 if m >= n else n)
    muon.muon_(weights, grads, momentum, second, torch.tensor([0.02, 0.9, 0.1]), torch.float32)


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs what it is given under watch: nothing found, and something looked at."""
    monkeypatch.setattr(attention_tiles, "INTERPRETED", Tile(16, 32, 1, 1))

    def check(run: Any, *given: Any) -> None:
        with watched() as watch:
            run(*given)
        assert watch.found == []
        assert watch.launches and watch.accesses > 1000

    return check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(50, 4, 2, 48, 20), (64, 2, 1, 32, 64), (33, 2, 2, 64, 0)], ids=["grouped", "whole", "itself"]
)
def test_attention(dtype: torch.dtype, shape: tuple[int, ...], sound: Any) -> None:
    sound(some_attention, dtype, *shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(45, 48, 17), (64, 32, 64), (33, 64, 0)], ids=["padded", "whole", "itself"])
def test_attention_in_the_place_of_q_and_k(dtype: torch.dtype, shape: tuple[int, int, int], sound: Any) -> None:
    sound(some_half_of_a_layer, dtype, *shape)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("shape", [(45, 48), (64, 32)], ids=["padded", "whole"])
def test_attention_of_torchs_in_the_place_of_q_and_k(dtype: torch.dtype, shape: tuple[int, int], sound: Any) -> None:
    sound(some_half_of_a_layer, dtype, *shape, shape[0], "flash")


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("sizes", [(40, 75), (32, 64)], ids=["odd", "even"])
@pytest.mark.parametrize("how", ["pointers", "tma", "torch"])
def test_the_mlp(how: str, sizes: tuple[int, int], dtype: torch.dtype, sound: Any, monkeypatch: Any) -> None:
    sound(some_mlp, monkeypatch, how, *sizes, dtype)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("scaled", [True, False])
def test_norms(scaled: bool, dtype: torch.dtype, sound: Any) -> None:
    sound(some_norms, scaled, dtype)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("V", [50, 77], ids=["held", "in_blocks"])
def test_the_loss(V: int, dtype: torch.dtype, sound: Any, monkeypatch: Any) -> None:
    sound(some_loss, V, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", WIDE)
def test_value_embeddings(dtype: torch.dtype, sound: Any) -> None:
    sound(some_values, dtype)


@pytest.mark.parametrize("shape", [(2, 37, 50), (2, 50, 37), (3, 32, 64)], ids=["wide", "tall", "even"])
def test_muon(shape: tuple[int, int, int], sound: Any, monkeypatch: Any) -> None:
    sound(some_muon, *shape, monkeypatch)
