"""Upstream's model and optimizer on a bench's weights and batches. Imports torch, numpy and nothing of ours.

Run by `benchmarks.upstream` as `python -I side.py ORDER`, from a copy in a folder with three others of ours that need
no more than torch. As they stand in the clone: model, optimizer, schedules, torch.compile and bfloat16 autocast.

Its attention is FlashAttention 3, which it downloads from a hub; here is no network. On a card each window of its
layers gets the fastest at hand, forward and backward, which is told with the answer: what the clone's own lines find
where a training of upstream's has left it, FlashAttention 3 as a package, cuDNN's and torch's flash attention (whole
context only), or FlexAttention. The first process of a bench times them. On a CPU it is PyTorch's, with a mask.
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
from functools import partial
from pathlib import Path
from typing import Any

SETTLE, GROUPS = 0.1, 8  # as in the bench's own sides (benchmarks/side.py)
TIMED_ROWS = 16  # at most: times grow with the rows, their order does not change
CHOSEN = "attention.json"  # in this folder, left by a bench's first process for those after it
OWN = "own_attention.py"  # the clone's lines that fetch its attention
AS_IT_IS, INSTEAD = "upstream's own", "in the place of what upstream downloads"


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
    if order["task"] == "start":
        tell("ready", device=device)
        tell("answer", startup=startup)
        os._exit(0)
    attend, attention = standing(order, device)
    tell("ready", device=device, dtype="bfloat16", dtype_reason="upstream's autocast", attention=attention)
    began = time.perf_counter()
    one = training(order, device, np.load(order["weights"]), attend)
    build = time.perf_counter() - began
    steps = Steps(one, torch.from_numpy(np.load(order["batches"]).astype(np.int64)), device)
    tell("opened", startup=startup, build=build, flops_per_token=0.0, **first_steps(steps, order))
    for line in sys.stdin:
        tell("turn", **turn(steps, json.loads(line)["steps"]))


# --- model and optimizer -----------------------------------------------------------------------


def training(
    order: dict[str, Any], device: str, weights: Any, attend: Callable[..., Any]
) -> Callable[[Any, float], Any]:
    """(rows, T + 1) tokens on the device, progress -> mean loss, unread: one optimizer step as its own loop does it."""
    import torch

    peer = namespace(order, attend)
    constants = order["constants"]
    depth, head_dim = constants["DEPTH"], constants["HEAD_DIM"]
    heads = heads_of(constants)
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


def heads_of(constants: dict[str, Any]) -> int:
    """Of a layer, by the recipe's constants."""
    return -(-constants["DEPTH"] * constants["ASPECT_RATIO"] // constants["HEAD_DIM"])


def namespace(order: dict[str, Any], attend: Callable[..., Any]) -> dict[str, Any]:
    """What the clone's train.py defines, with an attention of FlashAttention 3's signature."""
    peer: dict[str, Any] = {"__name__": "peer", "fa3": types.SimpleNamespace(flash_attn_func=attend)}
    module = types.ModuleType("peer")
    module.__dict__.update(peer)
    sys.modules["peer"] = module  # dataclasses look their module up
    exec(compile(Path(order["definitions"]).read_text(encoding="utf-8"), "upstream", "exec"), module.__dict__)
    module.__dict__["norm"] = norm
    return module.__dict__


def norm(x: Any) -> Any:
    """Upstream's, as the torch that it pins computes it. Since 2.10 autocast makes a norm of bfloat16 float32: the
    stream would be read and kept twice as wide, and FlashAttention 3 takes no such q and k. No work of upstream's."""
    import torch

    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.rms_norm(x, (x.size(-1),))


def load(model: Any, weights: Any) -> None:
    """Weights as arrays by name, a file of numpy's or a dictionary; the dtype is the model's own."""
    import torch

    own = dict(model.named_parameters())
    odd = sorted(own.keys() ^ set(weights.keys()))
    if odd:
        raise ValueError(f"upstream's weights have other names: {odd[:4]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(weights[name]))


# --- attention ---------------------------------------------------------------------------------


def standing(order: dict[str, Any], device: str) -> tuple[Callable[..., Any], str]:
    """A function of FlashAttention 3's signature, (q, k, v, causal, window_size), all (B, T, H, D); and what it is."""
    import torch

    at_hand = beside("at_hand")
    if device == "cpu":
        return at_hand.windowed_sdpa, f"{at_hand.MASKED}, {INSTEAD}"
    T, file = order["context"], Path(__file__).with_name(CHOSEN)
    cases = {window: case(order, device, window) for window in windows(T, order["constants"]["WINDOW_PATTERN"])}
    if not file.is_file():
        names, rows = chosen(cases)
        file.write_text(json.dumps({"names": names, "told": at_hand.told(rows)}), encoding="utf-8")
    found = json.loads(file.read_text(encoding="utf-8"))
    names = {int(window): name for window, name in found["names"].items()}
    made = {window: makers().get(name, at_hand.masked)(cases[window]) for window, name in names.items()}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # what was timed is none of upstream's
    instead = "" if {*names.values()} == {AS_IT_IS} else f", {INSTEAD}"
    return at_hand.call_of(made), f"{at_hand.named(names)}{instead} ({found['told']})"


def windows(length: int, pattern: str) -> list[int]:
    """Tokens that are seen by the layers of a pattern, as upstream reads it: L all, S half; the last layer sees all."""
    return [length // 2, length] if "S" in pattern.upper() else [length]


def case(order: dict[str, Any], device: str, window: int) -> Any:
    import torch

    constants = order["constants"]
    rows = min(constants["DEVICE_BATCH_SIZE"], TIMED_ROWS)
    return types.SimpleNamespace(
        rows=rows, length=order["context"], heads=heads_of(constants), head=constants["HEAD_DIM"], window=window,
        device=torch.device(device),
    )  # fmt: skip


def chosen(cases: dict[int, Any]) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """window -> the name of the fastest; and what there is to tell of all."""
    names: dict[int, str] = {}
    rows: list[dict[str, Any]] = []
    for window, of in cases.items():
        names[window], _, found = beside("at_hand").fastest(of, makers(), partial(why_not, of), partial(timed, of))
        rows += found
    return names, rows


def makers() -> dict[str, Callable[[Any], Any]]:
    """Name -> what makes its function of q, k and v for a case."""
    from torch.nn.attention import SDPBackend

    at_hand = beside("at_hand")
    return {
        AS_IT_IS: own,
        "fa3": partial(at_hand.flash3, beside("attention_flash")),
        "cudnn": partial(at_hand.sdpa, SDPBackend.CUDNN_ATTENTION),
        "flash": partial(at_hand.sdpa, SDPBackend.FLASH_ATTENTION),
        "flex": at_hand.flex,
    }


def own(of: Any) -> Callable[..., Any]:
    """What the clone's own lines find, without a network: that is left in a cache by a training of upstream's."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    found: dict[str, Any] = {"__name__": "own_attention"}
    exec(compile(Path(__file__).with_name(OWN).read_text(encoding="utf-8"), OWN, "exec"), found)
    attend = found["fa3"].flash_attn_func
    return lambda q, k, v: attend(q, k, v, causal=True, window_size=(of.window, 0))


def why_not(of: Any, name: str) -> str:
    """Why a candidate is not tried; what is tried and fails says so itself."""
    if name in ("cudnn", "flash") and of.window < of.length - 1:
        return "knows no windows"
    if name == AS_IT_IS and not Path(__file__).with_name(OWN).read_text(encoding="utf-8"):
        return "its train.py fetches none"
    module = beside("attention_flash").MODULE
    if name == "fa3" and importlib.util.find_spec(module) is None:
        return f"flash-attn-3 is not installed (no module {module})"
    return ""


def timed(of: Any, plain: Callable[..., Any]) -> float:
    """Milliseconds of a forward and backward by the card's own clock."""
    import torch

    shape = (of.rows, of.length, of.heads, of.head)
    q, k, v, dy = (torch.randn(shape, device=of.device, dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both() -> None:
        torch.autograd.grad(plain(*leaves), leaves, dy)

    return float(beside("measured").median(both, of.device))


def beside(name: str) -> Any:
    """A module that lies beside this file, and in no folder that is imported from."""
    known = f"beside_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None  # it is a file of Python's
        sys.modules[known] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[known]


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
