"""What the CUDA recipe starts from, by class of data-centre card and by the memory that is free on it.

The class of the H100 starts from what is known to work in five minutes, not from upstream's defaults: what upstream's
own night of 125 experiments on one ended with, on the same text and the same model (its branch exp/H100/mar8: 0.9979 ->
0.9697 val_bpb). The others are scaled from it by the cards' data sheets, and `scale` corrects each by a measured step
time. None of them was measured on a card by this project yet (docs/verified.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from backends.cuda.learning import LEARNING
from backends.scaling import COMPILING_CAP, Range, refit
from core.errors import UserError
from core.facts import Gpu
from core.hardware import GIB, Hardware
from core.settings import Profile

CONTEXT = 2048
EVAL_TOKENS = 40 * 2**19  # 20.97M
FEWEST_STEPS = 500  # within a budget; below that the optimizer has hardly begun
MOST_STEPS = 4000  # above that larger steps or a larger model learn more
SMALLEST_BATCH, LARGEST_BATCH = 2**15, 2**20  # tokens a step, as the recipe's range
SHAPES = [{"DEPTH": d, "ASPECT_RATIO": a} for d in range(2, 15) for a in (48, 56, 64)]
RESERVED = GIB  # of the card, for the driver's context and kernels of each child

_FIVE_MINUTES: Mapping[str, Any] = {"HEAD_DIM": 128, "WINDOW_PATTERN": "SSSSL", "SHORT_WINDOW": 8, **LEARNING}


@dataclass(frozen=True)
class Class:
    """Cards of one kind: what they start from, and the least free memory that it trains in."""

    name: str
    least: int  # bytes
    constants: Mapping[str, Any]
    what: str
    logits: int  # bytes of one scoring batch in float32


def _class(name: str, gib: float, what: str, logits: int, **constants: Any) -> Class:
    return Class(name, int(gib * GIB), {**_FIVE_MINUTES, **constants}, what, logits * GIB)


# Largest first: what does not fit into the free memory falls to the next. The least memory is of one micro-batch of
# 8 rows with weights and optimizer (python -m benchmarks.memory); more rows are taken where there is room. Scoring
# holds about three times its logits, and no optimizer: 4 GiB are 64 rows, 160 batches in all.
CLASSES = (
    _class("b200", 24, "Blackwell: 2.3 times an H100's matrix products", 4, DEPTH=10, ASPECT_RATIO=72,
           TOTAL_BATCH_SIZE=2**18, DEVICE_BATCH_SIZE=128),
    _class("h100", 24, "Hopper: depth 9 of 640 at 2^18 tokens a step", 4, DEPTH=9, ASPECT_RATIO=57,
           TOTAL_BATCH_SIZE=2**18, DEVICE_BATCH_SIZE=128),
    _class("a100", 16, "Ampere: a third of an H100's matrix products, so half of its batch", 4, DEPTH=8,
           ASPECT_RATIO=64, TOTAL_BATCH_SIZE=2**17, DEVICE_BATCH_SIZE=64),
    _class("slice-20", 10, "a part of a card, or what is free of it", 2, DEPTH=6, ASPECT_RATIO=64,
           TOTAL_BATCH_SIZE=2**16, DEVICE_BATCH_SIZE=32),
    _class("slice-10", 5, "a small part of a card, or what is free of it", 1, DEPTH=4, ASPECT_RATIO=64,
           TOTAL_BATCH_SIZE=2**16, DEVICE_BATCH_SIZE=16),
)  # fmt: skip
WHOLE_CARD = 0.9  # of an A100's 40 GB: less is a part of a card, or a smaller one


def profiles(hardware: Hardware) -> list[Profile]:
    """Best first, then the smaller ones, `demo` last. UserError where the card has no room for any."""
    if not hardware.gpus:
        raise UserError("no NVIDIA GPU was found", hardware.gpu_problem or "choose --backend cpu")
    gpu = hardware.gpus[0]
    own = next(i for i, c in enumerate(CLASSES) if c.name == _name(gpu))
    free = gpu.memory_free - RESERVED
    fitting = [c for c in CLASSES[own:] if c.least <= free]
    if not fitting:
        raise _no_room(hardware)
    what = f"{gpu.name}, {_gib(gpu.memory_free)} of {_gib(gpu.memory)} free"
    if fitting[0] is not CLASSES[own]:
        what += f", too little for {CLASSES[own].name} ({_gib(CLASSES[own].least + RESERVED)})"
    if gpu.processes:
        what += f"; {gpu.processes} other process(es) on it distort scores: end them"
    if len(hardware.gpus) > 1:
        what += f"; the first of {len(hardware.gpus)} cards, CUDA_VISIBLE_DEVICES chooses another"
    found = [_profile(c, f"{what}: {c.what}") for c in fitting]
    demo = replace(found[-1], name="demo", data="kjv", budget=30.0, reason="a first look: short experiments")
    return [*found, demo]


def _name(gpu: Gpu) -> str:
    """The class of a card by its capability, or by its memory where it is a part of one."""
    part = gpu.uuid.startswith("MIG-") or gpu.memory < WHOLE_CARD * 40e9
    if part:
        return "a100" if gpu.memory >= 34e9 else "slice-20" if gpu.memory >= 17e9 else "slice-10"
    return "b200" if gpu.capability >= (10, 0) else "h100" if gpu.capability >= (9, 0) else "a100"


def _no_room(hardware: Hardware) -> UserError:
    gpu, least = hardware.gpus[0], CLASSES[-1].least + RESERVED
    fact = f"{gpu.name} has {_gib(gpu.memory_free)} of {_gib(gpu.memory)} free, at least {_gib(least)} are needed"
    others = f"end the {gpu.processes} process(es) on it" if gpu.processes else "end what uses it (nvidia-smi lists it)"
    free = next((g for g in hardware.gpus[1:] if g.memory_free >= least), None)
    return UserError(fact, f"set CUDA_VISIBLE_DEVICES={free.uuid}, which has room, or {others}" if free else others)


def _profile(chosen: Class, reason: str) -> Profile:
    return Profile(
        name=chosen.name,
        backend="cuda",
        data="climbmix",
        vocab_size=8192,
        sequence_len=CONTEXT,
        budget=300.0,
        eval_tokens=EVAL_TOKENS,
        constants=dict(chosen.constants),
        reason=reason,
        warmup_cap=COMPILING_CAP,
        logits_bytes=chosen.logits,
    )


def scale(profile: Profile, seconds_per_step: float) -> Profile:
    """The profile refitted so that a budget holds FEWEST_STEPS to MOST_STEPS steps (`backends.scaling.refit`)."""
    return refit(profile, seconds_per_step, Range(FEWEST_STEPS, MOST_STEPS, SMALLEST_BATCH, LARGEST_BATCH, SHAPES))


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
