"""QK-norm and RoPE on queries or keys in Triton: the piece that attention's passes share.

With x = (a, b) the two halves of a head's D channels at position t, r = 1 / sqrt(mean(x^2) + eps) (QK-norm: Henry et
al. 2020, with RMS in place of L2), and the angles of half-split RoPE (Su et al. 2021) c = cos(t * f), s = sin(t * f):

    x^ = r * (a*c + b*s, b*c - a*s)

Its length is at most sqrt(D). x^ may take the place of x: with r, one float32 a head, it is all that the way back
needs, as turning changes no length. For the gradient (d, e) of the halves of x^:

    (u, w) = (d, e) - x^ mean((d, e) * x^)        dx = r * (u*c - w*s, w*c + u*s)

In registers each half is padded with zeros to DP/2, a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_reference import EPSILON
from kernels.attention_tiles import ROWS, padded

EPS: Any = tl.constexpr(EPSILON)


@triton.jit
def channels(D: tl.constexpr, DP: tl.constexpr):
    """Of the DP channels of a head in registers: where each lies in memory, and whether it does."""
    columns = tl.arange(0, DP)
    place = columns
    if D != DP:
        place = columns // (DP // 2) * (D // 2) + columns % (DP // 2)
    return place, columns % (DP // 2) < D // 2


@triton.jit
def halves(X, xt, rows, T, D: tl.constexpr, DP: tl.constexpr):
    """Of a head at X, row stride xt: both halves of its rows, (rows, DP/2) float32. Zero where padded."""
    half = tl.arange(0, DP // 2)
    mask = (rows < T)[:, None] & (half < D // 2)[None, :]
    here = rows[:, None] * xt + half[None, :]
    a = tl.load(X + here, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(X + here + D // 2, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def angles(Cos, Sin, rows, T, D: tl.constexpr, DP: tl.constexpr):
    """Cosines and sines of the rows, (rows, DP/2) float32."""
    half = tl.arange(0, DP // 2)
    mask = (rows < T)[:, None] & (half < D // 2)[None, :]
    angle = rows[:, None] * (D // 2) + half[None, :]
    return tl.load(Cos + angle, mask=mask, other=0.0), tl.load(Sin + angle, mask=mask, other=0.0)


@triton.jit
def put(first, second, Out, ot, rows, T, D: tl.constexpr, DP: tl.constexpr):
    """Store both halves, (rows, DP/2), of a head at Out, row stride ot."""
    half = tl.arange(0, DP // 2)
    mask = (rows < T)[:, None] & (half < D // 2)[None, :]
    here = rows[:, None] * ot + half[None, :]
    tl.store(Out + here, first.to(Out.dtype.element_ty), mask=mask)
    tl.store(Out + here + D // 2, second.to(Out.dtype.element_ty), mask=mask)


@triton.jit
def rotate(X, Out, R, Cos, Sin, xt, ot, rows, T, D: tl.constexpr, DP: tl.constexpr):
    """Store x^ and r, (rows,), of a head at X; both halves of x^ in Out's dtype. Out may be X: what a thread writes
    there it has read."""
    a, b = halves(X, xt, rows, T, D, DP)
    c, s = angles(Cos, Sin, rows, T, D, DP)
    r = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + EPS)
    tl.store(R + rows, r, mask=rows < T)
    first = (r[:, None] * (a * c + b * s)).to(Out.dtype.element_ty)
    second = (r[:, None] * (b * c - a * s)).to(Out.dtype.element_ty)
    put(first, second, Out, ot, rows, T, D, DP)
    return first, second


@triton.jit
def rotate_back(d, e, X, R, Out, Cos, Sin, xt, ot, rows, T, D: tl.constexpr, DP: tl.constexpr):
    """Store the gradient of x, given that of x^ as its two halves d and e, (rows, DP/2) float32. X: of x^."""
    a, b = halves(X, xt, rows, T, D, DP)
    c, s = angles(Cos, Sin, rows, T, D, DP)
    r = tl.load(R + rows, mask=rows < T, other=0.0)[:, None]
    mean = (tl.sum(d * a + e * b, axis=1) / D)[:, None]
    u, w = d - a * mean, e - b * mean
    put(r * (u * c - w * s), r * (w * c + u * s), Out, ot, rows, T, D, DP)


@triton.jit
def rotated_kernel(
    X, Out, R, Cos, Sin,  # (B, T, H, D) twice, (B, H, T) float32, (T, D/2) float32 twice
    xb, xt, xh, ob, ot, oh,  # strides of X and Out
    T, H, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x^ and r. Out may be X. Program: ROWS tokens of one head."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r = R + tl.program_id(1).to(tl.int64) * T
    rotate(X + b * xb + h * xh, Out + b * ob + h * oh, r, Cos, Sin, xt, ot, rows, T, D, DP)


@triton.jit
def rotated_back_kernel(
    Dx, X, R, Out, Cos, Sin,  # of x^ (B, T, H, D), x^ the same, (B, H, T) float32, of x (B, T, H, D), (T, D/2) twice
    db, dt, dh, xb, xt, xh, ob, ot, oh,  # strides of Dx, X and Out
    T, H, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of x, given that of x^. Out may be Dx. Program: ROWS tokens of one head."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d, e = halves(Dx + b * db + h * dh, dt, rows, T, D, DP)
    r = R + tl.program_id(1).to(tl.int64) * T
    rotate_back(d, e, X + b * xb + h * xh, r, Out + b * ob + h * oh, Cos, Sin, xt, ot, rows, T, D, DP)


def rotated(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x^ of x (B, T, H, D) to out, which may be x; in both the channels lie side by side. -> r (B, H, T) float32.

    cos, sin (T, D/2) float32, contiguous.
    """
    B, T, H, D = x.shape
    r = torch.empty(B, H, T, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(T, ROWS), B * H)
    rotated_kernel[grid](x, out, r, cos, sin, *x.stride()[:3], *out.stride()[:3], T, H, D, padded(D), ROWS, num_warps=4)
    return r


def rotated_back(d: Tensor, turned: Tensor, r: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The gradient of x (B, T, H, D) to out, given that of x^, d, and what `rotated` made of x: x^ and r. out may be d;
    in all three the channels lie side by side."""
    B, T, H, D = d.shape
    rotated_back_kernel[(triton.cdiv(T, ROWS), B * H)](
        d, turned, r, out, cos, sin, *d.stride()[:3], *turned.stride()[:3], *out.stride()[:3], T, H, D, padded(D), ROWS,
        num_warps=4,
    )  # fmt: skip
