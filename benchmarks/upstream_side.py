"""Upstream's model and optimizer on a bench's weights and batches. Imports torch, numpy and nothing of ours.

Run by `benchmarks.upstream` as `python -I side.py ORDER`, from a copy in an empty folder. As they stand in the clone:
model, optimizer, schedules, torch.compile and bfloat16 autocast. Replaced: FlashAttention 3, which is downloaded from a
hub, by FlexAttention on a card and scaled_dot_product_attention on a CPU; both are told with the answer.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTLE, GROUPS = 0.1, 8  # as in the bench's own sides (benchmarks/side.py)


def forget(ours: Path) -> None:
    """Take the project's folders off the path, an editable installation's finder included. The environment that this
    runs in stays, wherever it lies: the README puts it into the project's folder."""
    root, environment = ours.resolve(), Path(sys.prefix).resolve()

    def is_ours(place: str) -> bool:
        path = Path(place or ".").resolve()
        return path.is_relative_to(root) and not path.is_relative_to(environment)

    sys.path[:] = [p for p in sys.path if not is_ours(p)]
    finders = [f for f in sys.meta_path if "__editable__" in getattr(f, "__module__", "") + repr(f)]
    sys.meta_path[:] = [f for f in sys.meta_path if f not in finders]
    sys.path_hooks[:] = [h for h in sys.path_hooks if "__editable__" not in getattr(h, "__module__", "") + repr(h)]
    sys.path_importer_cache.clear()
    for name in ("core", "backends", "benchmarks", "kernels", "prepare"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and is_ours(spec.origin):
            raise ImportError(f"{name} of this project can still be imported beside upstream")


def tell(kind: str, **facts: Any) -> None:
    print(json.dumps({"event": kind, **facts}), flush=True)


def main() -> None:
    order = json.loads(sys.argv[1])
    forget(Path(order["ours"]))
    import numpy as np
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    startup = time.time() - order["began"]
    tell("ready", device=device, dtype="bfloat16", dtype_reason=f"upstream's autocast; {attention_name(device)}")
    if order["task"] == "start":
        tell("answer", startup=startup)
        os._exit(0)
    began = time.perf_counter()
    one = training(order, device, np.load(order["weights"]))
    build = time.perf_counter() - began
    steps = Steps(one, torch.from_numpy(np.load(order["batches"]).astype(np.int64)), device)
    tell("opened", startup=startup, build=build, flops_per_token=0.0, **first_steps(steps, order))
    for line in sys.stdin:
        tell("turn", **turn(steps, json.loads(line)["steps"]))


# --- model and optimizer -----------------------------------------------------------------------


def training(order: dict[str, Any], device: str, weights: Any) -> Callable[[Any, float], Any]:
    """(rows, T + 1) tokens on the device, progress -> mean loss, unread: one optimizer step as its own loop does it."""
    import torch

    peer = namespace(order, device)
    constants = order["constants"]
    depth, head_dim = constants["DEPTH"], constants["HEAD_DIM"]
    heads = -(-depth * constants["ASPECT_RATIO"] // head_dim)
    config = peer["GPTConfig"](
        order["context"], order["vocab_size"], depth, heads, heads, heads * head_dim, constants["WINDOW_PATTERN"]
    )
    with torch.device("meta"):
        model = peer["GPT"](config)
    model.to_empty(device=device)
    rates = ("MATRIX_LR", "EMBEDDING_LR", "UNEMBEDDING_LR", "SCALAR_LR", "WEIGHT_DECAY", "ADAM_BETAS")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a scaling factor
        model.init_weights()
        optimizer = model.setup_optimizer(**{name.lower(): peer[name] for name in rates})
    load(model, weights)
    if device == "cpu":  # PyTorch cannot compile upstream's Muon for a CPU: what it cannot runs as plain Python
        torch._dynamo.config.suppress_errors = True
    forward = torch.compile(model, dynamic=False)
    micro, done = constants["DEVICE_BATCH_SIZE"], [0]

    def one(tokens: Any, progress: float) -> Any:
        parts = tokens.split(micro)
        total = torch.zeros((), device=device)
        for part in parts:
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss = forward(part[:, :-1].contiguous(), part[:, 1:].contiguous()) / len(parts)
            loss.backward()
            total += loss.detach()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * peer["get_lr_multiplier"](progress)
            if group["kind"] == "muon":
                group["momentum"] = peer["get_muon_momentum"](done[0])
                group["weight_decay"] = peer["get_weight_decay"](progress)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        done[0] += 1
        return total

    return one


def namespace(order: dict[str, Any], device: str) -> dict[str, Any]:
    """What the clone's train.py defines, with an attention of FlashAttention 3's signature."""
    attend = flex if device != "cpu" else windowed_sdpa
    peer: dict[str, Any] = {"__name__": "peer", "fa3": types.SimpleNamespace(flash_attn_func=attend)}
    module = types.ModuleType("peer")
    module.__dict__.update(peer)
    sys.modules["peer"] = module  # dataclasses look their module up
    exec(compile(Path(order["definitions"]).read_text(encoding="utf-8"), "upstream", "exec"), module.__dict__)
    module.__dict__["norm"] = norm
    return module.__dict__


def norm(x: Any) -> Any:
    """Upstream's, as the torch that it pins computes it: since 2.10 autocast makes a norm of bfloat16 float32."""
    import torch

    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.rms_norm(x, (x.size(-1),))


def load(model: Any, weights: Any) -> None:
    """The bench's weights, under the same names; the dtype is the model's own."""
    import torch

    own = dict(model.named_parameters())
    odd = sorted(own.keys() ^ set(weights.files))
    if odd:
        raise ValueError(f"upstream's weights have other names: {odd[:4]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(weights[name]))


def attention_name(device: str) -> str:
    return "FlexAttention for FlashAttention 3" if device != "cpu" else "PyTorch's attention for FlashAttention 3"


def windowed_sdpa(q: Any, k: Any, v: Any, causal: bool, window_size: tuple[int, int]) -> Any:
    """FlashAttention 3's signature, (B, T, H, D)."""
    import torch
    import torch.nn.functional as F

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    T, back = q.size(2), window_size[0]
    if back >= T or back < 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    seen = (distance >= 0) & (distance <= back)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def flex(q: Any, k: Any, v: Any, causal: bool, window_size: tuple[int, int]) -> Any:
    """The same on a card, without scores of size T^2; called from within the compiled model."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = q.size(1)
    back = T if window_size[0] < 0 else min(window_size[0], T)

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j <= back)

    mask = create_block_mask(seen, None, None, T, T, device=q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask).transpose(1, 2)


# --- steps -------------------------------------------------------------------------------------


class Steps:
    """The bench's batches in order, and again from the first. From pinned memory, as upstream's loader sends them."""

    def __init__(self, one: Callable[[Any, float], Any], batches: Any, device: str) -> None:
        self.one, self.device, self.done = one, device, 0
        self.batches = batches if device == "cpu" else batches.pin_memory()

    def take(self, count: int) -> list[float]:
        """Losses of so many steps, which have ended; one is read when the next step is under way."""
        import torch

        losses: list[float] = []
        waiting: list[Callable[[], float]] = []
        for _ in range(count):
            at = self.done % len(self.batches)
            batch = self.batches[at].to(self.device, non_blocking=True)
            waiting.append(later(self.one(batch, at / len(self.batches))))
            if len(waiting) > 1:
                losses.append(waiting.pop(0)())
            self.done += 1
        if self.device != "cpu":
            torch.cuda.synchronize()
        return losses + [read() for read in waiting]


def later(loss: Any) -> Callable[[], float]:
    """The loss, for which nothing is waited that is sent to the card from now on; as in kernels/pinned.py."""
    import torch

    if loss.device.type == "cpu":
        return lambda: float(loss)
    buffer, event = torch.empty((), dtype=torch.float32, pin_memory=True), torch.cuda.Event()
    buffer.copy_(loss.detach(), non_blocking=True)
    event.record()

    def read() -> float:
        event.synchronize()
        return float(buffer)

    return read


def first_steps(steps: Steps, order: dict[str, Any]) -> dict[str, Any]:
    warm, count = order["warm_steps"], order["first_steps"] or len(steps.batches)
    losses: list[float] = []
    seconds: list[float] = []
    for step in range(count):
        mark = time.perf_counter()
        losses += steps.take(1)
        seconds.append(time.perf_counter() - mark)
        tell("step", step=step + 1, of=count)
    gc.collect()
    gc.freeze()
    timed = sorted(seconds[warm:])
    return {
        "compile": max(0.0, sum(seconds[:warm]) - warm * timed[len(timed) // 2]),
        "seconds": seconds,
        "losses": losses,
        "peak_memory": peak_memory(steps.device),
    }


def turn(steps: Steps, count: int) -> dict[str, Any]:
    """As the bench's own sides take one, but for what needs their recipes and devices."""
    time.sleep(SETTLE)
    steps.take(1)
    size = -(-count // GROUPS)
    found = []
    for _ in range(-(-count // size)):
        began = time.perf_counter()
        steps.take(size)
        found.append((time.perf_counter() - began) / size)
    seconds = statistics.median(found)
    energy = {"joules": None, "seconds": seconds * count, "source": "not told: not measured for a peer"}
    return {"seconds": seconds, "energy": energy}


def peak_memory(device: str) -> int:
    """Bytes: of the card's arrays, or of this process (0 on Windows: not told)."""
    import torch

    if device != "cpu":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line for line in lines if line.startswith("VmHWM:")]
    if found:
        return int(found[0].split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used if sys.platform == "darwin" else used * 1024)


if __name__ == "__main__":
    main()
