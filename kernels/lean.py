"""The two halves of a transformer layer, keeping for backward only what is dear to make again.

With norm(z) = z / sqrt(mean(z^2) + 2^-23), a stream x (N, C) and its start x0, scalars a, b, H heads of D channels:

    project    x' = a x + b x0     n = norm(x')     (q, k, v) = n Wqkv^T     v += 2 sigmoid(n[:32] G^T) E[token]
    feed       z = x' + branch     n = norm(z)      y = max(n W1^T, 0)^2     x'' = z + y W2^T

`project` keeps x (the next layer's is the last one's result, so one tensor a layer) and `feed` keeps z and y; norms,
gates and the gathered rows of E are made again. y, four times as wide as the stream, is made again too where
`keep_hidden` is off, for a ninth of a layer's products more. Beside these a layer keeps q, k, v and attention's result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import portable, recomputed


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x0: Tensor, a: Tensor, b: Tensor, w: Tensor, gate: Any, table: Any, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, x0, a, b, w, gate, table, tokens)
        out, n = portable.norm(x, x0, a, b)
        return out, recomputed.qkv(n, w, gate, table, tokens)

    @staticmethod
    def backward(ctx: Any, d: Tensor, dqkv: Tensor) -> tuple[Tensor | None, ...]:
        x, x0, a, b, w, gate, table, tokens = ctx.saved_tensors
        dn, dw, dgate, dtable = recomputed.qkv_backward(dqkv.contiguous(), w, gate, table, tokens, x, x0, a, b)
        dx, dx0, sums = portable.norm_backward(d.contiguous(), dn, x, x0, a, b)
        da, db = sums.to(a.dtype).unbind()
        rest = (None, None) if table is None else (dgate, dtable)
        return dx, dx0, da.view(a.shape), db.view(b.shape), dw, *rest, None


def project(
    x: Tensor,  # (N, C) stream, compute dtype
    x0: Tensor,  # (N, C)
    a: Tensor,  # () float32
    b: Tensor,  # () float32
    w: Tensor,  # (3C, C) compute dtype: c_q, c_k, c_v
    gate: Tensor | None,  # (H, channels of the gate) compute dtype
    table: Tensor | None,  # (V, C) float32 value embeddings; None for a layer without
    tokens: Tensor,  # (N,)
) -> tuple[Tensor, Tensor]:
    """-> x' (N, C) and q, k, v side by side (N, 3C)."""
    found: tuple[Tensor, Tensor] = _Project.apply(x, x0, a, b, w, gate, table, tokens)
    return found


class _Feed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, w1: Tensor, w2: Tensor, keep_hidden: bool, by: str) -> Tensor:
        ctx.by = by
        z, n = portable.norm(x, branch, None, None)
        y = portable.relu2(n, w1, by)
        ctx.save_for_backward(z, w1, w2, y if keep_hidden else None)
        return torch.addmm(z, y, w2.T)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        z, w1, w2, y = ctx.saved_tensors
        d = d.contiguous()
        n = normed(z)
        y = portable.relu2(n, w1, ctx.by) if y is None else y
        dw2 = d.T @ y
        dh = portable.relu2_backward(d, w2, y, ctx.by)
        del y
        dw1, dn = dh.T @ n, dh @ w1
        dx = portable.norm_backward(d, dn, z, None, None, None)[0]
        return dx, dx, dw1, dw2, None, None


def feed(x: Tensor, branch: Tensor, w1: Tensor, w2: Tensor, keep_hidden: bool, by: str = "triton") -> Tensor:
    """x' and attention's result (N, C), w1 (4C, C), w2 (C, 4C), all in the compute dtype -> x'' (N, C).

    by: what makes the MLP's products, as in kernels/mlp_choice.py.
    """
    found: Tensor = _Feed.apply(x, branch, w1, w2, keep_hidden, by)
    return found


def normed(z: Tensor) -> Tensor:
    """norm(z), (N, C). Without gradients."""
    return portable.normed(z, None, None, None, z.dtype)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return normed(z)

    @staticmethod
    def backward(ctx: Any, dn: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return portable.norm_backward(torch.zeros_like(z), dn.contiguous(), z, None, None, None)[0]


def last_norm(z: Tensor) -> Tensor:
    """norm(z), (N, C) -> same; keeps z."""
    found: Tensor = _Normed.apply(z)
    return found
