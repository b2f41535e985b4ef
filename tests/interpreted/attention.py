"""attention under Triton's interpreter against its float64 reference. Run by tests/test_gpu_kernels.py."""

from __future__ import annotations

import os
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants TRITON_INTERPRET=1", allow_module_level=True)

import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder

from kernels import attention_tiles
from kernels.attention import attend_, attend_backward, attention
from kernels.attention_reference import reference, reference_rotated
from kernels.attention_tiles import Tile

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TILES = [Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(16, 16, 1, 1)]
given_dot = InterpreterBuilder.create_dot


def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter multiplies the 16-bit integers in which it holds bf16 (triton 3.8): give it float32 instead."""
    a, b = (self.create_fp_to_fp(x, tl.float32, None) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return given_dot(self, a, b, *rest)


@pytest.fixture(autouse=True, scope="module")
def mended():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


def inputs(seed: int, B: int, T: int, H: int, G: int, D: int, dtype: torch.dtype, packed: bool = False):
    """q, k, v (packed: as slices of one tensor), cos, sin, dy."""
    rng = torch.Generator().manual_seed(seed)
    heads = H + 2 * (H // G)
    qkv = torch.randn(B, T, heads, D, generator=rng) * (0.5 + 2 * torch.rand(1, 1, heads, 1, generator=rng))
    q, k, v = qkv.to(dtype).split((H, H // G, H // G), dim=2)
    if not packed:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    angle = torch.outer(torch.arange(T).float(), 10000.0 ** (-torch.arange(0, D, 2) / D))
    return q, k, v, angle.cos(), angle.sin(), torch.randn(B, T, H, D, generator=rng).to(dtype)


def run(function, q, k, v, cos, sin, dy, *rest):
    """Output and the three gradients."""
    leaves = [x.detach().requires_grad_(True) for x in (q, k, v)]
    y = function(*leaves, cos, sin, *rest)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def worst(found, wanted):
    """Largest difference of each, relative to the largest of what is wanted, or to 3: a query that sees one key only
    has a gradient of zero, the difference of two numbers dy.v of some sqrt(D) times 2, times k and D^-0.5."""
    return [((f.double() - w).abs().max() / w.abs().max().clamp(min=3)).item() for f, w in zip(found, wanted)]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 2), st.integers(8, 90), st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 8)]),
    st.sampled_from([32, 48, 64, 80, 96, 128]), st.sampled_from(list(EPSILON)), st.sampled_from(TILES),
    st.booleans(), st.data(),
)  # fmt: skip
def test_forward_and_backward_agree_with_float64(seed, B, T, heads, D, dtype, tile, packed, data):
    window = data.draw(st.integers(1, T))
    q, k, v, cos, sin, dy = inputs(seed, B, T, *heads, D, dtype, packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_tiles, "INTERPRETED", tile)
        found = run(attention, q, k, v, cos, sin, dy, window)
    wanted = run(reference, *(x.double() for x in (q, k, v, cos, sin, dy)), window)
    assert all(f.dtype == dtype and f.is_contiguous() for f in found)
    assert max(worst(found, wanted)) < 12 * EPSILON[dtype] + 2e-6


@pytest.mark.parametrize("G", range(1, 9))
def test_groups(G):
    q, k, v, cos, sin, dy = inputs(torch.seed() % 2**32, 1, 37, G, G, 32, torch.float32)
    found = run(attention, q, k, v, cos, sin, dy, 20)
    assert max(worst(found, run(reference, *(x.double() for x in (q, k, v, cos, sin, dy)), 20))) < 2e-6


def test_every_window_of_one_sequence():
    q, k, v, cos, sin, dy = inputs(torch.seed() % 2**32, 1, 50, 1, 1, 32, torch.float32)
    wide = [x.double() for x in (q, k, v, cos, sin, dy)]
    for window in (0, *range(1, 51, 3), 49, 50, 10**9):
        found, wanted = run(attention, q, k, v, cos, sin, dy, window), run(reference, *wide, window)
        assert max(worst(found, wanted)) < 2e-6, window


@pytest.mark.parametrize(("H", "G", "D"), [(2, 1, 32), (4, 2, 48), (2, 2, 64)])
@pytest.mark.parametrize("dtype", list(EPSILON))
def test_in_the_place_of_q_and_k_everything_is_the_same(H, G, D, dtype):
    """They are used up and v is not; output and gradients are those of tensors of their own, to the bit but for dq."""
    q, k, v, cos, sin, dy = inputs(7, 2, 50, H, G, D, dtype, packed=True)
    y, dq, dk, dv = run(attention, q, k, v, cos, sin, dy, 20)
    qkv = torch.cat((q, k, v), dim=2)
    into = torch.full_like(qkv, torch.nan)
    parts, found = (x.split([H, H // G, H // G], dim=2) for x in (qkv, into))
    ours, *beside = attend_(*parts, cos, sin, 20)
    attend_backward(dy, ours, *parts, *beside, cos, sin, 20, found)
    assert torch.equal(ours, y) and torch.equal(parts[2], v)
    for turned, x in zip(parts, (q, k)):
        wanted = reference_rotated(x.double(), cos.double(), sin.double())
        torch.testing.assert_close(turned.double(), wanted, atol=8 * EPSILON[dtype], rtol=EPSILON[dtype])
    for r, x in zip(beside[1:], (q, k)):
        wanted = x.double().square().mean(-1).add(2.0**-23).rsqrt().transpose(1, 2)
        torch.testing.assert_close(r.double(), wanted, atol=0, rtol=1e-5)
    assert torch.equal(found[1], dk) and torch.equal(found[2], dv)
    torch.testing.assert_close(found[0], dq, atol=4 * EPSILON[dtype], rtol=4 * EPSILON[dtype])  # summed in any order


def test_directional_derivative():
    """Of the kernel itself, by central differences: 1e-3 apart in float32."""
    q, k, v, cos, sin, dy = inputs(torch.seed() % 2**32, 1, 20, 2, 2, 32, torch.float32)
    _, *gradients = run(attention, q, k, v, cos, sin, dy, 6)
    for n in range(3):
        step = torch.randn_like((q, k, v)[n])
        step *= 2e-2 / step.norm()
        ends = []
        for sign in (1, -1):
            moved = [x + sign * step if i == n else x for i, x in enumerate((q, k, v))]
            ends.append((attention(*moved, cos, sin, 6) * dy).double().sum().item())
        slope, wanted = (ends[0] - ends[1]) / 2, (gradients[n] * step).double().sum().item()
        assert abs(slope - wanted) < 2e-2 * gradients[n].norm().item() * 2e-2 + 2e-5


def test_gradcheck_of_the_reference():
    q, k, v, cos, sin, _ = (x.double() for x in inputs(torch.seed() % 2**32, 1, 6, 2, 2, 4, torch.float32))
    leaves = [x.detach().clone().requires_grad_(True) for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: reference(*x, cos, sin, 3), leaves)


@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_at_the_bound(dtype, sign):
    """All queries and keys parallel or opposed: every score is +-sqrt(D), where exp(s - c) is largest or smallest.

    The smallest is e^-11.6, which fp16 holds to 0.3 %.
    """
    T, D = 40, 128
    q = torch.ones(1, T, 1, D, dtype=dtype)
    _, _, v, _, _, dy = inputs(torch.seed() % 2**32, 1, T, 1, 1, D, dtype)
    cos, sin = torch.ones(T, D // 2), torch.zeros(T, D // 2)
    found = run(attention, q, sign * q, v, cos, sin, dy, T)
    wanted = run(reference, *(x.double() for x in (q, sign * q, v, cos, sin, dy)), T)
    limit = (12 if dtype == torch.float16 else 6) * EPSILON[dtype] + 2e-6
    assert worst(found[:1], wanted[:1])[0] < limit and worst(found[3:], wanted[3:])[0] < limit
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_larger_scale(dtype):
    q, k, v, cos, sin, dy = inputs(torch.seed() % 2**32, 1, 40, 1, 1, 64, dtype)
    found = run(attention, q, k, v, cos, sin, dy, 30, 0.5)
    wanted = run(reference, *(x.double() for x in (q, k, v, cos, sin, dy)), 30, 0.5)
    assert max(worst(found, wanted)) < 30 * EPSILON[dtype] + 2e-5


def test_zeros_and_neighbours_in_memory_do_no_harm():
    """A zero vector has no direction; what lies behind the last token is never read into the sums."""
    T, D = 21, 48
    q, k, v, cos, sin, dy = inputs(3, 1, 64, 2, 2, D, torch.float32)
    for x in (q, k, v, dy):
        x[:, T:] = torch.nan
    q[:, :4], k[:, 2:6] = 0, 0
    given_ = [x[:, :T] for x in (q, k, v)] + [cos, sin, dy[:, :T]]
    found, wanted = run(attention, *given_, 9), run(reference, *(x.double() for x in given_), 9)
    assert all(x.isfinite().all() for x in found)
    assert worst(found[:1], wanted[:1])[0] < 2e-6 and worst(found[3:], wanted[3:])[0] < 2e-6


def test_the_operator_is_sound_for_torch_compile():
    """Schema, fake shapes, autograd registration; and one whole graph around it."""
    q, k, v, cos, sin, _ = inputs(5, 1, 19, 2, 2, 32, torch.float32)
    leaves = [x.requires_grad_(True) for x in (q, k, v)]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.autoresearch.attention_forward, (*leaves, cos, sin, 7, 32**-0.5), test_utils=checks)
    graph = torch.compile(
        lambda q, k, v: attention(q * 1, k, v, cos, sin, 7).sum(), backend="aot_eager", fullgraph=True
    )
    found = torch.autograd.grad(graph(*leaves), leaves)
    for f, w in zip(found, torch.autograd.grad(attention(*leaves, cos, sin, 7).sum(), leaves)):
        assert torch.allclose(f, w, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"D": 30}, "head size 30; this kernel takes even ones from 32 to 128"),
        ({"D": 130}, "head size 130"),
        ({"dtype": torch.float64}, "float64; this kernel takes bf16, fp16"),
        ({"window": -1}, "window -1"),
        ({"scale": 2.0}, "scale x head size is 64"),
        ({"heads": 3}, "3 query heads do not divide into groups over 2"),
        ({"tables": 5}, "cos and sin"),
        ({"B": 2**15}, "32,768 sequences of 2 heads; a launch takes 65,535"),
    ],
)
def test_what_does_not_fit_is_said(change, said):
    D, dtype = change.get("D", 32), change.get("dtype", torch.float32)
    B = change.get("B", 1)
    q, k, v = (torch.zeros(B, 8, h, D, dtype=dtype) for h in (change.get("heads", 2), 2, 2))
    cos = sin = torch.zeros(change.get("tables", 8), D // 2)
    with pytest.raises(ValueError, match=said):
        attention(q, k, v, cos, sin, change.get("window", 3), change.get("scale"))
