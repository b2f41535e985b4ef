"""Value embeddings: what a token adds to the values of its position, gated head by head.

With v (N, H, D), gates g (N, H), a table E (V, H D) of float32 and a token t_n at each position:

    v_n,h += g_n,h E[t_n]_h        dg_n,h = dv_n,h . E[t_n]_h        dE[t]_h = sum over n with t_n = t of g_n,h dv_n,h

The rows of E never are a tensor of their own. dE is summed by atomics: its float32 rounding differs from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # tokens of a program, which has one head of them; 4 warps


@triton.jit
def _place(V, TABLE, TOKENS, N, stride, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to v and E[token] of this program's rows and head, the mask, and the rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * D + tl.arange(0, DP)
    inside = (rows < N)[:, None] & (tl.arange(0, DP) < D)[None, :]
    token = tl.load(TOKENS + rows, mask=rows < N, other=0).to(tl.int64)
    v = V + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return v, TABLE + token[:, None] * (H * D) + columns[None, :], inside, rows


@triton.jit
def _add(
    V, GATES, TABLE, TOKENS, N, stride,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    v, e, inside, rows = _place(V, TABLE, TOKENS, N, stride, H, D, DP, ROWS)
    g = tl.load(GATES + rows.to(tl.int64) * H + tl.program_id(1), mask=rows < N, other=0.0).to(ACC)
    total = tl.load(v, mask=inside, other=0.0).to(ACC) + g[:, None] * tl.load(e, mask=inside, other=0.0).to(ACC)
    tl.store(v, total.to(V.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    DV, GATES, TABLE, TOKENS, DG, DTABLE, N, stride,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    dv, e, inside, rows = _place(DV, TABLE, TOKENS, N, stride, H, D, DP, ROWS)
    de = _place(DV, DTABLE, TOKENS, N, stride, H, D, DP, ROWS)[1]
    at = rows.to(tl.int64) * H + tl.program_id(1)
    d = tl.load(dv, mask=inside, other=0.0).to(ACC)
    g = tl.load(GATES + at, mask=rows < N, other=0.0).to(ACC)
    tl.store(DG + at, tl.sum(d * tl.load(e, mask=inside, other=0.0).to(ACC), 1), mask=rows < N)
    tl.atomic_add(de, g[:, None] * d, mask=inside, sem="relaxed")


def _launch(kernel: triton.JITFunction, v: Tensor, *arrays: Tensor) -> None:
    """v (N, H, D), heads and channels side by side, and what the kernel takes after it."""
    N, H, D = v.shape
    if v.stride()[1:] != (D, 1):
        raise ValueError(f"heads and channels must lie side by side, not {tuple(v.stride())} apart")
    acc = tl.float64 if v.dtype == torch.float64 else tl.float32
    if N:
        grid = (triton.cdiv(N, ROWS), H)
        kernel[grid](v, *arrays, N, v.stride(0), H, D, triton.next_power_of_2(D), ROWS, acc, num_warps=4)


def add_gated(v: Tensor, gates: Tensor, table: Tensor, tokens: Tensor) -> None:
    """v (N, H, D), rows any distance apart, in place; gates (N, H), table (V, H D), tokens (N,)."""
    _launch(_add, v, gates.contiguous(), table.contiguous(), tokens.contiguous())


def add_gated_backward(dv: Tensor, gates: Tensor, table: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """-> dg (N, H) and dE (V, H D), in the table's dtype."""
    dg = torch.empty(gates.shape, dtype=table.dtype, device=gates.device)
    dtable = torch.zeros_like(table, memory_format=torch.contiguous_format)
    _launch(_backward, dv, gates.contiguous(), table.contiguous(), tokens.contiguous(), dg, dtable)
    return dg, dtable
