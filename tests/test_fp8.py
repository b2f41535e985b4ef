"""The FP8 linear layer on a CPU, where its product is computed in float32 from the same rounded operands."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402 - after the skip
from hypothesis import strategies as st  # noqa: E402

from kernels import fp8  # noqa: E402


def tensors(seed, tokens, k, n, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(s, generator=rng) * scale for s, scale in (((tokens, k), 3.0), ((n, k), 0.1)))
    return x.to(dtype), w.to(dtype)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([16, 48, 128]), st.sampled_from([16, 32]))
def test_the_product_is_that_of_the_rounded_operands(seed, tokens, k, n):
    x, w = tensors(seed, tokens, k, n)
    found, wanted = fp8.linear(x, w), fp8.reference(x, w)
    ties = (found - wanted).abs() > 1e-4 * wanted.abs().max()  # at the middle of two values the two may part
    assert ties.float().mean() < 0.02
    exact = x.double() @ w.double().T
    assert (found - exact).square().mean().sqrt() < 0.08 * exact.square().mean().sqrt()


def test_later_tokens_do_not_move_earlier_outputs_and_a_scale_per_tensor_would():
    """What is scored at a position may depend on its past alone, to the last bit."""
    x, w = tensors(torch.seed() % 2**31, 32, 64, 32)
    later = x.clone()
    later[20:] *= 100.0

    def per_tensor(a):
        scale = a.abs().max() / fp8.LARGEST
        return (a / scale).to(torch.float8_e4m3fn).float() * scale @ w.T

    assert torch.equal(fp8.linear(x, w)[:20], fp8.linear(later, w)[:20])
    assert not torch.equal(per_tensor(x)[:20], per_tensor(later)[:20])


def test_gradients_are_those_of_a_linear_layer_within_the_rounding():
    x, w = (t.requires_grad_() for t in tensors(torch.seed() % 2**31, 48, 64, 32))
    dy = torch.randn(48, 32)
    found = torch.autograd.grad(fp8.linear(x, w), (x, w), dy)
    assert (found[0] - dy @ w).square().mean().sqrt() < 0.05 * (dy @ w).square().mean().sqrt()
    torch.testing.assert_close(found[1], dy.T @ x)


def test_it_is_one_graph_with_what_stands_around_it():
    x, w = (t.requires_grad_() for t in tensors(3, 2 * 8, 32, 16))

    def loss(x, w):
        return torch.tanh(fp8.linear(x.view(2, 8, 32), w)).square().sum()

    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x, w), loss(x, w))
    for ours, theirs in zip(torch.autograd.grad(whole(x, w), (x, w)), torch.autograd.grad(loss(x, w), (x, w))):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("x", "w", "words"),
    [((4, 20), (16, 20), "channels by the 16"), ((4, 16), (16, 32), r"\(4, 16\)"), ((4, 32), (24, 32), "by the 16")],
)
def test_what_no_product_takes_is_refused(x, w, words):
    with pytest.raises(ValueError, match=words):
        fp8.linear(torch.zeros(x), torch.zeros(w))


def test_a_token_of_zeros_stays_zero():
    x, w = tensors(1, 4, 16, 16)
    x[2] = 0
    assert torch.equal(fp8.linear(x, w)[2], torch.zeros(16))


def test_a_card_without_fp8_is_named(monkeypatch):
    class OnCard:
        shape, dtype, is_cuda, device = (4, 16), torch.bfloat16, True, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fp8.obstacle(OnCard(), torch.zeros(16, 16, dtype=torch.bfloat16)).startswith("FP8 needs sm_89")
