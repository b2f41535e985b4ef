"""Four mistakes of ports, made in the shipped recipes: what stands in each recipe, and what is put there."""

from __future__ import annotations

import backends

INTERLEAVED_MLX = """\
from kernels.qk_norm_rope import metal


def qk_norm_rope(x, cos, sin, epsilon):
    y = mx.fast.rms_norm(x, None, epsilon) * x.shape[-1] ** -0.25
    a, b = y[..., 0::2], y[..., 1::2]
    c, s = cos[:, None], sin[:, None]
    return mx.stack((a * c + b * s, b * c - a * s), axis=-1).reshape(x.shape).swapaxes(1, 2)
"""

# fault -> backend -> edits
MISTAKES: dict[str, dict[str, list[tuple[str, str]]]] = {
    "the sliding window is dropped": {
        "cpu": [("else sequence_len // 2 for c", "else sequence_len for c")],
        "mlx": [("else sequence_len // 2 for c", "else sequence_len for c")],
    },
    "RoPE turns neighbouring channels (interleaved)": {
        "cpu": [
            ("a, b = x.chunk(2, dim=-1)", "a, b = x[..., 0::2], x[..., 1::2]"),
            ("torch.cat((b, a), dim=-1)", "torch.stack((b, a), dim=-1).flatten(-2)"),
            ("torch.cat((cos, cos), dim=-1)", "torch.stack((cos, cos), dim=-1).flatten(-2)"),
            ("torch.cat((sin, -sin), dim=-1)", "torch.stack((sin, -sin), dim=-1).flatten(-2)"),
        ],
        "mlx": [("from kernels.qk_norm_rope import metal, qk_norm_rope\n", INTERLEAVED_MLX)],
    },
    "the softcap is 20": {
        "cpu": [("SOFTCAP = 15.0", "SOFTCAP = 20.0")],
        "mlx": [("SOFTCAP = 15.0", "SOFTCAP = 20.0")],
    },
    "NorMuon's scale is missing": {
        "cpu": [("g *= scale * (length / rescaled.clamp_min(1e-10))", "pass")],
        "mlx": [("g = g * scale * (length / mx.maximum(rescaled, 1e-10))", "pass")],
    },
}


def broken(backend: str, mistake: str) -> bytes:
    source = backends.load(backend).recipe().decode("utf-8")
    for old, new in MISTAKES[mistake][backend]:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source.encode("utf-8")
