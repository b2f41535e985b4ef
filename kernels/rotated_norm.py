"""QK-norm and RoPE on queries or keys in Triton: the piece that attention's passes share.

With x = (a, b) the two halves of a head's D channels at position t, r = 1 / sqrt(mean(x^2) + eps) (QK-norm: Henry et
al. 2020, with RMS in place of L2), and the angles of half-split RoPE (Su et al. 2021) c = cos(t * f), s = sin(t * f):

    x^ = r * (a*c + b*s, b*c - a*s)

Its length is at most sqrt(D). Outside of the kernels x^ is stored as (B, H, T, DP): each half padded with zeros to
DP/2, a power of two, so that the loops of attention load it without a mask.
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
def halves(X, Cos, Sin, xt, rows, T, D: tl.constexpr, DP: tl.constexpr):
    """Of a head at X, row stride xt: both halves of its rows, their cosines and sines, all (rows, DP/2) float32, and
    r (rows, 1). Zero where padded."""
    half = tl.arange(0, DP // 2)
    mask = (rows < T)[:, None] & (half < D // 2)[None, :]
    here = rows[:, None] * xt + half[None, :]
    a = tl.load(X + here, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(X + here + D // 2, mask=mask, other=0.0).to(tl.float32)
    angle = rows[:, None] * (D // 2) + half[None, :]
    c = tl.load(Cos + angle, mask=mask, other=0.0)
    s = tl.load(Sin + angle, mask=mask, other=0.0)
    r = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + EPS)
    return a, b, c, s, r[:, None]


@triton.jit
def rotate_back(d, e, X, Out, Cos, Sin, xt, ot, rows, T, D: tl.constexpr, DP: tl.constexpr):
    """Store the gradient of x, given that of x^ as its two halves d and e, (rows, DP/2) float32.

    g = (d*c - e*s, e*c + d*s),  n = x * r,  dx = r * (g - n * mean(g * n))
    """
    a, b, c, s, r = halves(X, Cos, Sin, xt, rows, T, D, DP)
    g1, g2 = d * c - e * s, e * c + d * s
    mean = r * (tl.sum(g1 * a + g2 * b, axis=1) / D)[:, None]
    half = tl.arange(0, DP // 2)
    mask = (rows < T)[:, None] & (half < D // 2)[None, :]
    here = rows[:, None] * ot + half[None, :]
    tl.store(Out + here, (r * (g1 - a * r * mean)).to(Out.dtype.element_ty), mask=mask)
    tl.store(Out + here + D // 2, (r * (g2 - b * r * mean)).to(Out.dtype.element_ty), mask=mask)


@triton.jit
def rotated_kernel(
    X, Out, Cos, Sin,  # (B, T, H, D), (B, H, T, DP), (T, D/2) float32 twice
    xb, xt, xh,  # strides of X
    T, H, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x^ of all heads of one row. Program: ROWS tokens of one head."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    a, e, c, s, r = halves(X + b * xb + h * xh, Cos, Sin, xt, rows, T, D, DP)
    place = Out + tl.program_id(1).to(tl.int64) * T * DP + rows[:, None] * DP + tl.arange(0, DP // 2)[None, :]
    inside = (rows < T)[:, None]
    tl.store(place, (r * (a * c + e * s)).to(Out.dtype.element_ty), mask=inside)
    tl.store(place + DP // 2, (r * (e * c - a * s)).to(Out.dtype.element_ty), mask=inside)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, H, D) with D contiguous -> (B, H, T, DP) in x's dtype. cos, sin (T, D/2) float32, contiguous."""
    B, T, H, D = x.shape
    DP = padded(D)
    out = torch.empty(B, H, T, DP, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(T, ROWS), B * H)
    rotated_kernel[grid](x, out, cos, sin, *x.stride()[:3], T, H, D, DP, ROWS, num_warps=4)
    return out
