"""What the CPU recipe starts from, by class of machine: a model small enough for hundreds of optimizer steps.

The commonest failure of a port is a model for a bigger machine: it makes fifty steps in its budget and learns nothing.
So a class is a guess from the usable cores, and `scale` corrects it by a measured step time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from core.hardware import GIB, Hardware
from core.settings import Profile

FEWEST_STEPS = 250  # within a budget; below that the optimizer has hardly begun
MOST_STEPS = 6000  # above that larger steps or a larger model learn more
SMALLEST_BATCH, LARGEST_BATCH = 2**10, 2**14  # tokens a step, as the recipe's range
LEAST_DEPTH, MOST_DEPTH = 2, 8
_ASPECTS = (16, 24, 32, 48)  # width per layer
SMALL_MEMORY = 3 * GIB
EVAL_TOKENS = 2**17

_SMALL: Mapping[str, Any] = {"DEPTH": 4, "ASPECT_RATIO": 32, "HEAD_DIM": 64, "TOTAL_BATCH_SIZE": 2**11}
_MIDDLE: Mapping[str, Any] = {"DEPTH": 6, "ASPECT_RATIO": 32, "HEAD_DIM": 64, "TOTAL_BATCH_SIZE": 2**12}
_LARGE: Mapping[str, Any] = {"DEPTH": 8, "ASPECT_RATIO": 32, "HEAD_DIM": 64, "TOTAL_BATCH_SIZE": 2**13}


def profiles(hardware: Hardware) -> list[Profile]:
    """Best first, then the smaller ones, `demo` last."""
    cores = hardware.cores
    classes = [
        (12, _profile("cpu-16", _LARGE, f"{cores} usable cores: the class of 12 and more")),
        (5, _profile("cpu-8", _MIDDLE, f"{cores} usable cores: the class of 5 to 11")),
        (0, _profile("cpu-2", _SMALL, f"{cores} usable core(s): the class of 1 to 4")),
    ]
    found = [profile for least, profile in classes if cores >= least]
    if hardware.memory and hardware.memory < SMALL_MEMORY:
        found = [replace(found[-1], reason=f"{hardware.memory / GIB:.1f} GiB of memory: the smallest class")]
    demo = replace(found[-1], name="demo", budget=30.0, reason="a first look: short experiments on the embedded text")
    return [*found, demo]


def _profile(name: str, constants: Mapping[str, Any], reason: str) -> Profile:
    return Profile(
        name=name,
        backend="cpu",
        data="kjv",
        vocab_size=4096,
        sequence_len=256,
        budget=300.0,
        eval_tokens=EVAL_TOKENS,
        constants=dict(constants),
        reason=reason,
    )


def scale(profile: Profile, seconds_per_step: float) -> Profile:
    """The profile refitted so that a budget holds FEWEST_STEPS to MOST_STEPS steps.

    A step's time is taken as proportional to `cost`. The batch is changed first; where that is not enough, the
    largest model that leaves enough steps is taken, or the smallest that leaves few enough.
    """
    if not seconds_per_step > 0:
        raise ValueError(f"a step cannot take {seconds_per_step} s")
    start = profile.budget / seconds_per_step
    now = dict(profile.constants)

    def steps(changed: Mapping[str, Any]) -> float:
        return start * cost(profile.constants, profile.vocab_size) / cost({**now, **changed}, profile.vocab_size)

    while steps({}) < FEWEST_STEPS and now["TOTAL_BATCH_SIZE"] > max(SMALLEST_BATCH, profile.sequence_len):
        now["TOTAL_BATCH_SIZE"] //= 2
    while steps({}) > MOST_STEPS and now["TOTAL_BATCH_SIZE"] < LARGEST_BATCH:
        now["TOTAL_BATCH_SIZE"] *= 2
    if steps({}) < FEWEST_STEPS:
        shapes = sorted(_shapes(), key=steps)  # the slowest first
        now.update(next((s for s in shapes if steps(s) >= FEWEST_STEPS), shapes[-1]))
    elif steps({}) > MOST_STEPS:
        shapes = sorted(_shapes(), key=steps, reverse=True)
        now.update(next((s for s in shapes if steps(s) <= MOST_STEPS), shapes[-1]))
    if now == profile.constants:
        return profile
    why = f"about {start:.0f} steps in {profile.budget:g} s were measured; refitted to about {steps({}):.0f}"
    return replace(profile, constants=now, reason=f"{profile.reason}; {why}")


def _shapes() -> list[dict[str, Any]]:
    return [{"DEPTH": d, "ASPECT_RATIO": a} for d in range(LEAST_DEPTH, MOST_DEPTH + 1) for a in _ASPECTS]


def cost(constants: Mapping[str, Any], vocab_size: int) -> float:
    """Multiplications of one step's linear layers: 12 C^2 a layer and V C in the head, for every token."""
    depth, head = constants["DEPTH"], constants["HEAD_DIM"]
    dim = math.ceil(depth * constants["ASPECT_RATIO"] / head) * head
    return float(constants["TOTAL_BATCH_SIZE"] * (12 * depth * dim**2 + vocab_size * dim))
