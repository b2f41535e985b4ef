"""One name for each operation of the model, and what stands behind it on this device: Triton's kernels, or torch's.

Triton is missing where `triton-windows` is not installed, fails where it finds no C compiler, and has no tensor-core
path before sm_80. None of that may end a run: `obstacle` says why its kernels are not used, and the same operation in
plain torch (kernels/plain.py, kernels/attention_slices.py) takes their place, with the same gradients and as little
memory. A window is never dropped on the way, and no mask of the whole context is ever made.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import plain
from kernels.errors import out_of_memory

TENSOR_CORES = 80  # the least capability for which Triton (3.8) uses tensor cores


def without_card() -> bool:
    """Whether Triton's kernels take tensors of a CPU: its interpreter runs them. benchmarks/ptx says so of its own."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def obstacle(device: torch.device) -> str:
    """Why Triton's kernels cannot be used on this device; "" if they can. On a card a small one is tried."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return "" if without_card() else f"Triton compiles for GPUs; the device is {device.type}"
    try:
        from kernels.residual_norm import residual_norm

        residual_norm(*torch.ones(2, 16, 32, device=device, dtype=torch.float16))
        torch.cuda.synchronize(device)
    except Exception as error:  # Triton's own share no base but this
        if out_of_memory(error):
            raise
        # No compiler for its launcher, a driver too old for its PTX, a broken installation.
        text = " ".join(str(error).split())[:200]
        return f"triton failed when tried: {type(error).__name__}: {text}"
    return ""


def fused(device: torch.device) -> bool:
    """Whether Triton's kernels for what works element by element are used."""
    return not obstacle(device)


def products(device: torch.device) -> bool:
    """Whether Triton's kernels with matrix products in them are used."""
    return fused(device) and (device.type != "cuda" or _capability(device) >= TENSOR_CORES)


def told(device: torch.device) -> str:
    """What is used on this device and why, in one line."""
    if why := obstacle(device):
        return f"torch: {why}"
    if not products(device):
        return f"triton for norms and loss, torch for products: sm_{_capability(device)} has no tensor cores in Triton"
    return "triton"


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int) -> Tensor:
    """(B, T, H, D) three times -> same: QK-norm, RoPE and causal attention over `window` tokens before a query."""
    if not products(q.device):
        from kernels.attention_slices import attention as by_slices

        return by_slices(q, k, v, cos, sin, window)
    from kernels.attention import attention as by_triton

    return by_triton(q, k, v, cos, sin, window)


def beside(device: torch.device) -> Callable[..., Tensor] | None:
    """What `lean.attend` takes for attention: None for Triton's kernels, where they can be used; else a function, which
    uses up q and k as these do."""
    if products(device):
        return None
    from kernels.attention_slices import attention_ as by_slices

    return by_slices


def rotated(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """QK-norm and RoPE of x (B, T, H, D) to out, which may be x -> r (B, H, T) float32 (kernels/rotated_norm.py).

    cos, sin (T, D/2) float32, contiguous. Without gradients.
    """
    if not fused(x.device):
        return plain.rotated(x, out, cos, sin)
    from kernels.rotated_norm import rotated as by_triton

    with torch.cuda.device_of(x):
        return by_triton(x, out, cos, sin)


def rotated_back(d: Tensor, turned: Tensor, r: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The gradient of x to out, which may be d, given that of what `rotated` made of x, d (B, T, H, D), and that."""
    if not fused(d.device):
        return plain.rotated_back(d, turned, r, out, cos, sin)
    from kernels.rotated_norm import rotated_back as by_triton

    with torch.cuda.device_of(d):
        return by_triton(d, turned, r, out, cos, sin)


def norm(x: Tensor, x0: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, C) rows -> a x + b x0 (x + x0 without scalars) and its RMS norm. Without gradients."""
    if not fused(x.device):
        return plain.norm(x, x0, a, b)
    from kernels.residual_norm import _residual_norm

    found: tuple[Tensor, Tensor] = _residual_norm(x.contiguous(), x0.contiguous(), a, b, x.dtype)
    return found


def normed(x: Tensor, x0: Tensor | None, a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, C) rows -> the norm alone of a x + b x0, or of x where there is no x0, in `dtype`. Without gradients."""
    if not fused(x.device):
        return plain.normed(x, x0, a, b, dtype)
    from kernels.residual_norm import normed as by_triton

    return by_triton(x.contiguous(), x0 if x0 is None else x0.contiguous(), a, b, dtype)


def norm_backward(
    d: Tensor | None,
    dy: Tensor,
    x: Tensor,
    x0: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for `norm`: dx, dx0 (empty without scalars, where it is dx) and (da, db).

    d (None: zeros) and dy are contiguous. x and x0 are what `norm` got; without scalars x is the sum and x0 is None.
    The norm itself goes to y, if there is one; dy will do, which is then used up.
    """
    if not fused(x.device):
        return plain.norm_backward(d, dy, x, x0, a, b, y)
    from kernels.residual_norm import backward

    return backward(d, dy, x.contiguous(), x0, a, b, x.dtype, y)


def scale(z: Tensor) -> Tensor:
    """(N, C) rows -> r (N,) float32: r z is the norm of z. Without gradients."""
    if not fused(z.device):
        return plain.scale(z)
    from kernels.residual_norm import scale as by_triton

    return by_triton(z.contiguous())


def scaled_backward(d: Tensor, rdy: Tensor, z: Tensor) -> Tensor:
    """The gradient of z, given that of itself, d, and r times that of its norm r z, which it takes the place of."""
    if not fused(z.device):
        return plain.scaled_backward(d, rdy, z)
    from kernels.residual_norm import scaled_backward as by_triton

    return by_triton(d, rdy, z)


def embedded_norm(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,), (V, C) float32 -> norm(table[token]), (N, C) in `dtype`. Without gradients."""
    if not fused(table.device):
        return plain.embedded_norm(tokens, table, dtype)
    from kernels.embedded_norm import embedded_norm as by_triton

    return by_triton(tokens, table, dtype)


def embedded_norm_backward(dn: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
    """The table's gradient (V, C) from that of `embedded_norm`, (N, C)."""
    if not fused(table.device):
        return plain.embedded_norm_backward(dn, tokens, table)
    from kernels.embedded_norm import embedded_norm_backward as by_triton

    return by_triton(dn, tokens, table)


def add_gated(v: Tensor, gates: Tensor, table: Tensor, tokens: Tensor) -> None:
    """v (N, H, D) += gates (N, H) times the tokens' (N,) rows of the table (V, H D), in place. Without gradients."""
    if not fused(v.device):
        return plain.add_gated(v, gates, table, tokens)
    from kernels.gated_embedding import add_gated as by_triton

    return by_triton(v, gates, table, tokens)


def add_gated_backward(dv: Tensor, gates: Tensor, table: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for `add_gated`: of the gates (N, H) and of the table (V, H D), in the table's dtype."""
    if not fused(dv.device):
        return plain.add_gated_backward(dv, gates, table, tokens)
    from kernels.gated_embedding import add_gated_backward as by_triton

    return by_triton(dv, gates, table, tokens)


def relu2(x: Tensor, w: Tensor, r: Tensor | None = None, by: str = "triton") -> Tensor:
    """(N, C), (F, C), r (N,) or none -> max(r x w^T, 0)^2, (N, F). by: "torch" for its product and one pass over it,
    "plain" for none of Triton's, also where Triton has products (kernels/mlp_choice.py)."""
    if by == "plain" or not fused(x.device):
        return plain.relu2(x, w, r)
    from kernels.linear_relu2 import relu2 as on_card

    return on_card(x, w, by if products(x.device) else "torch", r)


def relu2_backward(d: Tensor, w2: Tensor, y: Tensor, r: Tensor | None = None, by: str = "triton") -> Tensor:
    """(N, C), (C, F), y (N, F) of `relu2` -> r times the gradient before the square, 2 r sqrt(y) (d w2), (N, F)."""
    if by == "plain" or not fused(d.device):
        return plain.relu2_backward(d, w2, y, r)
    from kernels.linear_relu2 import relu2_backward as on_card

    return on_card(d, w2, y, by if products(d.device) else "torch", r)


def softcapped_loss(x: Tensor, head: Tensor, targets: Tensor, cap: float) -> Tensor:
    """x (..., C), head (V, C) float32, targets (...) -> mean nats, float32 (). Never all logits at once."""
    if not fused(x.device):
        loss: Tensor = plain.SoftcappedLoss.apply(x.reshape(-1, x.shape[-1]), head, targets.flatten(), cap)
        return loss
    from kernels.softcapped_loss import softcapped_loss as by_triton

    return by_triton(x, head, targets, cap)


def muon_(
    weights: Tensor,
    grads: Tensor,
    momentum: Tensor,
    second: Tensor,
    rates: Tensor,
    dtype: torch.dtype,
    beta2: float,
    steps: int,
) -> None:
    """One step of Muon over a stack (L, m, n) of matrices, in place (kernels/muon.py tells what is what)."""
    if not fused(weights.device):
        return plain.muon_(weights, grads, momentum, second, rates, dtype, beta2, steps)
    from kernels.muon import muon_ as by_triton

    return by_triton(weights, grads, momentum, second, rates, dtype, beta2, steps)
