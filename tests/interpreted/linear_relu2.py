"""linear_relu2 under Triton's interpreter against its float64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import linear_relu2 as kernel
from kernels import plain

SMALL = kernel.Tiles(16, 32, 16, warps=4, stages=2, group=2)
SMALL_TMA = kernel.Tiles(16, 32, 16, warps=4, stages=2, group=2, tma=True)
SIZES = st.one_of(st.integers(1, 150), st.sampled_from([16, 32, 48, 64, 128, 144]))  # that divide, or do not
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


BY = st.sampled_from([("triton", None), ("triton", SMALL), ("triton", SMALL_TMA), ("torch", None)])


def inputs(seed: int, N: int, C: int, F: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, w1, w2, dout = (torch.randn(s, generator=g) for s in ((N, C), (F, C), (C, F), (N, C)))
    return [t.to(dtype) for t in (x, w1 * C**-0.5, w2 * F**-0.5, dout)]


def run(function, x, w1, w2, dout):
    """Output and the three gradients."""
    leaves = [t.detach().clone().requires_grad_(True) for t in (x, w1, w2)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def sizes_of_sums(x, w1, w2, dout):
    """What rounding errors of the four results are relative to: each product as the root of the sum of its terms'
    squares, so that terms which cancel do not make the allowed error small."""

    def product(a, b):
        return (a.square() @ b.square()).sqrt()

    h, dy = product(x, w1.mT), product(dout, w2)
    y, dh = h.square(), 2 * h * dy
    return product(y, w2.mT), product(dh, w1), product(dh.mT, x), product(dout.mT, y)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 150), SIZES, SIZES, st.sampled_from(list(EPSILON)), BY
)  # fmt: skip
def test_forward_and_backward_agree_with_float64(seed, N, C, F, dtype, by):
    check(inputs(seed, N, C, F, dtype), *by)


@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 9, 11), (96, 64, 256)])
def test_products_of_torch_agree_with_float64_in_every_dtype(sizes, dtype):
    """Also where the hidden numbers fill several programs, and where they do not fill one."""
    assert 2 * kernel.FLAT < 96 * 256
    check(inputs(torch.seed() % 2**32, *sizes, dtype), "torch", None)


def check(given_, by, tiles):
    dtype = given_[0].dtype
    with pytest.MonkeyPatch.context() as patch:
        if tiles is not None:
            patch.setattr(kernel, "choose", lambda configs, x: tiles)
        found = run(partial(kernel.mlp, by=by), *given_)
    wanted = run(kernel.reference, *(t.double() for t in given_))
    sizes = sizes_of_sums(*(t.double() for t in given_))
    for name, f, w, size in zip(("out", "dx", "dw1", "dw2"), found, wanted, sizes):
        assert f.dtype == dtype
        error = (f.double() - w).norm() / size.norm()
        assert error < 8 * EPSILON[dtype], f"{name}: {error:.2e} of {tuple(w.shape)}"


@pytest.mark.parametrize("tiles", [SMALL, SMALL_TMA, None], ids=["pointers", "tma", "torch"])
@pytest.mark.parametrize("sizes", [(5, 6), (16, 16)], ids=["odd", "even"])
def test_gradients_are_those_of_finite_differences(sizes, tiles, monkeypatch):
    monkeypatch.setattr(kernel, "choose", lambda configs, x: tiles)
    leaves = [t.requires_grad_(True) for t in inputs(torch.seed() % 2**32, 3, *sizes, torch.float64)[:3]]
    mlp = partial(kernel.mlp, by="torch" if tiles is None else "triton")
    assert torch.autograd.gradcheck(mlp, leaves, fast_mode=sizes[0] > 8)


def test_both_keep_the_same_for_the_backward():
    """Three of the inputs, and the squared ReLU: no other tensor as wide."""
    x, w1, w2, _ = inputs(0, 6, 8, 32, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, w1, w2)]
    for by in ("triton", "torch"):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            kernel.mlp(*leaves, by=by)
        assert [t.shape for t in kept] == [(6, 8), (32, 8), (8, 32), (6, 32)]


def test_the_operator_keeps_torchs_rules():
    leaves = [t.requires_grad_(True) for t in inputs(0, 5, 8, 16, torch.float32)[:3]]
    x, w1, w2 = (leaf.detach() for leaf in leaves)
    ops = torch.ops.autoresearch
    for by in ("triton", "torch"):
        torch.library.opcheck(ops.mlp.default, (*leaves, by))
        torch.library.opcheck(ops.mlp_backward.default, (torch.rand(5, 8), x, w1, w2, torch.rand(5, 16), by))


@pytest.mark.parametrize("tiles", [SMALL, SMALL_TMA, None], ids=["pointers", "tma", "torch"])
@pytest.mark.parametrize("sizes", [(37, 24, 40), (35, 16, 32)], ids=["odd", "even"])
def test_rows_are_scaled_on_the_way(sizes, tiles):
    """As if they had been before: h of r z, and r times its gradient."""
    N, C, F = sizes
    z, w1, w2, d = (torch.randn(s, dtype=torch.float64) for s in ((N, C), (F, C), (C, F), (N, C)))
    r = torch.rand(N, dtype=torch.float64) + 0.5
    y = kernel.launch(z, w1, None, tiles, r)
    torch.testing.assert_close(y, kernel.launch(r[:, None] * z, w1, None, tiles))
    torch.testing.assert_close(kernel.launch(d, w2, y, tiles, r), r[:, None] * kernel.launch(d, w2, y, tiles))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("relu2", [partial(kernel.relu2, by="torch"), partial(kernel.relu2, by="triton"), plain.relu2])
def test_a_stream_of_large_numbers_fits_as_its_norm_does(relu2, dtype):
    """Products of it are beyond what float16 holds."""
    z, w1, *_ = inputs(3, 9, 24, 16, dtype)
    z, w1, r = 3000 * z, 60 * w1, torch.full((9,), 1 / 3000)
    assert (z.double() @ w1.double().T).abs().max() > 65504
    wanted = ((z.double() / 3000) @ w1.double().T).relu().square()
    assert (relu2(z, w1, r=r).double() - wanted).norm() < 8 * EPSILON[dtype] * wanted.norm()


def test_leading_dimensions_and_no_rows():
    x, w1, w2, _ = inputs(1, 6, 8, 12, torch.float32)
    torch.testing.assert_close(kernel.mlp(x.view(2, 3, 8), w1, w2), kernel.reference(x.view(2, 3, 8), w1, w2))
    assert kernel.mlp(x[:0], w1, w2).shape == kernel.mlp(x[:0], w1, w2, by="torch").shape == (0, 8)


def test_mixed_dtypes_are_refused():
    x, w1, w2, _ = inputs(1, 6, 8, 12, torch.float32)
    with pytest.raises(TypeError, match="all in bfloat16"):
        kernel.mlp(x.bfloat16(), w1, w2)


def test_another_way_to_multiply_is_refused():
    with pytest.raises(ValueError, match="by triton or torch, not by 'cublas'"):
        kernel.mlp(*inputs(1, 6, 8, 12, torch.float32)[:3], by="cublas")
