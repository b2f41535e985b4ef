"""muon under Triton's interpreter against its float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import muon as kernel

SMALL = kernel.Tiles(16, 16, warps=4, stages=2)
SIZES = st.one_of(st.integers(1, 90), st.sampled_from([16, 32, 48, 80]))  # that divide, or do not
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 3), SIZES, SIZES, st.booleans(),
    st.sampled_from(list(EPSILON)), st.sampled_from([SMALL, kernel.SYMMETRIC[80]]), st.booleans(),
)  # fmt: skip
def test_symmetric_products_agree_with_float64(seed, L, m, n, transposed, dtype, tiles, add):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(L, n, m, generator=g).to(dtype).mT if transposed else torch.randn(L, m, n, generator=g).to(dtype)
    d = None
    if add:
        d = torch.randn(L, m, m, generator=g)
        d = (d + d.mT).to(dtype)
    found = kernel.launch_symmetric(x, d, 0.7, -1.3 if add else 0.0, tiles)
    wanted = 0.7 * (x.double() @ x.double().mT) + (-1.3 * d.double() if d is not None else 0)
    even = n % tiles.k == 0 and m % 16 == 0
    tile = torch.arange(m) // (tiles if even else kernel.ODD).side
    mirrored = (tile[:, None] != tile).expand_as(found)  # within a tile on the diagonal two sums may round apart
    assert found.dtype == dtype and torch.equal(found[mirrored], found.mT[mirrored])
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error < 2 * EPSILON[dtype] + 1e-6


def test_every_tile_of_the_triangle_is_found_once():
    """Of 20 tiles a side: the root that numbers the triangle is taken in float32."""
    x = torch.randn(1, 320, 16)
    torch.testing.assert_close(kernel.launch_symmetric(x, None, 1.0, 0.0, SMALL), x @ x.mT)


def state(seed: int, L: int, m: int, n: int):
    g = torch.Generator().manual_seed(seed)
    weights, grads, momentum = (torch.randn(L, m, n, generator=g, dtype=torch.float64) for _ in range(3))
    second = torch.rand(L, m if m >= n else 1, 1 if m >= n else n, generator=g, dtype=torch.float64) / max(m, n)
    return weights, grads * 1e-2, momentum * 1e-2, second, torch.tensor([0.02, 0.9, 0.1], dtype=torch.float64)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 70), st.integers(1, 150), st.booleans())
def test_a_step_agrees_with_float64(seed, L, m, n, flip):
    m, n = (n, m) if flip else (m, n)
    wanted = state(seed, L, m, n)
    found = [t.float() for t in wanted]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "choose", lambda configs, x: SMALL)
        kernel.muon_(*found, torch.float32)
    kernel.reference(*wanted, torch.float64)
    for name, f, w in zip(("weights", "grads", "momentum", "second"), found, wanted):
        error = (f.double() - w).norm() / w.norm()
        # singular values near 0 grow by 8 x 4 x 4 x 3 x 2 over the iterations, and so does their rounding
        assert error < (2e-4 if name in ("weights", "second") else 2e-6), f"{name}: {error:.2e}"


@pytest.mark.parametrize("shape", [(8, 48, 48), (4, 32, 80), (4, 96, 24)])
def test_a_step_in_bfloat16_is_as_near_as_plain_torch(shape):
    """The update itself, against that of a float64 orthogonalisation: no worse than plain bfloat16.

    But for what the interpreter adds: it cuts off where a conversion to bfloat16 on a card rounds to nearest.
    """
    exact = state(torch.seed() % 2**32, *shape)
    before = exact[0].clone()
    ours, plain = [t.float() for t in exact], [t.float() for t in exact]
    kernel.muon_(*ours, torch.bfloat16)
    kernel.reference(*plain, torch.bfloat16)
    kernel.reference(*exact, torch.float64)
    error, allowed = ((t[0].double() - exact[0]).norm() / (exact[0] - before).norm() for t in (ours, plain))
    assert error < 1.5 * allowed, (error, allowed)


def test_singular_values_come_near_one():
    x = torch.randn(3, 40, 100)
    for g in (x, x.mT.contiguous()):
        found = kernel.orthogonalise(g, g.norm(dim=(1, 2)), torch.float32, 5)
        values = torch.linalg.svdvals(found)
        assert found.shape == g.shape and values.min() > 0.8 and values.max() < 1.2


def test_a_gradient_of_zero_leaves_finite_weights():
    weights, grads, momentum, second, rates = (t.float() for t in state(2, 2, 20, 12))
    kernel.muon_(weights, grads.zero_(), momentum.zero_(), second.zero_(), rates, torch.bfloat16)
    assert torch.isfinite(weights).all()


def test_the_operators_keep_torchs_rules():
    found = [t.float() for t in state(0, 2, 8, 12)]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.autoresearch.muon_.default, (*found, torch.float32), test_utils=tests)
    torch.library.opcheck(torch.ops.autoresearch.polar_express.default, (found[0] / 100,), test_utils=tests)


def test_wrong_state_is_refused():
    weights, grads, momentum, second, rates = (t.float() for t in state(0, 2, 8, 12))
    with pytest.raises(ValueError, match="second moment"):
        kernel.muon_(weights, grads, momentum, second[:, :, :8].contiguous(), rates, torch.float32)
    with pytest.raises(TypeError, match="one dtype"):
        kernel.muon_(weights, grads.half(), momentum, second, rates, torch.float32)
