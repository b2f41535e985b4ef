"""QK-norm and rotary embedding of queries or keys in one pass over memory (MLX).

With x = (a, b) the two halves of a head's D channels at position t, r = 1 / sqrt(mean(x^2) + eps), and the angles of
half-split RoPE (Su et al. 2021) c = cos(t * f), s = sin(t * f):

    y = D^-0.25 * r * (a*c + b*s, b*c - a*s)

so that q.k comes out divided by sqrt(D). Turning changes no length: the norm may come before or after it. Backward,
with g = dy turned back and n = x * r: dx = D^-0.25 * r * (g - n * mean(g * n)).

On Metal one SIMD group works on one head of one position: x is read once, y written once, in the layout that attention
wants; the backward reads x and dy and keeps nothing else. Elsewhere `reference` does the same in plain MLX.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

LANES = 32  # threads of a SIMD group

_HEAD = """
    uint lane = thread_position_in_threadgroup.x;
    uint row = threadgroup_position_in_grid.y;
    uint h = row % H;
    uint t = (row / H) % T;
    uint b = row / (H * T);
    const device E* here = x + row * D;
    size_t there = ((size_t)(b * H + h) * T + t) * D;
    float first[PAIRS], second[PAIRS], squares = 0;
    for (uint i = 0; i < PAIRS; i++) {
        uint c = lane + 32 * i;
        first[i] = c < D / 2 ? (float)here[c] : 0.0f;
        second[i] = c < D / 2 ? (float)here[c + D / 2] : 0.0f;
        squares += first[i] * first[i] + second[i] * second[i];
    }
    float r = metal::precise::rsqrt(simd_sum(squares) / D + eps[0]);
    float scale = metal::precise::rsqrt(metal::precise::sqrt((float)D));
"""

FORWARD = (
    _HEAD
    + """
    for (uint i = 0; i < PAIRS; i++) {
        uint c = lane + 32 * i;
        if (c >= D / 2) continue;
        float co = cosine[t * (D / 2) + c], si = sine[t * (D / 2) + c];
        y[there + c] = (E)(scale * r * (first[i] * co + second[i] * si));
        y[there + c + D / 2] = (E)(scale * r * (second[i] * co - first[i] * si));
    }
"""
)

BACKWARD = (
    _HEAD
    + """
    float g1[PAIRS], g2[PAIRS], dot = 0;
    for (uint i = 0; i < PAIRS; i++) {
        uint c = lane + 32 * i;
        g1[i] = g2[i] = 0;
        if (c >= D / 2) continue;
        float co = cosine[t * (D / 2) + c], si = sine[t * (D / 2) + c];
        float d1 = (float)dy[there + c], d2 = (float)dy[there + c + D / 2];
        g1[i] = d1 * co - d2 * si;
        g2[i] = d2 * co + d1 * si;
        dot += (g1[i] * first[i] + g2[i] * second[i]) * r;
    }
    float mean = simd_sum(dot) / D;
    for (uint i = 0; i < PAIRS; i++) {
        uint c = lane + 32 * i;
        if (c >= D / 2) continue;
        dx[row * D + c] = (E)(scale * r * (g1[i] - first[i] * r * mean));
        dx[row * D + c + D / 2] = (E)(scale * r * (g2[i] - second[i] * r * mean));
    }
"""
)


def qk_norm_rope(x: mx.array, cos: mx.array, sin: mx.array, eps: float) -> mx.array:
    """(B, T, H, D) -> (B, H, T, D) in x's dtype. cos and sin (T, D/2) float32; D even, at most 1024."""
    if metal():
        y: mx.array = _fused()(x, cos, sin, mx.array([eps]))
        return y
    return reference(x, cos, sin, eps)


def reference(x: mx.array, cos: mx.array, sin: mx.array, eps: float) -> mx.array:
    """The same in plain MLX, float32 in between."""
    n = mx.fast.rms_norm(x.astype(mx.float32), None, eps).swapaxes(1, 2)
    a, b = mx.split(n, 2, axis=-1)
    scale = x.shape[-1] ** -0.25
    return (scale * mx.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)).astype(x.dtype)


def metal() -> bool:
    """Whether arrays are worked on by Metal: a Mac's GPU, not MLX's CUDA build and not a CPU."""
    return bool(mx.metal.is_available()) and mx.default_device() == mx.gpu


def sources() -> dict[str, str]:
    """Name -> body of each Metal kernel, for tests."""
    return {"forward": FORWARD, "backward": BACKWARD}


@functools.cache
def _fused() -> Any:
    """The Metal kernels with their gradient. Made at the first call, as making them needs Metal."""
    inputs = ["x", "cosine", "sine", "eps"]
    forward = mx.fast.metal_kernel("qk_norm_rope", inputs, ["y"], FORWARD)
    backward = mx.fast.metal_kernel("qk_norm_rope_backward", [*inputs, "dy"], ["dx"], BACKWARD)

    def launch(kernel: Any, arrays: list[mx.array], shape: tuple[int, ...]) -> mx.array:
        x = arrays[0]
        B, T, H, D = x.shape
        pairs = -(-D // (2 * LANES))
        found: mx.array = kernel(
            inputs=arrays,
            template=[("E", x.dtype), ("T", T), ("H", H), ("D", D), ("PAIRS", pairs)],
            grid=(LANES, B * T * H, 1),
            threadgroup=(LANES, 1, 1),
            output_shapes=[shape],
            output_dtypes=[x.dtype],
        )[0]
        return found

    @mx.custom_function  # type: ignore[untyped-decorator]
    def apply(x: mx.array, cos: mx.array, sin: mx.array, eps: mx.array) -> mx.array:
        B, T, H, D = x.shape
        return launch(forward, [x, cos, sin, eps], (B, H, T, D))

    @apply.vjp  # type: ignore[untyped-decorator]
    def gradient(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        x, cos, sin, eps = primals
        dx = launch(backward, [x, cos, sin, eps, cotangent], x.shape)
        return dx, mx.zeros_like(cos), mx.zeros_like(sin), mx.zeros_like(eps)

    return apply
