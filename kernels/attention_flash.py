"""FlashAttention-3 as operators of torch's, so that torch.compile takes it into one graph with what stands around it.

Its public function calls C++ that torch.compile cannot look into, so the forward and the backward behind it are called
here, each inside an operator with known shapes. These two are not the package's public interface, and their parameters
changed over its versions: `_called` gives each version what it has a name for, and what comes back is checked. A
version that it does not know fails where attention is chosen, and is told there.

Shapes: B rows, T tokens, H query heads, G key heads, D channels of a head.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MODULE = "flash_attn_interface"


def flash3(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None) -> Tensor:
    """(B, T, H, D), (B, T, G, D) twice -> (B, T, H, D); a query sees `window` tokens before it and itself."""
    y, _ = _forward(q, k, v, min(window, q.size(1)), q.size(-1) ** -0.5 if scale is None else scale)
    return y


def load() -> None:
    """Import the package, which loads its CUDA library: ImportError or OSError where that does not fit this torch."""
    importlib.import_module(MODULE)


def _called(name: str, window: int, scale: float, **tensors: Tensor) -> Any:
    """One of the package's inner functions: what it calls `causal` or `is_causal`, one `window_size` or two."""
    function: Callable[..., Any] = getattr(importlib.import_module(MODULE), name)
    taken = inspect.signature(getattr(function, "_init_fn", function)).parameters  # in newer versions an operator too
    if not (taken.keys() & {"causal", "is_causal"} and taken.keys() & {"window_size", "window_size_left"}):
        raise RuntimeError(f"{MODULE}.{name} takes {', '.join(taken)}: no window and mask that are known here")
    sizes = {"window_size": (window, 0), "window_size_left": window, "window_size_right": 0}
    known = {**tensors, **sizes, "softmax_scale": scale, "causal": True, "is_causal": True}
    missing = {n: None for n, parameter in taken.items() if parameter.default is parameter.empty}
    return function(**{**missing, **{n: value for n, value in known.items() if n in taken}})


def forward(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """-> y, and of each query the logarithm of its sum of exponentials (B, H, T), float32. Without gradients."""
    y, sums, *_ = _called("_flash_attn_forward", window, scale, q=q, k=k, v=v)
    wanted = (q.size(0), q.size(2), q.size(1))
    if y.shape != q.shape or sums.shape != wanted or sums.dtype != torch.float32:
        found = f"{tuple(y.shape)} and {sums.dtype} {tuple(sums.shape)}"
        raise RuntimeError(f"{MODULE} gave {found}; {tuple(q.shape)} and float32 {wanted} are known here")
    return y.contiguous(), sums.contiguous()


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, into: tuple[Tensor, Tensor, Tensor],
    window: int, scale: float,
) -> None:  # fmt: skip
    """dq, dk and dv to `into`, of which the channels of a head lie side by side."""
    dq, dk, dv = into
    given = {"dout": dy, "q": q, "k": k, "v": v, "out": y, "softmax_lse": sums, "dq": dq, "dk": dk, "dv": dv}
    _called("_flash_attn_backward", window, scale, **given)


# --- as operators -------------------------------------------------------------------------------


@torch.library.custom_op("autoresearch::flash3", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, window, scale)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.size(0), q.size(2), q.size(1), dtype=torch.float32)


@torch.library.custom_op("autoresearch::flash3_backward", mutates_args=())
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    backward(dy, q, k, v, y, sums, (dq, dk, dv), window, scale)
    return dq, dk, dv


@_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return (*_backward(dy.contiguous(), *ctx.saved_tensors, ctx.window, ctx.scale), None, None)


_forward.register_autograd(_gradients, setup_context=_keep)
