"""What stands in for FlashAttention 3 in upstream's model where it is measured beside ours: the fastest at hand.

Upstream fetches FlashAttention 3 from a hub, by the package `kernels`; here is no network. So each window of its layers
gets what is the fastest on this card, forward and backward: FlashAttention 3 where its package is installed, cuDNN's
and torch's own flash attention, which know no windows, or FlexAttention (benchmarks/at_hand.py). Ours is no candidate:
it is what upstream is compared with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import at_hand
from benchmarks.at_hand import FLASH3_CARDS, MASKED, Plain, Row
from benchmarks.gpu import Order
from kernels import attention_flash
from kernels.attention_choice import TIMED_ROWS, Case, available, milliseconds


@dataclass(frozen=True)
class Standing:
    """In for FlashAttention 3."""

    call: Callable[..., Tensor]  # with its signature: (q, k, v, causal, window_size) -> (B, T, H, D)
    name: str  # what each window of the layers got
    rows: list[Row] = field(default_factory=list)  # milliseconds of each that could, and why the others could not


def standing(order: Order) -> Standing:
    """The fastest for each window of the order's model; on a CPU PyTorch's, with a mask."""
    if order.device == "cpu":
        return Standing(at_hand.windowed_sdpa, MASKED)
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
    return Standing(at_hand.call_of(made), at_hand.named(names), rows)


def fastest(case: Case) -> tuple[str, Plain, list[Row]]:
    """Name and function of the fastest that can do the case, and what there is to tell of all."""

    def why_not(name: str) -> str:
        return no_flash3(case) if name == "fa3" else available(case)[name]

    return at_hand.fastest(case, CANDIDATES, why_not, lambda plain: milliseconds(partial(_with_turns, plain), case))


def _with_turns(plain: Plain, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int) -> Tensor:
    """As those are called that are timed; norm and RoPE are upstream's own."""
    return plain(q, k, v)


def no_flash3(case: Case) -> str:
    """ "" where FlashAttention 3 is there to be tried, else why not. The recipe takes it on sm_90 alone."""
    if case.capability not in FLASH3_CARDS:
        return f"FlashAttention 3 is for sm_80 to sm_90, not sm_{case.capability}"
    missing = importlib.util.find_spec(attention_flash.MODULE) is None
    return f"flash-attn-3 is not installed (no module {attention_flash.MODULE})" if missing else ""


CANDIDATES: dict[str, Callable[[Case], Plain]] = {
    "fa3": partial(at_hand.flash3, attention_flash),
    "cudnn": partial(at_hand.sdpa, SDPBackend.CUDNN_ATTENTION),
    "flash": partial(at_hand.sdpa, SDPBackend.FLASH_ATTENTION),
    "flex": at_hand.flex,
}
