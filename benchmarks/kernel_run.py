"""The kernels of one backend, in a process of its own: `-m benchmarks.kernel_run ORDER`, a JSON line for each finding.

Lines are {"stage": text}, {"peak": [key, Peak]} and {"kernel": KernelResult}. What was said before a crash stands.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import kernel_cases
from benchmarks.kernel_cases import Case, Clock, Shape
from benchmarks.results import KernelResult, Peak
from core.contract import Device
from core.paths import project_root
from core.sandbox import preloaded

ROOF_SECONDS = 1.0  # at the start and at the end
PATIENCE = 240.0  # seconds without a word after which a backend's process is ended: a compilation may take long


@dataclass(frozen=True)
class Order:
    """What a child is told."""

    backend: str
    shape: Shape
    seconds: float  # of each way of each case
    only: str = ""  # attention, mlp, head or optimizer

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Order:
        found = json.loads(text)
        return cls(**{**found, "shape": Shape(**found["shape"])})


@dataclass
class Found:
    """What came of one backend."""

    backend: str
    peaks: dict[str, Peak] = field(default_factory=dict)
    kernels: list[KernelResult] = field(default_factory=list)
    failed: str = ""  # why it ended before its time


# --- the child ------------------------------------------------------------------------------------


def child(order: Order, tell: Callable[[dict[str, Any]], None]) -> None:
    import backends

    device = backends.load(order.backend).open_device()
    clock, found = opened(order, device)

    def peak() -> None:
        tell({"stage": "peaks of products and memory"})
        tell({"peak": [f"{order.backend}/{clock.dtype}", asdict(kernel_cases.measured_peak(clock, ROOF_SECONDS))]})

    peak()
    for case in found:
        if order.only in ("", case.kernel):
            tell({"stage": f"{case.kernel}, {case.direction}: {case.what}"})
            for line in kernel_cases.measure(order.backend, case, clock, order.seconds):
                tell({"kernel": asdict(line)})
    peak()  # once more: other programs may have had their turn at the start


def opened(order: Order, device: Device) -> tuple[Clock, Iterator[Case]]:
    """How the backend is timed, and its cases."""
    dtype = str(device.dtype.value)
    if order.backend == "mlx":
        from benchmarks.kernels_mlx import MlxClock, mlx_cases

        ticking = MlxClock(device.name, dtype, f"MLX on the {device.name}")
        return ticking, mlx_cases(order.shape, ticking)
    import torch

    from benchmarks.kernels_torch import TorchClock, cpu_cases

    if order.backend == "cpu":
        clock = TorchClock(torch.device("cpu"), dtype, f"{torch.get_num_threads()} thread(s)")
        return clock, cpu_cases(order.shape, clock)
    from benchmarks.kernels_cuda import cuda_cases

    card = torch.device(device.name)
    clock = TorchClock(card, dtype, torch.cuda.get_device_name(card))
    return clock, cuda_cases(order.shape, clock)


# --- the parent -----------------------------------------------------------------------------------


def measured(order: Order, stage: Callable[[str], None], patience: float = PATIENCE) -> Found:
    """Start the child and gather what it says. A crash or a hang ends up in `failed`."""
    found = Found(order.backend)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kernel_run", order.text()], cwd=project_root(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **preloaded(order.backend)},
    )  # fmt: skip
    errors: list[str] = []
    said: queue.Queue[str | None] = queue.Queue()
    readers = [
        threading.Thread(target=_lines, args=(process.stdout, said.put), daemon=True),
        threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        found.failed = _gathered(found, said, stage, patience)
    except BaseException:  # Ctrl-C: the device must not stay busy
        process.kill()
        process.wait()
        raise
    if found.failed:
        process.kill()
    process.wait()
    for reader in readers:
        reader.join(5.0)
    if process.returncode and not found.failed:
        last = next((line.strip() for line in reversed(errors) if line.strip()), "it said nothing")
        found.failed = f"it ended with status {process.returncode}: {last[:300]}"
    return found


def _lines(stream: Any, put: Callable[[str | None], None]) -> None:
    for line in stream:
        put(line)
    put(None)


def _gathered(found: Found, said: queue.Queue[str | None], stage: Callable[[str], None], patience: float) -> str:
    """Empty when the child has closed its output, else why it must be ended."""
    last = time.monotonic()
    while True:
        try:
            line = said.get(timeout=max(0.0, last + patience - time.monotonic()))
        except queue.Empty:
            return f"it said nothing for {patience:.0f} s"
        if line is None:
            return ""
        last = time.monotonic()
        if not line.startswith("{"):
            continue  # a library's own remark
        given = json.loads(line)
        if "stage" in given:
            stage(given["stage"])
        elif "peak" in given:
            key, peak = given["peak"]
            found.peaks[key] = kernel_cases.higher(found.peaks.get(key), Peak(**peak))
        else:
            found.kernels.append(KernelResult(**given["kernel"]))


if __name__ == "__main__":
    child(Order.read(sys.argv[1]), lambda line: print(json.dumps(line), flush=True))
