"""The MLP of a transformer block, its squared ReLU fused into the matrix products on both sides of it.

With x (N, C), w1 (F, C), w2 (C, F), all contiguous and in one compute dtype:

    h = x w1^T        y = max(h, 0)^2        out = y w2^T
    dy = dout w2      dh = 2 max(h, 0) dy    dx = dh w1    dw1 = dh^T x    dw2 = dout^T y

By Triton, y comes out of the first product's epilogue and dh out of the product that makes dy: h and dy are never in
memory. By torch, each is a product of cuBLAS and one pass over it, in place: no more memory, but more traffic, and h
and dy are rounded, as in plain PyTorch. Which is faster depends on card and C: kernels/mlp_choice.py measures it.

Only y is kept for backward, because max(h, 0) = sqrt(y); rounding y and then taking its root costs half the error of
rounding h. (In float16 a y below 2^-24 is lost, and with it the gradient of an h below 2^-12.) The squared ReLU is
Primer's (So et al. 2021). The three plain products are torch's.

Of x = r z, a norm with its scale r (N, 1), the kernels take z and r: h = r (z w1^T), and with r dh in the place of dh
they give r dx and dw1 = (r dh)^T z, so that a norm need not be in memory (kernels/lean.py).

On sm_90 and sm_100, Triton's operands come by TMA and each program works through several tiles; elsewhere, and where
the sizes do not divide, by pointers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import plain
from kernels.targets import choose, dot, interpreted, processors

Tensors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Tiles:
    """One program makes (m, n) of the product at a time, k of the inner dimension per step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int  # steps whose operands are in flight
    group: int = 8  # rows of tiles that share columns while these are in the cache
    tma: bool = False  # operands by tensor descriptors; as many programs as processors, each with many tiles


# sm_75 has no entry: Triton (3.8) makes no use of that card's tensor cores, so its products are torch's.
FORWARD = {
    80: Tiles(128, 256, 64, warps=8, stages=3),
    86: Tiles(128, 128, 32, warps=4, stages=4),
    89: Tiles(128, 128, 32, warps=4, stages=4),
    90: Tiles(128, 256, 64, warps=8, stages=3, tma=True),
    100: Tiles(128, 256, 64, warps=8, stages=3, tma=True),
    120: Tiles(128, 128, 32, warps=4, stages=4),
}
BACKWARD = {
    80: Tiles(128, 128, 64, warps=8, stages=3),
    86: Tiles(128, 128, 32, warps=8, stages=4),
    89: Tiles(128, 128, 32, warps=8, stages=4),
    90: Tiles(128, 256, 64, warps=8, stages=3, tma=True),
    100: Tiles(128, 128, 64, warps=8, stages=4, tma=True),
    120: Tiles(128, 128, 32, warps=8, stages=4),
}
ODD = Tiles(64, 64, 32, warps=4, stages=2)  # for sizes that do not divide: larger tiles would spill on every card
FLAT = 2048  # elements at most of a program that goes over a product of torch's


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of tile number `tile`: down GROUP rows of tiles, then one column on."""
    down = tl.cdiv(M, BLOCK_M)
    per_group = GROUP * tl.cdiv(N, BLOCK_N)
    first = tile // per_group * GROUP
    height = tl.minimum(down - first, GROUP)
    within = tile % per_group
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _by_pointers(
    A, B, Y, R, OUT, M, N, K,
    BACKWARD: tl.constexpr, EVEN_K: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Forward: OUT (M, N) = max(R A B^T, 0)^2, B (N, K). Backward: OUT = 2 R sqrt(Y) (A B), B (K, N). A is (M, K), R,
    if given, (M,)."""
    row, column = _place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    m = (rows % M).to(tl.int64)  # rows and columns beyond the end read what is there, and are not stored
    n = (columns % N).to(tl.int64)
    a = A + m[:, None] * K + inner[None, :]
    b = B + n[None, :] * K + inner[:, None]
    if BACKWARD:
        b = B + inner.to(tl.int64)[:, None] * N + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            left = tl.load(a)
            right = tl.load(b)
        else:
            left = tl.load(a, mask=inner[None, :] < K - k, other=0.0)
            right = tl.load(b, mask=inner[:, None] < K - k, other=0.0)
        acc = dot(left, right, acc, WIDEN)
        a += BLOCK_K
        b += BLOCK_K * (N.to(tl.int64) if BACKWARD else 1)
    at = m[:, None] * N + n[None, :]
    if R is not None:
        acc *= tl.load(R + m).to(ACC)[:, None]
    if BACKWARD:
        acc *= 2 * tl.sqrt(tl.load(Y + at, mask=inside, other=0.0).to(ACC))
    else:
        acc = tl.maximum(acc, 0.0)
        acc *= acc
    tl.store(OUT + at, acc.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _by_tma(
    A, B, Y, R, OUT, M, N, K,
    BACKWARD: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same with tensor descriptors, which leave out what lies beyond the end; one program, many tiles."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = _place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for k in range(0, K, BLOCK_K):
            left = A.load([row, k])
            if BACKWARD:
                acc = dot(left, B.load([k, column]), acc, WIDEN)
            else:
                acc = dot(left, B.load([column, k]).T, acc, WIDEN)
        if R is not None:
            rows = row + tl.arange(0, BLOCK_M)
            acc *= tl.load(R + rows, mask=rows < M, other=0.0).to(ACC)[:, None]
        if BACKWARD:
            acc *= 2 * tl.sqrt(Y.load([row, column]).to(ACC))
        else:
            acc = tl.maximum(acc, 0.0)
            acc *= acc
        OUT.store([row, column], acc.to(OUT.dtype))


@triton.jit
def _piece(N, BLOCK: tl.constexpr):
    """Row, and columns, of this program's part of a row of N."""
    across = tl.cdiv(N, BLOCK)
    return (tl.program_id(0) // across).to(tl.int64), tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _squared(H, R, N, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """H (M, N) = max(R H, 0)^2, in place; R, if given, (M,)."""
    row, columns = _piece(N, BLOCK)
    at = H + row * N + columns
    h = tl.maximum(tl.load(at, mask=columns < N, other=0.0).to(ACC), 0.0)
    if R is not None:
        h *= tl.load(R + row).to(ACC)
    tl.store(at, (h * h).to(H.dtype.element_ty), mask=columns < N)


@triton.jit
def _times_root(D, Y, R, N, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """D (M, N) *= 2 R sqrt(Y), in place; R, if given, (M,)."""
    row, columns = _piece(N, BLOCK)
    at = row * N + columns
    d = tl.load(D + at, mask=columns < N, other=0.0).to(ACC)
    d *= 2 * tl.sqrt(tl.load(Y + at, mask=columns < N, other=0.0).to(ACC))
    if R is not None:
        d *= tl.load(R + row).to(ACC)
    tl.store(D + at, d.to(D.dtype.element_ty), mask=columns < N)


def constants(tiles: Tiles) -> dict[str, Any]:
    """What a configuration fixes in the kernel's code."""
    return {"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "GROUP": tiles.group}


def launch(a: Tensor, b: Tensor, y: Tensor | None, tiles: Tiles | None, r: Tensor | None = None) -> Tensor:
    """Forward without y: (M, K), (N, K) -> (M, N). Backward with it: (M, K), (K, N), (M, N) -> (M, N). r (M,) or none.

    Without tiles the product is torch's, and so in float32: for proofs, as nothing trains in that on a card.
    """
    if tiles is None or (a.dtype == torch.float32 and not interpreted()):  # no tile of it would fit
        if y is not None:
            return pass_over(a @ b, y, r)
        a, r = plain.before_product(a, r)
        return pass_over(a @ b.T, None, r)
    backward = y is not None
    M, K = a.shape
    N = b.shape[1] if backward else b.shape[0]
    out = torch.empty(M, N, dtype=a.dtype, device=a.device)
    if M == 0:
        return out
    hidden = out if y is None else y
    even = K % tiles.k == 0 and N % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (a, b, hidden))
    if not even:
        tiles = ODD
    acc = tl.float64 if a.dtype == torch.float64 else tl.float32
    options = constants(tiles) | {"num_warps": tiles.warps, "num_stages": tiles.stages, "WIDEN": interpreted()}
    count = triton.cdiv(M, tiles.m) * triton.cdiv(N, tiles.n)
    if tiles.tma:
        arrays = [
            TensorDescriptor.from_tensor(a, [tiles.m, tiles.k]),
            TensorDescriptor.from_tensor(b, [tiles.k, tiles.n] if backward else [tiles.n, tiles.k]),
            TensorDescriptor.from_tensor(hidden, [tiles.m, tiles.n]),
            TensorDescriptor.from_tensor(out, [tiles.m, tiles.n]),
        ]
        grid = (min(count, processors(a.device)),)
        _by_tma[grid](*arrays[:3], r, arrays[3], M, N, K, BACKWARD=backward, ACC=acc, **options)
    else:
        _by_pointers[(count,)](a, b, hidden, r, out, M, N, K, BACKWARD=backward, EVEN_K=even, ACC=acc, **options)
    return out


def pass_over(product: Tensor, y: Tensor | None, r: Tensor | None = None) -> Tensor:
    """What comes after the product, in place: max(r h, 0)^2, or 2 r sqrt(y) dy. Both (M, N), contiguous; r (M,)."""
    M, N = product.shape
    if M and N:
        grid, acc = (M * triton.cdiv(N, FLAT),), tl.float64 if product.dtype == torch.float64 else tl.float32
        if y is None:
            _squared[grid](product, r, N, acc, FLAT)
        else:
            _times_root[grid](product, y, r, N, acc, FLAT)
    return product


def relu2(x: Tensor, w1: Tensor, by: str, r: Tensor | None = None) -> Tensor:
    """(N, C), (F, C), r (N,) or none -> y (N, F). by: "triton" or "torch". Without gradients."""
    return launch(x, w1, None, choose(FORWARD, x) if by == "triton" else None, r)


def relu2_backward(dout: Tensor, w2: Tensor, y: Tensor, by: str, r: Tensor | None = None) -> Tensor:
    """(N, C), (C, F), (N, F), r (N,) or none -> r dh (N, F)."""
    return launch(dout, w2, y, choose(BACKWARD, dout) if by == "triton" else None, r)


@torch.library.custom_op("autoresearch::mlp", mutates_args=())
def _mlp(x: Tensor, w1: Tensor, w2: Tensor, by: str) -> tuple[Tensor, Tensor]:
    y = relu2(x, w1, by)
    return y @ w2.T, y


@_mlp.register_fake
def _(x: Tensor, w1: Tensor, w2: Tensor, by: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(w2)), x.new_empty(len(x), len(w1))


@torch.library.custom_op("autoresearch::mlp_backward", mutates_args=())
def _mlp_backward(dout: Tensor, x: Tensor, w1: Tensor, w2: Tensor, y: Tensor, by: str) -> Tensors:
    """dx, dw1, dw2; one operation, as in kernels/lean.py."""
    dw2 = dout.T @ y
    dh = relu2_backward(dout, w2, y, by)
    return dh @ w1, dh.T @ x, dw2


@_mlp_backward.register_fake
def _(dout: Tensor, x: Tensor, w1: Tensor, w2: Tensor, y: Tensor, by: str) -> Tensors:
    return torch.empty_like(dout), torch.empty_like(w1), torch.empty_like(w2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *kept, ctx.by = inputs
    ctx.save_for_backward(*kept, output[1])


def _gradients(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_mlp_backward(dout.contiguous(), *ctx.saved_tensors, ctx.by), None


_mlp.register_autograd(_gradients, setup_context=_keep)


def mlp(x: Tensor, w1: Tensor, w2: Tensor, by: str = "triton") -> Tensor:
    """(..., C) -> (..., C) through F hidden units. w1 (F, C), w2 (C, F); all bfloat16 or all float16.

    by: what makes the two products with the squared ReLU beside them, "triton" or "torch".

    Within a layer kernels/lean.py has it, with the norm before it and the sum behind it.
    Proofs may have it all in float32, and the interpreter in float64.
    """
    found = {x.dtype, w1.dtype, w2.dtype}
    if len(found) > 1 or not (x.dtype in (torch.bfloat16, torch.float16, torch.float32) or interpreted()):
        raise TypeError(f"mlp takes x, w1 and w2 all in bfloat16 or all in float16, not {found}")
    if by not in ("triton", "torch"):
        raise ValueError(f"mlp multiplies by triton or torch, not by {by!r}")
    out, _ = _mlp(x.reshape(-1, x.shape[-1]).contiguous(), w1.contiguous(), w2.contiguous(), by)
    return out.view(x.shape)


def reference(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The same in plain torch, any dtype."""
    return (x @ w1.T).relu().square() @ w2.T
