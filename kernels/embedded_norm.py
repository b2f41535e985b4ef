"""The RMS norm of a token's embedding, and its gradient straight into the table.

With e = E[t_n] of C channels, r = 1 / sqrt(mean(e^2) + 2^-23), n = e r and the gradient d of n:

    out_n = n in the dtype asked for        dE[t] = sum over n with t_n = t of r (d - n mean(d n))

The table is float32, and neither its rows nor their gradients ever are a tensor of their own. dE is summed by atomics:
its float32 rounding differs from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.residual_norm import EPSILON, FORWARD, constants
from kernels.targets import choose


@triton.jit
def _norm_of_row(TABLE, TOKENS, N, C, eps, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """n (ROWS, BLOCK), r (ROWS, 1), where they come from in the table, where they go to, and the mask."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (columns < C)[None, :]
    token = tl.load(TOKENS + rows, mask=rows < N, other=0).to(tl.int64)
    of = token[:, None] * C + columns[None, :]
    e = tl.load(TABLE + of, mask=inside, other=0.0).to(ACC)
    r = tl.rsqrt(tl.sum(e * e, 1) / C + eps)[:, None]
    return e * r, r, of, rows.to(tl.int64)[:, None] * C + columns[None, :], inside


@triton.jit
def _forward(TABLE, TOKENS, OUT, N, C, eps, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """All (N, C). One program per ROWS rows."""
    n, _, _, at, inside = _norm_of_row(TABLE, TOKENS, N, C, eps, ACC, ROWS, BLOCK)
    tl.store(OUT + at, n.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _backward(DN, TABLE, TOKENS, DTABLE, N, C, eps, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    n, r, of, at, inside = _norm_of_row(TABLE, TOKENS, N, C, eps, ACC, ROWS, BLOCK)
    d = tl.load(DN + at, mask=inside, other=0.0).to(ACC)
    tl.atomic_add(DTABLE + of, r * (d - n * (tl.sum(d * n, 1) / C)[:, None]), mask=inside, sem="relaxed")


def _launch(kernel: triton.JITFunction, *arrays: Tensor, of: Tensor, rows: int) -> None:
    """of: the table, which tells the channels and what is computed in."""
    if rows:
        C, options = of.size(1), constants(of.size(1), choose(FORWARD, of) or FORWARD[75])
        acc = tl.float64 if of.dtype == torch.float64 else tl.float32
        kernel[(triton.cdiv(rows, options["ROWS"]),)](*arrays, rows, C, EPSILON, ACC=acc, **options)


def embedded_norm(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,), (V, C) -> (N, C) in `dtype`. Without gradients."""
    tokens, table = tokens.contiguous(), table.contiguous()
    out = torch.empty(len(tokens), table.size(1), dtype=dtype, device=table.device)
    _launch(_forward, table, tokens, out, of=table, rows=len(tokens))
    return out


def embedded_norm_backward(dn: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
    """(N, C), (N,), (V, C) -> dE (V, C)."""
    dn, tokens, table = dn.contiguous(), tokens.contiguous(), table.contiguous()
    dtable = torch.zeros_like(table)
    _launch(_backward, dn, table, tokens, dtable, of=table, rows=len(tokens))
    return dtable
