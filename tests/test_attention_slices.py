"""Attention by torch's own kernels on key slices: each window against the reference, and no mask beyond a slice."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402 - after the skip

from kernels import attention_slices as slices  # noqa: E402
from kernels.attention_reference import reference, reference_rotated  # noqa: E402


def inputs(length, rows=2, heads=3, head=16):
    rng = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(rows, length, heads, head, generator=rng).requires_grad_() for _ in range(3))
    angle = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, head, 2) / head))
    return q, k, v, angle.cos(), angle.sin()


@pytest.mark.parametrize("length", [1, 37, 256, 300, 700])
@pytest.mark.parametrize("window", [0, 1, 17, 128, 255, 256, 299, 350, 1000])
def test_every_window_agrees_with_the_reference(length, window):
    q, k, v, cos, sin = inputs(length)
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    found, wanted = (
        (y, *torch.autograd.grad(y, (q, k, v), dy))
        for y in (f(q, k, v, cos, sin, window) for f in (slices.attention, reference))
    )
    for a, b in zip(found, wanted):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 60, 299])
def test_in_the_place_of_q_and_k_it_is_the_same_and_leaves_them_turned(window):
    """They are slices of one tensor that nobody else reads, as in a layer; v stays. What keeps its own does not touch
    them."""
    q, k, v, cos, sin = inputs(300)
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for way in (slices.attention_, slices.attention):
        qkv = torch.cat((q, k, v), dim=2)
        before, parts = qkv.detach().clone(), qkv.chunk(3, dim=2)
        y = way(*parts, cos, sin, window)
        found.append((y, *torch.autograd.grad(y, (q, k, v), dy)))
        left = [reference_rotated(x, cos, sin) for x in before.chunk(3, dim=2)[:2]]
        wanted = torch.cat((*left, v), dim=2) if way is slices.attention_ else before
        torch.testing.assert_close(qkv.detach(), wanted.detach(), atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("window", "widest"), [(2000, 0), (100, 100 + slices.QUERY_BLOCK), (512, 512 + 256)])
def test_a_mask_is_never_wider_than_a_slice(window, widest):
    masks = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), given=None):
            if "scaled_dot_product" in str(function):
                mask = (given or {}).get("attn_mask")
                masks.append((0, 0) if mask is None else tuple(mask.shape))
            return function(*arguments, **(given or {}))

    q, k, v, cos, sin = inputs(1100, rows=1, heads=1)
    with Watched():
        slices.attention(q, k, v, cos, sin, window).sum().backward()
    assert masks and len(masks) == 2 * len(slices.blocks(1100, window))  # forward once, backward once
    assert max(rows for rows, _ in masks) <= slices.QUERY_BLOCK
    assert max(columns for _, columns in masks) == widest


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, cos, sin = inputs(8)
    with pytest.raises(ValueError, match="of one shape"):
        slices.attention(q, k[:, :4], v, cos, sin, 3)
    with pytest.raises(ValueError, match="window -1"):
        slices.attention(q, k, v, cos, sin, -1)
