"""One side of `benchmarks.memory`, in a process that has a blank card: `-m benchmarks.memory_side SIDE ORDER TOP`."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import blank_card
from benchmarks.gpu import Order
from benchmarks.gpu_sections import Tokens, recipe, upstream_step
from benchmarks.leaving import leave
from core.contract import Spec
from kernels import attention_flash

MIB = 2**20
STEPS = 3  # the first compiles
ENTRIES = 200_000  # of the allocator's history, more than a step has

Pair = tuple[int, int]
Step = Callable[[Tokens, float], Tensor]

# --- what FlashAttention 3 allocates, upstream's attention and where it is the fastest ours, too --------


@torch.library.custom_op("blank::flash3", mutates_args=())
def _flash3(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """FlashAttention 3's forward, as far as memory is concerned: (B, T, H, D) -> the same, and (B, H, T) float32."""
    return torch.empty_like(q), _per_row(q)


@torch.library.custom_op("blank::flash3_backward", mutates_args=())
def _flash3_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    beside = _beside_gradients(q)
    found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    del beside
    return found


@torch.library.custom_op("blank::flash3_gradients", mutates_args=("dq", "dk", "dv"))
def _flash3_gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, window: int
) -> None:
    """The same where there is a place for them."""
    beside = _beside_gradients(q)
    del beside


def _beside_gradients(q: Tensor) -> tuple[Tensor, ...]:
    """Its backward holds dq in float32 and two numbers a row beside the gradients (hopper/flash_api.cpp, mha_bwd)."""
    sums = q.new_zeros(q.size(0), q.size(2), q.size(1), q.size(3), dtype=torch.float32)
    return sums, _per_row(q), _per_row(q)


def _per_row(q: Tensor) -> Tensor:
    return q.new_empty(q.size(0), q.size(2), q.size(1), dtype=torch.float32)


_flash3.register_fake(lambda q, k, v, window: (torch.empty_like(q), _per_row(q)))
_flash3_backward.register_fake(
    lambda dy, q, k, v, y, lse, window: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


_flash3.register_autograd(
    lambda ctx, dy, dlse: (*_flash3_backward(dy, *ctx.saved_tensors, ctx.window), None), setup_context=_keep
)


def flash3(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"FlashAttention 3 takes bfloat16 and float16, not {q.dtype}: upstream pins torch 2.9.1")
    return _flash3(q, k, v, window_size[0])[0]  # type: ignore[no-any-return]


def flash3_package() -> ModuleType:
    """What kernels/attention_flash.py imports."""

    def forward(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: Pair) -> Any:
        return _flash3(q, k, v, window_size[0])

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, softmax_scale: float, causal: bool, window_size: Pair,
    ) -> None:  # fmt: skip
        _flash3_gradients(dout, q, k, v, out, softmax_lse, dq, dk, dv, window_size[0])

    package = ModuleType(attention_flash.MODULE)
    package.__spec__ = ModuleSpec(package.__name__, None)
    vars(package).update(_flash_attn_forward=forward, _flash_attn_backward=backward)
    return package


# --- measuring ----------------------------------------------------------------------------------


def ours(order: Order, attention: str = "triton") -> Step:
    """The shipped recipe with its own kernels, which every card since sm_80 can take: nothing is chosen by time."""
    spec = Spec(order.vocab, order.context, order.vocab - 1, order.device, "bfloat16", 42, 0)
    training = recipe(order, ATTENTION=attention, MLP="triton").build(spec)

    def step(tokens: Tokens, progress: float) -> Tensor:
        loss: Tensor = training.step(tokens, progress)
        if training.rows < order.rows:
            raise RuntimeError(f"{training.rows} of {order.rows} rows went through at once: {training.rows_reason}")
        return loss

    return step


def ours_with_flash3(order: Order) -> Step:
    sys.modules[attention_flash.MODULE] = flash3_package()
    return ours(order, "fa3")


def upstream(order: Order) -> Step:
    return upstream_step(order, flash3)


# `recipe` is `ours` with the order's own file
SIDES = {"ours": ours, "ours, fa3": ours_with_flash3, "recipe": ours, "upstream": upstream}


def measured(step: Step, tokens: Tokens, progress: float) -> dict[str, Any]:
    """What PyTorch's allocator held at most during a step, and what the step asked of the card."""
    torch.cuda.reset_peak_memory_stats()
    blank_card.reset()
    began = time.monotonic()
    step(tokens, progress)
    seconds, counts = time.monotonic() - began, blank_card.counts()
    return {
        "allocated": torch.cuda.max_memory_allocated() / MIB,
        "reserved": torch.cuda.max_memory_reserved() / MIB,
        "seconds": seconds,
        "torch": torch.__version__,
        **{kind: counts.times(kind) for kind in blank_card.KINDS},
        "bytes to card": counts.bytes("to card"),
        "waited by": counts.names("waits"),
        "not stood in for": counts.names("absent"),
    }


# --- what is held at the peak ---------------------------------------------------------------------


def at_peak(step: Step, tokens: Tokens, top: int) -> Iterator[dict[str, Any]]:
    """The tensors of a step that are there when it holds the most, by who took them, the largest first.

    What lives as long as the training, such as weights and moments, was there before and is one row.
    """
    before = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(max_entries=ENTRIES, stacks="python")
    step(tokens, 1.0)
    events = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(None)  # type: ignore[arg-type]
    yield {"held before the step": before / MIB}
    found = Counter((e["size"], _taker(e)) for e in _most(events).values())
    for (size, taker), count in sorted(found.items(), key=lambda x: -x[0][0] * x[1])[:top]:
        yield {"mib": count * size / MIB, "count": count, "each": size / MIB, "by": taker}


def _most(events: list[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Address -> the allocation that lives there when all of them are the most."""
    live: dict[int, Mapping[str, Any]] = {}
    most: dict[int, Mapping[str, Any]] = {}
    held = peak = 0
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            held += event["size"]
        elif event["action"] == "free_completed":
            live.pop(event["addr"], None)  # what was taken before the history is no row of it
            held -= event["size"]
        if held > peak:
            peak, most = held, dict(live)
    return most


def _taker(event: Mapping[str, Any]) -> str:
    return " < ".join(f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in event["frames"][:3])


def main() -> None:
    side, order, top = sys.argv[1], Order(**json.loads(sys.argv[2])), int(sys.argv[3])
    step, tokens = SIDES[side](order), Tokens(order)
    for i in range(STEPS):
        print(json.dumps({"step": i + 1, **measured(step, tokens, i / STEPS)}), flush=True)
    for row in at_peak(step, tokens, top) if top else ():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
    leave()
