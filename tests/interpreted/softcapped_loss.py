"""softcapped_loss under Triton's interpreter against its float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import softcapped_loss as kernel

EPSILON = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of float32 a few
HELD, LOOPED = kernel.Row(held=512, block=32), kernel.Row(held=1, block=32)
CAP = 15.0


def inputs(seed: int, N: int, C: int, V: int, dtype: torch.dtype, size: float = 3.0):
    """Logits before the cap have a standard deviation of `size`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=g).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    head = (torch.randn(V, C, generator=g) * size * C**-0.5).to(wide)
    return x, head, torch.randint(V, (N,), generator=g)


def run(function, x, head, targets, incoming=1.0):
    leaves = [t.detach().clone().requires_grad_(True) for t in (x, head)]
    loss = function(*leaves, targets, CAP)
    return [loss.detach(), *torch.autograd.grad(loss * incoming, leaves)]


@settings(max_examples=16, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 70), st.integers(2, 300),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from([HELD, LOOPED]),
    st.integers(1, 9), st.sampled_from([0.3, 3.0, 30.0]),
)  # fmt: skip
def test_forward_and_backward_agree_with_float64(seed, N, C, V, dtype, row, rows, size):
    x, head, targets = inputs(seed, N, C, V, dtype, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "choose", lambda configs, x: row)
        patch.setattr(kernel, "chunk_rows", lambda vocab, each: rows)
        found = run(kernel.softcapped_loss, x, head, targets)
    rounded = head.to(dtype).double()
    wanted = run(kernel.reference, x.double(), rounded, targets)
    assert [f.dtype for f in found] == [torch.float32, dtype, torch.float32]
    # a rounded logit, of up to a few `size`, moves probabilities by as much; a sum of C values rounds less than each
    bound = EPSILON[dtype] * (4 + 3 * min(size, CAP))
    assert abs(found[0] - wanted[0]) < bound + 1e-5
    usual = head.norm() / (N * V) ** 0.5, x.double().norm() / N  # where no target is nearly certain
    for name, f, w, scale in zip(("dx", "dhead"), found[1:], wanted[1:], usual):
        error = (f.double() - w).norm() / (w.norm() + 0.1 * scale)
        assert error < bound, f"{name}: {error:.2e}, {bound:.2e} at most"


def test_float16_keeps_small_gradients_under_a_scaler():
    """Of 4,096 rows each gradient is below float16's least number until the scaler's factor comes in."""
    x, head, targets = inputs(torch.seed() % 2**32, 64, 32, 128, torch.float16)
    found = run(kernel.softcapped_loss, x.repeat(4, 1), head, targets.repeat(4), incoming=2.0**14)
    wanted = run(kernel.reference, x.double().repeat(4, 1), head.half().double(), targets.repeat(4), incoming=2.0**14)
    for f, w in zip(found[1:], wanted[1:]):
        assert (f.double() - w).norm() / w.norm() < 0.01


@pytest.mark.parametrize("row", [HELD, LOOPED], ids=["held", "looped"])
def test_gradients_are_those_of_finite_differences(row, monkeypatch):
    monkeypatch.setattr(kernel, "choose", lambda configs, x: row)
    monkeypatch.setattr(kernel, "chunk_rows", lambda vocab, each: 2)
    x, head, targets = inputs(torch.seed() % 2**32, 3, 2, 34, torch.float64)
    leaves = x.requires_grad_(True), head.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x, head: kernel.softcapped_loss(x, head, targets, CAP), leaves)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's: exp gives inf, 1 / inf is right
def test_extreme_logits_stay_finite():
    x, head, targets = inputs(3, 8, 16, 50, torch.bfloat16, size=1e4)
    assert all(torch.isfinite(t).all() for t in run(kernel.softcapped_loss, x, head, targets))


def test_the_operator_keeps_torchs_rules():
    x, head, targets = inputs(0, 5, 8, 20, torch.float32)
    arguments = (x.requires_grad_(True), head.requires_grad_(True), targets, CAP)
    torch.library.opcheck(torch.ops.autoresearch.softcapped_loss.default, arguments)


def test_chunks_of_logits_hold_to_their_memory():
    for vocab in (8192, 50304, 65536):
        rows = kernel.chunk_rows(vocab, 2)
        assert rows % 256 == 0 and rows * vocab * 2 <= kernel.CHUNK_BYTES
    assert kernel.chunk_rows(10**9, 2) == 1


def test_no_rows_are_refused():
    x, head, targets = inputs(0, 1, 8, 20, torch.float32)
    with pytest.raises(ValueError, match="no rows"):
        kernel.softcapped_loss(x[:0], head, targets[:0], CAP)
