"""Causal sliding-window attention with QK-norm, RoPE and grouped heads, forward and backward, in Triton.

With q^ and k^ the RMS-normalised and turned queries and keys (kernels/rotated_norm.py; QK-norm: Henry et al. 2020,
RoPE: Su et al. 2021), for the query at i and the keys j with i - window <= j <= i:

    s_ij = scale * q^_i . k^_j        y_i = sum_j exp(s_ij - c) v_j / sum_j exp(s_ij - c)

tile by tile, without the matrix of scores in memory (Dao et al. 2022; Dao 2023). What is particular here:

- |q^|, |k^| <= sqrt(D), so |s| <= scale * D =: bound. The constant c = max(0, bound - 11) takes the place of the
  running maximum and of the rescaling that it needs: exp(s - c) stays below e^11, which fp16 still holds, and above
  e^(11 - 2 bound). Any c gives the same y.
- The keys of a block of queries fall into three ranges: those at the window's far edge, those that every query of
  the block sees, those at the diagonal. The middle one has a loop of its own, which knows no mask; the other two share
  one that skips it (a third loop would only cost registers).
- Queries are normalised and turned in the prologue, keys by a pass before (many blocks of queries read one key). Both
  are left in memory for the backward (kernels/attention_backward.py), which so makes nothing again: `attention` puts
  them into tensors of their own, kernels/lean.py in the place of q and k, of which it is the only reader.
- Kept for the backward: q^, k^, v, y, and two float32 per query and head, one per key and head.

Shapes: B rows, T tokens, H query heads in groups of G over Hkv = H / G key heads, D channels of a head, DP the padded
D. A window counts the tokens before a query, itself not counted: FlashAttention's (window, 0).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_backward import LOG2E, gradients
from kernels.attention_reference import reference, rows_of, within
from kernels.attention_tiles import FORWARD, padded, tile
from kernels.rotated_norm import channels, rotate, rotated

__all__ = ["attend_", "attend_backward", "attention", "obstacle", "reference"]

HEADROOM = 11.0  # log of the largest exp(s - c): e^11 = 59,874, fp16 ends at 65,504
# Largest bound = scale * D per dtype, by the smallest exp(s - c) that must still be told from 0. fp16: e^-13, half a
# unit of its subnormals is then 1.3 %. Else float32's range, in which sums are kept: e^-85.
BOUND_LIMIT = {torch.float16: 12.0, torch.bfloat16: 48.0, torch.float32: 48.0}
HEAD_SIZES = range(32, 129, 2)
MOST_HEADS = 2**16 - 1  # of all sequences: what a grid's second axis holds on every card


@triton.jit
def over_keys(
    acc, total, q, rows,  # (M, DP) float32, (M,) float32, (M, DP), (M,)
    K, V,  # of this head: k^ and v (T, D)
    first, last, whole, gap, T, window, scale2, shift2,
    kt: tl.constexpr, vt: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """Add the keys first..last (in steps of N) to acc = sum exp(s - c) v and total = sum exp(s - c).

    MASKED: whole..whole+gap are left out.
    """
    for j in tl.range(first, last, N, disable_licm=MASKED and LEAN):
        if MASKED:
            j = tl.where(j < whole, j, j + gap)
        j = tl.multiple_of(j, N)
        steps = tl.arange(0, N)
        place, real = channels(D, DP)
        here = j * kt + (steps[:, None] * kt + place[None, :])
        there = j * vt + (steps[:, None] * vt + place[None, :])
        if MASKED:
            inside = (j + steps < T)[:, None] & real[None, :]
            k = tl.load(K + here, mask=inside, other=0.0)
            v = tl.load(V + there, mask=inside, other=0.0)
        else:
            k = tl.load(K + here) if D == DP else tl.load(K + here, mask=real[None, :], other=0.0)
            v = tl.load(V + there) if D == DP else tl.load(V + there, mask=real[None, :], other=0.0)
        p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale2 - shift2)  # (M, N)
        if MASKED:
            distance = rows[:, None] - (j + steps)[None, :]
            p = tl.where((distance >= 0) & (distance <= window), p, 0.0)
        total += tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total


@triton.jit
def forward_kernel(
    Q, K, V, Cos, Sin,  # q (B, T, H, D), k^ and v (B, T, Hkv, D), (T, D/2) float32 twice
    Out, R, Y, Lse,  # q^ (B, T, H, D), which may be Q; r (B, H, T) float32; (B, T, H, D), (B, H, T) float32
    qb, qt, qh, ob, ot, oh, kb, kh, vb, vh, yb, yt, yh,  # strides of Q, Out, K, V and Y
    T, H, G, window, scale2, shift2,  # scale and c, both times log2(e)
    kt: tl.constexpr, vt: tl.constexpr,  # tokens of K and of V lie this far apart
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """Program: M queries of one head. The last queries, which see most, are started first."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    rows = start + tl.arange(0, M)
    place, real = channels(D, DP)
    of_head = tl.program_id(1).to(tl.int64) * T
    pair = rotate(Q + b * qb + h * qh, Out + b * ob + h * oh, R + of_head, Cos, Sin, qt, ot, rows, T, D, DP)
    q = tl.reshape(tl.permute(tl.join(pair[0], pair[1]), (0, 2, 1)), (M, DP))  # of (M, DP/2, 2)
    k = K + b * kb + (h // G) * kh
    v = V + b * vb + (h // G) * vh
    acc = tl.zeros((M, DP), tl.float32)
    total = tl.zeros((M,), tl.float32)
    # query i sees the keys i-window..i; all queries of the block see start+M-1-window..start
    first = tl.maximum(0, start - window) // N * N
    last = tl.minimum(T, start + M)
    whole = tl.cdiv(tl.maximum(0, start + M - 1 - window), N) * N
    gap = tl.maximum(0, (start + 1) // N * N - whole)
    acc, total = over_keys(
        acc, total, q, rows, k, v, first, last - gap, whole, gap, T, window, scale2, shift2,
        kt, vt, D, DP, N, True, LEAN,
    )  # fmt: skip
    acc, total = over_keys(
        acc, total, q, rows, k, v, whole, whole + gap, whole, gap, T, window, scale2, shift2,
        kt, vt, D, DP, N, False, LEAN,
    )  # fmt: skip
    # rows past T see no key: their total of 0 is divided by, but not stored
    tl.store(Lse + of_head + rows, shift2 + tl.log2(total), mask=rows < T)
    y = Y + b * yb + h * yh + rows[:, None] * yt + place[None, :]
    tl.store(y, (acc / total[:, None]).to(Y.dtype.element_ty), mask=(rows < T)[:, None] & real[None, :])


def attended(
    q: Tensor,  # (B, T, H, D), as k and v with a head's channels side by side
    k: Tensor,  # (B, T, Hkv, D)
    v: Tensor,  # (B, T, Hkv, D)
    out: tuple[Tensor, Tensor],  # where q^ and k^ go; q and k will do, which are then used up
    cos: Tensor,
    sin: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, T, H, D); log2 of the sum of exp(scores) (B, H, T); of q and of k the r of kernels/rotated_norm.py,
    (B, H, T) and (B, Hkv, T). The last three float32. Without gradients."""
    B, T, H, D = q.shape
    shape, DP = tile(FORWARD, q.device, q.dtype, D), padded(D)
    y = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    lse, rq = (torch.empty(B, H, T, dtype=torch.float32, device=q.device) for _ in range(2))
    turned, keys = out
    with torch.cuda.device_of(q):  # Triton launches on the current device
        rk = rotated(k, keys, cos, sin)
        forward_kernel[(triton.cdiv(T, shape.queries), B * H)](
            q, keys, v, cos, sin, turned, rq, y, lse,
            *q.stride()[:3], *turned.stride()[:3], keys.stride(0), keys.stride(2), v.stride(0), v.stride(2),
            *y.stride()[:3], T, H, H // k.size(2), window, scale * LOG2E, max(0.0, scale * D - HEADROOM) * LOG2E,
            keys.stride(1), v.stride(1), D, DP, shape.queries, shape.keys, shape.lean,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return y, lse, rq, rk


Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("autoresearch::attention_forward", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float) -> Forward:
    """y (B, T, H, D) and, for the backward, what `attended` returns beside it, q^ and k^, contiguous."""
    turned, keys = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    return *attended(rows_of(q), rows_of(k), rows_of(v), (turned, keys), cos, sin, window, scale), turned, keys


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float) -> Forward:
    per_row = [q.new_empty((len(x), x.size(2), x.size(1)), dtype=torch.float32) for x in (q, q, k)]
    return q.new_empty(q.shape), per_row[0], per_row[1], per_row[2], q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("autoresearch::attention_backward", mutates_args=())
def attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, y: Tensor, lse: Tensor, rq: Tensor,
    rk: Tensor, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, contiguous, of the q and k of which q^ and k^ are given."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    with torch.cuda.device_of(q):
        gradients(rows_of(dy), q, k, rows_of(v), cos, sin, y, lse, rq, rk, window, scale, (dq, dk, dv))
    return dq, dk, dv


@attention_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, y: Tensor, lse: Tensor, rq: Tensor,
    rk: Tensor, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    _, _, v, cos, sin, ctx.window, ctx.scale = inputs
    y, lse, rq, rk, turned, keys = output
    ctx.save_for_backward(turned, keys, v, cos, sin, y, lse, rq, rk)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*attention_backward(dy, *ctx.saved_tensors, ctx.window, ctx.scale), None, None, None, None)


attention_forward.register_autograd(_differentiate, setup_context=_keep)


# --- the same in the place of q and k, of which q^ and k^ are left: for kernels/lean.py. Without gradients ----------


def attend_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `attended`, at a scale of D^-0.5; q and k become q^ and k^."""
    window, scale, cos, sin = checked(q, k, v, cos, sin, window, None)
    return attended(q, k, v, (q, k), cos, sin, window, scale)


def attend_backward(
    dy: Tensor, y: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, rq: Tensor, rk: Tensor, cos: Tensor,
    sin: Tensor, window: int, into: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """q and k as `attend_` left them. The gradients of what they were, and dv, go to `into`."""
    window, scale, cos, sin = checked(q, k, v, cos, sin, window, None)
    with torch.cuda.device_of(q):
        gradients(dy, q, k, v, cos, sin, y, lse, rq, rk, window, scale, into)


def attention(
    q: Tensor,  # (B, T, H, D) bf16, fp16, or float32 for tests; slices of a larger tensor are read where they lie
    k: Tensor,  # (B, T, Hkv, D)
    v: Tensor,  # (B, T, Hkv, D)
    cos: Tensor,  # (T or more, D/2) float32
    sin: Tensor,
    window: int,  # tokens seen before a query; T - 1 and more: all
    scale: float | None = None,  # of the scores; D^-0.5 if not given
) -> Tensor:
    """y (B, T, H, D) in q's dtype. Gradients for q, k and v."""
    window, scale, cos, sin = checked(q, k, v, cos, sin, window, scale)
    y: Tensor = attention_forward(q, k, v, cos, sin, window, scale)[0]
    return y


def checked(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float | None
) -> tuple[int, float, Tensor, Tensor]:
    """window, scale, cos and sin as the kernels take them; ValueError where something is wrong."""
    check(q, k, v, cos, sin, window)
    T, D = q.size(1), q.size(3)
    scale = D**-0.5 if scale is None else float(scale)
    limit = BOUND_LIMIT[q.dtype]
    if not 0 < scale * D <= limit:
        raise ValueError(f"scale x head size is {scale * D:g}; in {q.dtype} it must lie within 0..{limit:g}")
    return within(window, T), scale, cos[:T].contiguous(), sin[:T].contiguous()


def check(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int) -> None:
    """ValueError with the fact where the arguments do not fit together or the kernel cannot take them."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.size(3) != k.size(3):
        raise ValueError(f"q (B, T, H, D), k and v (B, T, Hkv, D) wanted, not {_shapes(q, k, v)}")
    T, H, D = q.shape[1:]
    if {k.dtype, v.dtype} != {q.dtype}:
        raise ValueError(f"q, k, v of one dtype wanted, not {q.dtype}, {k.dtype}, {v.dtype}")
    if found := obstacle(0, H, k.size(2), D, q.dtype):
        raise ValueError(found)
    if len(q) * H > MOST_HEADS:
        raise ValueError(
            f"{len(q):,} sequences of {H} heads; a launch takes {MOST_HEADS:,} heads in all: use smaller micro-batches"
        )
    if max(T * x.stride(1) for x in (q, k, v)) >= 2**31:
        raise ValueError(f"a row of {T} tokens spans more than 2^31 elements of its tensor; copy it to its own")
    tables = all(
        x.dim() == 2 and x.size(0) >= T and x.size(1) == D // 2 and x.dtype == torch.float32 for x in (cos, sin)
    )
    if not tables:
        raise ValueError(f"cos and sin ({T} or more, {D // 2}) float32 wanted, not {_shapes(cos, sin)} {cos.dtype}")
    within(window, T)


def obstacle(capability: int, heads: int, key_heads: int, head: int, dtype: torch.dtype) -> str:
    """Why the kernel cannot do this, or "". capability: 90 for sm_90, 0 not to ask about the card."""
    if key_heads == 0 or heads % key_heads:
        return f"{heads} query heads do not divide into groups over {key_heads} key heads"
    if head not in HEAD_SIZES:
        return f"head size {head}; this kernel takes even ones from {HEAD_SIZES[0]} to {HEAD_SIZES[-1]}"
    if dtype not in BOUND_LIMIT:
        return f"{dtype}; this kernel takes bf16, fp16 and, for tests, float32"
    if capability and capability < min(FORWARD):
        return f"sm_{capability}; this kernel needs sm_{min(FORWARD)} or newer: Triton uses no older tensor cores"
    return ""


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)
