"""What the CPU recipe starts from, by class of machine: a model small enough for hundreds of optimizer steps.

The commonest failure of a port is a model for a bigger machine: it makes fifty steps in its budget and learns nothing.
So a class is a guess from the usable cores, and `scale` corrects it by a measured step time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from backends.scaling import Range, refit
from core.hardware import GIB, Hardware
from core.settings import Profile

FEWEST_STEPS = 250  # within a budget; below that the optimizer has hardly begun
MOST_STEPS = 6000  # above that larger steps or a larger model learn more
SMALLEST_BATCH, LARGEST_BATCH = 2**10, 2**14  # tokens a step, as the recipe's range
SHAPES = [{"DEPTH": d, "ASPECT_RATIO": a} for d in range(2, 9) for a in (16, 24, 32, 48)]
SMALL_MEMORY = 3 * GIB
EVAL_TOKENS = 2**17

# The small class was fitted in 60 s runs on two cores (docs/verified.md). An odd depth gives the first layer value
# embeddings; 128 tokens of context leave time for more steps; so few steps want no weight decay, and Adam's second
# moment a long memory, as most rows of an embedding have a gradient in few of them only.
_SMALL: Mapping[str, Any] = {
    "DEPTH": 3,
    "ASPECT_RATIO": 42,
    "HEAD_DIM": 64,
    "TOTAL_BATCH_SIZE": 2**11,
    "WEIGHT_DECAY": 0.0,
    "EMBEDDING_LR": 1.5,
    "ADAM_BETAS": (0.8, 0.99),
}
_MIDDLE: Mapping[str, Any] = {"DEPTH": 6, "ASPECT_RATIO": 32, "HEAD_DIM": 64, "TOTAL_BATCH_SIZE": 2**12}
_LARGE: Mapping[str, Any] = {"DEPTH": 8, "ASPECT_RATIO": 32, "HEAD_DIM": 64, "TOTAL_BATCH_SIZE": 2**13}


def profiles(hardware: Hardware) -> list[Profile]:
    """Best first, then the smaller ones, `demo` last."""
    cores = hardware.cores
    classes = [
        (12, _profile("cpu-16", _LARGE, f"{cores} usable cores: the class of 12 and more")),
        (5, _profile("cpu-8", _MIDDLE, f"{cores} usable cores: the class of 5 to 11")),
        (0, _profile("cpu-2", _SMALL, f"{cores} usable core(s): the class of 1 to 4", context=128)),
    ]
    found = [profile for least, profile in classes if cores >= least]
    if hardware.memory and hardware.memory < SMALL_MEMORY:
        found = [replace(found[-1], reason=f"{hardware.memory / GIB:.1f} GiB of memory: the smallest class")]
    demo = replace(found[-1], name="demo", budget=30.0, reason="a first look: short experiments on the embedded text")
    return [*found, demo]


def _profile(name: str, constants: Mapping[str, Any], reason: str, context: int = 256) -> Profile:
    return Profile(
        name=name,
        backend="cpu",
        data="kjv",
        vocab_size=4096,
        sequence_len=context,
        budget=300.0,
        eval_tokens=EVAL_TOKENS,
        constants=dict(constants),
        reason=reason,
    )


def scale(profile: Profile, seconds_per_step: float) -> Profile:
    """The profile refitted so that a budget holds FEWEST_STEPS to MOST_STEPS steps (`backends.scaling.refit`)."""
    return refit(profile, seconds_per_step, Range(FEWEST_STEPS, MOST_STEPS, SMALLEST_BATCH, LARGEST_BATCH, SHAPES))
