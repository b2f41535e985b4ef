"""One side of `benchmarks.ports`, in a process that has a blank card: `-m benchmarks.ports_side SIDE SHAPE CLONE`."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_rtx, upstream_side
from benchmarks.launches import recorded, tell
from benchmarks.leaving import leave
from benchmarks.peers import PEER_NAMES, load_peer, rates
from benchmarks.ports import constants_of
from core.contract import Spec
from kernels import portable

MIB = 2**20
STEPS = 3  # the first compiles, the last one's launches are told
DEVICE = "cuda:0"
CLONE = ("GPT", "build_model_config", "adamw_step_fused", "muon_step_fused", *PEER_NAMES)  # what its train.py defines


def step_of(side: str, shape: gpu_rtx.Shape, clone: str) -> Callable[[float], Tensor]:
    """side: "ports", "clone", or what of ours is made again in backward (`constants_of`). All rows at once, or
    RuntimeError."""
    if side == "clone":
        return step_of_clone(Path(clone), shape)
    mlp = "triton" if portable.products(torch.device(DEVICE)) else "torch"  # fixed: times are the host's here
    again = {} if side == "ports" else constants_of(side)
    module = gpu_rtx.recipe(shape, MLP=mlp, **again)
    training = module.build(Spec(shape.vocab, shape.context, 0, DEVICE, gpu_rtx.dtype_of_card(), 42, 0))
    if side == "ports":
        gpu_rtx.make_peer(training, module)
    tokens, first = gpu_rtx.Tokens(shape, DEVICE), way(training)

    def step(progress: float) -> Tensor:
        loss: Tensor = training.step(tokens, progress)
        if way(training) != first:
            raise RuntimeError(f"{training.rows_at_once} of {shape.rows} rows fit into this card at once; give --rows")
        return loss

    return step


def way(training: Any) -> tuple[int, str, int]:
    """In which the batch goes through the card; another after a step that ran out of memory."""
    return training.rows_at_once, training.model.recompute, training.model.recompute_more


def step_of_clone(folder: Path, shape: gpu_rtx.Shape) -> Callable[[float], Tensor]:
    """The step of jsegov/autoresearch-win-rtx with each layer checkpointed, as that does it on cards below 16 GB: its
    model and optimizer as they stand, at these shapes and with heads as many as ours."""
    dtype = getattr(torch, gpu_rtx.dtype_of_card())
    peer = load_peer(folder / "train.py", {"MAX_SEQ_LEN": shape.context}, CLONE)
    peer |= {"norm": upstream_side.norm, "MUON_COMPUTE_DTYPE": dtype, "HEAD_DIM": gpu_rtx.recipe(shape).HEAD_DIM}
    peer |= {"ADAMW_STEP_IMPL": peer["adamw_step_fused"], "MUON_STEP_IMPL": peer["muon_step_fused"]}
    runtime = SimpleNamespace(attention_backend="sdpa", amp_dtype=dtype)
    with contextlib.redirect_stdout(io.StringIO()):
        with torch.device("meta"):
            config = peer["build_model_config"](shape.depth, shape.vocab, runtime, use_activation_checkpointing=True)
            model = peer["GPT"](config)
        model.to_empty(device=torch.device(DEVICE))
        model.init_weights(embed_dtype=dtype)
        optimizer = model.setup_optimizer(**rates(peer))
    tokens, parts = gpu_rtx.Tokens(shape, DEVICE), shape.tokens // (shape.rows * shape.context)

    def step(progress: float) -> Tensor:
        total = torch.zeros((), device=DEVICE)
        for _ in range(parts):
            batch = tokens.next(shape.rows, shape.context)
            with torch.autocast("cuda", dtype):
                loss = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            (loss / parts).backward()
            total += loss.detach() / parts
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return total

    return step


def main() -> None:
    """What each launch of the third step is, one line of JSON each, then the memory of the second and third."""
    side, shape = sys.argv[1], gpu_rtx.Shape(**json.loads(sys.argv[2]))
    step = step_of(side, shape, sys.argv[3])
    step(0.0)
    torch.cuda.reset_peak_memory_stats()
    step(1 / STEPS)
    with recorded() as recorder:
        step(2 / STEPS)
    held = {"allocated": torch.cuda.max_memory_allocated() / MIB, "reserved": torch.cuda.max_memory_reserved() / MIB}
    tell(recorder, **held)


if __name__ == "__main__":
    main()
    leave()
