"""Muon over stacks of matrices: momentum, Polar Express orthogonalisation, NorMuon's scaling, cautious weight decay.

With stacked weights W (L, m, n), gradients G, momentum M, rates lr, mu, wd:

    M <- mu M + (1 - mu) G    U = mu M + (1 - mu) G    X = U / (1.02 |U| + 1e-6), the small side first
    X <- a X + (b A + c A A) X, A = X X^T              five times, with the coefficients below (Amsel et al. 2025)
    s = mean of X^2 over the longer side's axis        v <- beta2 v + (1 - beta2) s
    X <- X rsqrt(v) sqrt(sum(s) / sum(s / v))          (Li et al. 2025: NorMuon)
    W <- W - lr max(1, m/n)^0.5 X - lr max(1, m/n)^0.5 wd W where X W >= 0

A and b A + c A A are symmetric: only the tiles on and below the diagonal are computed, each stored twice. What is
elementwise is two kernels, momentum with |U|^2 and the update of W; the means of squares are a third and the scalar of
each matrix a fourth.

The rates are a tensor on the device: neither a compiled nor a captured graph then holds them as constants.

There is no AdamW here: torch's own fused kernel, `torch._fused_adamw_`, takes all parameters that share their rates
in one launch, reading and writing each array once, which leaves nothing to gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import plain
from kernels.plain import FLOOR, POLAR_EXPRESS
from kernels.targets import choose, dot, interpreted


@dataclass(frozen=True)
class Tiles:
    """One program makes side x side of a symmetric product, k of the inner dimension per step."""

    side: int
    k: int
    warps: int
    stages: int


# sm_75 has no entry: Triton (3.8) makes no use of that card's tensor cores, so its products are torch's.
SYMMETRIC = {
    80: Tiles(128, 64, warps=8, stages=3),
    86: Tiles(128, 64, warps=8, stages=3),
    89: Tiles(128, 64, warps=8, stages=3),
    90: Tiles(128, 64, warps=8, stages=4),
    100: Tiles(128, 64, warps=8, stages=4),
    120: Tiles(128, 64, warps=8, stages=3),
}
ODD = Tiles(64, 32, warps=4, stages=2)  # for sizes that do not divide: larger tiles would spill on every card
# What works elementwise has the same tiles on every card: it is bound by memory, and has no tiles in shared memory.
FLAT = 2048  # elements of a program, 4 warps
KEPT, REDUCED = 16, 128  # of the means of squares
UPDATED = (16, 128)  # rows and columns of the update


@triton.jit
def _symmetric(
    X, D, OUT, m, n, stride_l, stride_m, stride_n, alpha, beta,
    ADD: tl.constexpr, EVEN_K: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
    SIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """OUT (L, m, m) = alpha X X^T + beta D, X (L, m, n) of any strides, D (L, m, m) symmetric."""
    tile = tl.program_id(0)  # i (i + 1) / 2 + j, j <= i
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    i -= (i * (i + 1) // 2 > tile).to(tl.int32)  # a root rounded up, or down
    i += ((i + 1) * (i + 2) // 2 <= tile).to(tl.int32)
    j = tile - i * (i + 1) // 2
    matrix = tl.program_id(1).to(tl.int64)
    rows = i * SIDE + tl.arange(0, SIDE)
    columns = j * SIDE + tl.arange(0, SIDE)
    inner = tl.arange(0, BLOCK_K)
    left = X + matrix * stride_l + (rows % m)[:, None] * stride_m + inner[None, :] * stride_n
    right = X + matrix * stride_l + (columns % m)[None, :] * stride_m + inner[:, None] * stride_n
    acc = tl.zeros((SIDE, SIDE), dtype=ACC)
    for k in range(0, n, BLOCK_K):
        if EVEN_K:
            acc = dot(tl.load(left), tl.load(right), acc, WIDEN)
        else:
            a = tl.load(left, mask=inner[None, :] < n - k, other=0.0)
            b = tl.load(right, mask=inner[:, None] < n - k, other=0.0)
            acc = dot(a, b, acc, WIDEN)
        left += BLOCK_K * stride_n
        right += BLOCK_K * stride_n
    inside = (rows < m)[:, None] & (columns < m)[None, :]
    at = matrix * m * m + rows[:, None] * m + columns[None, :]
    acc *= alpha
    if ADD:
        acc += beta * tl.load(D + at, mask=inside, other=0.0).to(ACC)
    found = acc.to(OUT.dtype.element_ty)
    tl.store(OUT + at, found, mask=inside)
    if i != j:
        mirrored = matrix * m * m + columns[:, None] * m + rows[None, :]
        tl.store(OUT + mirrored, tl.trans(found), mask=(columns < m)[:, None] & (rows < m)[None, :])


@triton.jit
def _momentum(G, M, SQUARES, RATES, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """M <- mu M + (1 - mu) G, then G <- mu M + (1 - mu) G. G, M (L, size). SQUARES (L, blocks): parts of |G|^2."""
    mu = tl.load(RATES + 1).to(ACC)
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = here < size
    at = tl.program_id(1).to(tl.int64) * size + here
    g = tl.load(G + at, mask=inside, other=0.0).to(ACC)
    m = tl.load(M + at, mask=inside, other=0.0).to(ACC)
    m += (1 - mu) * (g - m)
    u = m + (1 - mu) * (g - m)
    tl.store(M + at, m, mask=inside)
    tl.store(G + at, u, mask=inside)
    tl.store(SQUARES + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(u * u))


@triton.jit
def _means(
    X, MEANS, SECOND, R, D, stride_l, stride_r, stride_d, beta2,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """MEANS (L, R) = mean of X^2 over D, X (L, R, D) of any strides; SECOND (L, R) moves towards it by 1 - beta2."""
    matrix = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    x = X + matrix * stride_l + rows[:, None] * stride_r + columns[None, :] * stride_d
    total = tl.zeros((BLOCK_R, BLOCK_D), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        inside = (rows < R)[:, None] & (columns < D - start)[None, :]
        v = tl.load(x, mask=inside, other=0.0).to(ACC)
        total += v * v
        x += BLOCK_D * stride_d
    mean = tl.sum(total, 1) / D
    at = matrix * R + rows
    second = tl.load(SECOND + at, mask=rows < R, other=0.0).to(ACC)
    tl.store(SECOND + at, second + (1 - beta2) * (mean - second), mask=rows < R)
    tl.store(MEANS + at, mean, mask=rows < R)


@triton.jit
def _length(MEANS, SECOND, LENGTHS, R, floor, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """LENGTHS (L,): what restores the length of a whole matrix after the division by sqrt(SECOND)."""
    matrix = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), dtype=ACC)
    after = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(0, R, BLOCK):
        at = matrix * R + start + columns
        mean = tl.load(MEANS + at, mask=columns < R - start, other=0.0).to(ACC)
        second = tl.load(SECOND + at, mask=columns < R - start, other=1.0).to(ACC)
        before += mean
        after += mean / tl.maximum(second, floor)
    tl.store(LENGTHS + matrix, tl.sqrt(tl.sum(before)) / tl.maximum(tl.sqrt(tl.sum(after)), floor))


@triton.jit
def _update(
    W, X, SECOND, LENGTHS, RATES, m, n, stride_l, stride_m, stride_n, boost, floor,
    PER_ROW: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W (L, m, n) -= lr x + lr wd W where x W >= 0, x = X scaled. SECOND (L, m) if PER_ROW, else (L, n)."""
    lr = tl.load(RATES).to(ACC) * boost
    decay = lr * tl.load(RATES + 2).to(ACC)
    matrix = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(n, BLOCK_N)
    rows = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    if PER_ROW:
        second = tl.load(SECOND + matrix * m + rows, mask=rows < m, other=1.0).to(ACC)[:, None]
    else:
        second = tl.load(SECOND + matrix * n + columns, mask=columns < n, other=1.0).to(ACC)[None, :]
    scale = tl.rsqrt(tl.maximum(second, floor)) * tl.load(LENGTHS + matrix).to(ACC)
    from_ = X + matrix * stride_l + rows[:, None] * stride_m + columns[None, :] * stride_n
    x = tl.load(from_, mask=inside, other=0.0).to(ACC) * scale
    at = W + matrix * m * n + rows[:, None] * n + columns[None, :]
    w = tl.load(at, mask=inside, other=0.0).to(ACC)
    tl.store(at, w - lr * x - tl.where(x * w >= 0, decay * w, 0.0), mask=inside)


def _accumulator(x: Tensor) -> tuple[Any, torch.dtype]:
    return (tl.float64, torch.float64) if x.dtype == torch.float64 else (tl.float32, torch.float32)


def launch_symmetric(x: Tensor, d: Tensor | None, alpha: float, beta: float, tiles: Tiles | None) -> Tensor:
    """alpha x x^T + beta d, x (L, m, n), d (L, m, m) contiguous. Without tiles, in plain torch."""
    L, m, n = x.shape
    if tiles is None:
        return alpha * (x @ x.mT) if d is None else torch.baddbmm(d, x, x.mT, beta=beta, alpha=alpha)
    even = n % tiles.k == 0 and m % 16 == 0
    tiles = tiles if even else ODD
    out = torch.empty(L, m, m, dtype=x.dtype, device=x.device)
    down = triton.cdiv(m, tiles.side)
    kind = {"ADD": d is not None, "EVEN_K": even, "ACC": _accumulator(x)[0], "WIDEN": interpreted()}
    _symmetric[(down * (down + 1) // 2, L)](
        x, d, out, m, n, *x.stride(), alpha, beta, **kind,
        SIDE=tiles.side, BLOCK_K=tiles.k, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


@torch.library.custom_op("autoresearch::polar_express", mutates_args=())
def polar_express(x: Tensor, steps: int = len(POLAR_EXPRESS)) -> Tensor:
    """(L, m, n) with m <= n and singular values of 1 at most -> the nearest semi-orthogonal matrices, about.

    In x's dtype; bfloat16, or float32 where torch multiplies. Has no gradient.
    """
    wide = x.dtype not in (torch.bfloat16, torch.float16) and not interpreted()
    tiles = None if wide else choose(SYMMETRIC, x)
    if steps < 1:
        raise ValueError("polar_express takes one step at least")
    for a, b, c in POLAR_EXPRESS[:steps]:
        A = launch_symmetric(x, None, 1.0, 0.0, tiles)
        B = launch_symmetric(A, A, c, b, tiles)
        x = torch.baddbmm(x, B, x, beta=a)
    return x


@polar_express.register_fake
def _(x: Tensor, steps: int = len(POLAR_EXPRESS)) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def orthogonalise(g: Tensor, length: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """g (L, m, n) and its lengths (L,) -> semi-orthogonal, in `dtype`; of tall matrices the transpose of that laid out.

    Both kinds of layout are (L, m, n) to whoever goes by the strides.
    """
    tall = g.shape[1] > g.shape[2]
    x = torch.empty(g.shape, dtype=dtype, device=g.device)
    torch.div(g, (length * 1.02 + 1e-6)[:, None, None], out=x)
    x = polar_express(x.mT if tall else x, steps)
    return x.mT if tall else x


def _normalised_update(weights: Tensor, x: Tensor, second: Tensor, rates: Tensor, beta2: float) -> None:
    """NorMuon's scaling of x and the update of the weights, both (L, m, n)."""
    L, m, n = weights.shape
    per_row, (acc, wide) = m >= n, _accumulator(weights)
    R, D = (m, n) if per_row else (n, m)
    strides = x.stride() if per_row else x.mT.stride()
    means = torch.empty(L, R, dtype=wide, device=x.device)
    lengths = torch.empty(L, dtype=wide, device=x.device)
    grid = (triton.cdiv(R, KEPT), L)
    _means[grid](x, means, second, R, D, *strides, beta2, ACC=acc, BLOCK_R=KEPT, BLOCK_D=REDUCED)
    _length[(L,)](means, second, lengths, R, FLOOR, ACC=acc, BLOCK=1024)
    boost = max(1.0, m / n) ** 0.5
    tile = {"BLOCK_M": UPDATED[0], "BLOCK_N": UPDATED[1]}
    grid = (triton.cdiv(m, UPDATED[0]) * triton.cdiv(n, UPDATED[1]), L)
    _update[grid](weights, x, second, lengths, rates, m, n, *x.stride(), boost, FLOOR, PER_ROW=per_row, ACC=acc, **tile)


@torch.library.custom_op("autoresearch::muon_", mutates_args=("weights", "grads", "momentum", "second"))
def muon_(
    weights: Tensor,  # (L, m, n) float32, contiguous, as grads and momentum: changed
    grads: Tensor,  # (L, m, n): used up
    momentum: Tensor,  # (L, m, n): changed
    second: Tensor,  # (L, m, 1) if m >= n, else (L, 1, n), float32, contiguous: changed
    rates: Tensor,  # (3,) float32 on the same device: lr, momentum, weight decay
    dtype: torch.dtype,  # of the orthogonalisation
    beta2: float = 0.95,  # decay of the second moment
    steps: int = 5,  # iterations of the orthogonalisation
) -> None:
    """One step of Muon, as in the module's docstring, over all matrices of one shape."""
    L, m, n = weights.shape
    if not all(t.is_contiguous() for t in (weights, grads, momentum, second)):
        raise ValueError("muon_ takes contiguous stacks")
    if not weights.dtype == grads.dtype == momentum.dtype == second.dtype:
        raise TypeError("muon_ takes weights, gradients and both moments in one dtype")
    if second.numel() != L * max(m, n):
        raise ValueError(f"the second moment has shape {tuple(second.shape)}, needed are {L} x {max(m, n)} elements")
    acc, wide = _accumulator(weights)
    count = triton.cdiv(m * n, FLAT)
    squares = torch.empty(L, count, dtype=wide, device=weights.device)
    _momentum[(count, L)](grads, momentum, squares, rates, m * n, ACC=acc, BLOCK=FLAT)
    x = orthogonalise(grads, squares.sum(1).sqrt(), dtype, steps)
    _normalised_update(weights, x, second, rates, beta2)


@muon_.register_fake
def _(
    weights: Tensor,
    grads: Tensor,
    momentum: Tensor,
    second: Tensor,
    rates: Tensor,
    dtype: torch.dtype,
    beta2: float = 0.95,
    steps: int = 5,
) -> None:
    return None


def reference_orthogonalise(g: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """(L, m, n) -> semi-orthogonal, in plain torch, in `dtype` and back."""
    x = g.mT if g.shape[1] > g.shape[2] else g
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)).to(dtype)
    for a, b, c in POLAR_EXPRESS[:steps]:
        A = x @ x.mT
        x = a * x + (b * A + c * (A @ A)) @ x
    return (x.mT if g.shape[1] > g.shape[2] else x).to(g.dtype)


def reference(
    weights: Tensor,
    grads: Tensor,
    momentum: Tensor,
    second: Tensor,
    rates: Tensor,
    dtype: torch.dtype,
    beta2: float = 0.95,
    steps: int = 5,
) -> None:
    """The same as muon_ in plain torch, any dtype."""
    plain.muon_(weights, grads, momentum, second, rates, dtype, beta2, steps, reference_orthogonalise)
