"""Refitting a profile to the measured speed of a machine, and other things that backends share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.settings import Profile

# Training tokens for each weight of the matrices, the fewest and the most. What won where others tried much: some 4 to
# 5 on an RTX 3090, where depth 5 of 512 at 2^16 tokens a step was the best of 1,800 experiments (karpathy/autoresearch,
# pull request 332), some 9 on an H100 (its branch exp/H100/mar8). Neither tells its steps: a thousand and 1,600 are our
# estimates. On two cores of a CPU 20 beat 5 (docs/verified.md).
PER_WEIGHT = (3.0, 20.0)
ASPECT = 80.0  # channels for each layer of a model of good shape: 42 to 102 won in the nights that profiles tell of
SHAPELY = 0.2  # what a model of another shape is worth, beside one of another size
COMPILING_CAP = 180.0  # seconds of a warm-up that compiles the whole graph in one thread, with nothing in a cache


@dataclass(frozen=True)
class Range:
    """How many optimizer steps a budget should hold, and what may be changed for that."""

    fewest: int
    most: int
    smallest_batch: int  # tokens a step
    largest_batch: int
    shapes: Sequence[Mapping[str, Any]]  # constants DEPTH and ASPECT_RATIO of the models that may be chosen
    per_weight: tuple[float, float] | None = None  # as PER_WEIGHT


def refit(profile: Profile, seconds_per_step: float, within: Range) -> Profile:
    """The profile changed so that a budget holds `within.fewest` to `within.most` steps.

    A step's time is taken as proportional to `cost`. A model that the budget trains with too few or too many tokens
    for its size is replaced by the one that fits best (`balanced`). Then the batch is changed; where that is not
    enough, the largest model that leaves enough steps is taken, or the smallest that leaves few enough.
    """
    if not seconds_per_step > 0:
        raise ValueError(f"a step cannot take {seconds_per_step} s")
    start = profile.budget / seconds_per_step
    now = dict(profile.constants)

    def steps(changed: Mapping[str, Any]) -> float:
        return start * cost(profile.constants, profile.vocab_size) / cost({**now, **changed}, profile.vocab_size)

    if within.per_weight and not _within(start * tokens_per_weight(now), within.per_weight):
        now.update(balanced(profile, seconds_per_step, within))
    while steps({}) < within.fewest and now["TOTAL_BATCH_SIZE"] > max(within.smallest_batch, profile.sequence_len):
        now["TOTAL_BATCH_SIZE"] //= 2
    while steps({}) > within.most and now["TOTAL_BATCH_SIZE"] < within.largest_batch:
        now["TOTAL_BATCH_SIZE"] *= 2
    if steps({}) < within.fewest:
        shapes = sorted(within.shapes, key=steps)  # the slowest first
        now.update(next((s for s in shapes if steps(s) >= within.fewest), shapes[-1]))
    elif steps({}) > within.most:
        shapes = sorted(within.shapes, key=steps, reverse=True)
        now.update(next((s for s in shapes if steps(s) <= within.most), shapes[-1]))
    if now == profile.constants:
        return profile
    why = f"about {start:.0f} steps in {profile.budget:g} s were measured; refitted to about {steps({}):.0f}"
    return replace(profile, constants=now, reason=f"{profile.reason}; {why}")


def balanced(profile: Profile, seconds_per_step: float, within: Range) -> dict[str, Any]:
    """DEPTH, ASPECT_RATIO and TOTAL_BATCH_SIZE of the model that the budget trains with the middle of
    `within.per_weight` tokens for each weight, at the middle of the steps (both geometric), at this speed."""
    assert within.per_weight is not None
    wanted = math.sqrt(math.prod(within.per_weight))
    speed = cost(profile.constants, profile.vocab_size) / seconds_per_step

    def tokens(shape: Mapping[str, Any]) -> float:
        one = cost({**profile.constants, **shape, "TOTAL_BATCH_SIZE": 1}, profile.vocab_size)
        return profile.budget * speed / one

    def unlike(shape: Mapping[str, Any]) -> float:
        constants = {**profile.constants, **shape}
        per_weight = tokens(shape) / matrices(constants)
        return abs(math.log(per_weight / wanted)) + SHAPELY * abs(math.log(width(constants) / shape["DEPTH"] / ASPECT))

    shape = min(within.shapes, key=unlike)
    batch = 2 ** round(math.log2(tokens(shape) / math.sqrt(within.fewest * within.most)))
    batch = min(max(batch, within.smallest_batch, profile.sequence_len), within.largest_batch)
    return {**shape, "TOTAL_BATCH_SIZE": batch}


def tokens_per_weight(constants: Mapping[str, Any]) -> float:
    """Of one step: tokens for each weight of the matrices."""
    return float(constants["TOTAL_BATCH_SIZE"] / matrices(constants))


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def width(constants: Mapping[str, Any]) -> int:
    """C: DEPTH * ASPECT_RATIO, rounded up to whole heads."""
    head = int(constants["HEAD_DIM"])
    return math.ceil(constants["DEPTH"] * constants["ASPECT_RATIO"] / head) * head


def matrices(constants: Mapping[str, Any]) -> int:
    """Weights in the layers' matrices, 12 C^2 each."""
    return int(12 * constants["DEPTH"] * width(constants) ** 2)


def cost(constants: Mapping[str, Any], vocab_size: int) -> float:
    """Multiplications of one step's linear layers: 12 C^2 a layer and V C in the head, for every token."""
    return float(constants["TOTAL_BATCH_SIZE"] * (matrices(constants) + vocab_size * width(constants)))
