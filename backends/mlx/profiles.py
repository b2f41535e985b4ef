"""What the MLX recipe starts from, by class of Mac: a model small enough for hundreds of optimizer steps.

A class is a guess from the chip and its memory, and `scale` corrects it by a measured step time. None of the classes
for Macs was measured on one (docs/verified.md); on Linux, where MLX is for trying the backend out, it is `mlx-cpu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from backends.scaling import PER_WEIGHT, Range, refit
from core.hardware import GIB, Hardware
from core.settings import Profile

FEWEST_STEPS = 300  # within a budget; below that the optimizer has hardly begun
MOST_STEPS = 6000  # above that larger steps or a larger model learn more
SMALLEST_BATCH, LARGEST_BATCH = 2**10, 2**17  # tokens a step
SHAPES = [{"DEPTH": d, "ASPECT_RATIO": a} for d in range(2, 11) for a in (16, 24, 32, 48, 64, 96)]
SMALL_MEMORY = 12 * GIB  # an 8 GB Mac leaves about 5 GiB for the GPU

_CPU: Mapping[str, Any] = {"DEPTH": 2, "ASPECT_RATIO": 64, "HEAD_DIM": 64, "TOTAL_BATCH_SIZE": 2**11}
_BASE: Mapping[str, Any] = {"DEPTH": 4, "ASPECT_RATIO": 64, "HEAD_DIM": 128, "TOTAL_BATCH_SIZE": 2**13}
_PRO: Mapping[str, Any] = {"DEPTH": 4, "ASPECT_RATIO": 64, "HEAD_DIM": 128, "TOTAL_BATCH_SIZE": 2**14}
_MAX: Mapping[str, Any] = {"DEPTH": 6, "ASPECT_RATIO": 64, "HEAD_DIM": 128, "TOTAL_BATCH_SIZE": 2**15}
_ULTRA: Mapping[str, Any] = {"DEPTH": 8, "ASPECT_RATIO": 64, "HEAD_DIM": 128, "TOTAL_BATCH_SIZE": 2**16}


def profiles(hardware: Hardware) -> list[Profile]:
    """Best first, then the smaller ones, `demo` last."""
    if not hardware.chip:
        found = [_profile("mlx-cpu", _CPU, f"{hardware.cores} core(s) and no Apple GPU", data="kjv", context=256)]
    else:
        classes = [("ultra", "Ultra", _ULTRA), ("max", "Max", _MAX), ("pro", "Pro", _PRO), ("base", "", _BASE)]
        start = next(i for i, (_, word, _) in enumerate(classes) if word in hardware.chip)
        if 0 < hardware.memory < SMALL_MEMORY:
            start = len(classes) - 1
        found = [_profile(f"mlx-{name}", constants, hardware.summary()) for name, _, constants in classes[start:]]
    demo = replace(found[-1], name="demo", data="kjv", budget=30.0, reason="a first look: short experiments")
    return [*found, demo]


def _profile(
    name: str, constants: Mapping[str, Any], reason: str, data: str = "tinystories", context: int = 512
) -> Profile:
    return Profile(
        name=name,
        backend="mlx",
        data=data,
        vocab_size=4096,
        sequence_len=context,
        budget=300.0,
        eval_tokens=2**17,
        constants=dict(constants),
        reason=reason,
    )


def scale(profile: Profile, seconds_per_step: float) -> Profile:
    """The profile refitted so that a budget holds FEWEST_STEPS to MOST_STEPS steps, and PER_WEIGHT tokens for each
    weight (`backends.scaling.refit`)."""
    within = Range(FEWEST_STEPS, MOST_STEPS, SMALLEST_BATCH, LARGEST_BATCH, SHAPES, PER_WEIGHT)
    return refit(profile, seconds_per_step, within)
