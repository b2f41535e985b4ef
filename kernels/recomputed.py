"""Layers that keep less for their backward than they read, and compute the rest again. Plain torch, which
torch.compile takes whole; no kernel is launched here.

    linear_of_norm    z = y w^T      with y = norm(a x + b x0): keeps x and x0, which the norm keeps anyway, and not y
    gated_embedding   v + g table[tokens]: keeps g and the tokens, and not the rows of the table

A recipe's norms and value embeddings are a fifth of what a step would hold otherwise (python -m benchmarks.memory);
computing them again is one pass over memory each.

Shapes: N tokens, C channels, O outputs, H heads of D channels, V table entries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 2.0**-23  # added to the mean square, as everywhere here


def norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """RMS norm over the last dimension, computed in float32 (float64 for float64)."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _LinearOfNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, w: Tensor, x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(w, x, x0, a, b)
        ctx.dtype = y.dtype
        return F.linear(y, w)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        w, x, x0, a, b = ctx.saved_tensors
        y = norm(a * _wide(x) + b * _wide(x0), ctx.dtype)  # a scalar's own float32 would not widen a bfloat16 row
        dw = dz.reshape(-1, dz.shape[-1]).T @ y.reshape(-1, y.shape[-1])
        return dz @ w, dw, None, None, None, None


def linear_of_norm(y: Tensor, w: Tensor, x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(..., C), (O, C) -> (..., O). y must be norm(a x + b x0); its own gradient goes to y as ever."""
    z: Tensor = _LinearOfNorm.apply(y, w, x.detach(), x0.detach(), a.detach(), b.detach())
    return z


class _GatedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, gate: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(gate, table, tokens)
        return v + gate.unsqueeze(-1) * F.embedding(tokens, table).to(v.dtype).view(v.shape)

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, table, tokens = ctx.saved_tensors
        rows = F.embedding(tokens, table).to(dv.dtype).view(dv.shape)
        dgate = (dv * rows).sum(-1)
        drows = (dv * gate.unsqueeze(-1)).reshape(*tokens.shape, -1).to(table.dtype)
        return dv, dgate, torch.ops.aten.embedding_dense_backward(drows, tokens, len(table), -1, False), None


def gated_embedding(v: Tensor, gate: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
    """(B, T, H, D), (B, T, H), (V, H D) of any width, (B, T) integers -> (B, T, H, D) in v's dtype."""
    out: Tensor = _GatedEmbedding.apply(v, gate, table, tokens)
    return out
