"""What tests/test_blank_card.py looks at of the cuda recipe, in a child that has a blank H100: JSON, one line a fact.

The order is a trainer's: a build and a warm-up that compiles (`first`: no more than these), then a second build in the
same process and its steps. Arguments: "first" or "all"; what multiplies in the MLP; of a small model, whose attention
over the whole context is to be taken.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

import torch
from torch._dynamo.utils import counters

from backends.cuda.device import open_device
from backends.worker import RandomBatches, warm_up
from benchmarks import blank_card
from benchmarks.gpu import Order
from benchmarks.gpu_sections import recipe
from benchmarks.leaving import leave
from core.contract import Spec

UPSTREAMS = replace(Order(), rows=128, tokens=2**19)  # the shapes at which upstream publishes its memory
SMALL = replace(UPSTREAMS, rows=4, context=512, tokens=2**12, depth=1, heads=2)
STEPS = (0.0, 0.3, 0.6, 0.9)  # progress


class OnCard:
    """Batches that are on the card already: what a step waits for is its own."""

    def next(self, rows: int, length: int) -> torch.Tensor:
        return torch.zeros(rows, length + 1, dtype=torch.int64, device="cuda:0")


def tell(what: str, **facts: Any) -> None:
    print(json.dumps({"what": what, **facts}), flush=True)


def compiled() -> dict[str, int]:
    """How much was compiled so far: graphs by Dynamo, found again or not; binaries loaded since the last reset."""
    found = {f"graphs {kind}": counters["aot_autograd"][f"autograd_cache_{kind}"] for kind in ("hit", "miss", "bypass")}
    graphs = counters["stats"]["unique_graphs"]
    return {"graphs": graphs, **found, "binaries": blank_card.counts().times("binaries")}


def step(training: Any, progress: float) -> dict[str, Any]:
    blank_card.reset()
    torch.cuda.reset_peak_memory_stats()
    training.step(OnCard(), progress)
    counts = blank_card.counts()
    return {
        "peak": torch.cuda.max_memory_allocated() / 2**20,
        "graphs": counters["stats"]["unique_graphs"],
        **{kind: counts.names(kind) for kind in blank_card.KINDS},
        "bytes to card": counts.bytes("to card"),
    }


def main() -> None:
    by = sys.argv[2] if len(sys.argv) > 2 else "triton"  # what is chosen by time would differ from run to run
    named = sys.argv[3:]
    order = SMALL if named else UPSTREAMS
    device, spec = open_device(), Spec(order.vocab, order.context, 8191, "cuda:0", "bfloat16", 42, 0)
    own = {"ATTENTION": named[0], "WINDOW_PATTERN": "L"} if named else {"ATTENTION": "triton"}
    module: ModuleType = recipe(order, MLP=by, **own)
    training = module.build(spec)
    warm_up(device, training, RandomBatches(device, spec))
    tell("first", rows=training.rows, breaks=dict(counters["graph_break"]), **compiled())
    if sys.argv[1:2] == ["first"]:
        return
    del training
    gc.collect()
    blank_card.reset()
    training = module.build(spec)
    tell("second", rows=training.rows, **compiled(), spec=asdict(spec))
    for progress in STEPS:
        tell("step", **step(training, progress))


if __name__ == "__main__":
    main()
    leave()
