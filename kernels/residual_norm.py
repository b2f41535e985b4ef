"""A weighted or plain residual sum and the RMS norm of it, in one pass over memory each way.

With rows x, x0 of C channels and scalars a, b:

    x' = a x + b x0    r = 1 / sqrt(mean(x'^2) + 2^-23)    n = x' r    y = n in the dtype asked for

Backward, with d = dx' that comes along the stream and dy that comes through the norm:

    dz = d + r (dy - n mean(dy n))    dx = a dz    dx0 = b dz    da = sum(dz x)    db = sum(dz x0)

r and n are made again in the backward, which hands n to whoever needs it for more (kernels/lean.py). With scalars x and
x0 are kept for it, not x': da and db need x, which could be had from x' only by a division by a. x0 is the same tensor
in every layer, so one tensor a layer is kept. Without scalars (a = b = 1: the sum of the stream and a branch) x' alone
is kept. The norm is Zhang & Sennrich's (2019) without weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.targets import choose, processors

EPSILON = 2.0**-23  # float32's machine epsilon
WIDEST = 4096  # channels of a row: a row stays in registers
REGISTERS = 65536  # of a processor, on every target


@dataclass(frozen=True)
class Tile:
    """One program works on so many elements at a time, whole rows of them."""

    elements: int
    warps: int  # for `elements`; a wider row gets more
    programs: int = 4  # of the backward, per processor


FORWARD = {target: Tile(4096, warps=4) for target in (75, 80, 86, 89, 90, 100, 120)}
BACKWARD = {target: Tile(1024, warps=4) for target in (75, 80, 86, 89, 90, 100, 120)}


@triton.jit
def _sum_of(X, X0, A, B, start, at, inside, SCALED: tl.constexpr, ACC: tl.constexpr):
    """x, x0 and a x + b x0 at the places `at` after `start`; x alone where there is no X0."""
    x = tl.load(X + start + at, mask=inside, other=0.0).to(ACC)
    if X0 is None:
        x0 = x
        total = x
    else:
        x0 = tl.load(X0 + start + at, mask=inside, other=0.0).to(ACC)
        total = x + x0
        if SCALED:
            total = tl.load(A).to(ACC) * x + tl.load(B).to(ACC) * x0
    return x, x0, total


@triton.jit
def _forward(
    X, X0, A, B, OUT, Y, R, N, C, eps,
    SCALED: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All (N, C), R (N,). One program per ROWS rows. What is not given of OUT, Y and R is not stored."""
    first = tl.program_id(0) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (rows < N - first)[:, None] & (columns < C)[None, :]
    start = first.to(tl.int64) * C  # what may pass 2^31 is one number; the places within the tile are short
    at = rows[:, None] * C + columns[None, :]
    _, _, total = _sum_of(X, X0, A, B, start, at, inside, SCALED, ACC)
    r = tl.rsqrt(tl.sum(total * total, 1) / C + eps)
    if OUT is not None:
        tl.store(OUT + start + at, total.to(OUT.dtype.element_ty), mask=inside)
    if Y is not None:
        tl.store(Y + start + at, (total * r[:, None]).to(Y.dtype.element_ty), mask=inside)
    if R is not None:
        tl.store(R + first + rows, r, mask=rows < N - first)


@triton.jit
def _backward(
    D, DY, X, X0, A, B, DX, DX0, SUMS, Y, N, C, eps,
    SCALED: tl.constexpr, BOTH: tl.constexpr, TIMES_R: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Without SCALED, X is x' and X0 is not read. BOTH: DX0 is written. SUMS (programs, 2): parts of da and db.
    Without D that is zero. Y, if given, gets n. TIMES_R: DY holds r dy. Y or DX may be DY: what a thread writes there
    it has read."""
    columns = tl.arange(0, BLOCK)
    da = tl.zeros((ROWS,), dtype=ACC)
    db = tl.zeros((ROWS,), dtype=ACC)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        inside = (rows < N)[:, None] & (columns < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + columns[None, :]
        if SCALED:
            x, x0, total = _sum_of(X, X0, A, B, 0, at, inside, SCALED, ACC)
        else:
            total = tl.load(X + at, mask=inside, other=0.0).to(ACC)
        dy = tl.load(DY + at, mask=inside, other=0.0).to(ACC)
        r = tl.rsqrt(tl.sum(total * total, 1) / C + eps)[:, None]
        n = total * r
        dz = dy - n * (tl.sum(dy * n, 1) / C)[:, None]
        if not TIMES_R:
            dz *= r
        if D is not None:
            dz += tl.load(D + at, mask=inside, other=0.0).to(ACC)
        if Y is not None:
            tl.store(Y + at, n.to(Y.dtype.element_ty), mask=inside)
        if SCALED:
            da += tl.sum(dz * x, 1)
            db += tl.sum(dz * x0, 1)
            tl.store(DX + at, (tl.load(A).to(ACC) * dz).to(DX.dtype.element_ty), mask=inside)
            tl.store(DX0 + at, (tl.load(B).to(ACC) * dz).to(DX0.dtype.element_ty), mask=inside)
        else:
            tl.store(DX + at, dz.to(DX.dtype.element_ty), mask=inside)
            if BOTH:
                tl.store(DX0 + at, dz.to(DX0.dtype.element_ty), mask=inside)
    if SCALED:
        tl.store(SUMS + 2 * tl.program_id(0), tl.sum(da))
        tl.store(SUMS + 2 * tl.program_id(0) + 1, tl.sum(db))


def constants(C: int, tile: Tile) -> dict[str, int]:
    """Rows and padded channels of a program's tile, and its warps."""
    block = triton.next_power_of_2(C)
    return {
        "ROWS": max(1, tile.elements // block),
        "BLOCK": block,
        "num_warps": min(32, tile.warps * max(1, block // tile.elements)),
    }


def registers(warps: int, tile: Tile) -> int | None:
    """What a thread of the backward may have where `tile.programs` share a processor's; None: ptxas decides.

    By itself it does not know how few programs there are and makes room for more: 12.8 (Triton 3.6) spilled for that.
    """
    share = REGISTERS // (32 * warps * tile.programs)
    return share if share >= 128 else None  # it needs 80 at most: as a limit a smaller share could only harm


def _accumulator(x: Tensor) -> tuple[Any, torch.dtype]:
    return (tl.float64, torch.float64) if x.dtype == torch.float64 else (tl.float32, torch.float32)


@torch.library.custom_op("autoresearch::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor, x0: Tensor, a: Tensor | None, b: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    N, C = x.shape
    out, y = torch.empty_like(x), torch.empty(N, C, dtype=dtype, device=x.device)
    _launch(x, x0, a, b, out, y)
    return out, y


def _launch(
    x: Tensor, x0: Tensor | None, a: Tensor | None, b: Tensor | None, out: Tensor | None, y: Tensor | None,
    r: Tensor | None = None,
) -> None:  # fmt: skip
    N, C = x.shape
    if N:
        options = constants(C, choose(FORWARD, x) or FORWARD[75])
        grid = (triton.cdiv(N, options["ROWS"]),)
        acc, _ = _accumulator(x)
        _forward[grid](x, x0, a, b, out, y, r, N, C, EPSILON, SCALED=a is not None, ACC=acc, **options)


def normed(x: Tensor, x0: Tensor | None, a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, C), contiguous -> the norm alone of a x + b x0, or of x, in `dtype`. Without gradients: for a backward that
    makes it again, outside of what torch.compile sees."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, x0, a, b, None, y)
    return y


@_residual_norm.register_fake
def _(x: Tensor, x0: Tensor, a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("autoresearch::residual_norm_backward", mutates_args=())
def _residual_norm_backward(
    d: Tensor, dy: Tensor, x: Tensor, x0: Tensor | None, a: Tensor | None, b: Tensor | None, dtype0: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dx0 (empty where it equals dx), (da, db). x and x0, or x' without x0. dtype0: that of x0."""
    return backward(d, dy, x, x0, a, b, dtype0)


def backward(
    d: Tensor | None,  # of the sum, or nothing for zeros
    dy: Tensor,  # of the norm
    x: Tensor,
    x0: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    dtype0: torch.dtype,
    y: Tensor | None = None,  # where the norm goes; dy will do
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator returns; all (N, C), contiguous. For a backward that is one operation with this in it."""
    N, C = x.shape
    scaled, tile = a is not None, choose(BACKWARD, x) or BACKWARD[75]
    both = scaled or dtype0 != x.dtype
    options = constants(C, tile)
    programs = max(1, min(triton.cdiv(N, options["ROWS"]), tile.programs * processors(x.device)))
    acc, wide = _accumulator(x)
    dx = torch.empty_like(x)
    dx0 = torch.empty(N if both else 0, C, dtype=dtype0, device=x.device)
    sums = torch.empty(programs if scaled else 0, 2, dtype=wide, device=x.device)
    kind = {"SCALED": scaled, "BOTH": both, "TIMES_R": False, "ACC": acc}
    kind["maxnreg"] = registers(options["num_warps"], tile)
    _backward[(programs,)](d, dy, x, x0, a, b, dx, dx0, sums, y, N, C, EPSILON, **kind, **options)
    return dx, dx0, sums.sum(0)


def scale(z: Tensor) -> Tensor:
    """(N, C), contiguous -> r (N,), float32: r z is the norm of z. Without gradients."""
    r = torch.empty(len(z), dtype=_accumulator(z)[1], device=z.device)
    _launch(z, None, None, None, None, None, r)
    return r


def scaled_backward(d: Tensor, rdy: Tensor, z: Tensor) -> Tensor:
    """The gradient of z, all (N, C), contiguous; it takes the place of rdy, which is r times that of the norm r z."""
    N, C = z.shape
    tile = choose(BACKWARD, z) or BACKWARD[75]
    options = constants(C, tile)
    programs = max(1, min(triton.cdiv(N, options["ROWS"]), tile.programs * processors(z.device)))
    kind = {"SCALED": False, "BOTH": False, "TIMES_R": True, "ACC": _accumulator(z)[0]}
    kind["maxnreg"] = registers(options["num_warps"], tile)
    _backward[(programs,)](d, rdy, z, None, None, None, rdy, None, None, None, N, C, EPSILON, **kind, **options)
    return rdy


@_residual_norm_backward.register_fake
def _(
    d: Tensor, dy: Tensor, x: Tensor, x0: Tensor | None, a: Tensor | None, b: Tensor | None, dtype0: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    both = a is not None or dtype0 != x.dtype
    dx0 = torch.empty_like(x, dtype=dtype0) if both else x.new_empty(0, x.shape[1], dtype=dtype0)
    return torch.empty_like(x), dx0, x.new_empty(2, dtype=_accumulator(x)[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, x0, a, b, _ = inputs
    ctx.dtype0 = x0.dtype
    if a is None:
        ctx.save_for_backward(output[0], None, None, None)
    else:
        ctx.save_for_backward(x, x0, a, b)


def _gradients(ctx: Any, d: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    x, x0, a, b = ctx.saved_tensors
    d = torch.zeros_like(x) if d is None else d.contiguous()
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dx, dx0, sums = _residual_norm_backward(d, dy, x, x0, a, b, ctx.dtype0)
    if a is None:
        return dx, dx if ctx.dtype0 == x.dtype else dx0, None, None, None
    da, db = sums.to(a.dtype).unbind()
    return dx, dx0, da.view(a.shape), db.view(b.shape), None


_residual_norm.register_autograd(_gradients, setup_context=_keep)


def residual_norm(
    x: Tensor, x0: Tensor, a: Tensor | None = None, b: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(..., C) twice, and two tensors of one element or neither -> a x + b x0 in x's dtype, its norm in `dtype`.

    `dtype` is x's where it is not given.
    """
    if x.shape != x0.shape:
        raise ValueError(f"residual_norm takes two tensors of one shape, not {tuple(x.shape)} and {tuple(x0.shape)}")
    if (a is None) != (b is None) or (a is not None and b is not None and (a.numel(), b.numel()) != (1, 1)):
        raise ValueError("residual_norm takes both scalars, as tensors of one element, or neither")
    if x.shape[-1] > WIDEST:
        raise ValueError(f"residual_norm takes rows of {WIDEST} channels at most, not {x.shape[-1]}")
    rows, rows0 = (t.reshape(-1, t.shape[-1]).contiguous() for t in (x, x0))
    out, y = _residual_norm(rows, rows0, a, b, dtype or x.dtype)
    return out.view(x.shape), y.view(x.shape)


def reference(
    x: Tensor, x0: Tensor, a: Tensor | None = None, b: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, any dtype."""
    out = x + x0 if a is None or b is None else a * x + b * x0
    y = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + EPSILON)
    return out, y.to(dtype or x.dtype)
