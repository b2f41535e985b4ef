"""What the RTX recipe starts from, by tier of memory: a model whose budget holds hundreds of steps on that tier's
slowest card.

The tiers follow what is known of how large a model five minutes can train (PER_WEIGHT in `backends.scaling`), and
`scale` holds a card to it by its measured step.

A tier is still a guess. `steps` predicts by a card's peak and bandwidth, and takes a smaller tier for a card that is
too slow for the one that its memory allows; `plans` says how many rows go through at once, by the memory that is free
now. None of the tiers was measured on its cards (docs/verified.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backends.rtx.cards import BY_MEMORY, Card, known
from backends.rtx.memory import Plan, Shape, made_again, peak, ways
from backends.scaling import COMPILING_CAP, PER_WEIGHT, Range, refit, tokens_per_weight
from core.errors import UserError
from core.facts import Gpu
from core.gpuwatch import is_laptop
from core.hardware import GIB, Hardware
from core.settings import Profile

FEWEST_STEPS = 500  # within a budget, on the tier's slowest card
MOST_STEPS = 3000  # above that larger steps or a larger model learn more
SMALLEST_BATCH, LARGEST_BATCH = 2**12, 2**18  # tokens a step, as the recipe's range
SHAPES = [{"DEPTH": d, "ASPECT_RATIO": a} for d in range(2, 13) for a in (32, 48, 64, 85, 102, 128)]
EVAL_TOKENS = 2**21
MIB = 2**20
MANY = 512 * MIB  # of logits: 64 rows
TOLERANCE = 0.9  # an "8 GB" card reports 7.9997 GiB, or 7.6 behind a hypervisor
# What others may take while a run is on: Windows' desktop on the same card, and CUDA's own context and libraries.
CONTEXT = 0.5 * GIB
DESKTOP = 0.75 * GIB
SLACK = 0.9  # of what is left: the allocator's cache is never packed tight
REACHED = 0.5  # share of the peak that products reach in these shapes; an estimate, as the next two
MOVED = 60  # numbers of a stream's width that a layer reads and writes per token, forward and backward
BANDWIDTH = 0.7  # share of the memory's bandwidth
TUNED = 75  # bytes read and written per weight by an optimizer step
# Of a step more, where all layers make that again: calculated by `benchmarks.ports` for an RTX 4060.
AGAIN = {"nothing": 0.0, "hidden": 0.065, "layer": 0.21}
A_PASS = 256  # tokens that each pass through the model costs as much as: launches and sums of gradients; an estimate


@dataclass(frozen=True)
class Tier:
    name: str
    memory: int  # GiB, as sold
    slowest: tuple[str, Card]
    constants: Mapping[str, Any]
    context: int = 512
    logits: int = 256 * MIB  # bytes of one scoring batch in float32, 32 rows; making them takes about three times that


def _constants(depth: int, ratio: int, batch: int) -> dict[str, Any]:
    return {"DEPTH": depth, "ASPECT_RATIO": ratio, "HEAD_DIM": 64, "TOTAL_BATCH_SIZE": batch, "DEVICE_BATCH_SIZE": 16}


def _card(name: str) -> tuple[str, Card]:
    found = known(f"RTX {name}")
    assert found is not None
    return name, found


TIERS = (  # the largest first; the last takes what is below it, too
    Tier("rtx-32", 32, _card("5090"), _constants(8, 64, 2**17), logits=MANY),
    Tier("rtx-24", 24, _card("3090"), _constants(5, 102, 2**16), logits=MANY),
    Tier("rtx-16", 16, _card("4060 Ti"), _constants(6, 64, 2**15), logits=MANY),
    Tier("rtx-12", 10, _card("3060"), _constants(5, 76, 2**15)),
    Tier("rtx-8", 8, _card("3050"), _constants(4, 96, 2**15)),
    Tier("rtx-6", 6, ("3050 6GB", BY_MEMORY["3050 6"]), _constants(5, 64, 2**15)),
)


def profiles(hardware: Hardware) -> list[Profile]:
    """Best first, then the smaller ones, `demo` last. UserError where not even the smallest fits into free memory."""
    gpu = hardware.gpus[0] if hardware.gpus else None
    tiers = [t for t in TIERS if gpu is None or gpu.memory >= TOLERANCE * t.memory * GIB] or list(TIERS[-1:])
    reasons = [hardware.summary()]
    if gpu is not None:
        tiers = _fast_enough(gpu, tiers, reasons)
        tiers = _fitting(hardware, tiers, reasons)
    found = [_profile(t, hardware, "; ".join(reasons)) for t in tiers]
    demo = replace(found[-1], name="demo", data="kjv", budget=30.0, reason="a first look: short experiments")
    return [*found, demo]


def _fast_enough(gpu: Gpu, tiers: list[Tier], reasons: list[str]) -> list[Tier]:
    """Without those that are too large for a known card: memory alone makes no card fast."""
    card = known(gpu.name, gpu.memory)
    if card is None:
        reasons.append("in no table: its speed is measured")
        return tiers
    left = [t for t in tiers if _trains(card, t)] or tiers[-1:]
    if left[0] is not tiers[0]:
        reasons.append(f"too slow for {tiers[0].name}: {card.flops / 1e12:.0f} TFLOP/s")
    return left


def _trains(card: Card, tier: Tier) -> bool:
    """Whether five minutes on this card hold enough steps, and enough tokens for the size of the model."""
    found = steps(card, tier.constants, 4096, tier.context)
    return found >= FEWEST_STEPS and found * tokens_per_weight(tier.constants) >= PER_WEIGHT[0]


def _fitting(hardware: Hardware, tiers: list[Tier], reasons: list[str]) -> list[Tier]:
    """Without those of which no plan fits into what is free now."""
    left = [t for t in tiers if plans(_profile(t, hardware, ""), hardware)]
    if not left:
        needed = lean(_profile(tiers[-1], hardware, ""))
        raise UserError(
            f"{hardware.gpus[0].name} has {available(hardware) / GIB:.2f} GiB for a training, "
            f"and the smallest profile takes {needed / GIB:.2f} GiB",
            "close what else uses the card (nvidia-smi lists it), or use the processor: --backend cpu",
        )
    if left[0] is not tiers[0]:
        reasons.append(f"only {available(hardware) / GIB:.1f} GiB are free: no room for {tiers[0].name}")
    return left


def _profile(tier: Tier, hardware: Hardware, reason: str) -> Profile:
    made = Profile(
        name=tier.name,
        backend="rtx",
        data="tinystories",
        vocab_size=4096,
        sequence_len=tier.context,
        budget=300.0,
        eval_tokens=EVAL_TOKENS,
        constants=dict(tier.constants),
        reason=reason,
        warmup_cap=COMPILING_CAP,
        logits_bytes=tier.logits,
    )
    fitting = plans(made, hardware) if hardware.gpus else []
    return replace(made, constants={**made.constants, **fitting[0].constants()}) if fitting else made


# --- speed -------------------------------------------------------------------------------------


def step_seconds(card: Card, constants: Mapping[str, Any], vocab: int, context: int) -> float:
    """Predicted seconds of a step: products at a share of the peak, the rest at a share of the bandwidth."""
    shape = Shape.of(constants, vocab, context)
    weights = shape.matrices + vocab * shape.dim
    flops = 6 * weights + 12 * shape.dim * shape.depth * context * 3 / 4  # two thirds of the layers see half of it
    moved = MOVED * shape.dim * shape.itemsize * shape.depth
    muon = 300 * shape.depth * shape.dim**3 / (REACHED * card.flops)
    tuned = TUNED * (shape.matrices + shape.embeddings) / (BANDWIDTH * card.bandwidth)
    each = flops / (REACHED * card.flops) + moved / (BANDWIDTH * card.bandwidth)
    return float(constants["TOTAL_BATCH_SIZE"] * each + muon + tuned)


def steps(card: Card, constants: Mapping[str, Any], vocab: int, context: int, budget: float = 300.0) -> float:
    """Predicted optimizer steps within a budget."""
    return budget / step_seconds(card, constants, vocab, context)


def scale(profile: Profile, seconds_per_step: float) -> Profile:
    """The profile refitted so that a budget holds FEWEST_STEPS to MOST_STEPS steps, and PER_WEIGHT tokens for each
    weight (`backends.scaling.refit`)."""
    within = Range(FEWEST_STEPS, MOST_STEPS, SMALLEST_BATCH, LARGEST_BATCH, SHAPES, PER_WEIGHT)
    return refit(profile, seconds_per_step, within)


# --- memory ------------------------------------------------------------------------------------


def available(hardware: Hardware) -> int:
    """Bytes of the card that a training may take, by what is free now: Windows' driver would not fail beyond them but
    move tensors to the computer's memory, many times slower."""
    gpu = hardware.gpus[0]
    free = gpu.memory_free or int(0.85 * gpu.memory)
    desktop = DESKTOP if hardware.os == "windows" or hardware.wsl or gpu.display else 0
    return max(0, int(SLACK * (free - CONTEXT - desktop)))


def plans(profile: Profile, hardware: Hardware) -> list[Plan]:
    """What fits into the card, the likeliest to be fast first. For each number of rows at once there is one: the fewest
    layers that make anything again, and the least of it."""
    memory = available(hardware)
    fitting = (next((p for p in found if p.peak <= memory), None) for found in _all_plans(profile))
    return sorted((p for p in fitting if p), key=lambda p: _cost(p, profile))


def _all_plans(profile: Profile) -> Iterator[list[Plan]]:
    """For each number of rows at once all ways, from the fastest to the leanest."""
    shape = Shape.of(profile.constants, profile.vocab_size, profile.sequence_len)
    batch = int(profile.constants["TOTAL_BATCH_SIZE"])
    most = max(1, batch // profile.sequence_len)
    for rows in (most >> k for k in range(most.bit_length())):
        yield [
            Plan(rows, how, more, peak(shape, rows, how, batch, fused=False, more=more))
            for how, more in ways(shape.depth)
        ]


def _cost(plan: Plan, profile: Profile) -> float:
    """How long a step takes, beside one pass through the model with nothing made again; an estimate."""
    layers = made_again(plan.recompute, plan.more, int(profile.constants["DEPTH"]))
    again = sum(AGAIN[how] for how in layers) / len(layers)
    return (1 + again) * (1 + A_PASS / (plan.rows * profile.sequence_len))


def lean(profile: Profile) -> int:
    """Bytes that the profile takes at least."""
    return min(plan.peak for found in _all_plans(profile) for plan in found)


# --- what is worth saying ----------------------------------------------------------------------


def remarks(hardware: Hardware) -> Sequence[str]:
    """What to know about the card before a night on it, one line each."""
    found: list[str] = []
    gpu = hardware.gpus[0] if hardware.gpus else None
    if gpu is None:
        return found
    if is_laptop(gpu.name, gpu.product):
        found.append("a laptop's card: its speed follows its power limit and its heat; it is measured, not looked up")
    if hardware.power.plugged is False:
        charge = f" at {hardware.power.percent:.0f} %" if hardware.power.percent is not None else ""
        found.append(f"on battery{charge}: the card runs at a fraction of its clock; plug it in, or use --backend cpu")
    if gpu.display:
        found.append("this card drives a display: what is shown there takes memory and time from it")
    if len(hardware.gpus) > 1:
        others = ", ".join(g.name for g in hardware.gpus[1:])
        found.append(f"{len(hardware.gpus)} cards: {gpu.name} is used, not {others}; CUDA_VISIBLE_DEVICES chooses")
    found += [f"{lost} does not answer the driver and is left out" for lost in gpu.lost]
    if gpu.name.startswith("MIG") or "MIG " in gpu.name:
        found.append("a MIG slice: its neighbours on the same card are not seen from here")
    if hardware.wsl:
        found.append("under WSL2 the driver tells no processes of others, and Windows' desktop shares the card")
    return found
