"""One backend in a process of its own: `python -m benchmarks.side ORDER`. Prints JSON lines.

    start    opens the device, and that is all: how long that takes is what is asked
    parity   computes the reference checkpoint
    turns    trains the bench's first steps, then waits: for each line on standard input it takes a turn, in which
             steps, scoring, products and passes over memory are timed within two seconds of each other

Sides of one bench take turns and stay alive between them. So what they are compared by was measured in the same state
of the machine, whose speed changes by a quarter from one half minute to the next on some virtual machines.

What is run are the shipped recipes, or a file that the user named, so there is no sandbox around it; scores come from
the referee.
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
from benchmarks.leaving import leave
from core import trees
from core.contract import Device, Peak, Spec, Training
from core.recipe import replace

PASS_BYTES = {"cpu": 2**28, "gpu": 2**29}  # of the block that a bandwidth is measured with, at least
CACHES = 4  # times the last-level cache, at least
SETTLE = 0.1  # seconds: threads of the side before spin on for a while when its turn is over
GROUPS = 8  # of the timed steps of a turn, at most; each ends with a fence


@dataclass(frozen=True)
class Least:
    """What a turn does at least beside its steps: batches that are scored and seconds of it; passes over memory, of
    which the fastest counts, and seconds of them."""

    scores: int
    score_seconds: float
    passes: int
    pass_seconds: float


WHOLE = Least(3, 0.4, 5, 0.15)
# The speed of a virtual machine changes from one second to the next: many brief turns tell more than a few long ones.
BRIEF = Least(2, 0.12, 5, 0.06)


@dataclass(frozen=True)
class Order:
    """What a side is asked. Paths never reach a result."""

    task: Literal["start", "parity", "turns"]
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
    warm_steps: int = 0  # of the first steps; not timed, they compile
    first_steps: int = 0  # 0: as many as there are batches
    micro_rows: int = 0
    brief: bool = False  # turns are short, and there are more of them


def tell(kind: str, **facts: Any) -> None:
    print(json.dumps({"event": kind, **facts}), flush=True)


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    device = backends.load(order.backend).open_device()
    startup = time.time() - order.began
    tell("ready", device=device.name, dtype=device.dtype.value, dtype_reason=device.dtype.reason)
    if order.task == "turns":
        take_turns(order, device, startup)
        return
    tell("answer", startup=startup, **(parity(order, device) if order.task == "parity" else {}))
    leave()  # what libraries clear up at their end is no part of a start


# --- parity ------------------------------------------------------------------------------------


def parity(order: Order, device: Device) -> dict[str, Any]:
    """Arrays of the reference checkpoint, in files for the parent to compare: in float32, where backends agree best,
    and in the dtype that is timed."""
    from backends import reference

    recipe, files = Path(order.recipe).read_bytes(), {}
    for dtype in dict.fromkeys(("float32", order.dtype or device.dtype.value)):
        found = reference.computed(recipe, device, dtype)
        files[dtype] = str(Path(order.folder) / f"{order.name}-{dtype}.npz")
        arrays: dict[str, Any] = {name: np.asarray(array, np.float32) for name, array in found.items()}
        np.savez(files[dtype], **arrays)
        tell("parity", dtype=dtype)
    return {"files": files}


# --- turns ---------------------------------------------------------------------------------------


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
    """`contract.Batches` of the bench's rows, in order and again from the first, however many are taken at a time."""

    def __init__(self, tokens: np.ndarray, device: Device) -> None:
        self._rows, self._at, self._device = tokens.reshape(-1, tokens.shape[-1]), 0, device

    def next(self, rows: int, length: int) -> Any:
        assert length + 1 == self._rows.shape[1] and len(self._rows) % rows == 0
        taken = np.array(self._rows[self._at : self._at + rows])
        self._at = (self._at + rows) % len(self._rows)
        return self._device.from_numpy(taken)


def take_turns(order: Order, device: Device, startup: float) -> None:
    """The first steps, then a turn for each line on standard input, until that is closed."""
    one = Taker(order, device)
    tell("opened", startup=startup, **one.first_steps())
    for line in sys.stdin:
        tell("turn", **one.turn(json.loads(line)["steps"]))


class Taker:
    """One backend's recipe with the bench's weights, on the bench's text."""

    def __init__(self, order: Order, device: Device) -> None:
        began = time.perf_counter()
        dtype = order.dtype or device.dtype.value
        spec = Spec(order.vocab_size, order.context, order.vocab_size - 1, device.name, dtype, 42, 0)
        self.training: Training = load(order).build(spec)
        with np.load(order.weights) as weights:
            self.training.load_weights({name: weights[name] for name in weights.files})
        device.fence()
        self.build = time.perf_counter() - began
        self.order, self.device, self.least = order, device, BRIEF if order.brief else WHOLE
        self.tokens = np.load(order.batches)
        self.batches, self.done = Batches(self.tokens, device), 0
        from benchmarks.energy import Meter  # not at the top: a start is timed until the device is there

        self.meter = Meter(device.name)
        self.memory_pass: Callable[[], Any] | None = None

    def first_steps(self) -> dict[str, Any]:
        """From the bench's weights on. The first `warm_steps` compile."""
        warm, count = self.order.warm_steps, self.order.first_steps or len(self.tokens)
        losses: list[float] = []
        marks = [time.perf_counter()]
        for step in range(count):
            losses += self.steps(1)
            marks.append(time.perf_counter())
            tell("step", step=step + 1, of=count)
        seconds = np.diff(marks)
        gc.collect()
        gc.freeze()  # as the trainer does
        return {
            "build": self.build,
            "compile": max(0.0, float(seconds[:warm].sum() - warm * np.median(seconds[warm:]))),
            "seconds": seconds.tolist(),
            "losses": losses,
            "flops_per_token": float(self.training.describe().get("flops_per_token", 0.0)),
            "peak_memory": peak_memory(self.device),
        }

    def steps(self, count: int) -> list[float]:
        """Losses of so many steps, which have ended. As in a trainer one is read when the next step is under way."""
        losses: list[float] = []
        waiting: list[Callable[[], Any]] = []
        for _ in range(count):
            loss = self.training.step(self.batches, (self.done % len(self.tokens)) / len(self.tokens))
            waiting.append(self.device.later(loss))
            if len(waiting) > 1:
                losses.append(_number(waiting.pop(0)()))
            self.done += 1
        losses += [_number(read()) for read in waiting]
        self.device.fence()
        return losses

    def turn(self, steps: int) -> dict[str, Any]:
        """Seconds of a step, tokens/s in scoring, FLOP/s of products and bytes/s of passes over memory, now."""
        time.sleep(SETTLE)
        self.steps(1)  # it finds the other side's data in the caches
        self.meter.start()
        seconds = timed(self.steps, steps)
        energy = self.meter.stop()
        peak = self.peak_now()
        return {
            "seconds": seconds,
            "energy": energy,
            "scored": self.scored(),
            "flops": float(peak.flops_per_second),
            "flops_source": peak.source,
            **self.bandwidth(),
        }

    def peak_now(self) -> Peak:
        """A card is asked to measure it, as it may know a data sheet; a device of another kind keeps what it has
        measured, so another one is asked."""
        measure = getattr(self.device, "measured_peak", None)
        peak: Peak = measure() if measure else backends.load(self.order.backend).open_device().peak()
        return peak

    def scored(self) -> float:
        """Tokens/s from tokens to losses, as a scorer does it, with as many rows at once as in training. The median of
        a few batches: on two processors a single one takes a third longer now and then."""
        rows = self.tokens.reshape(-1, self.tokens.shape[-1])[: self.order.micro_rows]

        def score() -> None:
            self.device.nats(self.training.logits(self.device.from_numpy(np.array(rows[:, :-1]))), rows[:, 1:])

        score()
        found: list[float] = []
        while len(found) < self.least.scores or sum(found) < self.least.score_seconds:
            began = time.perf_counter()
            score()
            found.append(time.perf_counter() - began)
        return float(rows[:, 1:].size / np.median(found))

    def bandwidth(self) -> dict[str, Any]:
        """Bytes/s of a pass that adds one to a block in place, read and written bytes both counted: the fastest.

        In place, because a result of that size would be fresh memory each time, and what is then timed is how the
        kernel (and on a virtual machine its host) finds pages: three to forty times what the pass takes.
        """
        size = pass_bytes(self.device.name)
        if self.memory_pass is None:
            of = _mlx_pass if self.order.backend == "mlx" else _torch_pass
            self.memory_pass = of(size, self.device.name)
        self.memory_pass()  # it brings the block into whatever cache there is
        self.device.fence()
        found: list[float] = []
        while len(found) < self.least.passes or sum(found) < self.least.pass_seconds:
            start = time.perf_counter()
            self.memory_pass()
            self.device.fence()
            found.append(time.perf_counter() - start)
        source = f"measured: fastest pass in place over {size >> 20} MiB by this backend's library"
        return {"bandwidth": 2 * size / min(found), "bandwidth_source": source}


def timed(take: Callable[[int], Any], count: int) -> float:
    """Seconds of a step: the median over at most GROUPS groups of steps, so that a hiccup in one of them is none."""
    size = -(-count // GROUPS)
    found = []
    for _ in range(-(-count // size)):
        began = time.perf_counter()
        take(size)
        found.append((time.perf_counter() - began) / size)
    return float(np.median(found))


def _number(loss: Any) -> float:
    return float(np.reshape(loss, ()))


def peak_memory(device: Device) -> int:
    """Bytes of this process at its worst on a CPU, of the device's arrays elsewhere."""
    if device.name != "cpu":
        return int(device.memory().peak)
    return trees.own_peak()


def pass_bytes(device: str) -> int:
    """Far more than the last-level cache."""
    from benchmarks.kernel_cases import linux_cache

    return PASS_BYTES["gpu"] if device != "cpu" else max(PASS_BYTES["cpu"], CACHES * linux_cache())


def _torch_pass(size: int, device: str) -> Callable[[], Any]:
    import torch

    block = torch.zeros(size // 4, device=device)
    return lambda: block.add_(1)


def _mlx_pass(size: int, device: str) -> Callable[[], Any]:
    import mlx.core as mx

    held = [mx.zeros(size // 4)]
    mx.eval(held)

    def add() -> None:
        held.append(held.pop() + 1)  # nobody else holds the block, so MLX writes the sum into it
        mx.eval(held)

    return add


if __name__ == "__main__":
    main()
