"""What one micro-batch of the CUDA recipe holds for its backward, counted without a card.

    python -m benchmarks.memory                              # the anchors' shapes: 128 rows of 2048, depth 8, dim 512
    python -m benchmarks.memory --rows 64 --depth 9

The recipe runs on PyTorch's meta device, where tensors have shapes and no memory; what autograd saves is summed up by
storage, each storage once. What the optimizer and the weights hold is added. What this does not count: temporaries
within an operation, what torch.compile keeps otherwise than eager autograd, the allocator's waste. So it is a count of
what must be held and no measured peak.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import ROOT, Order
from benchmarks.gpu_run import shape
from core.contract import Spec
from core.recipe import replace as replace_constants

UPSTREAM = 45.0  # GB that upstream's recipe holds at its peak, as published
GOAL = 0.55  # share of it


def built(order: Order) -> Any:
    """The shipped recipe on the meta device; its kernels' shapes come from their fake versions."""
    source = (ROOT / "backends" / "cuda" / "train.py").read_text(encoding="utf-8")
    module = ModuleType("train")
    text = replace_constants(source, shape(order) | {"ATTENTION": "triton"})
    exec(compile(text, "train.py", "exec"), module.__dict__)
    return module.build(Spec(order.vocab, order.context, order.vocab - 1, "meta", "bfloat16", 42, 0))


def saved(training: Any, order: Order) -> dict[tuple[int, ...], tuple[int, int]]:
    """Shape of a storage's first tensor -> (how many storages, bytes in all) that autograd holds after the forward."""
    weights = {t.untyped_storage()._cdata for t in own_tensors(training)}
    seen: dict[int, tuple[tuple[int, ...], int, Tensor]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            seen.setdefault(storage._cdata, (tuple(x.shape), storage.nbytes(), x))  # held, so that no name comes twice
        return x

    tokens = torch.zeros(order.rows, order.context + 1, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = training.model.loss(tokens)
    del loss
    found: dict[tuple[int, ...], tuple[int, int]] = {}
    for where, size, _ in seen.values():
        count, total = found.get(where, (0, 0))
        found[where] = (count + 1, total + size)
    return found


def own_tensors(training: Any) -> list[Tensor]:
    weights = training.model.weights
    return [*weights.singles.values(), *weights.stacks.values(), training.model.cos, training.model.sin]


def state_bytes(training: Any) -> int:
    """Weights, their gradients, the optimizers' moments."""
    weights = [*training.model.weights.singles.values(), *training.model.weights.stacks.values()]
    moments = [m for group in training.adam.groups for found in group["moments"] for m in found[:2]]
    moments += [t for muon in training.muons for t in (muon.momentum, muon.second)]
    return sum(t.numel() * t.element_size() for t in (*weights, *weights, *moments))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description="What a micro-batch holds.")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--top", type=int, default=16, help="how many shapes are listed")
    given = parser.parse_args(arguments)
    order = replace(Order(), rows=given.rows, depth=given.depth)
    training = built(order)
    found, state = saved(training, order), state_bytes(training)
    print(
        f"{order.rows} rows of {order.context}, depth {order.depth}, dim {training.model.dim}, vocabulary {order.vocab}"
    )
    for where, (count, size) in sorted(found.items(), key=lambda x: -x[1][1])[: given.top]:
        print(f"  {size / 1e9:7.2f} GB  {count:3} x {where}")
    held = sum(size for _, size in found.values())
    total, goal = (held + state) / 1e9, GOAL * UPSTREAM
    print(f"saved for backward {held / 1e9:.2f} GB, weights, gradients and moments {state / 1e9:.2f} GB")
    print(f"held in all {total:.2f} GB; the goal is {goal:.2f} GB ({GOAL:g} of {UPSTREAM:g})")


if __name__ == "__main__":
    main()
