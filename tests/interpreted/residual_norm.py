"""residual_norm under Triton's interpreter against its float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import plain
from kernels import residual_norm as kernel

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(EPSILON)
SMALL = kernel.Tile(16, warps=4, programs=1)  # several blocks a program, several rows a block where rows are short


def inputs(seed: int, N: int, C: int, dtype: torch.dtype, dtype0: torch.dtype):
    g = torch.Generator().manual_seed(seed)
    x, x0, d, dy = (torch.randn(N, C, generator=g, dtype=torch.float64) for _ in range(4))
    scalars = torch.randn(2, generator=g, dtype=torch.float64)
    return x.to(dtype), x0.to(dtype0), scalars, d, dy


def run(function, x, x0, scalars, d, dy, dtype):
    """Both outputs and all gradients."""
    leaves = [t.detach().clone().requires_grad_(True) for t in (x, x0, *(scalars if scalars is not None else ()))]
    out, y = function(*leaves, dtype=dtype)
    return [out.detach(), y.detach(), *torch.autograd.grad((out, y), leaves, (d.to(out.dtype), dy.to(y.dtype)))]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 50), st.integers(8, 200),  # of one channel nothing is left but rounding
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans(),
    st.sampled_from([None, SMALL]),
)  # fmt: skip
def test_forward_and_backward_agree_with_float64(seed, N, C, dtype, dtype0, dtype_y, scaled, tile):
    x, x0, scalars, d, dy = inputs(seed, N, C, dtype, dtype0)
    d, dy = d.to(dtype).double(), dy.to(dtype_y).double()
    given_ = scalars.float() if scaled else None
    with pytest.MonkeyPatch.context() as patch:
        if tile is not None:
            patch.setattr(kernel, "choose", lambda configs, x: tile)
        found = run(kernel.residual_norm, x, x0, given_, d, dy, dtype_y)
    wide = None if given_ is None else given_.double()
    wanted = run(kernel.reference, x.double(), x0.double(), wide, d, dy, torch.float64)
    assert [f.dtype for f in found[:4]] == [dtype, dtype_y, dtype, dtype0]
    coarsest = max(EPSILON[t] for t in (dtype, dtype0, dtype_y))
    for name, f, w in zip(("x'", "y", "dx", "dx0"), found, wanted):
        error = (f.double() - w).norm() / (w.norm() + 1e-3 * w.numel() ** 0.5)
        assert error < 6 * coarsest, f"{name}: {error:.2e}"
    for name, f, w, of in zip("ab", found[4:], wanted[4:], (x, x0)):
        size = wanted[2].norm() / scalars[0].abs().clamp_min(1e-3) * of.double().norm()  # |dz| |x|
        assert (f.double() - w).abs() < 2e-6 * size + 1e-6, f"d{name}"


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_are_those_of_finite_differences(scaled, monkeypatch):
    monkeypatch.setattr(kernel, "choose", lambda configs, x: SMALL)
    x, x0, scalars, _, _ = inputs(torch.seed() % 2**32, 5, 6, torch.float64, torch.float64)
    leaves = [t.clone().requires_grad_(True) for t in (x, x0, *(scalars if scaled else ()))]
    assert torch.autograd.gradcheck(kernel.residual_norm, leaves)


def test_a_scalar_of_zero_has_its_gradient():
    x, x0, _, d, dy = inputs(5, 4, 16, torch.float32, torch.float32)
    scalars = torch.tensor([0.0, 1.0])
    found = run(kernel.residual_norm, x, x0, scalars, d, dy, torch.float32)
    wanted = run(kernel.reference, x.double(), x0.double(), scalars.double(), d, dy, torch.float64)
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f.double(), w, rtol=1e-5, atol=1e-5)


def test_an_output_that_is_not_used_gives_no_gradient():
    x, x0, _, _, dy = inputs(6, 4, 16, torch.float32, torch.float32)
    leaf = x.clone().requires_grad_(True)
    _, y = kernel.residual_norm(leaf, x0)
    (found,) = torch.autograd.grad(y, leaf, dy.float())
    wide = x.double().requires_grad_(True)
    (wanted,) = torch.autograd.grad(kernel.reference(wide, x0.double())[1], wide, dy)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaled", [True, False])
def test_the_operator_keeps_torchs_rules(scaled):
    x, x0, scalars, _, _ = inputs(0, 5, 8, torch.float32, torch.float32)
    a, b = scalars.float().clone().unbind() if scaled else (None, None)
    leaves = [t if t is None else t.clone().requires_grad_(True) for t in (x, x0, a, b)]
    torch.library.opcheck(torch.ops.autoresearch.residual_norm.default, (*leaves, torch.bfloat16))


def test_leading_dimensions_and_what_is_refused():
    x, x0, scalars, _, _ = inputs(1, 6, 8, torch.float32, torch.float32)
    for f, w in zip(kernel.residual_norm(x.view(2, 3, 8), x0.view(2, 3, 8)), kernel.reference(x, x0)):
        torch.testing.assert_close(f, w.view(2, 3, 8))
    with pytest.raises(ValueError, match="one shape"):
        kernel.residual_norm(x, x0[:1])
    with pytest.raises(ValueError, match="or neither"):
        kernel.residual_norm(x, x0, scalars[0].float())


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(0, 50), st.integers(8, 200),
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_the_norm_alone_is_the_one_that_the_forward_stores(seed, N, C, dtype, dtype_y, scaled):
    """To the bit: a backward makes it again and takes it for what the forward used."""
    x, x0, scalars, _, _ = inputs(seed, N, C, dtype, dtype)
    a, b = scalars.float().split(1) if scaled else (None, None)
    total, y = kernel.residual_norm(x, x0, a, b, dtype_y)
    assert torch.equal(kernel.normed(x, x0, a, b, dtype_y) if scaled else y, y)
    if dtype == torch.float32:  # else the sum was rounded in between
        assert torch.equal(kernel.normed(total, None, None, None, dtype_y), y)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 50), st.integers(8, 200), st.booleans())
def test_the_scale_of_a_norm_and_back(seed, N, C, with_triton):
    """r z is the norm; the gradient of z comes from that of the norm times r, in whose place it is."""
    x, x0, _, d, dy = inputs(seed, N, C, torch.float64, torch.float64)
    module = kernel if with_triton else plain
    z, y = kernel.reference(x, x0)
    r = module.scale(z)
    torch.testing.assert_close(r[:, None] * z, y)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(kernel.reference(leaf, x0), leaf, (d, dy))
    rdy = r[:, None] * dy
    found = module.scaled_backward(d, rdy, z)
    torch.testing.assert_close(found, wanted)
    assert found.data_ptr() == rdy.data_ptr()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 50), st.integers(8, 200), st.booleans(), st.booleans(), st.booleans())
def test_a_backward_leaves_the_norm_where_its_gradient_was(seed, N, C, scaled, given_d, with_triton):
    x, x0, scalars, d, dy = inputs(seed, N, C, torch.float64, torch.float64)
    a, b = scalars.split(1) if scaled else (None, None)
    leaves = [t.clone().requires_grad_() for t in ((x, x0) if scaled else (x,))]
    total = a * leaves[0] + b * leaves[1] if scaled else leaves[0]
    wanted = torch.autograd.grad((total, kernel.reference(total, 0 * x)[1]), leaves, (d if given_d else 0 * d, dy))
    back = kernel.backward if with_triton else lambda *given: plain.norm_backward(*given[:6], given[7])
    used = dy.clone()
    dx, dx0, _ = back(d if given_d else None, used, x, x0 if scaled else None, a, b, x.dtype, used)
    torch.testing.assert_close(used, kernel.reference(total, 0 * x)[1].detach())
    torch.testing.assert_close((dx, dx0) if scaled else (dx,), wanted)
