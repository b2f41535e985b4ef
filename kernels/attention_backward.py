"""Backward of kernels/attention.py: all five products of a tile in one pass, scores computed once.

With q^, k^ the normalised and turned queries and keys, P = exp(scale * q^ k^T - lse) the probabilities and
delta = sum(dy * y) per query (Dao 2023):

    dV = P^T dY        dP = dY V^T        dS = P * (dP - delta)        dK^ = scale * dS^T q^        dQ^ = scale * dS k^

One program owns a block of keys of one key head, walks over the queries that see it, of all query heads of the group,
and so finishes dK and dV in registers, summed over the group. Its part of dQ^ it adds to a float32 buffer by atomics:
a second pass that owned queries instead would compute S and dP again (seven products), a buffer per block of keys
would need T / keys times the memory. The price is the order of that addition: dq differs by float32 rounding from
one run to the next; dk and dv do not.

Then the way back through RoPE and norm (kernels/rotated_norm.py), for keys in the epilogue, for queries in a pass of
its own over the finished sums. It needs q^, k^ and their r: q and k are not there any more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import BACKWARD, ROWS, padded, tile
from kernels.rotated_norm import channels, rotate_back

LOG2E = 1.4426950408889634


@triton.jit
def delta_kernel(
    Y, Dy, Delta,  # (B, T, H, D), (B, T, H, D), (B, H, T) float32
    yb, yt, yh, gb, gt, gh,  # strides of Y and Dy
    T, H, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta[t] = sum over channels of dy[t] * y[t]. Program: ROWS tokens of one head."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, DP)
    mask = (rows < T)[:, None] & (channels < D)[None, :]
    y = tl.load(Y + b.to(tl.int64) * yb + h * yh + rows[:, None] * yt + channels[None, :], mask=mask, other=0.0)
    dy = tl.load(Dy + b.to(tl.int64) * gb + h * gh + rows[:, None] * gt + channels[None, :], mask=mask, other=0.0)
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), axis=1)
    tl.store(Delta + tl.program_id(1).to(tl.int64) * T + rows, delta, mask=rows < T)


@triton.jit
def over_queries(
    dk, dv, k, v, keys,  # (N, DP) float32 twice, (N, DP) twice, (N,)
    Q, Dy, Dq, Lse, Delta,  # of this head: q^ and dy (T, D), (T, DP) float32, (T,), (T,)
    first, last, whole, gap, T, window, scale2, unscale2,
    qt: tl.constexpr, gt: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the queries first..last (in steps of M) bring to dk and dv, and this block's part to dq.

    MASKED: whole..whole+gap are left out.
    """
    N: tl.constexpr = k.shape[0]
    # Registers decide here. A tile's address is a scalar that moves and offsets known when compiling; and what does
    # not change is computed again in each step, as else the offsets of all loops are kept at once, and spilled.
    for i in tl.range(first, last, M, disable_licm=True):
        # The minimum changes nothing. It hides that i moves by a constant, for which LLVM may keep a 64-bit pointer to
        # each number of lse and delta, 60 registers, and move them all (with Triton 3.9 it does).
        i = tl.where(i < whole, i, i + gap) if MASKED else tl.minimum(i, T - M)
        i = tl.multiple_of(i, M)
        steps = tl.arange(0, M)
        place, real = channels(D, DP)
        kept = real[None, :]
        here = steps[:, None] * DP + tl.arange(0, DP)[None, :]
        turned = i * qt + (steps[:, None] * qt + place[None, :])
        there = i * gt + (steps[:, None] * gt + place[None, :])
        inside = i + steps < T
        if MASKED:
            q = tl.load(Q + turned, mask=inside[:, None] & kept, other=0.0)
            dy = tl.load(Dy + there, mask=inside[:, None] & kept, other=0.0)
            lse = tl.load(Lse + i + steps, mask=inside, other=float("inf"))  # past T: p = 0
            delta = tl.load(Delta + i + steps, mask=inside, other=0.0)
        else:
            q = tl.load(Q + turned) if D == DP else tl.load(Q + turned, mask=kept, other=0.0)
            dy = tl.load(Dy + there) if D == DP else tl.load(Dy + there, mask=kept, other=0.0)
            lse = tl.load(Lse + i + steps)
            delta = tl.load(Delta + i + steps)
        # lse and delta are subtracted by starting the sums from them, which frees their registers
        start = tl.broadcast_to(lse[None, :] * unscale2, (N, M))
        p = tl.exp2(tl.dot(k, q.T, start, input_precision="ieee") * scale2)  # (N, M)
        if MASKED:
            distance = (i + steps)[None, :] - keys[:, None]
            p = tl.where((distance >= 0) & (distance <= window), p, 0.0)
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
        dp = tl.dot(v, dy.T, tl.broadcast_to(-delta[None, :], (N, M)), input_precision="ieee")  # (N, M), less delta
        ds = (p * dp).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(ds.T, k, input_precision="ieee")  # (M, DP)
        if MASKED:
            tl.atomic_add(Dq + i * DP + here, dq, mask=inside[:, None] & kept, sem="relaxed")
        elif D == DP:
            tl.atomic_add(Dq + i * DP + here, dq, sem="relaxed")
        else:
            tl.atomic_add(Dq + i * DP + here, dq, mask=kept, sem="relaxed")
    return dk, dv


@triton.jit
def backward_kernel(
    Q, K, V, Dy,  # q^ (B, T, H, D), k^ and v (B, T, Hkv, D), dy (B, T, H, D)
    Cos, Sin, R, Lse, Delta,  # (T, D/2) twice, r of k (B, Hkv, T), (B, H, T) twice, all float32
    Dq, Dk, Dv,  # dq^ / scale (B, H, T, DP) float32, dk and dv (B, T, Hkv, D)
    qb, qh, kb, kt, kh, vb, vt, vh, gb, gh, ob, ot, oh,  # strides of Q, K, V, Dy, and of Dk and Dv
    T, H, G, window, scale, scale2,
    qt: tl.constexpr, gt: tl.constexpr,  # tokens of Q and of Dy lie this far apart
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program: N keys of one key head, all G query heads that share it."""
    heads = H // G
    b, hk = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    start = tl.program_id(0) * N
    keys = start + tl.arange(0, N)
    place, real = channels(D, DP)
    valid = (keys < T)[:, None] & real[None, :]
    turned = K + b * kb + hk * kh
    k = tl.load(turned + keys[:, None] * kt + place[None, :], mask=valid, other=0.0)
    v = tl.load(V + b * vb + hk * vh + keys[:, None] * vt + place[None, :], mask=valid, other=0.0)
    dk = tl.zeros((N, DP), tl.float32)
    dv = tl.zeros((N, DP), tl.float32)
    # key j is seen by the queries j..j+window; all keys of the block by start+N-1..start+window
    first = start // M * M
    last = tl.minimum(T, start + N + window)
    whole = tl.cdiv(start + N - 1, M) * M
    gap = tl.maximum(0, (tl.minimum(start + window, T - 1) + 1) // M * M - whole)
    unscale2 = -1.0 / scale2  # here, as the loops compute anew what does not change
    for g in tl.range(0, G, num_stages=1, disable_licm=True):
        row = (b * H + hk * G + g) * T
        dq, lse, delta = Dq + row * DP, Lse + row, Delta + row
        q = Q + b * qb + (hk * G + g) * qh
        dy = Dy + b * gb + (hk * G + g) * gh
        dk, dv = over_queries(
            dk, dv, k, v, keys, q, dy, dq, lse, delta, first, last - gap, whole, gap, T, window, scale2, unscale2,
            qt, gt, D, DP, M, True,
        )  # fmt: skip
        dk, dv = over_queries(
            dk, dv, k, v, keys, q, dy, dq, lse, delta, whole, whole + gap, whole, gap, T, window, scale2, unscale2,
            qt, gt, D, DP, M, False,
        )  # fmt: skip
    out = b * ob + hk * oh
    tl.store(Dv + out + keys[:, None] * ot + place[None, :], dv.to(Dv.dtype.element_ty), mask=valid)
    first_half, second_half = tl.split(tl.permute(tl.reshape(dk * scale, (N, 2, DP // 2)), (0, 2, 1)))
    r = R + tl.program_id(1).to(tl.int64) * T
    rotate_back(first_half, second_half, turned, r, Dk + out, Cos, Sin, kt, ot, keys, T, D, DP)


@triton.jit
def rotate_back_kernel(
    Dq, Q, R, Out, Cos, Sin,  # dq^ / scale (B, H, T, DP), q^ (B, T, H, D), r (B, H, T), dq (B, T, H, D), (T, D/2) twice
    qb, qt, qh, ob, ot, oh,  # strides of Q and of Out
    T, H, scale, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dq from the finished sums. Program: ROWS tokens of one head."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    of_head = tl.program_id(1).to(tl.int64) * T
    source = Dq + of_head * DP
    half = tl.arange(0, DP // 2)
    here = rows[:, None] * DP + half[None, :]
    mask = (rows < T)[:, None] & (half < D // 2)[None, :]
    d = tl.load(source + here, mask=mask, other=0.0) * scale
    e = tl.load(source + here + DP // 2, mask=mask, other=0.0) * scale
    rotate_back(d, e, Q + b * qb + h * qh, R + of_head, Out + b * ob + h * oh, Cos, Sin, qt, ot, rows, T, D, DP)


def gradients(
    dy: Tensor,  # (B, T, H, D); of this and the next three a head's channels lie side by side
    q: Tensor,  # q^ (B, T, H, D)
    k: Tensor,  # k^ (B, T, Hkv, D)
    v: Tensor,  # (B, T, Hkv, D)
    cos: Tensor,  # (T, D/2) float32
    sin: Tensor,
    y: Tensor,  # (B, T, H, D), what the forward returned
    lse: Tensor,  # (B, H, T) float32: log2 of the sum of exp(scores)
    rq: Tensor,  # (B, H, T) float32
    rk: Tensor,  # (B, Hkv, T) float32
    window: int,
    scale: float,
    into: tuple[Tensor, Tensor, Tensor],  # where dq, dk and dv go, the last two equally strided
) -> None:
    """dq, dk and dv, of the q and k of which q^ and k^ are given."""
    B, T, H, D = q.shape
    G, DP = H // k.size(2), padded(D)
    shape = tile(BACKWARD, q.device, q.dtype, D)
    delta = torch.empty_like(lse)
    grid = (triton.cdiv(T, ROWS), B * H)
    delta_kernel[grid](y, dy, delta, *y.stride()[:3], *dy.stride()[:3], T, H, D, DP, ROWS, num_warps=4)
    sums = torch.zeros(B, H, T, DP, dtype=torch.float32, device=q.device)
    dq, dk, dv = into
    backward_kernel[(triton.cdiv(T, shape.keys), B * k.size(2))](
        q, k, v, dy, cos, sin, rk, lse, delta, sums, dk, dv,
        q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3], dy.stride(0), dy.stride(2), *dk.stride()[:3],
        T, H, G, window, scale, scale * LOG2E, q.stride(1), dy.stride(1), D, DP, shape.queries, shape.keys,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    rotate_back_kernel[grid](
        sums, q, rq, dq, cos, sin, *q.stride()[:3], *dq.stride()[:3], T, H, scale, D, DP, ROWS, num_warps=4
    )
