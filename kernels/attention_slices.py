"""Causal sliding-window attention with QK-norm and RoPE by torch's own kernels, for devices without Triton's.

    y = softmax(D^-0.5 q^ k^T over the keys j with 0 <= i - j <= window) v       q^, k^: normed, then turned

FlexAttention, torch's attention with windows, is itself compiled by Triton. So a block of queries meets only the slice
of keys that it can see, with a mask of that slice, (QUERY_BLOCK, window + QUERY_BLOCK) at most; the whole context
needs no mask at all. Kept are q^, k^, v and y, which the layer behind keeps too, and three numbers a head: of q and k
one (kernels/rotated_norm.py), and the logarithm of the sum of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import portable
from kernels.attention_reference import within

QUERY_BLOCK = 256  # queries that share one slice of keys
ALIGNED = 16  # entries of a mask, within which its rows must begin for torch's kernels


@functools.lru_cache(maxsize=16)
def band(window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(QUERY_BLOCK, window + QUERY_BLOCK): 0 for keys that a query sees, else -inf. Query r of a block stands at column
    window + r."""
    distance = window + torch.arange(QUERY_BLOCK, device=device)[:, None]
    distance = distance - torch.arange(window + QUERY_BLOCK, device=device)
    return torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(
        (distance < 0) | (distance > window), float("-inf")
    )


def added(q: Tensor, keys: int, offset: int, window: int) -> Tensor:
    """What is added to the scores of a block of queries, (n, keys). `offset`: how many of the keys stand before the
    first query."""
    first = window - offset
    found = band(window, q.dtype, q.device)[: q.size(2), first : first + keys]
    if first % ALIGNED or keys % ALIGNED or found.stride(0) % ALIGNED:
        return F.pad(found, (0, -keys % ALIGNED))[:, :keys]
    return found


def blocks(length: int, window: int) -> list[tuple[slice, slice]]:
    """Of each block of queries: its positions, and those of the keys that it can see."""
    if window >= length - 1:
        return [(slice(0, length), slice(0, length))]
    ends = [(i, min(i + QUERY_BLOCK, length)) for i in range(0, length, QUERY_BLOCK)]
    return [(slice(start, end), slice(max(0, start - window), end)) for start, end in ends]


# --- torch's own kernels: what scaled_dot_product_attention takes with these arguments ------------
# They are called by themselves because of what their backward needs only the sums of a block are to be kept: their
# result lies in that of all blocks. None of them makes all scores at once.


def by_flash(q: Tensor, mask: Tensor | None) -> bool:
    """Whether a card has torch's flash attention for it, which knows no masks; else it is the efficient one."""
    narrow = q.dtype in (torch.float16, torch.bfloat16)
    return mask is None and narrow and q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)


def one_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """q (B, H, n, D), k and v (B, H, m, D) -> (B, H, n, D), and what its backward needs beside these. `mask` (n, m) is
    added to the scores; None: causal."""
    ops, causal = torch.ops.aten, mask is None
    if not q.is_cuda:
        y, *kept = ops._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, causal, attn_mask=mask)
    elif by_flash(q, mask):
        y, sums, *_, seed, offset, _ = ops._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True)
        kept = [sums, seed, offset]
    else:
        bias = mask if mask is None else mask.expand(*q.shape[:2], *mask.shape)
        y, *kept = ops._scaled_dot_product_efficient_attention.default(q, k, v, bias, True, 0.0, causal)
    return y, kept


def one_block_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, kept: Sequence[Tensor], mask: Tensor | None
) -> tuple[Tensor, ...]:
    """Those of q, k and v, which are given as y and its gradient are, (B, H, n, D)."""
    ops, given, causal = torch.ops.aten, (dy, q, k, v), mask is None
    if not q.is_cuda:
        of = ops._scaled_dot_product_flash_attention_for_cpu_backward.default
        found = of(*given, y, *kept, 0.0, causal, attn_mask=mask)
    elif by_flash(q, mask):
        (sums, seed, offset), T = kept, q.size(2)
        of = ops._scaled_dot_product_flash_attention_backward.default
        found = of(*given, y, sums, None, None, T, T, 0.0, True, seed, offset)
    else:
        bias = mask if mask is None else mask.expand(*q.shape[:2], *mask.shape)
        of = ops._scaled_dot_product_efficient_attention_backward.default
        found = of(*given, bias, y, *kept, 0.0, [True, True, True, False], causal)
    return tuple(found[:3])


class Sliced(torch.autograd.Function):
    """`turned`: where q^ and k^ go, (B, T, H, D) each; q and k will do, which are then used up."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, turned: tuple[Tensor, Tensor]
    ) -> Tensor:
        lengths = [portable.rotated(x, n, cos, sin) for x, n in zip((q, k), turned, strict=True)]
        y, kept = _forward(*turned, v, window)
        ctx.window = window
        # v detached: PyTorch refuses one of several views where another was written to, which q and k may be
        ctx.save_for_backward(*turned, v.detach(), cos, sin, *lengths, y, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, rq, rk, y, *kept = ctx.saved_tensors
        dq, dk, dv = gradients(dy, y, (q, k, v), kept, ctx.window)
        for d, turned, r in ((dq, q, rq), (dk, k, rk)):
            portable.rotated_back(d, turned, r, d, cos, sin)
        return dq, dk, dv, None, None, None, None


def _mask(q: Tensor, block: slice, seen: slice, window: int, length: int) -> Tensor | None:
    """Of a block of queries q (B, H, n, D); None for the whole context."""
    if window >= length - 1:
        return None
    return added(q, seen.stop - seen.start, block.start - seen.start, window)


def _forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, list[Tensor]]:
    """q^, k^ and v, (B, T, H, D) each -> y (B, T, H, D), contiguous, and of each block what its backward needs."""
    T, places = q.size(1), blocks(q.size(1), window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if len(places) == 1:
        found, kept = one_block(q, k, v, _mask(q, *places[0], window, T))
        return found.transpose(1, 2).contiguous(), kept
    y, kept = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format), []
    for block, seen in places:
        mask = _mask(q[:, :, block], block, seen, window, T)
        found, beside = one_block(q[:, :, block], k[:, :, seen], v[:, :, seen], mask)
        y[:, block] = found.transpose(1, 2)
        kept += beside
    return y, kept


def gradients(
    dy: Tensor, y: Tensor, given: tuple[Tensor, Tensor, Tensor], kept: Sequence[Tensor], window: int
) -> list[Tensor]:
    """Those of q^, k^ and v, which are given, (B, T, H, D) each; `kept`: of each block as much."""
    places = blocks(dy.size(1), window)
    each = len(kept) // len(places)
    dy, y, q, k, v = (x.transpose(1, 2) for x in (dy, y, *given))
    totals: list[Tensor] = []
    for i, (block, seen) in enumerate(places):
        mask, beside = _mask(q[:, :, block], block, seen, window, dy.size(2)), kept[i * each : (i + 1) * each]
        at = (dy[:, :, block], q[:, :, block], k[:, :, seen], v[:, :, seen], y[:, :, block])
        parts = [part.transpose(1, 2) for part in one_block_backward(*at, beside, mask)]
        if len(places) == 1:
            return parts
        totals = totals or [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]
        old = block.start - seen.start  # keys and values whose gradients the blocks before have begun
        totals[0][:, block] = parts[0]
        for total, part in zip(totals[1:], parts[1:], strict=True):
            total[:, seen.start : block.start] += part[:, :old]
            total[:, block] = part[:, old:]
    return totals


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
