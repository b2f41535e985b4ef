"""MLX as a device: Metal on a Mac, CUDA or the CPU on Linux. Dtype and why, memory, measured peak, logits into nats."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import psutil

from core.contract import Choice, Memory, Peak

NATS_BYTES = 2**24  # memory of the float32 logits that are turned into nats at a time
CPU_STREAMS = 2
PEAK_SIZE = {"gpu": 4096, "cpu": 1024}  # side of the square matrices of which the peak is measured


class MlxDevice:
    """See core.contract.Device."""

    def __init__(self, name: str, dtype: Choice, limit: int) -> None:
        self.name = name
        self.dtype = dtype
        self._limit = limit
        self._streams = [mx.default_stream(mx.default_device())]
        if name == "cpu":  # MLX gives each stream of a CPU one thread
            self._streams += [mx.new_stream(mx.cpu) for _ in range(CPU_STREAMS - 1)]

    def fence(self) -> None:
        mx.synchronize()

    def memory(self) -> Memory:
        """Bytes of MLX's arrays, which is what counts in unified memory; on a CPU the process's own, if more."""
        used, peak = mx.get_active_memory(), mx.get_peak_memory()
        if self.name == "cpu":
            used = max(used, psutil.Process().memory_info().rss)
        return Memory(used, max(used, peak), self._limit)

    @functools.cached_property
    def _measured_peak(self) -> Peak:
        size, dtype = PEAK_SIZE[self.name], getattr(mx, self.dtype.value)
        a, b = mx.ones((size, size), dtype), mx.ones((size, size), dtype)
        mx.eval(a @ b)
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            mx.eval(a @ b)
            best = min(best, time.perf_counter() - start)
        return Peak(2 * size**3 / best, f"measured: best of 5 {self.dtype.value} products of {size} x {size} matrices")

    def peak(self) -> Peak:
        return self._measured_peak

    def to_numpy(self, x: mx.array) -> np.ndarray:
        return np.array(x.astype(mx.float32) if x.dtype in (mx.bfloat16, mx.float16) else x)

    def later(self, x: mx.array) -> Callable[[], np.ndarray]:
        """Read when it is asked for: waiting for an array waits for what it is made of, and for nothing else."""
        return lambda: self.to_numpy(x)

    def from_numpy(self, x: np.ndarray) -> mx.array:
        return mx.array(np.ascontiguousarray(x, dtype=np.int32))

    def nats(self, logits: mx.array, targets: np.ndarray) -> np.ndarray:
        """(B, T, V) logits, (B, T) targets -> (B, T) float32 nats of each target, a part of the rows at a time."""
        if tuple(logits.shape[:-1]) != tuple(targets.shape):
            raise ValueError(f"logits of shape {tuple(logits.shape)} for targets of shape {tuple(targets.shape)}")
        flat = logits.reshape(-1, logits.shape[-1])
        wanted = self.from_numpy(targets.reshape(-1, 1))
        rows = max(1, NATS_BYTES // (4 * flat.shape[1]))
        found = []
        for i in range(0, len(flat), rows * len(self._streams)):
            waiting = []
            for start, stream in zip(range(i, len(flat), rows), self._streams):
                part = slice(start, start + rows)
                with mx.stream(stream):
                    waiting.append(_nats(flat[part].astype(mx.float32), wanted[part]))
            mx.eval(waiting)
            if not all(fine.item() for _, fine in waiting):
                raise ValueError("logits that are not finite")
            found += [np.array(nats) for nats, _ in waiting]
        return np.concatenate(found).reshape(targets.shape)


def _nats(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """(n, V) float32 logits, (n, 1) targets -> (n,) nats, and whether all logits are finite."""
    nats = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets, axis=-1)[:, 0]
    return nats, mx.isfinite(logits).all()


def open_device() -> MlxDevice:
    """The GPU where MLX has one (Metal, or CUDA with `mlx[cuda]`), else the CPU."""
    limit = psutil.virtual_memory().total
    if mx.default_device() == mx.gpu:
        if mx.metal.is_available():
            # More than this cannot stay resident for the GPU: macOS would page the weights out in mid-step.
            limit = int(mx.device_info()["max_recommended_working_set_size"])
            mx.set_wired_limit(limit)
        else:
            limit = int(mx.device_info().get("total_memory", limit))  # the card's own, with `mlx[cuda]`
        return MlxDevice("gpu", Choice("bfloat16", "half the memory traffic of float32, with its range"), limit)
    return MlxDevice("cpu", Choice("float32", "MLX multiplies bfloat16 on a CPU many times slower than float32"), limit)
