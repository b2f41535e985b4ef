"""What is computed again in a backward against plain torch and its own gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import linear_relu2, recomputed


def leaves(seed, *shapes):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=rng, dtype=torch.float64).requires_grad_() for s in shapes]


def same(found, wanted, inputs):
    dy = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted)
    pairs = zip(*(torch.autograd.grad(y, inputs, dy, retain_graph=True) for y in (found, wanted)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + recomputed.EPSILON)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 20), st.integers(1, 12))
def test_a_linear_layer_of_a_norm(seed, N, C, O):  # noqa: E741 - as in the module's shapes
    x, x0, w, a, b = leaves(seed, (N, C), (N, C), (O, C), (1,), (1,))
    y = norm(a * x + b * x0)
    same(recomputed.linear_of_norm(y, w, x, x0, a, b), F.linear(y, w), (x, x0, w, a, b))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 9))
def test_a_gated_embedding(seed, B, T, H, V):
    v, gate, table = leaves(seed, (B, T, H, 4), (B, T, H), (V, 4 * H))
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))
    wanted = v + gate.unsqueeze(-1) * F.embedding(tokens, table).view(v.shape)
    same(recomputed.gated_embedding(v, gate, table, tokens), wanted, (v, gate, table))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([16, 48]))
def test_an_mlp_of_a_norm_keeps_what_was_normalised(seed, N, C):
    x, w1, w2 = leaves(seed, (N, C), (2 * C, C), (C, 2 * C))
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        for table in ("FORWARD", "BACKWARD"):  # in plain torch: the kernels have tests of their own
            patch.setattr(linear_relu2, table, {})
        check_kept(x, w1, w2, kept)


def check_kept(x, w1, w2, kept):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = norm(x)
        kept.clear()
        found = linear_relu2.mlp(y, w1, w2, source=x)
    assert x.data_ptr() in kept and y.data_ptr() not in kept
    same(found, linear_relu2.reference(y, w1, w2), (x, w1, w2))


def test_rows_in_bfloat16_are_summed_in_float32():
    """As the forward's kernel does. A scalar without a dimension, as a recipe has it, widens nothing by itself."""
    rng = torch.Generator().manual_seed(1)
    x, x0, dz = (torch.randn(64, 32, generator=rng).bfloat16() for _ in range(3))
    a, b = torch.tensor(1.1), torch.tensor(0.3)
    y = recomputed.norm(a * x.float() + b * x0.float(), torch.bfloat16)
    w = torch.randn(32, 32, generator=rng).bfloat16().requires_grad_()
    recomputed.linear_of_norm(y, w, x, x0, a, b).backward(dz)
    assert torch.equal(w.grad, dz.T @ y)


def test_all_of_it_is_one_graph():
    x, x0, w, a, b = (t.detach().float().requires_grad_() for t in leaves(1, (2, 6, 8), (2, 6, 8), (8, 8), (1,), (1,)))
    table = torch.randn(5, 8).requires_grad_()
    tokens = torch.randint(5, (2, 6))

    def loss(x, x0, w, a, b, table):
        z = recomputed.linear_of_norm(norm(a * x + b * x0), w, x, x0, a, b)
        gate = torch.sigmoid(z[..., :2])
        return recomputed.gated_embedding(z.view(2, 6, 2, 4), gate, table, tokens).square().mean()

    inputs = (x, x0, w, a, b, table)
    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(torch.autograd.grad(whole(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs)):
        torch.testing.assert_close(ours, theirs)
