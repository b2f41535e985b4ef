"""Causal sliding-window attention with QK-norm and RoPE by torch's own kernels, for devices without Triton's.

    y = softmax(D^-0.5 q^ k^T over the keys j with 0 <= i - j <= window) v       q^, k^: normed, then turned

FlexAttention, torch's attention with windows, is itself compiled by Triton. So a block of queries meets only the slice
of keys that it can see, with a mask of that slice, (QUERY_BLOCK, window + QUERY_BLOCK) at most; the whole context
needs no mask at all. Only q, k and v are kept: backward makes the rest again, block by block.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention_reference import reference_rotated

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
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int) -> Tensor:
        ctx.window = window
        ctx.save_for_backward(q, k, v, cos, sin)
        y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        q, k, v = (x.transpose(1, 2) for x in (turned(q, cos, sin), turned(k, cos, sin), v))
        limit = None if window >= q.size(2) - 1 else window
        for block, seen in blocks(q.size(2), window):
            found = one_block(q[:, :, block], k[:, :, seen], v[:, :, seen], block.start - seen.start, limit)
            y[:, block] = found.transpose(1, 2)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin = ctx.saved_tensors
        dy = dy.transpose(1, 2)
        with torch.enable_grad():
            raw = [x.detach().requires_grad_() for x in (q, k)]
            both = [turned(x, cos, sin) for x in raw]
            tq, tk, tv = (x.detach().transpose(1, 2) for x in (*both, v))
            dq, dk, dv = (torch.zeros_like(x) for x in (tq, tk, tv))
            limit = None if ctx.window >= q.size(1) - 1 else ctx.window
            for block, seen in blocks(q.size(1), ctx.window):
                inputs = [x[:, :, at].detach().requires_grad_() for x, at in ((tq, block), (tk, seen), (tv, seen))]
                y = one_block(inputs[0], inputs[1], inputs[2], block.start - seen.start, limit)
                found = torch.autograd.grad(y, inputs, dy[:, :, block])
                for total, at, part in zip((dq, dk, dv), (block, seen, seen), found):
                    total[:, :, at] += part
        del tq, tk, tv, inputs, y, found, part  # and q's graph before k's: here the sliced way holds the most
        dq = torch.autograd.grad(both.pop(0), raw[0], dq.transpose(1, 2))[0]
        dk = torch.autograd.grad(both.pop(0), raw[1], dk.transpose(1, 2))[0]
        return dq, dk, dv.transpose(1, 2), None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int) -> Tensor:
    """q, k, v (B, T, H, D) -> y (B, T, H, D). cos, sin (T or more, D/2) float32; `window`: tokens before a query."""
    if q.shape != k.shape or k.shape != v.shape:
        raise ValueError(f"q, k and v of one shape wanted, not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if window < 0:
        raise ValueError(f"window {window}; 0 sees only the token itself, {q.size(1) - 1} all")
    T = q.size(1)
    y: Tensor = Sliced.apply(q, k, v, cos[:T], sin[:T], min(window, T))
    return y


turned = reference_rotated  # (B, T, H, D) -> the same, normed and turned
