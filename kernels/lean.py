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
import torch.nn.functional as F
from torch import Tensor

from kernels import plain, portable


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x0: Tensor, a: Tensor, b: Tensor, w: Tensor, gate: Any, table: Any, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, x0, a, b, w, gate, table, tokens)
        out, n = portable.norm(x, x0, a, b)
        qkv = n @ w.T
        if table is not None:
            g, rows = _gated(n, gate, table, tokens)
            v = qkv[:, -x.size(1) :].view(rows.shape)
            v.addcmul_(g.unsqueeze(-1), rows)
        return out, qkv

    @staticmethod
    def backward(ctx: Any, d: Tensor, dqkv: Tensor) -> tuple[Tensor | None, ...]:
        x, x0, a, b, w, gate, table, tokens = ctx.saved_tensors
        n = portable.normed(x, x0, a, b, x.dtype)
        dn, dw, dgate, dtable = dqkv @ w, dqkv.T @ n, None, None
        if table is not None:
            g, rows = _gated(n, gate, table, tokens)
            dv = dqkv[:, -x.size(1) :].view(rows.shape)
            dz = torch.linalg.vecdot(dv, rows) * g * (1 - g / 2)  # of the sigmoid's argument
            dgate = dz.T @ n[:, : gate.size(1)]
            dn[:, : gate.size(1)] += dz @ gate
            dtable = _gathered((dv * g.unsqueeze(-1)).view(x.shape), tokens, table)
        dx, dx0, sums = portable.norm_backward(d.contiguous(), dn, x, x0, a, b)
        da, db = sums.to(a.dtype).unbind()
        return dx, dx0, da.view(a.shape), db.view(b.shape), dw, dgate, dtable, None


def _gated(n: Tensor, gate: Tensor, table: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(N, H) gates within 0..2, and (N, H, D) rows of the table in n's dtype."""
    g = 2 * torch.sigmoid(n[:, : gate.size(1)] @ gate.T)
    return g, F.embedding(tokens, table.to(n.dtype)).view(len(n), len(gate), -1)


def _gathered(d: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
    """Gradients (N, C) of gathered rows -> the table's (V, C), summed in its float32."""
    total = torch.zeros_like(table)
    for part in plain.parts(d.shape, plain.ROW_ELEMENTS):
        rows = d[part].to(table.dtype)
        total += torch.ops.aten.embedding_dense_backward(rows, tokens[part], len(table), -1, False)
    return total


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
    def forward(ctx: Any, x: Tensor, branch: Tensor, w1: Tensor, w2: Tensor, keep_hidden: bool) -> Tensor:
        z, n = portable.norm(x, branch, None, None)
        y = portable.relu2(n, w1)
        ctx.save_for_backward(z, w1, w2, y if keep_hidden else None)
        return torch.addmm(z, y, w2.T)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        z, w1, w2, y = ctx.saved_tensors
        d = d.contiguous()
        n = normed(z)
        y = portable.relu2(n, w1) if y is None else y
        dw2 = d.T @ y
        dh = portable.relu2_backward(d, w2, y)
        del y
        dw1, dn = dh.T @ n, dh @ w1
        dx = portable.norm_backward(d, dn, z, None, None, None)[0]
        return dx, dx, dw1, dw2, None


def feed(x: Tensor, branch: Tensor, w1: Tensor, w2: Tensor, keep_hidden: bool) -> Tensor:
    """x' and attention's result (N, C), w1 (4C, C), w2 (C, 4C), all in the compute dtype -> x'' (N, C)."""
    found: Tensor = _Feed.apply(x, branch, w1, w2, keep_hidden)
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


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tokens, table)
        return portable.embedded_norm(tokens, table, dtype)

    @staticmethod
    def backward(ctx: Any, dn: Tensor) -> tuple[None, Tensor, None]:
        return None, portable.embedded_norm_backward(dn, *ctx.saved_tensors), None


def embed(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) tokens, (V, C) float32 -> norm(table[token]), (N, C) in `dtype`; keeps the tokens only."""
    found: Tensor = _Embed.apply(tokens, table, dtype)
    return found
