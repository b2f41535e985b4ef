"""The CPU as a device: threads, dtype and why, memory, measured peak, and logits turned into nats."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from core.contract import Choice, Memory, Peak
from core.trees import own_peak

NATS_ROWS = 64  # rows of (V,) logits that are turned into nats at a time: 64 * 8192 * 4 B = 2 MiB stays in cache
PEAK_SIZE = 1024  # side of the square matrices of which the peak is measured
KEPT_BY_MALLOC = 2**30  # bytes below which an allocation is served from memory that the process keeps


class CpuDevice:
    """See core.contract.Device."""

    name = "cpu"

    def __init__(self, dtype: Choice) -> None:
        self.dtype = dtype

    def fence(self) -> None:
        """Nothing to wait for: an operation has ended when its call returns."""

    def memory(self) -> Memory:
        """Resident bytes of this process; the limit is the machine's memory, or less where a cgroup says so."""
        used = psutil.Process().memory_info().rss
        return Memory(used, max(used, own_peak()), memory_limit())

    @functools.cached_property
    def _measured_peak(self) -> Peak:
        dtype = getattr(torch, self.dtype.value)
        a, b = torch.ones(PEAK_SIZE, PEAK_SIZE, dtype=dtype), torch.ones(PEAK_SIZE, PEAK_SIZE, dtype=dtype)
        torch.mm(a, b)
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - start)
        source = f"measured: best of 5 {self.dtype.value} products of {PEAK_SIZE} x {PEAK_SIZE} matrices"
        return Peak(2 * PEAK_SIZE**3 / best, f"{source} on {torch.get_num_threads()} thread(s)")

    def peak(self) -> Peak:
        return self._measured_peak

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        x = x.detach()
        return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()

    def later(self, x: torch.Tensor) -> Callable[[], np.ndarray]:
        """A copy made now: the work has ended, and the next step may write into `x`."""
        found = self.to_numpy(x).copy()
        return lambda: found

    def from_numpy(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))

    def nats(self, logits: torch.Tensor, targets: np.ndarray) -> np.ndarray:
        """(B, T, V) logits, (B, T) targets -> (B, T) float32 nats of each target, in chunks that stay in cache."""
        if tuple(logits.shape[:-1]) != tuple(targets.shape):
            raise ValueError(f"logits of shape {tuple(logits.shape)} for targets of shape {tuple(targets.shape)}")
        flat, wanted = logits.detach().reshape(-1, logits.shape[-1]), self.from_numpy(targets).reshape(-1)
        found = torch.empty(len(flat))
        for i in range(0, len(flat), NATS_ROWS):
            rows = flat[i : i + NATS_ROWS].float()
            # The sum of rows is finite only if nothing in them is NaN or infinite, or if they overflow it.
            if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
                raise ValueError("logits that are not finite")
            found[i : i + NATS_ROWS] = F.cross_entropy(rows, wanted[i : i + NATS_ROWS], reduction="none")
        return found.view(targets.shape).numpy()


def open_device() -> CpuDevice:
    """Sets this process up for work on the CPU and says which dtype is faster here."""
    torch.set_num_threads(usable_cores())
    _keep_freed_memory()
    return CpuDevice(choose_dtype(torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()))


def choose_dtype(avx512_bf16: bool, amx: bool) -> Choice:
    """bfloat16 where the processor multiplies it natively; elsewhere it is emulated and slower than float32."""
    if amx:
        return Choice("bfloat16", "AMX multiplies bfloat16 tiles, many times faster than float32")
    if avx512_bf16:
        return Choice("bfloat16", "AVX512-BF16 multiplies bfloat16 at about twice the rate of float32")
    return Choice("float32", "this processor has no bfloat16 arithmetic")


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Physical cores that this process may run on: a second thread on a core slows matrix products down.

    A container's quota counts too: more threads than it has would be stopped in the middle of every product.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = [allowed, psutil.cpu_count(logical=False) or allowed]
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):  # no such cgroup here, or none of our business
        quota, period = "max", "1"
    if quota.isdecimal():
        cores.append(math.ceil(int(quota) / int(period)))
    return max(1, min(cores))


def _keep_freed_memory() -> None:
    """glibc gives large blocks back to the kernel at each free, and every reuse pays for fresh pages.

    A training step frees and takes the same blocks again and again: keeping them made steps of the reference shapes
    a third faster on two cores.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, KEPT_BY_MALLOC)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may use: of the machine, or of the container (cgroup v2, then v1)."""
    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroup / name).read_text().strip()
        except OSError:  # no such cgroup here, or none of our business
            continue
        if text.isdecimal():  # v2 writes "max" for no limit
            limits.append(int(text))
    return min(limits)
