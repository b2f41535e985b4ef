"""A linear layer by FP8 tensor cores, with a scale of its own for every token and every output channel.

With s_i = max_k |x_ik| / 448 for each token i, t_j = max_k |w_jk| / 448 for each output channel j, and e4m3 rounding
to 4 exponent and 3 mantissa bits (Micikevicius et al. 2022):

    y_ij = s_i t_j sum_k e4m3(x_ik / s_i) e4m3(w_jk / t_j)        summed in float32

Scales per token, because a recipe is scored by what it predicts from the past alone: one scale for a whole tensor would
let a large later token coarsen the rounding of all earlier ones, and so move their logits.

Backward: dx by the same product (tokens of dy, columns of w), dw in the inputs' dtype. The shipped recipe does not use
it; it is for recipes to try. Needs sm_89 or newer, whose product is torch._scaled_mm; elsewhere `linear` refuses and
`reference` computes the same in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST = 448.0  # of e4m3
TINIEST = 1e-12  # keeps a token of zeros from dividing by zero
LEAST_CAPABILITY = (8, 9)
MULTIPLE = 16  # of channels, in and out, that the product takes


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> e4m3 (M, K) and float32 scales (M, 1): x is about the one times the other."""
    wide = x.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(TINIEST) / LARGEST
    return (wide / scale).to(torch.float8_e4m3fn), scale


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K), (N, K) -> a b^T (M, N) in a's dtype, each row of both with a scale of its own."""
    (qa, sa), (qb, sb) = quantised(a), quantised(b)
    if not a.is_cuda:
        return ((qa.float() @ qb.float().T) * sa * sb.T).to(a.dtype)
    # the product that takes a scale per row writes bfloat16 only
    y = torch._scaled_mm(qa, qb.T, scale_a=sa, scale_b=sb.T.contiguous(), out_dtype=torch.bfloat16)
    return y.to(a.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return product(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        dy = dy.contiguous()
        return product(dy, w.T.contiguous()), dy.T @ x


def linear(x: Tensor, w: Tensor) -> Tensor:
    """(..., K), (N, K), one dtype -> (..., N) in it. ValueError where the card or the sizes have no such product."""
    if why := obstacle(x, w):
        raise ValueError(why)
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), w)
    return y.view(*x.shape[:-1], len(w))


def obstacle(x: Tensor, w: Tensor) -> str:
    """Why `linear` cannot do this, or ""."""
    if w.dim() != 2 or x.shape[-1] != w.shape[1] or x.dtype != w.dtype:
        return (
            f"x (..., K) and w (N, K) of one dtype wanted, not {tuple(x.shape)} {x.dtype}, {tuple(w.shape)} {w.dtype}"
        )
    if w.shape[0] % MULTIPLE or w.shape[1] % MULTIPLE:
        return f"FP8 products take channels by the {MULTIPLE}, not a weight of {tuple(w.shape)}"
    if x.is_cuda and (capability := torch.cuda.get_device_capability(x.device)) < LEAST_CAPABILITY:
        return f"FP8 needs sm_89 or newer, not sm_{capability[0]}{capability[1]}; use F.linear"
    return ""


def reference(x: Tensor, w: Tensor) -> Tensor:
    """y in float64, written out: each operand rounded to the nearest of e4m3's values, found by its exponent."""
    y = _rounded(x.reshape(-1, x.shape[-1]).double()) @ _rounded(w.double()).T
    return y.view(*x.shape[:-1], len(w))


def _rounded(x: Tensor) -> Tensor:
    """(M, K) float64 -> what it becomes in e4m3 under a scale per row, scaled back."""
    scale = (x.abs().amax(dim=1, keepdim=True).clamp_min(TINIEST) / LARGEST).float().double()
    y = x / scale
    exponent = torch.floor(torch.log2(y.abs().clamp_min(2.0**-30))).clamp_min(-6)  # below 2^-6 numbers are subnormal
    step = 2.0 ** (exponent - 3)
    return torch.round(y / step) * step * scale
