"""The RTX recipe's step on a card held to so many gigabytes, against the usual path of ports, at equal shapes.

    python -m benchmarks.gpu_rtx --limit-gb 8              # on any NVIDIA card; more than 8 GB really fails
    python -m benchmarks.gpu_rtx --smoke                   # small shapes on a CPU: it works, its times mean nothing

The peer is what ports to gaming PCs do, written here: eager PyTorch, a dense boolean mask for every windowed layer,
each layer checkpointed, all logits at once in float32. Model, weights, optimizer, batch and tokens are the same on both
sides, and loss and gradient of one row are held against each other. Ours is there twice: as it is the fastest, and with
the inside of four of eight MLPs made again in backward, which by `benchmarks.ports`, the same on a card that is not
there, is enough for 0.6 of the peer's memory. A side that does not fit into the limit gets half of its rows at once
until it does, which is told.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import gpu_profile
from core.allocator import cap, margin
from core.contract import Spec
from core.paths import project_root
from core.recipe import replace
from kernels.attention_reference import reference_rotated
from kernels.errors import out_of_memory

Row = dict[str, Any]
LOSSES_APART, GRADIENTS_APART = 5e-3, 0.05  # shares of the peer's, beyond which the work was not the same
PROVEN = "attn.c_q.weight"  # whose gradient depends on every key that a query sees, and on all layers behind


@dataclass(frozen=True)
class Shape:
    """Of the model and its step."""

    depth: int = 8
    ratio: int = 64
    context: int = 2048
    vocab: int = 8192
    tokens: int = 2**16  # of one optimizer step
    rows: int = 16  # at once
    steps: int = 12


SMOKE = Shape(2, 64, 96, 97, 4 * 96, 2, 3)


def recipe(shape: Shape, **more: Any) -> ModuleType:
    """The shipped recipe at these shapes; more: other constants of it."""
    constants = {
        "DEPTH": shape.depth,
        "ASPECT_RATIO": shape.ratio,
        "TOTAL_BATCH_SIZE": shape.tokens,
        "DEVICE_BATCH_SIZE": shape.rows,
        **more,
    }
    source = (project_root() / "backends" / "rtx" / "train.py").read_text(encoding="utf-8")
    module = ModuleType("train")
    exec(compile(replace(source, constants), "train.py", "exec"), module.__dict__)
    return module


def make_peer(training: Any, module: ModuleType) -> None:
    """Put the usual path in place of the training's forward. Its optimizer stays."""
    model = training.model
    positions = torch.arange(training.sequence_len, device=model.device)
    distance = positions[:, None] - positions
    masks = {w: (distance >= 0) & (distance <= w) for w in set(model.windows)}

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=2.0**-23)

    def layer(i: int, x: Tensor, x0: Tensor, tokens: Tensor) -> Tensor:
        w, name = model.weights.by_name(), f"transformer.h.{i}."
        m = {n: w[f"{name}{n}.weight"].to(x.dtype) for n in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
        x = (w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0).to(x.dtype)
        y = norm(x)
        heads = (*tokens.shape, model.heads, -1)
        q, k, v = (F.linear(y, w[f"{name}attn.{n}.weight"].to(x.dtype)).view(heads) for n in ("c_q", "c_k", "c_v"))
        if module.has_value_embedding(i):
            gate = w[f"{name}attn.ve_gate.weight"].to(x.dtype)
            gate = 2 * torch.sigmoid(F.linear(y[..., : gate.size(1)], gate))
            v = v + gate.unsqueeze(-1) * F.embedding(tokens, w[f"value_embeds.{i}.weight"]).to(x.dtype).view(heads)
        q, k = (reference_rotated(t, model.cos, model.sin) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[model.windows[i]])
        x = x + F.linear(a.transpose(1, 2).reshape(x.shape), m["attn.c_proj"])
        return x + F.linear(F.relu(F.linear(norm(x), m["mlp.c_fc"])).square(), m["mlp.c_proj"])

    def loss(tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = x0 = norm(F.embedding(inputs, model.weights.singles["transformer.wte.weight"])).to(model.dtype)
        for i in range(len(model.windows)):
            x = checkpoint(layer, i, x, x0, inputs, use_reentrant=False)
        logits = F.linear(norm(x), model.weights.singles["lm_head.weight"].to(x.dtype)).float()
        logits = module.SOFTCAP * torch.tanh(logits / module.SOFTCAP)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model.loss = loss


class Tokens:
    """`contract.Batches` of seeded random tokens, the same for both sides."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device, self.random = shape, device, np.random.default_rng(0)

    def next(self, rows: int, length: int) -> Tensor:
        return torch.from_numpy(self.random.integers(0, self.shape.vocab, (rows, length + 1))).to(self.device)


def randomize(training: Any) -> None:
    """Seeded values for what a training starts with as zeros or nearly so: there the layers change nothing, and the
    loss is that of a uniform guess whatever attention does."""
    random, weights = np.random.default_rng(1), training.weights()
    for name in sorted(weights):
        if name.endswith(("c_proj.weight", "ve_gate.weight", "lm_head.weight")):
            drawn = random.standard_normal(weights[name].shape, dtype=np.float32)
            weights[name] = drawn * np.float32(drawn.shape[-1] ** -0.5)
    training.load_weights(weights)


def proven(training: Any, shape: Shape, device: str) -> Row:
    """Loss of one row, and the norm of its gradient; float16's scaled as in a step."""
    model = training.model
    scale = 1.0 if training.scale is None else float(training.scale.scale) * shape.context / shape.tokens
    loss = model.loss(Tokens(shape, device).next(1, shape.context))
    (loss * scale).backward()
    squares = [g.double().square().sum() for n, g in model.weights.gradients().items() if n.endswith(PROVEN)]
    model.weights.drop_gradients()
    return {"proof_loss": float(loss.detach()), "proof_gradient": float(sum(squares)) ** 0.5 / scale}


def apart(ours: Row, peer: Row) -> Row:
    """How far the sides are from equal work; what is no number is not equal, and equal zeros, as on a
    card that computes nothing, prove nothing."""
    loss, gradient = (abs(ours[n] - peer[n]) / max(peer[n], 1e-30) for n in ("proof_loss", "proof_gradient"))
    passed = loss < LOSSES_APART and gradient < GRADIENTS_APART and peer["proof_gradient"] > 0
    return {"losses_apart": loss, "gradients_apart": gradient, "passed": passed}


OURS: dict[str, Row] = {  # constants of the recipe
    "ours": {"RECOMPUTE": "nothing"},
    "ours, 4 MLPs made again": {"RECOMPUTE": "nothing", "RECOMPUTE_MORE": 4},
}
PEER = "peer"


def measure(side: str, shape: Shape, device: str, dtype: str) -> Row:
    """Median time of a step, the most memory held, the proof of equal work; rows at once as they ended up."""
    module = recipe(shape, **OURS.get(side, {}))
    training = module.build(Spec(shape.vocab, shape.context, 0, device, dtype, 42, 0))
    if side == PEER:
        make_peer(training, module)
    randomize(training)
    proof = proven(training, shape, device)
    tokens, times = Tokens(shape, device), []
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for step in range(shape.steps):
        start = time.perf_counter()
        float(training.step(tokens, step / shape.steps))  # waits for the device
        times.append(time.perf_counter() - start)
    row = {"side": side, "ms": 1e3 * statistics.median(times[2:] or times), **proof}
    row |= {"rows_at_once": training.rows_at_once, "kernels": training.describe()["kernels"] if side in OURS else ""}
    row |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device != "cpu" else {}
    return row | gpu_profile.whole(device, lambda: training.step(tokens, 1.0))


def compare(shape: Shape, device: str, dtype: str) -> Iterator[Row]:
    """Each side as soon as it is measured: one that cannot run takes no row of the others with it. Then the ratios of
    the peer to each of ours. A side that does not fit with one row is a row that says so, and fails if ours; any other
    error is a failure of either."""
    rows: dict[str, Row] = {}
    for side in (*OURS, PEER):
        try:
            rows[side] = measure(side, shape, device, dtype)
        except Exception as error:  # noqa: BLE001 - Triton's, the libraries' and the driver's share no base but this
            said = " ".join(str(error).split())[:200]
            what = {"out_of_memory": said} if out_of_memory(error) else {"failed": f"{type(error).__name__}: {said}"}
            rows[side] = {"side": side, **what} | ({"passed": False} if side in OURS or "failed" in what else {})
        yield rows[side]
        gc.collect()
        torch.cuda.empty_cache()
    for side in OURS:
        if "ms" in rows[side] and "ms" in rows[PEER]:
            yield ratio(rows[side], rows[PEER])


def ratio(ours: Row, peer: Row) -> Row:
    """How many times as fast, and how much of the memory, where that was measured. A card that is far faster than a
    gaming PC's waits for Python in either side's steps: what its kernels take by themselves is told apart."""
    row = {"side": f"peer / {ours['side']}", "speed": peer["ms"] / ours["ms"], **apart(ours, peer)}
    if "kernels_ms" in ours and "kernels_ms" in peer:
        row["speed_of_kernels"] = peer["kernels_ms"] / ours["kernels_ms"]
    return row | ({"memory": ours["peak_gib"] / peer["peak_gib"]} if "peak_gib" in ours else {})


def on_card(limit_gb: float | None) -> Iterator[Row]:
    """What card the first one is; then both sides on it, its allocator held to so many GB (10^9 bytes), and to what the
    backend's own device would allow: beyond that Windows' driver swaps, and does not fail."""
    free, total = torch.cuda.mem_get_info()
    allowed = cap(free, total, margin())
    held = min(allowed, int(limit_gb * 1e9)) if limit_gb else allowed
    torch.cuda.set_per_process_memory_fraction(held / total)
    dtype = dtype_of_card()
    card = {"side": "card", "name": torch.cuda.get_device_name(), "dtype": dtype}
    yield {**card, "limit_gb": limit_gb, "held_gb": held / 1e9}
    yield from compare(Shape(), "cuda:0", dtype)


def dtype_of_card() -> str:
    return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"


def small() -> Iterator[Row]:
    """Both sides on a CPU: it works, and the times mean nothing."""
    return compare(SMOKE, "cpu", "float32")


def main() -> None:
    """A step of the RTX recipe against the usual path of ports, at equal shapes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_rtx", description=main.__doc__)
    parser.add_argument("--limit-gb", type=float, help="hold the allocator to so many GB (10^9 bytes) of the card")
    parser.add_argument("--smoke", action="store_true", help="small shapes on a CPU")
    given = parser.parse_args()
    if not given.smoke and not torch.cuda.is_available():
        sys.exit("no CUDA device is in reach; --smoke runs small shapes on the processor")
    rows = small() if given.smoke else on_card(given.limit_gb)
    failed = False
    for row in rows:
        print(json.dumps(row), flush=True)
        failed |= row.get("passed") is False
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
