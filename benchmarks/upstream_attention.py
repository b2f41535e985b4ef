"""What stands in for FlashAttention 3 in upstream's model where it is measured beside ours: the fastest at hand.

Upstream fetches FlashAttention 3 from a hub, by the package `kernels`; here is no network. So each window of its layers
gets what is the fastest on this card, forward and backward: FlashAttention 3 where its package is installed, cuDNN's
and torch's own flash attention, which know no windows, or FlexAttention. All get q and k that are turned and normed,
as upstream's model hands them over. Ours is no candidate: it is what upstream is compared with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import Order
from benchmarks.gpu_correctness import Row, first_line
from benchmarks.upstream_side import windowed_sdpa
from kernels import attention_flash
from kernels.attention_choice import TIMED_ROWS, Case, available, block_mask, milliseconds

MASKED = "SDPA with a dense mask"  # where nothing else can do it, as on a CPU
FLASH3_CARDS = range(80, 91)  # its package is built for sm_80, whose code sm_86 and sm_89 run, too, and for sm_90

Plain = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, T, H, D), turned and normed -> (B, T, H, D)


@dataclass(frozen=True)
class Standing:
    """In for FlashAttention 3."""

    call: Callable[..., Tensor]  # with its signature: (q, k, v, causal, window_size) -> (B, T, H, D)
    name: str  # what each window of the layers got
    rows: list[Row] = field(default_factory=list)  # milliseconds of each that could, and why the others could not


def standing(order: Order) -> Standing:
    """The fastest for each window of the order's model; on a CPU PyTorch's, with a mask."""
    if order.device == "cpu":
        return Standing(windowed_sdpa, MASKED)
    names: dict[int, str] = {}
    made: dict[int, Plain] = {}
    rows: list[Row] = []
    for window in (order.context // 2, order.context):
        few = min(order.rows, TIMED_ROWS)
        case = Case(
            few, order.context, order.heads, order.heads, order.head_dim, window, torch.bfloat16,
            torch.device(order.device),
        )  # fmt: skip
        names[window], made[window], found = fastest(case)
        rows += found

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
        T = q.size(1)
        window = T if window_size[0] < 0 else min(window_size[0], T)
        if window not in made:
            raise ValueError(f"upstream asks for a window of {window}; known are {sorted(made)}, those of its pattern")
        return made[window](q, k, v)

    same = len(set(names.values())) == 1
    name = names[order.context] if same else ", ".join(f"{n} over {w}" for w, n in names.items())
    return Standing(call, name, rows)


def fastest(case: Case) -> tuple[str, Plain, list[Row]]:
    """Name and function of the fastest that can do the case, and what there is to tell of all."""
    times: dict[str, float] = {}
    made: dict[str, Plain] = {}
    rows: list[Row] = []
    for name, make in CANDIDATES.items():
        why = no_flash3(case) if name == "fa3" else available(case)[name]
        if not why:
            try:
                made[name] = make(case)
                times[name] = milliseconds(partial(_with_turns, made[name]), case)
            except Exception as error:  # noqa: BLE001 - the packages', Triton's and the driver's share no base but this
                why = f"failed when timed: {first_line(error)}"
        told: Row = {"window": case.window, "attention": name}
        rows.append(told | ({"not measured": why} if why else {"attention_ms": times[name]}))
    if not times:
        return MASKED, partial(_masked, case.window), rows
    best = min(times, key=lambda name: times[name])
    return best, made[best], rows


def _with_turns(plain: Plain, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int) -> Tensor:
    """As those are called that are timed; norm and RoPE are upstream's own."""
    return plain(q, k, v)


# --- the candidates ---------------------------------------------------------------------------


def no_flash3(case: Case) -> str:
    """ "" where FlashAttention 3 is there to be tried, else why not. The recipe takes it on sm_90 alone."""
    if case.capability not in FLASH3_CARDS:
        return f"FlashAttention 3 is for sm_80 to sm_90, not sm_{case.capability}"
    missing = importlib.util.find_spec(attention_flash.MODULE) is None
    return f"flash-attn-3 is not installed (no module {attention_flash.MODULE})" if missing else ""


def _flash3(case: Case) -> Plain:
    """By operators, so that torch.compile takes upstream's model into one graph whatever the package's version."""
    attention_flash.load()
    return lambda q, k, v: attention_flash.flash3(q, k, v, case.window)


def _sdpa(backend: SDPBackend, case: Case) -> Plain:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def _flex(case: Case) -> Plain:
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = torch.compile(flex_attention, dynamic=False)  # not compiled it would build all scores
    mask = block_mask(case.length, min(case.window, case.length), case.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask)
        return y.transpose(1, 2)

    return run


def _masked(window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y: Tensor = windowed_sdpa(q, k, v, True, (window, 0))
    return y


CANDIDATES: dict[str, Callable[[Case], Plain]] = {
    "fa3": _flash3,
    "cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "flex": _flex,
}
