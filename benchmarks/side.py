"""One backend in a process of its own: `python -m benchmarks.side ORDER`. Prints JSON lines; the last is the answer.

`parity` computes the reference checkpoint; `steps` trains the bench's fixed steps and times them. What is run are the
shipped recipes, or a file that the user named, so there is no sandbox around it; scores come from the referee.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

import backends
from backends import reference
from core.contract import Device, Spec, Training
from core.recipe import replace

COPY_BYTES = {"cpu": 2**27, "gpu": 2**29}  # of each of the two blocks that a bandwidth is measured with
BEST_OF = 10
PEAKS = 4  # measurements of the peak, each the best of a few products


@dataclass(frozen=True)
class Order:
    """What a side is asked. Paths never reach a result."""

    task: Literal["parity", "steps"]
    name: str  # of the side
    backend: str
    recipe: str  # file
    folder: str  # for what it writes
    began: float  # time.time() at which the parent started it
    dtype: str = ""  # empty: what the device chooses
    constants: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 0
    context: int = 0
    weights: str = ""  # .npz
    batches: str = ""  # .npy
    warm_steps: int = 0
    peaks: bool = True


def tell(kind: str, **facts: Any) -> None:
    print(json.dumps({"event": kind, **facts}), flush=True)


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    device = backends.load(order.backend).open_device()
    startup = time.time() - order.began
    tell("ready", device=device.name, dtype=device.dtype.value, dtype_reason=device.dtype.reason)
    answer = parity(order, device) if order.task == "parity" else steps(order, device)
    tell("answer", startup=startup, **answer)


# --- parity ------------------------------------------------------------------------------------


def parity(order: Order, device: Device) -> dict[str, Any]:
    """Arrays of the reference checkpoint, in files for the parent to compare: in float32, where backends agree best,
    and in the dtype that is timed."""
    recipe, files = Path(order.recipe).read_bytes(), {}
    for dtype in dict.fromkeys(("float32", order.dtype or device.dtype.value)):
        found = reference.computed(recipe, device, dtype)
        files[dtype] = str(Path(order.folder) / f"{order.name}-{dtype}.npz")
        arrays: dict[str, Any] = {name: np.asarray(array, np.float32) for name, array in found.items()}
        np.savez(files[dtype], **arrays)
        tell("parity", dtype=dtype)
    return {"files": files}


# --- steps -------------------------------------------------------------------------------------


def load(order: Order) -> ModuleType:
    """The recipe with the profile's constants."""
    source = replace(Path(order.recipe).read_text(encoding="utf-8"), order.constants)
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    file = Path(order.folder) / f"recipe_{digest}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("bench_recipe", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_recipe"] = module
    spec.loader.exec_module(module)
    return module


class Batches:
    """`contract.Batches` of the bench's rows, in order, however many a recipe takes at a time."""

    def __init__(self, tokens: np.ndarray, device: Device) -> None:
        self._rows, self._at, self._device = tokens.reshape(-1, tokens.shape[-1]), 0, device

    def next(self, rows: int, length: int) -> Any:
        assert length + 1 == self._rows.shape[1] and self._at + rows <= len(self._rows)
        self._at += rows
        return self._device.from_numpy(np.array(self._rows[self._at - rows : self._at]))


def steps(order: Order, device: Device) -> dict[str, Any]:
    """All fixed steps from the bench's weights. The first `warm_steps` compile and are not timed."""
    began = time.perf_counter()
    dtype = order.dtype or device.dtype.value
    spec = Spec(order.vocab_size, order.context, order.vocab_size - 1, device.name, dtype, 42, 0)
    training: Training = load(order).build(spec)
    with np.load(order.weights) as weights:
        training.load_weights({name: weights[name] for name in weights.files})
    device.fence()
    build = time.perf_counter() - began
    tokens = np.load(order.batches, mmap_mode="r")
    marks, losses, energy = run(training, device, tokens, order.warm_steps)
    seconds = np.diff(marks)
    timed = seconds[order.warm_steps :]
    # Noise only ever lowers a peak; a device keeps what it has measured, so others are asked.
    asked = [device, *(backends.load(order.backend).open_device() for _ in range(PEAKS - 1))] if order.peaks else []
    peak = max((d.peak() for d in asked), key=lambda p: p.flops_per_second, default=None)
    return {
        "build": build,
        "compile": max(0.0, float(seconds[: order.warm_steps].sum() - order.warm_steps * np.median(timed))),
        "seconds": seconds.tolist(),
        "losses": losses,
        "flops_per_token": float(training.describe().get("flops_per_token", 0.0)),
        "peak_memory": peak_memory(device),
        "energy": energy,
        **({"peak": {
            "flops": float(peak.flops_per_second), "flops_source": peak.source, **bandwidth(order.backend, device)
        }} if peak else {}),
    }  # fmt: skip


def run(
    training: Training, device: Device, tokens: np.ndarray, warm: int
) -> tuple[list[float], list[float], dict[str, Any]]:
    """Times at which each step had ended, losses, and the energy of those after `warm`. As in a trainer the loss of a
    step is read when the next one is under way."""
    from benchmarks.energy import Meter

    batches, count = Batches(tokens, device), len(tokens)
    meter = Meter(device.name)
    losses: list[float] = []
    marks = [time.perf_counter()]
    waiting: Any = None
    for step in range(count):
        if step == warm:
            losses += _read(device, waiting)
            waiting = None
            device.fence()
            gc.collect()
            gc.freeze()  # as the trainer does
            meter.start()
            marks[-1] = time.perf_counter()
        loss = training.step(batches, step / count)
        losses += _read(device, waiting)
        waiting = loss
        if step in (warm - 1, count - 1):
            losses += _read(device, waiting)
            waiting = None
            device.fence()
        marks.append(time.perf_counter())
        tell("step", step=step + 1, of=count)
    return marks, losses, meter.stop()


def _read(device: Device, loss: Any) -> list[float]:
    return [] if loss is None else [float(np.reshape(device.to_numpy(loss), ()))]


def peak_memory(device: Device) -> int:
    """Bytes of this process at its worst on a CPU, of the device's arrays elsewhere."""
    if device.name != "cpu":
        return int(device.memory().peak)
    status = Path("/proc/self/status")
    if status.exists():
        found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if found:
            return int(found[0].split()[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used if sys.platform == "darwin" else used * 1024)


def bandwidth(backend: str, device: Device) -> dict[str, Any]:
    """Bytes/s of a copy, read and written bytes both counted: best of a few."""
    size = COPY_BYTES["cpu" if device.name == "cpu" else "gpu"]
    copy = _mlx_copy(size) if backend == "mlx" else _torch_copy(size, device.name)
    copy()
    device.fence()
    best = float("inf")
    for _ in range(BEST_OF):
        start = time.perf_counter()
        copy()
        device.fence()
        best = min(best, time.perf_counter() - start)
    source = f"measured: best of {BEST_OF} copies of {size >> 20} MiB by this backend's library"
    return {"bandwidth": 2 * size / best, "bandwidth_source": source}


def _torch_copy(size: int, device: str) -> Callable[[], Any]:
    import torch

    a, b = (torch.ones(size // 4, device=device) for _ in range(2))
    return lambda: b.copy_(a)


def _mlx_copy(size: int) -> Callable[[], Any]:
    import mlx.core as mx

    a = mx.ones(size // 4)
    mx.eval(a)
    return lambda: mx.eval(a + 1)  # MLX has no copy that moves bytes


if __name__ == "__main__":
    main()
