"""What is computed again in a backward against plain torch and its own gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from flash3 import FORMS, stand_in
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted.attention import mended  # noqa: F401 - a fixture: the interpreter's products of bfloat16
from torch.utils.checkpoint import checkpoint

from kernels import attention, attention_reference, attention_slices, lean, linear_relu2, portable, recomputed
from kernels.residual_norm import EPSILON, residual_norm


def leaves(seed, *shapes):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=rng, dtype=torch.float64).requires_grad_() for s in shapes]


def some_tokens(seed, entries, *shape):
    return torch.randint(entries, shape, generator=torch.Generator().manual_seed(seed))


def same(found, wanted, inputs):
    """One output of each, or several."""
    found, wanted = (y if isinstance(y, tuple) else (y,) for y in (found, wanted))
    dy = [torch.randn_like(y) for y in wanted]
    torch.testing.assert_close(found, wanted)
    pairs = zip(*(torch.autograd.grad(y, inputs, dy, retain_graph=True) for y in (found, wanted)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)


def plain_qkv(y, w, gate, table, tokens):
    """(N, C) -> (N, 3C): three products, the value embeddings as tensors of their own."""
    q, k, v = F.linear(y, w).chunk(3, dim=-1)
    if gate is not None:
        g = 2 * torch.sigmoid(F.linear(y[:, : gate.size(1)], gate))
        v = v + (g.unsqueeze(-1) * F.embedding(tokens, table).unflatten(-1, (len(gate), -1))).flatten(1)
    return torch.cat((q, k, v), dim=-1)


@pytest.mark.parametrize("with_triton", [True, False], ids=["triton", "torch"])
@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 3), st.integers(1, 9), st.integers(1, 4),
    st.integers(1, 9), st.booleans(),
)  # fmt: skip
def test_q_k_and_v_of_a_norm(with_triton, seed, N, H, D, G, V, gated):
    C = H * D
    x, x0, w, a, b = leaves(seed, (N, C), (N, C), (3 * C, C), (1,), (1,))
    gate, table = leaves(seed + 1, (H, min(G, C)), (V, C)) if gated else (None, None)
    tokens, total = some_tokens(seed, V, N), a * x + b * x0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "fused", lambda device: with_triton)
        found = lean.project(x, x0, a, b, w, gate, table, tokens)
        inputs = (x, x0, w, a, b, *((gate, table) if gated else ()))
        same(found, (total, plain_qkv(norm(total), w, gate, table, tokens)), inputs)


@pytest.mark.parametrize("with_triton", [True, False], ids=["triton", "torch"])
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_the_norm_of_an_embedding(with_triton, seed, N, C, V):
    (table,) = leaves(seed, (V, C))
    tokens = some_tokens(seed, V, N)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "fused", lambda device: with_triton)
        found = recomputed.embedded_norm(tokens, table, torch.float64)
        same(found, norm(F.embedding(tokens, table)), (table,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_value_embeddings_in_the_compute_dtype(dtype):
    """Within a rounding of it; the table and its gradient are float32."""
    rng = torch.Generator().manual_seed(3)
    v, dv = (torch.randn(50, 3, 24, generator=rng).to(dtype) for _ in range(2))
    gates, table = torch.rand(50, 3, generator=rng).to(dtype), torch.randn(7, 72, generator=rng)
    tokens = some_tokens(3, 7, 50)
    wide = [t.double().requires_grad_() for t in (gates, table)]
    added = wide[0].unsqueeze(-1) * F.embedding(tokens, wide[1]).view(v.shape)
    wanted, close = v.double() + added.detach(), {"atol": 1e-5, "rtol": torch.finfo(dtype).eps}
    dg, dtable = torch.autograd.grad(added, wide, dv.double())
    packed = torch.cat((torch.zeros(50, 144, dtype=dtype), v.flatten(1)), dim=1)  # as v lies beside q and k
    portable.add_gated(packed[:, 144:].unflatten(1, (3, 24)), gates, table, tokens)
    torch.testing.assert_close(packed[:, 144:].double(), wanted.flatten(1), **close)
    assert not packed[:, :144].any()
    found = portable.add_gated_backward(dv, gates, table, tokens)
    assert [t.dtype for t in found] == [torch.float32, torch.float32]
    for ours, theirs in zip(found, (dg, dtable)):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("with_triton", [True, False], ids=["triton", "torch"])
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([16, 48]), st.booleans())
def test_an_mlp_of_a_norm_keeps_what_was_normalised(with_triton, seed, N, C, keep_hidden):
    x, u, wu, w1, w2 = leaves(seed, (N, C), (N, C), (C, C), (2 * C, C), (C, 2 * C))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "fused", lambda device: with_triton)
        for table in ("FORWARD", "BACKWARD"):  # in plain torch: the kernels have tests of their own
            patch.setattr(linear_relu2, table, {})
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            found = lean.feed(x, u, wu, w1, w2, keep_hidden)
        z = x + u @ wu.T
        hidden = norm(z) @ w1.T
        weights = wu.numel() + w1.numel() + w2.numel()
        assert sum(t.numel() for t in kept) == 2 * N * C + N + weights + (hidden.numel() if keep_hidden else 0)
        same(found, z + hidden.relu().square() @ w2.T, (x, u, wu, w1, w2))


@pytest.mark.parametrize("keep_hidden", [True, False])
@pytest.mark.parametrize("behind", [False, True])
def test_a_checkpoint_leaves_the_last_product_out_where_nothing_behind_needs_it(monkeypatch, keep_hidden, behind):
    given_, times = leaves(5, (7, 16), (7, 16), (16, 16), (32, 16), (16, 32)), []
    down = lean._down
    monkeypatch.setattr(lean, "_down", lambda *t: times.append(1) or down(*t))

    def layer(*t):
        found = lean.feed(*t, keep_hidden)
        return found.sin() if behind else found

    made = checkpoint(layer, *given_, use_reentrant=False)
    x, u, wu, w1, w2 = given_
    z = x + u @ wu.T
    wanted = z + (norm(z) @ w1.T).relu().square() @ w2.T
    same(made, wanted.sin() if behind else wanted, given_)
    assert len(times) == (2 if behind else 1)


@pytest.mark.parametrize("with_triton", [True, False], ids=["triton", "torch"])
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40))
def test_the_last_norm(with_triton, seed, N, C):
    (z,) = leaves(seed, (N, C))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "fused", lambda device: with_triton)
        same(lean.last_norm(z), norm(z), (z,))


def test_rows_in_bfloat16_are_summed_in_float32():
    """As the forward's kernel does. A scalar without a dimension, as a recipe has it, widens nothing by itself."""
    rng = torch.Generator().manual_seed(1)
    x, x0 = (torch.randn(64, 32, generator=rng).bfloat16() for _ in range(2))
    dz = torch.randn(64, 96, generator=rng).bfloat16()
    a, b = torch.tensor(1.1), torch.tensor(0.3)
    _, y = residual_norm(x, x0, a, b)
    w = torch.randn(96, 32, generator=rng).bfloat16().requires_grad_()
    lean.project(x, x0, a, b, w, None, None, torch.zeros(64, dtype=torch.int64))[1].backward(dz)
    assert torch.equal(w.grad, dz.T @ y)


def test_a_gate_without_a_table_is_refused():
    x, w, gate, a = leaves(1, (3, 4), (12, 4), (2, 4), (1,))
    with pytest.raises(ValueError, match="both a gate and a table"):
        lean.project(x, x, a, a, w, gate, None, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("gated", [True, False])
def test_the_operators_keep_torchs_rules(gated):
    shapes = ((6, 8), (6, 8), (1,), (1,), (24, 8), (6, 24), (6, 2), (8, 8), (12, 8), (8, 12), (6, 12))
    x, x0, a, b, w, dz, g, wu, w1, w2, y = (t.detach().abs() for t in leaves(1, *shapes))
    gate, table = (t.detach() for t in leaves(2, (2, 3), (5, 8))) if gated else (None, None)
    tokens, ops, tests = some_tokens(1, 5, 6), torch.ops.autoresearch, ("test_schema", "test_faketensor")
    (free,) = leaves(3, (5, 8))
    torch.library.opcheck(ops.project.default, (x, x0, a, b, w, gate, table, tokens), test_utils=tests)
    back = (x, dz, g if gated else g.new_empty(0), x, x0, a, b, w, gate, table, tokens)
    torch.library.opcheck(ops.project_backward.default, back)
    torch.library.opcheck(ops.normed.default, (x,), test_utils=tests)
    torch.library.opcheck(ops.normed_backward.default, (x0, x))
    torch.library.opcheck(ops.hidden.default, (x, x0, wu, w1, "triton"), test_utils=tests)
    torch.library.opcheck(ops.down.default, (x, y, w2), test_utils=tests)
    for keep in (True, False):
        back = (x, x0, g[:, 0].clone(), y if keep else y.new_empty(0), w1, w2, keep, "triton")
        torch.library.opcheck(ops.hidden_backward.default, back)
    torch.library.opcheck(ops.feed_backward.default, (x, y, x0, x, wu, w1))
    torch.library.opcheck(ops.embedded_norm.default, (tokens, free, torch.float64))
    torch.library.opcheck(ops.embedded_norm_backward.default, (x, tokens, free.detach()))


# --- a layer's first half, attention within -------------------------------------------------------

EPSILONS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BY = {  # what stands beside the rest
    "triton": attention.attention,
    "slices": attention_slices.attention,
    "slices in place": attention_slices.attention_,
    "plain": attention_reference.reference,
}


@pytest.fixture(autouse=True, scope="module")
def flash_attention_3():
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, *FORMS["newer"])
        yield


def half(seed, B, T, H, D, gated, dtype=torch.float64):
    """What `lean.attend` gets but for the window: x, x0, a, b, w, gate, table, tokens, cos, sin."""
    C, entries = H * D, 7
    x, x0, w, a, b = leaves(seed, (B, T, C), (B, T, C), (3 * C, C), (1,), (1,))
    gate, table = leaves(seed + 1, (H, 8), (entries, C)) if gated else (None, None)
    angle = torch.outer(torch.arange(T).float(), 10000.0 ** (-torch.arange(0, D, 2) / D))
    narrow = (t if t is None else t.detach().to(dtype).requires_grad_() for t in (x, x0, w, gate))
    x, x0, w, gate = narrow
    if dtype != torch.float64:
        a, b, table = (t if t is None else t.detach().float().requires_grad_() for t in (a, b, table))
    return x, x0, a, b, w, gate, table, some_tokens(seed, entries, B, T), angle.cos(), angle.sin()


def gradients(outputs, given, dy):
    """Of what is given and wants them, in float64; and the outputs before them."""
    wanted = [t for t in given if t is not None and t.requires_grad]
    found = torch.autograd.grad(outputs, wanted, [d.to(y.dtype) for d, y in zip(dy, outputs)])
    return [t.detach().double() for t in (*outputs, *found)]


def plain_half(x, x0, a, b, w, gate, table, tokens, cos, sin, window):
    total = a * x + b * x0
    y = plain_qkv(norm(total).flatten(0, 1), w, gate, table, tokens.flatten())
    q, k, v = y.view(*tokens.shape, 3, -1, 2 * cos.size(1)).unbind(2)
    return total, attention_reference.reference(q, k, v, cos, sin, window).reshape(x.shape)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([None, "flash", "fa3"]), st.integers(0, 2**32), st.integers(1, 2), st.integers(2, 60),
    st.integers(1, 3), st.sampled_from([32, 48, 64]), st.booleans(), st.sampled_from(list(EPSILONS)), st.data(),
)  # fmt: skip
def test_attention_within_a_layer_agrees_with_float64(by, seed, B, T, H, D, gated, dtype, data):
    window = T if by == "flash" else data.draw(st.integers(0, T))  # torch's own knows no windows
    given_ = half(seed, B, T, H, D, gated, dtype)
    outputs = lean.attend(*given_, window, by)
    dy = [torch.randn_like(y) for y in outputs]
    found = gradients(outputs, given_, dy)
    wide = [t if t is None or not t.is_floating_point() else t.detach().double() for t in given_]
    wide = [t if t is None or o is None else t.requires_grad_(o.requires_grad) for t, o in zip(wide, given_)]
    wanted = gradients(plain_half(*wide, window), wide, dy)
    for f, w in zip(found, wanted, strict=True):
        usual = max(w.numel(), given_[0].numel() if w.numel() == 1 else 0) ** 0.5  # a scalar's is a sum over all rows
        assert (f - w).norm() <= (20 * EPSILONS[dtype] + 1e-5) * (w.norm() + usual)


@pytest.mark.parametrize("by", [*BY])
@pytest.mark.parametrize("window", [0, 5, 30])
def test_every_attention_beside_a_layer_gives_what_the_one_within_gives(by, window):
    given_ = half(torch.seed() % 2**32, 2, 31, 2, 32, True, torch.float32)
    pairs = [lean.attend(*given_, window, other) for other in (None, BY[by])]
    dy = [torch.randn_like(y) for y in pairs[0]]
    for ours, theirs in zip(*(gradients(pair, given_, dy) for pair in pairs), strict=True):
        # A scalar's is a sum over all of x, and may be near zero: rounding is of the size of what is summed.
        size = max(float(theirs.abs().max()), 0.1 * given_[0].numel() ** 0.5 if theirs.numel() == 1 else 0.0)
        torch.testing.assert_close(ours, theirs, atol=2e-5 * size + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("by", [None, "flash", "fa3"])
def test_a_layer_keeps_q_and_k_once(by):
    """Normalised and turned, where they were: beside the stream and the weights four widths and a few numbers a row."""
    B, T, H, D = 2, 24, 2, 32
    given_, kept = half(1, B, T, H, D, False, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lean.attend(*given_, T, by)
    places = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in kept if t.is_floating_point()}
    for t in given_:
        places.pop(t.untyped_storage().data_ptr() if t is not None else 0, None)
    assert sum(places.values()) == B * T * (4 * H * D + 3 * H)


def test_heads_that_the_kernels_do_not_take_are_told():
    given_ = half(1, 1, 8, 2, 30, False, torch.float32)
    with pytest.raises(ValueError, match="head size 30; this kernel takes even ones from 32"):
        lean.attend(*given_, 3)
    with pytest.raises(ValueError, match="window -1"):
        lean.attend(*half(1, 1, 8, 2, 32, False, torch.float32), -1)


@pytest.mark.parametrize("by", ["triton", "flash", "fa3"])
@pytest.mark.parametrize("gated", [True, False])
def test_attention_within_a_layer_keeps_torchs_rules(gated, by):
    x, x0, a, b, w, gate, table, tokens, cos, sin = (
        t if t is None else t.detach() for t in half(1, 2, 9, 2, 32, gated, torch.float32)
    )
    flat = (x.flatten(0, 1), x0.flatten(0, 1), a, b, w, gate, table, tokens.flatten(), cos, sin, 9, 9, by)
    ops, tests = torch.ops.autoresearch, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.attend.default, flat, test_utils=tests)
    _, u, qkv, beside, _ = ops.attend(*flat)
    back = (torch.randn_like(u), u, qkv, beside, cos, sin, 9, 9, by)
    torch.library.opcheck(ops.attend_backward.default, back, test_utils=tests, rtol=1e-4, atol=1e-5)


def test_all_of_it_is_one_graph():
    shapes = ((2, 6, 8), (24, 8), (1,), (1,), (12, 8), (8, 12))
    x0, w, a, b, w1, w2 = (t.detach().float().requires_grad_() for t in leaves(1, *shapes))
    table, values, gate = (t.detach().float().requires_grad_() for t in leaves(2, (5, 8), (5, 8), (2, 3)))
    tokens = some_tokens(1, 5, 2, 6)

    def loss(x0, w, a, b, w1, w2, table, values, gate):
        x = recomputed.embedded_norm(tokens, table, torch.float32)
        x, qkv = lean.project(x, x0, a, b, w, gate, values, tokens)
        return lean.last_norm(lean.feed(x, qkv[..., -8:], w[:8], w1, w2)).sin().mean() + qkv.square().mean()

    inputs = (x0, w, a, b, w1, w2, table, values, gate)
    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(torch.autograd.grad(whole(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs)):
        torch.testing.assert_close(ours, theirs)
