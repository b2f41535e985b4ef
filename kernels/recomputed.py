"""The parts of a layer that keep less for their backward than they read, and compute the rest again.

    embedded_norm    norm(table[token]) - keeps the tokens
    qkv_of_norm      z = y w^T, its last third plus 2 sigmoid(y[:G] gate^T) table[token] head by head, in one tensor,
                     with y = norm(a x + b x0) - keeps x and x0, which the norm keeps anyway, and not y

norm(x) = x / sqrt(mean(x^2) + 2^-23), as in kernels/residual_norm.py. Each is one operation each way for torch.compile,
its temporaries gone when it ends: the compiler would find that what is made again was there before, and keep it, and
would put the product of dw off, and keep for it what the next layers no longer need. q, k and v stay one tensor through
attention (`attention_choice.Choice.packed`), where the compiler would copy all three together in each backward. Value
embeddings: Zhou et al. 2024, gated as in nanochat.

Shapes: N tokens, C channels, O = 3 C outputs, H heads of D channels, G channels of the gate, V table entries.
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


class _QkvOfNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, w: Tensor, gate: Any, table: Any, tokens: Tensor, x: Tensor, x0: Tensor, a: Tensor,
        b: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(w, gate, table, tokens, x, x0, a, b)
        return qkv(y, w, gate, table, tokens)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dy, dw, dgate, dtable = qkv_backward(dz.contiguous(), *ctx.saved_tensors)
        rest = (None, None) if ctx.saved_tensors[2] is None else (dgate, dtable)
        return dy, dw, *rest, None, None, None, None, None


def qkv_of_norm(
    y: Tensor,  # (..., C) norm(a x + b x0), whose gradient goes to it as ever
    w: Tensor,  # (3C, C) in y's dtype: c_q, c_k, c_v
    gate: Tensor | None,  # (H, G) in y's dtype
    table: Tensor | None,  # (V, C) float32 value embeddings; None for a layer without, then no gate either
    tokens: Tensor,  # (...) integers
    x: Tensor,  # (..., C)
    x0: Tensor,
    a: Tensor,  # one element
    b: Tensor,
) -> Tensor:
    """-> q, k and v side by side, (..., 3C)."""
    if (gate is None) != (table is None):
        raise ValueError("qkv_of_norm takes both a gate and a table of value embeddings, or neither")
    rows = [t.reshape(-1, t.shape[-1]) for t in (y, x.detach(), x0.detach())]
    z: Tensor = _QkvOfNorm.apply(rows[0], w, gate, table, tokens.flatten(), *rows[1:], a.detach(), b.detach())
    return z.view(*y.shape[:-1], -1)


@torch.library.custom_op("autoresearch::qkv", mutates_args=())
def qkv(y: Tensor, w: Tensor, gate: Tensor | None, table: Tensor | None, tokens: Tensor) -> Tensor:
    z = y @ w.T
    if gate is not None and table is not None:
        portable.add_gated(_values(z, len(gate)), _gates(y, gate), table, tokens)
    return z


@qkv.register_fake
def _(y: Tensor, w: Tensor, gate: Tensor | None, table: Tensor | None, tokens: Tensor) -> Tensor:
    return y.new_empty(len(y), len(w))


@torch.library.custom_op("autoresearch::qkv_backward", mutates_args=())
def qkv_backward(
    dz: Tensor, w: Tensor, gate: Tensor | None, table: Tensor | None, tokens: Tensor, x: Tensor, x0: Tensor,
    a: Tensor, b: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dy, dw, and the gradients of gate and table, which are empty where there are none."""
    y = portable.normed(x, x0, a, b, w.dtype)
    dy, dw = dz @ w, dz.T @ y
    if gate is None or table is None:
        return dy, dw, w.new_empty(0), w.new_empty(0)
    g = _gates(y, gate)
    dg, dtable = portable.add_gated_backward(_values(dz, len(gate)), g, table, tokens)
    du = (dg * g * (1 - g / 2)).to(y.dtype)  # of what the sigmoid got
    dy[:, : gate.size(1)].addmm_(du, gate)
    return dy, dw, du.T @ y[:, : gate.size(1)], dtable


@qkv_backward.register_fake
def _(
    dz: Tensor, w: Tensor, gate: Tensor | None, table: Tensor | None, tokens: Tensor, x: Tensor, x0: Tensor,
    a: Tensor, b: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dgate, dtable = (w.new_empty(0) if t is None else torch.empty_like(t) for t in (gate, table))
    return dz.new_empty(x.shape), torch.empty_like(w), dgate, dtable


def _values(z: Tensor, heads: int) -> Tensor:
    """(N, 3C) -> v, (N, H, D), a view."""
    return z[:, -(z.size(1) // 3) :].unflatten(1, (heads, -1))


def _gates(y: Tensor, gate: Tensor) -> Tensor:
    """(N, C), (H, G) -> (N, H) within 0..2."""
    return 2 * torch.sigmoid(y[:, : gate.size(1)] @ gate.T)
