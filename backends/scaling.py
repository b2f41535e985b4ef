"""Refitting a profile to the measured speed of a machine, and other things that backends share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.settings import Profile

COMPILING_CAP = 180.0  # seconds of a warm-up that compiles the whole graph in one thread, with nothing in a cache


@dataclass(frozen=True)
class Range:
    """How many optimizer steps a budget should hold, and what may be changed for that."""

    fewest: int
    most: int
    smallest_batch: int  # tokens a step
    largest_batch: int
    shapes: Sequence[Mapping[str, Any]]  # constants DEPTH and ASPECT_RATIO of the models that may be chosen


def refit(profile: Profile, seconds_per_step: float, within: Range) -> Profile:
    """The profile changed so that a budget holds `within.fewest` to `within.most` steps.

    A step's time is taken as proportional to `cost`. The batch is changed first; where that is not enough, the
    largest model that leaves enough steps is taken, or the smallest that leaves few enough.
    """
    if not seconds_per_step > 0:
        raise ValueError(f"a step cannot take {seconds_per_step} s")
    start = profile.budget / seconds_per_step
    now = dict(profile.constants)

    def steps(changed: Mapping[str, Any]) -> float:
        return start * cost(profile.constants, profile.vocab_size) / cost({**now, **changed}, profile.vocab_size)

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


def cost(constants: Mapping[str, Any], vocab_size: int) -> float:
    """Multiplications of one step's linear layers: 12 C^2 a layer and V C in the head, for every token."""
    depth, head = constants["DEPTH"], constants["HEAD_DIM"]
    dim = math.ceil(depth * constants["ASPECT_RATIO"] / head) * head
    return float(constants["TOTAL_BATCH_SIZE"] * (12 * depth * dim**2 + vocab_size * dim))
