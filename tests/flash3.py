"""A stand-in for FlashAttention-3's package in plain torch, under both forms that its inner functions have had."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attention_flash


def scores(q: Tensor, k: Tensor, window: int, scale: float) -> Tensor:
    i = torch.arange(q.size(1))
    seen = (i[:, None] >= i) & (i[:, None] - i <= window)
    return (torch.einsum("bihd,bjhd->bhij", q, k) * scale).masked_fill(~seen, -torch.inf)


def wide(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.size(2) // x.size(2), 2)


def forward(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    q, k, v = q.float(), wide(k, q).float(), wide(v, q).float()
    s = scores(q, k, window, scale)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v).to(dtype), s.logsumexp(-1)


def backward(dy, q, k, v, y, sums, dq, dk, dv, window: int, scale: float) -> None:
    """From y and the logarithms, as the real one."""
    groups, (dy, q, y) = k.size(2), (x.float() for x in (dy, q, y))
    k, v = wide(k, q).float(), wide(v, q).float()
    p = (scores(q, k, window, scale) - sums.unsqueeze(-1)).exp()
    ds = p * (torch.einsum("bihd,bjhd->bhij", dy, v) - (dy * y).sum(-1).transpose(1, 2).unsqueeze(-1))
    dq.copy_(torch.einsum("bhij,bjhd->bihd", ds, k) * scale)
    dk.copy_((torch.einsum("bhij,bihd->bjhd", ds, q) * scale).unflatten(2, (groups, -1)).sum(3))
    dv.copy_(torch.einsum("bhij,bihd->bjhd", p, dy).unflatten(2, (groups, -1)).sum(3))


def older_forward(q, k, v, k_new, cu_seqlens_q, softmax_scale, causal, window_size=(-1, -1), softcap=0.0):
    assert causal is True and k_new is cu_seqlens_q is None and window_size[1] == 0
    return *forward(q, k, v, window_size[0], softmax_scale), None, None


def older_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, dq, dk, dv, softmax_scale, causal,
                   window_size=(-1, -1), deterministic=False):  # fmt: skip
    assert causal is True and cu_seqlens_q is None
    backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, window_size[0], softmax_scale)
    return dq, dk, dv, None


@torch.library.custom_op("stand_in::flash_forward", mutates_args=())
def newer_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, num_splits: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert causal and window_size_right == 0 and softmax_scale is not None
    return *forward(q, k, v, window_size_left, softmax_scale), q.new_empty(0)


@torch.library.custom_op("stand_in::flash_backward", mutates_args=("dq", "dk", "dv"))
def newer_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, cu_seqlens_q: Tensor | None = None,
    dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None, softmax_scale: float | None = None,
    is_causal: bool = False, window_size_left: int = -1, window_size_right: int = -1,
) -> Tensor:  # fmt: skip
    assert is_causal and window_size_right == 0
    backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, window_size_left, softmax_scale)
    return q.new_empty(0)


FORMS = {"older": (older_forward, older_backward), "newer": (newer_forward, newer_backward)}


def stand_in(monkeypatch: pytest.MonkeyPatch, forward_: Any, backward_: Any) -> None:
    module = ModuleType(attention_flash.MODULE)
    module._flash_attn_forward, module._flash_attn_backward = forward_, backward_
    monkeypatch.setitem(sys.modules, attention_flash.MODULE, module)
