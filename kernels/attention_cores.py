"""Attention by others' kernels, on queries and keys that ours have normed and turned: FlashAttention 3's, and cuDNN's
and FlashAttention 2's, which PyTorch brings along.

    y = softmax(scale q^ k^T over the keys j with 0 <= i - j <= window) v       q^, k^: kernels/rotated_norm.py

Theirs know neither QK-norm nor RoPE. What stands here is around them what kernels/attention.py has inside: q^ and k^
are made in one pass over memory, and with one float32 a head they are all that is kept of q and k; the gradients are
turned back in one pass, too. `attended` and `gradients` are for kernels/lean.py, within whose operations torch.compile
keeps nothing of its own: there q^ and k^ take the place of q and k. `attention` stands by itself.

Shapes: B rows, T tokens, H query heads, G key heads, D channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import attention_flash, portable
from kernels.attention_reference import rows_of, within

Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Core:
    """One of them. Its tensors are (B, T, H, D) and (B, T, G, D), a head's channels side by side."""

    # q^, k^, v, window, scale -> y, contiguous, and what its backward needs beside these
    forward: Callable[[Tensor, Tensor, Tensor, int, float], tuple[Tensor, list[Tensor]]]
    # dy, q^, k^, v, y, that, window, scale, where the gradients may go -> those of q^, k^ and v, there or elsewhere
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], int, float, Three], Three]
    # what the forward returns, in the same form, for tensors that have a shape only
    shapes: Callable[[Tensor, Tensor, Tensor, int, float], tuple[Tensor, list[Tensor]]]


# --- PyTorch's own: what scaled_dot_product_attention takes where sdpa_kernel names one, with these arguments --------
# They are called by themselves because a backward of their own is wanted, within an operation.


def _whole_context(name: str, window: int, length: int) -> None:
    if window < length - 1:
        raise ValueError(f"{name} knows no windows; {window} of {length} tokens asked for")


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """(B, T, H, D) -> (B, H, T, D), views."""
    return [x.transpose(1, 2) for x in tensors]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, list[Tensor]]:
    _whole_context("cuDNN", window, q.size(1))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    # no bias, with what a backward needs, no dropout, causal
    y, sums, *_, seed, offset, _ = attend(*_heads_first(q, k, v), None, True, 0.0, True, False, scale=scale)
    return y.transpose(1, 2).contiguous(), [sums, seed, offset]


def _cudnn_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, kept: list[Tensor], window: int, scale: float, into: Three
) -> Three:
    T, given = q.size(1), _heads_first(dy, q, k, v, y)
    of = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
    dq, dk, dv = of(*given, *kept, None, None, None, T, T, 0.0, True, scale=scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, list[Tensor]]:
    _whole_context("torch's flash attention", window, q.size(1))
    ops, given = torch.ops.aten, _heads_first(q, k, v)
    if q.device.type == "cpu":
        y, *kept = ops._scaled_dot_product_flash_attention_for_cpu.default(*given, 0.0, True, scale=scale)
    else:
        y, sums, *_, seed, offset, _ = ops._scaled_dot_product_flash_attention.default(*given, 0.0, True, scale=scale)
        kept = [sums, seed, offset]
    return y.transpose(1, 2).contiguous(), kept


def _flash_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, kept: list[Tensor], window: int, scale: float, into: Three
) -> Three:
    T, ops, given = q.size(1), torch.ops.aten, _heads_first(dy, q, k, v, y)
    if q.device.type == "cpu":
        of = ops._scaled_dot_product_flash_attention_for_cpu_backward.default
        dq, dk, dv = of(*given, *kept, 0.0, True, scale=scale)
    else:
        sums, seed, offset = kept
        of = ops._scaled_dot_product_flash_attention_backward.default
        dq, dk, dv = of(*given, sums, None, None, T, T, 0.0, True, seed, offset, scale=scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


# --- FlashAttention 3 ---------------------------------------------------------------------------


def _flash3(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, list[Tensor]]:
    y, sums = attention_flash.forward(q, k, v, window, scale)
    return y, [sums]


def _flash3_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, kept: list[Tensor], window: int, scale: float, into: Three
) -> Three:
    (sums,) = kept
    attention_flash.backward(dy, q, k, v, y, sums, into, window, scale)
    return into


def _flash3_shapes(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, list[Tensor]]:
    return q.new_empty(q.shape), [q.new_empty(q.size(0), q.size(2), q.size(1), dtype=torch.float32)]


CORES = {
    "fa3": Core(_flash3, _flash3_backward, _flash3_shapes),
    "cudnn": Core(_cudnn, _cudnn_backward, _cudnn),
    "flash": Core(_flash, _flash_backward, _flash),
}


# --- with QK-norm and RoPE around them. Without gradients ------------------------------------------


def attended(
    q: Tensor,  # (B, T, H, D), as k and v with a head's channels side by side
    k: Tensor,  # (B, T, G, D)
    v: Tensor,  # (B, T, G, D)
    out: tuple[Tensor, Tensor],  # where q^ and k^ go; q and k will do, which are then used up
    cos: Tensor,  # (T or more, D/2) float32
    sin: Tensor,
    window: int,
    by: str,
    scale: float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """y, contiguous, and what `gradients` needs beside q^, k^, v and it: of q and of k the r of
    kernels/rotated_norm.py, (B, H, T) and (B, G, T), and the core's own."""
    T, (window, scale) = q.size(1), _limited(q, window, scale)
    cos, sin = cos[:T].contiguous(), sin[:T].contiguous()
    turns = [portable.rotated(x, turned, cos, sin) for x, turned in zip((q, k), out, strict=True)]
    y, kept = CORES[by].forward(*out, v, window, scale)
    return y, [*turns, *kept]


def gradients(
    dy: Tensor, y: Tensor, q: Tensor, k: Tensor, v: Tensor, beside: list[Tensor], cos: Tensor, sin: Tensor, window: int,
    into: Three, by: str, scale: float | None = None,
) -> None:  # fmt: skip
    """dq and dk of what became q^ and k^, which are q and k here, and dv, go to `into`."""
    T, (window, scale) = q.size(1), _limited(q, window, scale)
    cos, sin = cos[:T].contiguous(), sin[:T].contiguous()
    found = CORES[by].backward(dy, q, k, v, y, beside[2:], window, scale, into)
    for d, turned, r, out in zip(found, (q, k), beside, into):  # dv is none of them
        portable.rotated_back(d, turned, r, out, cos, sin)
    if found[2] is not into[2]:
        into[2].copy_(found[2])


def shapes(
    q: Tensor, k: Tensor, v: Tensor, window: int, by: str, scale: float | None = None
) -> tuple[Tensor, list[Tensor]]:
    """As `attended`, for tensors that have a shape only."""
    window, scale = _limited(q, window, scale)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    turns = [x.new_empty((x.size(0), x.size(2), x.size(1)), dtype=wide) for x in (q, k)]
    y, kept = CORES[by].shapes(q, k, v, window, scale)
    return y, [*turns, *kept]


def _limited(q: Tensor, window: int, scale: float | None) -> tuple[int, float]:
    return within(window, q.size(1)), q.size(-1) ** -0.5 if scale is None else scale


# --- by itself ------------------------------------------------------------------------------------


@torch.library.custom_op("autoresearch::attention_by", mutates_args=())
def _by(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float, by: str
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """y, q^ and k^, and what their backward needs beside them."""
    turned, keys = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    y, beside = attended(rows_of(q), rows_of(k), rows_of(v), (turned, keys), cos, sin, window, by, scale)
    _as_told(by, window, scale, (turned, keys, rows_of(v)), [y, *beside])
    return y, turned, keys, beside


def _as_told(by: str, window: int, scale: float, given: Three, found: list[Tensor]) -> None:
    """RuntimeError where a core made other tensors than `shapes` tells torch.compile of. By itself it would not matter;
    in a recipe's graph it ends the first step, and by itself is how one is tried before a recipe takes it."""
    wanted = _told(by, window, scale, *(_form(x) for x in given), given[0].device)
    made = [_form(x) for x in found]
    if made != wanted:
        raise RuntimeError(f"{by} made {made}; of this torch {wanted} are known here (shape, strides, dtype)")


Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def _form(x: Tensor) -> Form:
    """Shape, strides and dtype. What one element lies apart from no other is nothing: 1."""
    return tuple(x.shape), tuple(s if n > 1 else 1 for n, s in zip(x.shape, x.stride(), strict=True)), x.dtype


@functools.cache
def _told(by: str, window: int, scale: float, q: Form, k: Form, v: Form, device: torch.device) -> list[Form]:
    with FakeTensorMode():
        made = [torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in (q, k, v)]
        y, beside = shapes(made[0], made[1], made[2], window, by, scale)
        return [_form(x) for x in (y, *beside)]


@_by.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float, by: str
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    turned, keys = q.new_empty(q.shape), k.new_empty(k.shape)
    y, beside = shapes(turned, keys, v, window, by, scale)
    return y, turned, keys, beside


@torch.library.custom_op("autoresearch::attention_by_backward", mutates_args=())
def _by_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, y: Tensor, beside: list[Tensor], window: int,
    scale: float, by: str,
) -> Three:  # fmt: skip
    dq, dk, dv = into = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    gradients(rows_of(dy), y, q, k, rows_of(v), beside, cos, sin, window, into, by, scale)
    return dq, dk, dv


@_by_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, y: Tensor, beside: list[Tensor], window: int,
    scale: float, by: str,
) -> Three:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, v, cos, sin, ctx.window, ctx.scale, ctx.by = inputs
    y, turned, keys, beside = output
    ctx.save_for_backward(turned, keys, v, cos, sin, y, *beside)


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, cos, sin, y, *beside = ctx.saved_tensors
    found = _by_backward(dy, q, k, v, cos, sin, y, beside, ctx.window, ctx.scale, ctx.by)
    return (*found, None, None, None, None, None)


_by.register_autograd(_differentiate, setup_context=_keep)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float | None = None, *, by: str
) -> Tensor:
    """As kernels/attention.py's `attention`, by one of CORES: y (B, T, H, D); gradients for q, k and v.

    ValueError for a window where the core knows none, and for one below 0.
    """
    window, scale = _limited(q, window, scale)
    y: Tensor = _by(q, k, v, cos, sin, window, scale, by)[0]
    return y
