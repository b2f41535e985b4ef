"""linear_relu2 under Triton's interpreter against its float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import linear_relu2 as kernel

SMALL = kernel.Tiles(16, 32, 16, warps=4, stages=2, group=2)
SMALL_TMA = kernel.Tiles(16, 32, 16, warps=4, stages=2, group=2, tma=True)
SIZES = st.one_of(st.integers(1, 150), st.sampled_from([16, 32, 48, 64, 128, 144]))  # that divide, or do not
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


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
    st.integers(0, 2**32), st.integers(1, 150), SIZES, SIZES, st.sampled_from(list(EPSILON)),
    st.sampled_from([None, SMALL, SMALL_TMA]),
)  # fmt: skip
def test_forward_and_backward_agree_with_float64(seed, N, C, F, dtype, tiles):
    given_ = inputs(seed, N, C, F, dtype)
    with pytest.MonkeyPatch.context() as patch:
        if tiles is not None:
            patch.setattr(kernel, "choose", lambda configs, x: tiles)
        found = run(kernel.mlp, *given_)
    wanted = run(kernel.reference, *(t.double() for t in given_))
    sizes = sizes_of_sums(*(t.double() for t in given_))
    for name, f, w, size in zip(("out", "dx", "dw1", "dw2"), found, wanted, sizes):
        assert f.dtype == dtype
        error = (f.double() - w).norm() / size.norm()
        assert error < 8 * EPSILON[dtype], f"{name}: {error:.2e} of {tuple(w.shape)}"


@pytest.mark.parametrize("tiles", [SMALL, SMALL_TMA], ids=["pointers", "tma"])
@pytest.mark.parametrize("sizes", [(5, 6), (16, 16)], ids=["odd", "even"])
def test_gradients_are_those_of_finite_differences(sizes, tiles, monkeypatch):
    monkeypatch.setattr(kernel, "choose", lambda configs, x: tiles)
    leaves = [t.requires_grad_(True) for t in inputs(torch.seed() % 2**32, 3, *sizes, torch.float64)[:3]]
    assert torch.autograd.gradcheck(kernel.mlp, leaves, fast_mode=sizes[0] > 8)


def test_the_operator_keeps_torchs_rules():
    leaves = [t.requires_grad_(True) for t in inputs(0, 5, 8, 16, torch.float32)[:3]]
    torch.library.opcheck(torch.ops.autoresearch.mlp.default, leaves)
    x, w1, w2 = (leaf.detach() for leaf in leaves)
    torch.library.opcheck(torch.ops.autoresearch.mlp_backward.default, [torch.rand(5, 8), x, w1, w2, torch.rand(5, 16)])


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


def test_leading_dimensions_and_no_rows():
    x, w1, w2, _ = inputs(1, 6, 8, 12, torch.float32)
    torch.testing.assert_close(kernel.mlp(x.view(2, 3, 8), w1, w2), kernel.reference(x.view(2, 3, 8), w1, w2))
    assert kernel.mlp(x[:0], w1, w2).shape == (0, 8)


def test_mixed_dtypes_are_refused():
    x, w1, w2, _ = inputs(1, 6, 8, 12, torch.float32)
    with pytest.raises(TypeError, match="all in bfloat16"):
        kernel.mlp(x.bfloat16(), w1, w2)
