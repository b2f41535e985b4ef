"""One signature for causal sliding-window attention with QK-norm and RoPE, and the choice of what stands behind it.

    choice = choose(Case(rows, length, heads, key_heads, head, window, dtype, device))
    y = choice.run(q, k, v, cos, sin, window, scale)      # shapes as in kernels/attention.py
    choice.name, choice.reason, choice.milliseconds       # kept for the log

What cannot do a case says why. None drops a window or puts a dense mask in its place: PyTorch's own kernels, which
know no window, are offered for the whole context only. Without a forced name all that can are timed on the device,
norm and RoPE included, forward and backward; a forced name is taken or refused, never replaced.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention_reference import reference, reference_rotated

HALF = (torch.float16, torch.bfloat16)
REPEATS = 10  # timed runs after WARMUP; their median decides
WARMUP = 3


@dataclass(frozen=True)
class Case:
    """What attention is asked to do."""

    rows: int  # B
    length: int  # T
    heads: int  # H
    key_heads: int  # Hkv
    head: int  # D
    window: int  # tokens seen before a query
    dtype: torch.dtype
    device: torch.device

    @property
    def whole(self) -> bool:
        """Whether every query sees all that came before it."""
        return self.window >= self.length - 1

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 where there is no NVIDIA card."""
        if self.device.type != "cuda":
            return 0
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor


Attention = Callable[..., Tensor]  # (q, k, v, cos, sin, window, scale=None) -> y


@dataclass(frozen=True)
class Choice:
    name: str
    run: Attention
    reason: str
    milliseconds: dict[str, float] = field(default_factory=dict)  # forward and backward, of all that were timed
    refused: dict[str, str] = field(default_factory=dict)  # name -> why it cannot do the case


# --- what stands behind the signature ---------------------------------------------------------


def _triton(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: Any = None) -> Tensor:
    from kernels.attention import attention

    return attention(q, k, v, cos, sin, window, scale)


def _flash3(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: Any = None) -> Tensor:
    return _flash("flash_attn_interface", q, k, v, cos, sin, window, scale)


def _flash4(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: Any = None) -> Tensor:
    return _flash("flash_attn.cute", q, k, v, cos, sin, window, scale)


def _flash(
    module: str, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float | None
) -> Tensor:
    """FlashAttention's Python interface. Some of its versions return (y, lse), some y."""
    function = importlib.import_module(module).flash_attn_func
    q, k = _turn(q, cos, sin), _turn(k, cos, sin)
    found = function(q, k, v, softmax_scale=scale, causal=True, window_size=(min(window, q.size(1)), 0))
    y: Tensor = found[0] if isinstance(found, tuple) else found
    return y


def _sdpa(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float | None
) -> Tensor:
    if window < q.size(1) - 1:
        raise ValueError(f"{backend.name} knows no windows; {window} of {q.size(1)} tokens asked for")
    q, k, v = (x.transpose(1, 2) for x in (_turn(q, cos, sin), _turn(k, cos, sin), v))
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: Any = None) -> Tensor:
    return _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, cos, sin, window, scale)


def _sdpa_flash(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: Any = None) -> Tensor:
    return _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, cos, sin, window, scale)


def _flex(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: Any = None) -> Tensor:
    mask = block_mask(q.size(1), min(window, q.size(1)), q.device)
    q, k, v = (x.transpose(1, 2) for x in (_turn(q, cos, sin), _turn(k, cos, sin), v))
    y: Tensor = _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


@functools.lru_cache(maxsize=16)
def block_mask(length: int, window: int, device: torch.device) -> Any:
    """FlexAttention's list of blocks that are seen wholly, in part or not at all."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j <= window)

    return create_block_mask(seen, None, None, length, length, device=device)


@functools.cache
def _compiled_flex() -> Any:
    """Not compiled, FlexAttention would build the whole matrix of scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _compiled_turn() -> Any:
    return torch.compile(reference_rotated, dynamic=False)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """QK-norm and RoPE for those that do not have them inside: on a card one fused pass."""
    turned: Tensor = (_compiled_turn() if x.is_cuda else reference_rotated)(x, cos, sin)
    return turned


# --- why not ----------------------------------------------------------------------------------


def _no_triton(case: Case) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from kernels.attention import obstacle

    if case.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton compiles for GPUs; the device is {case.device.type}"
    return obstacle(case.capability, case.heads, case.key_heads, case.head, case.dtype)


def _no_flash3(case: Case) -> str:
    if case.capability // 10 != 9:
        return f"FlashAttention-3 is for sm_90, not {_card(case)}"
    return _half(case) or _absent("flash_attn_interface", "flash_attn_3")


def _no_flash4(case: Case) -> str:
    if case.capability // 10 not in (9, 10, 11):
        return f"FlashAttention-4 is for sm_90 and sm_100, not {_card(case)}"
    if case.head not in (64, 96, 128):
        return f"FlashAttention-4 takes heads of 64, 96 and 128 channels, not {case.head}"
    return _half(case) or _absent("flash_attn.cute", "flash-attn-4")


def _no_cudnn(case: Case) -> str:
    if case.capability < 80:
        return f"cuDNN's attention needs sm_80, not {_card(case)}"
    if not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    if case.head % 8 or case.head > 128:
        return f"cuDNN's attention takes heads of 8, 16, .. 128 channels, not {case.head}"
    return _half(case) or _windowless(case)


def _no_sdpa_flash(case: Case) -> str:
    if case.device.type == "cuda" and case.capability < 80:
        return f"torch's flash attention needs sm_80, not {_card(case)}"
    return (_half(case) if case.device.type == "cuda" else "") or _windowless(case)


def _no_flex(case: Case) -> str:
    if case.capability < 80:
        return f"FlexAttention is compiled by Triton for sm_80 and newer, not {_card(case)}"
    return "" if importlib.util.find_spec("triton") else "FlexAttention needs triton, which is not installed"


def _half(case: Case) -> str:
    return "" if case.dtype in HALF else f"takes bf16 and fp16, not {case.dtype}"


def _windowless(case: Case) -> str:
    return "" if case.whole else f"knows no windows; {case.window} of {case.length} tokens asked for"


def _card(case: Case) -> str:
    return f"sm_{case.capability}" if case.capability else case.device.type


def _absent(module: str, package: str) -> str:
    """Looked up without importing: FlashAttention loads its CUDA libraries on import."""
    parent = module.partition(".")[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
        return f"{package} is not installed (no module {module})"
    return ""


IMPLEMENTATIONS: dict[str, tuple[Attention, Callable[[Case], str]]] = {
    "triton": (_triton, _no_triton),
    "fa3": (_flash3, _no_flash3),
    "fa4": (_flash4, _no_flash4),
    "cudnn": (_cudnn, _no_cudnn),
    "flash": (_sdpa_flash, _no_sdpa_flash),
    "flex": (_flex, _no_flex),
    "reference": (reference, lambda case: ""),
}


# --- the choice -------------------------------------------------------------------------------


def available(case: Case) -> dict[str, str]:
    """Name -> "" where it can do the case, else why not."""
    return {name: why_not(case) for name, (_, why_not) in IMPLEMENTATIONS.items()}


def choose(case: Case, forced: str | None = None) -> Choice:
    """The fastest that can do the case, or the forced one. ValueError where a forced one is unknown or cannot."""
    if forced is not None and forced not in IMPLEMENTATIONS:
        raise ValueError(f"no attention called {forced!r}; known: {', '.join(IMPLEMENTATIONS)}")
    found = available(case)
    refused = {name: why for name, why in found.items() if why}
    if forced is not None:
        if refused.get(forced):
            raise ValueError(f"attention {forced!r} cannot do this: {refused[forced]}")
        return Choice(forced, IMPLEMENTATIONS[forced][0], "forced", refused=refused)
    if case.device.type != "cuda":
        reason = f"no device to time the others on ({case.device.type})"
        return Choice("reference", IMPLEMENTATIONS["reference"][0], reason, refused=refused)
    times: dict[str, float] = {}
    for name in (n for n, why in found.items() if not why and n != "reference"):
        try:
            times[name] = milliseconds(IMPLEMENTATIONS[name][0], case)
        except (RuntimeError, ImportError, ValueError, TypeError) as error:  # it said it could, and could not
            refused[name] = f"failed when timed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if not times:
        return Choice("reference", IMPLEMENTATIONS["reference"][0], "nothing else can do this", refused=refused)
    best = min(times, key=times.__getitem__)
    others = ", ".join(f"{name} {ms:.3f}" for name, ms in sorted(times.items(), key=lambda x: x[1]) if name != best)
    reason = f"{times[best]:.3f} ms forward and backward" + (f"; {others}" if others else "; nothing else ran")
    return Choice(best, IMPLEMENTATIONS[best][0], reason, times, refused)


def milliseconds(run: Attention, case: Case) -> float:
    """Median time of a forward and backward on the device, norm and RoPE included."""
    q, k, v, cos, sin = inputs(case)
    dy = torch.randn_like(q)
    times = []
    for i in range(WARMUP + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        y = run(q, k, v, cos, sin, case.window)
        torch.autograd.grad(y, (q, k, v), dy)
        end.record()
        end.synchronize()
        if i >= WARMUP:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v, which want gradients, and the cosines and sines of RoPE at base 10000."""
    rng = torch.Generator(case.device).manual_seed(seed)
    shapes = [(case.rows, case.length, h, case.head) for h in (case.heads, case.key_heads, case.key_heads)]
    q, k, v = (torch.randn(s, generator=rng, device=case.device, dtype=case.dtype).requires_grad_() for s in shapes)
    turns = 10000.0 ** (-torch.arange(0, case.head, 2, device=case.device) / case.head)
    angle = torch.outer(torch.arange(case.length, device=case.device, dtype=torch.float32), turns)
    return q, k, v, angle.cos(), angle.sin()
