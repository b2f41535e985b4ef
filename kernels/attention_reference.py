"""What kernels/attention.py computes, in plain torch: the definition that its tests hold it to, and the fallback.

In any dtype, with the whole (T, T) matrix of scores in memory. Needs no Triton.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 2.0**-23  # float32's machine epsilon, added to the mean square


def rows_of(x: Tensor) -> Tensor:
    """x, copied if the channels of a head do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def within(window: int, length: int) -> int:
    """The window, `length` at most. ValueError below 0."""
    if window < 0:
        raise ValueError(f"window {window}; 0 sees only the token itself, {length - 1} all")
    return min(window, length)


def reference_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x^ in plain torch: (B, T, H, D) -> same shape and dtype; float32 in between, float64 for float64."""
    T, wide = x.size(1), torch.float64 if x.dtype == torch.float64 else torch.float32
    n = x.to(wide)
    n = n * torch.rsqrt(n.square().mean(dim=-1, keepdim=True) + EPSILON)
    a, b = n.chunk(2, dim=-1)
    c, s = cos[:T, None].to(wide), sin[:T, None].to(wide)
    return torch.cat((a * c + b * s, b * c - a * s), dim=-1).to(x.dtype)


def reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float | None = None
) -> Tensor:
    """The same in plain torch, in any dtype, with the whole (T, T) matrix of scores in memory."""
    T, H, D = q.shape[1:]
    scale = D**-0.5 if scale is None else scale
    q, k = reference_rotated(q, cos, sin), reference_rotated(k, cos, sin)
    k, v = (x.repeat_interleave(H // k.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    position = torch.arange(T, device=q.device)
    distance = position[:, None] - position
    scores = scores.masked_fill((distance < 0) | (distance > window), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v)
