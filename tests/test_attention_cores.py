"""Attention by others' kernels on what ours have normed and turned, where Triton is not: PyTorch's flash attention for
CPUs, which is real, and a stand-in for FlashAttention-3's package. With Triton: tests/interpreted/recomputed.py."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from flash3 import FORMS, stand_in  # noqa: E402 - after the skip

from kernels import attention_cores, lean  # noqa: E402
from kernels.attention_cores import CORES, attention  # noqa: E402
from kernels.attention_reference import reference, reference_rotated  # noqa: E402

COMPILES = pytest.mark.skipif(
    sys.platform == "win32" and shutil.which("cl") is None, reason="Microsoft's C++ compiler is not there"
)


@pytest.fixture(autouse=True, scope="module")
def flash_attention_3():
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, *FORMS["older"])
        yield


def angles(T, D):
    angle = torch.outer(torch.arange(T).float(), 10000.0 ** (-torch.arange(0, D, 2) / D))
    return angle.cos(), angle.sin()


def random(seed, *shapes, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng).to(dtype).requires_grad_() for shape in shapes]


def layer(seed, B, T, H, D, dtype=torch.float32):
    """What `lean.attend` gets but for the window: x, x0, a, b, w, gate, table, tokens, cos, sin."""
    C = H * D
    x, x0, w, gate = random(seed, (B, T, C), (B, T, C), (3 * C, C), (H, 8), dtype=dtype)
    a, b, table = random(seed + 1, (1,), (1,), (5, C), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x, x0, a, b, w, gate, table, torch.randint(5, (B, T)), *angles(T, D)


def leaves(given_):
    return [t for t in given_ if t.requires_grad]


@pytest.mark.parametrize("by", ["fa3", "flash"])
@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 50), st.integers(1, 2), st.sampled_from([1, 2, 4]),
    st.sampled_from([2, 10, 32]), st.booleans(), st.data(),
)  # fmt: skip
def test_by_itself_it_agrees_with_the_reference(by, seed, B, T, G, group, D, packed, data):
    window = T if by == "flash" else data.draw(st.integers(0, T + 3))
    scale = data.draw(st.sampled_from([None, 0.3]))
    H = G * group
    q, k, v = random(seed, (B, T, H, D), (B, T, G, D), (B, T, G, D))
    if packed:  # slices of one tensor, as a layer has them
        q, k, v = torch.cat([q, k, v], dim=2).split([H, G, G], dim=2)
    before = [x.clone() for x in (q, k, v)]
    cos, sin = angles(T + 2, D)
    found, wanted = (f(q, k, v, cos, sin, window, scale) for f in (functools.partial(attention, by=by), reference))
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-4)
    dy = torch.randn_like(wanted)
    for ours, theirs in zip(*(torch.autograd.grad(y, (q, k, v), dy) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()) + 1e-5, rtol=1e-3)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("by", ["fa3", "flash"])
@pytest.mark.parametrize("window", [0, 7, 30])
def test_within_a_layer_it_gives_what_the_reference_beside_it_gives(by, window):
    window = 30 if by == "flash" else window
    given_ = layer(torch.seed() % 2**32, 2, 31, 3, 16)
    pairs = [lean.attend(*given_, window, way) for way in (by, reference)]
    dy = [torch.randn_like(y) for y in pairs[0]]
    found, wanted = ([*pair, *torch.autograd.grad(pair, leaves(given_), dy)] for pair in pairs)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5 * float(theirs.abs().max()) + 1e-6, rtol=1e-3)


def test_gradients_are_derivatives():
    given_ = layer(3, 1, 5, 2, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: lean.attend(*t, *given_[7:], 5, "flash"), given_[:7])
    q, k, v = random(4, *[(2, 5, 2, 4)] * 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: attention(*t, *angles(5, 4), 5, by="flash"), (q, k, v))


@pytest.mark.parametrize("by", ["fa3", "flash"])
def test_a_layer_keeps_queries_and_keys_once_turned(by):
    B, T, H, D = 2, 24, 2, 32
    given_, kept = layer(1, B, T, H, D), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lean.attend(*given_, T, by)
    places = {t.untyped_storage().data_ptr(): t for t in kept if t.is_floating_point()}
    for t in given_:
        places.pop(t.untyped_storage().data_ptr(), None)
    numbers = sum(t.untyped_storage().nbytes() // 4 for t in places.values())
    assert numbers == B * T * (4 * H * D + 4 * H)  # q^ k^ v and u; g, two lengths and the logarithm of a sum
    (qkv,) = (t for t in places.values() if t.shape == (B * T, 3 * H * D))
    q, k, _ = (t.view(B, T, H, D) for t in qkv.chunk(3, dim=1))
    for turned in (q, k):
        torch.testing.assert_close(turned.square().mean(-1), torch.ones(B, T, H), atol=1e-3, rtol=0)


@pytest.mark.parametrize("by", ["fa3", "flash"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, COMPILES])])
def test_layers_are_one_graph_and_the_same(by, backend):
    x, x0, a, b, w, gate, table, tokens, cos, sin = layer(5, 2, 16, 2, 8)

    def layers(x, w):
        for i in range(3):
            x, u = lean.attend(
                x, x0, a, b, w, gate if i % 2 else None, table if i % 2 else None, tokens, cos, sin, 16, by
            )
            x = x + u
        return x.sin().mean()

    whole = torch.compile(layers, backend=backend, dynamic=False, fullgraph=True)
    torch.testing.assert_close(whole(x, w), layers(x, w))
    inputs = (x, x0, a, b, w, gate, table)
    for ours, theirs in zip(*(torch.autograd.grad(f(x, w), inputs) for f in (whole, layers)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("by", ["fa3", "flash"])
def test_the_operations_keep_torchs_rules(by):
    x, x0, a, b, w, gate, table, tokens, cos, sin = (t.detach() for t in layer(6, 2, 9, 2, 8))
    ops, tests = torch.ops.autoresearch, ("test_schema", "test_faketensor")
    flat = (x.flatten(0, 1), x0.flatten(0, 1), a, b, w, gate, table, tokens.flatten(), cos, sin, 9, 9, by)
    torch.library.opcheck(ops.attend.default, flat, test_utils=tests)
    _, u, qkv, beside, _ = ops.attend(*flat)
    given_ = (torch.randn_like(u), u, qkv, beside, cos, sin, 9, 9, by)
    torch.library.opcheck(ops.attend_backward.default, given_, test_utils=tests)
    q, k, v = random(7, (2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    tests = (*tests, "test_autograd_registration")
    torch.library.opcheck(ops.attention_by.default, (q, k, v, cos, sin, 9, 0.4, by), test_utils=tests)


def test_a_window_that_a_core_does_not_know_is_refused():
    q, k, v = random(8, *[(1, 9, 2, 8)] * 3)
    with pytest.raises(ValueError, match="torch's flash attention knows no windows; 7 of 9 tokens asked for"):
        attention(q, k, v, *angles(9, 8), 7, by="flash")
    with pytest.raises(ValueError, match="cuDNN knows no windows; 7 of 9"):
        CORES["cudnn"].forward(q, k, v, 7, 0.1)
    for by in CORES:
        with pytest.raises(ValueError, match="window -1; 0 sees only the token itself, 8 all"):
            attention(q, k, v, *angles(9, 8), -1, by=by)
    with pytest.raises(ValueError, match="knows no windows"):
        lean.attend(*layer(9, 1, 9, 2, 8), 3, "flash")


def test_a_core_that_makes_other_tensors_than_it_tells_is_refused_where_it_is_tried(monkeypatch):
    """As where a version of PyTorch keeps a sum by (B, H, T, 1) and tells (B, H, T): a graph ends its first step."""
    (q, k, v), (cos, sin) = random(12, *[(2, 11, 2, 8)] * 3), angles(11, 8)
    real = CORES["flash"]

    def other(change):
        def forward(*given_):
            y, (sums, *rest) = real.forward(*given_)
            return y, [change(sums), *rest]

        return dataclasses.replace(real, forward=forward)

    assert attention(q, k, v, cos, sin, 11, by="flash").shape == q.shape
    for change in (lambda s: s.unsqueeze(-1), torch.Tensor.contiguous, torch.Tensor.double):
        monkeypatch.setitem(CORES, "flash", other(change))
        with pytest.raises(RuntimeError, match=r"flash made \[.*\]; of this torch \[.*\] are known here"):
            attention(q, k, v, cos, sin, 11, by="flash")


def test_turning_back_is_the_derivative_of_turning():
    (x, dy), (cos, sin) = random(10, *[(2, 7, 3, 10)] * 2, dtype=torch.float64), angles(7, 10)
    found = x.detach().clone()
    r = attention_cores.portable.rotated(found, found, cos, sin)
    wanted = reference_rotated(x, cos, sin)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(r, x.square().mean(-1).add(2.0**-23).rsqrt().transpose(1, 2))
    back = dy.detach().clone()
    attention_cores.portable.rotated_back(back, found, r, back, cos, sin)
    torch.testing.assert_close(back, torch.autograd.grad(wanted, x, dy)[0], atol=1e-5, rtol=1e-5)
