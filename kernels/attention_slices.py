"""Causal sliding-window attention with QK-norm and RoPE by torch's own kernels, for devices without Triton's.

    y = softmax(D^-0.5 q^ k^T over the keys j with 0 <= i - j <= window) v       q^, k^: normed, then turned

FlexAttention, torch's attention with windows, is itself compiled by Triton. So a block of queries meets only the slice
of keys that it can see, with a mask of that slice, (QUERY_BLOCK, window + QUERY_BLOCK) at most; the whole context
needs no mask at all. Kept are q^, k^ and v, and one number a head of q and k (kernels/rotated_norm.py): backward makes
the rest again, block by block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import portable
from kernels.attention_reference import within

QUERY_BLOCK = 256  # queries that share one slice of keys
# On a card anything but these would make all scores at once: it is refused rather than taken.
LEAN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@functools.lru_cache(maxsize=16)
def band(window: int, device: torch.device) -> Tensor:
    """(QUERY_BLOCK, window + QUERY_BLOCK): which keys a query sees. Query r of a block stands at column window + r."""
    distance = window + torch.arange(QUERY_BLOCK, device=device)[:, None]
    distance = distance - torch.arange(window + QUERY_BLOCK, device=device)
    return (distance >= 0) & (distance <= window)


def blocks(length: int, window: int) -> list[tuple[slice, slice]]:
    """Of each block of queries: its positions, and those of the keys that it can see."""
    if window >= length - 1:
        return [(slice(0, length), slice(0, length))]
    ends = [(i, min(i + QUERY_BLOCK, length)) for i in range(0, length, QUERY_BLOCK)]
    return [(slice(start, end), slice(max(0, start - window), end)) for start, end in ends]


def one_block(q: Tensor, k: Tensor, v: Tensor, offset: int, window: int | None) -> Tensor:
    """q (B, H, n, D), k and v (B, H, m, D) -> (B, H, n, D).

    `offset`: how many of the keys stand before the first query. `window` None: the whole context, offset 0.
    """
    mask = None
    if window is not None:
        first = window - offset
        mask = band(window, q.device)[: q.size(2), first : first + k.size(2)]
    with sdpa_kernel(LEAN) if q.is_cuda else nullcontext():
        y: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return y


class Sliced(torch.autograd.Function):
    """`turned`: where q^ and k^ go, (B, T, H, D) each; q and k will do, which are then used up."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, turned: tuple[Tensor, Tensor]
    ) -> Tensor:
        lengths = [portable.rotated(x, n, cos, sin) for x, n in zip((q, k), turned, strict=True)]
        ctx.window = window
        # v detached: PyTorch refuses one of several views where another was written to, which q and k may be
        ctx.save_for_backward(*turned, v.detach(), cos, sin, *lengths)
        y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tq, tk, tv = (x.transpose(1, 2) for x in (*turned, v))
        limit = None if window >= q.size(1) - 1 else window
        for block, seen in blocks(q.size(1), window):
            found = one_block(tq[:, :, block], tk[:, :, seen], tv[:, :, seen], block.start - seen.start, limit)
            y[:, block] = found.transpose(1, 2)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *given, cos, sin, rq, rk = ctx.saved_tensors
        window = None if ctx.window >= dy.size(1) - 1 else ctx.window
        dq, dk, dv = gradients(dy, given, window)
        for d, turned, r in ((dq, given[0], rq), (dk, given[1], rk)):
            portable.rotated_back(d, turned, r, d, cos, sin)
        return dq, dk, dv, None, None, None, None


def gradients(dy: Tensor, given: Sequence[Tensor], window: int | None) -> list[Tensor]:
    """Those of q^, k^ and v, which are given, (B, T, H, D) each. `window` None: the whole context, one block."""
    if window is None:
        whole = slice(0, dy.size(1))
        return [part.transpose(1, 2) for part in _of_block(dy, given, (whole, whole), None)]
    totals = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in given]
    for block, seen in blocks(dy.size(1), window):
        found = _of_block(dy[:, block], given, (block, seen), window)
        for total, at, part in zip(totals, (block, seen, seen), found, strict=True):
            total[:, at] += part.transpose(1, 2)
    return totals


def _of_block(
    dy: Tensor, given: Sequence[Tensor], places: tuple[slice, slice], window: int | None
) -> tuple[Tensor, ...]:
    """The gradients of a block of queries and of the keys and values that it sees, (B, H, n, D) each."""
    block, seen = places
    with torch.enable_grad():
        q, k, v = (x.detach()[:, at].transpose(1, 2).requires_grad_() for x, at in zip(given, (block, seen, seen)))
        y = one_block(q, k, v, block.start - seen.start, window)
    return torch.autograd.grad(y, (q, k, v), dy.transpose(1, 2))


def attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int) -> Tensor:
    """q, k, v (B, T, H, D) -> y (B, T, H, D). cos, sin (T or more, D/2) float32; `window`: tokens before a query."""
    return _attended(q, k, v, cos, sin, window, in_place=False)


def attention_(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int) -> Tensor:
    """The same in the place of q and k, which become q^ and k^: for kernels/lean.py, which is their only reader."""
    return _attended(q, k, v, cos, sin, window, in_place=True)


def _attended(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, in_place: bool) -> Tensor:
    if q.shape != k.shape or k.shape != v.shape:
        raise ValueError(f"q, k and v of one shape wanted, not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    T, window = q.size(1), within(window, q.size(1))
    turned = [
        x.detach() if in_place else torch.empty_like(x.detach(), memory_format=torch.contiguous_format) for x in (q, k)
    ]
    y: Tensor = Sliced.apply(q, k, v, cos[:T].contiguous(), sin[:T].contiguous(), window, tuple(turned))
    return y
