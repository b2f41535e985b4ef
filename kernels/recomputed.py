"""norm(table[token]), which keeps the tokens for its backward and neither the rows nor their norms.

norm(x) = x / sqrt(mean(x^2) + 2^-23), as in kernels/residual_norm.py. It is one operation each way for torch.compile,
which would find that what is made again was there before, and keep it.

Shapes: N tokens, C channels, V table entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import portable


@torch.library.custom_op("autoresearch::embedded_norm", mutates_args=())
def _embedded_norm(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    return portable.embedded_norm(tokens, table, dtype)


@_embedded_norm.register_fake
def _(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    return table.new_empty(len(tokens), table.size(1), dtype=dtype)


@torch.library.custom_op("autoresearch::embedded_norm_backward", mutates_args=())
def _embedded_norm_backward(dn: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
    return portable.embedded_norm_backward(dn, tokens, table)


@_embedded_norm_backward.register_fake
def _(dn: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(table)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradient(ctx: Any, dn: Tensor) -> tuple[Tensor | None, ...]:
    return None, _embedded_norm_backward(dn, *ctx.saved_tensors), None


_embedded_norm.register_autograd(_gradient, setup_context=_keep)


def embedded_norm(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """(...) tokens, (V, C) float32 -> norm(table[token]), (..., C) in `dtype`."""
    found: Tensor = _embedded_norm(tokens.flatten(), table, dtype)
    return found.view(*tokens.shape, -1)
