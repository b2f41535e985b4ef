"""An NVIDIA card as a device: dtype and why, memory, peak by a table, pinned memory for tokens and losses, nats."""

from __future__ import annotations

import functools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from core import allocator, cardfaults, torchbuild
from core.contract import Choice, Memory, Peak
from core.errors import DeviceFull, UserError
from kernels.errors import out_of_memory
from kernels.pinned import PinnedSlots, later

NATS_BYTES = 2**28  # memory of the float32 logits that are turned into nats at a time
LEAST_CAPABILITY = (8, 0)
LEAST_FREE = 2 * 2**30  # bytes; what a child needs before it holds anything of a model
NVML = "NVML_SUCCESS"  # of torch's assertion, which is all that it says when NVML fails
PEAK_SIZE = 8192  # side of the square matrices of which an unknown card's peak is measured
PEAK_SOURCE = "NVIDIA's data sheet: dense bfloat16 with float32 accumulation"
PEAKS = {  # FLOP/s without sparsity; the longest name that a card's name contains counts
    "A100": 312e12,
    "A800": 312e12,
    "H100": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H800": 989.4e12,
    "H800 PCIe": 756e12,
    "H200": 989.4e12,
    "H200 NVL": 835e12,
    "GH200": 989.4e12,
    "B100": 1750e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}


class CudaDevice:
    """See core.contract.Device."""

    def __init__(self, dtype: Choice) -> None:
        self.name = "cuda:0"
        self.dtype = dtype
        self._device = torch.device(self.name)
        self._slots = PinnedSlots(self._device)

    def fence(self) -> None:
        torch.cuda.synchronize()

    def memory(self) -> Memory:
        """What PyTorch's allocator took from the card (its cache included, which others cannot use), and the card's."""
        used, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
        return Memory(used, peak, torch.cuda.get_device_properties(self._device).total_memory)

    @functools.cached_property
    def _peak(self) -> Peak:
        name = torch.cuda.get_device_name()
        known = known_peak(name)
        return known or self._measure(name)

    def measured_peak(self) -> Peak:
        """What products reach here and now, whatever a data sheet says."""
        return self._measure("")

    def _measure(self, name: str) -> Peak:
        """`name`: of a card that is measured because it is in no table."""
        dtype = getattr(torch, self.dtype.value)
        a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, dtype=dtype, device=self._device) for _ in range(2))
        best = math.inf
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.mm(a, b)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        what = f"best of 8 {self.dtype.value} products of {PEAK_SIZE} x {PEAK_SIZE} matrices"
        why = f", as {name} is in no table" if name else ""
        return Peak(2 * PEAK_SIZE**3 / best, f"measured{why}: {what}")

    def peak(self) -> Peak:
        return self._peak

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        x = x.detach()
        return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).cpu().numpy()

    def later(self, x: torch.Tensor) -> Callable[[], np.ndarray]:
        return later(x)

    def from_numpy(self, x: np.ndarray) -> torch.Tensor:
        return self._slots.send(x)

    def nats(self, logits: torch.Tensor, targets: np.ndarray) -> np.ndarray:
        """(B, T, V) logits, (B, T) targets -> (B, T) float32 nats of each target, a part of the rows at a time."""
        if tuple(logits.shape[:-1]) != tuple(targets.shape):
            raise ValueError(f"logits of shape {tuple(logits.shape)} for targets of shape {tuple(targets.shape)}")
        flat, wanted = logits.detach().reshape(-1, logits.shape[-1]), self.from_numpy(targets).reshape(-1)
        found = torch.empty(len(flat), device=flat.device)
        fine = torch.ones((), dtype=torch.bool, device=flat.device)
        rows = max(1, NATS_BYTES // (4 * flat.shape[1]))
        for i in range(0, len(flat), rows):
            part = flat[i : i + rows].float()
            fine &= torch.isfinite(part).all()
            found[i : i + rows] = F.cross_entropy(part, wanted[i : i + rows], reduction="none")
        if not bool(fine):  # read once, so that the card is not waited for at every part
            raise ValueError("logits that are not finite")
        return found.view(targets.shape).cpu().numpy()


def known_peak(name: str) -> Peak | None:
    """The data sheet's figure for a card's name ("NVIDIA H100 80GB HBM3"); None for one that is in no table.

    A part of a card ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "GRID A100-10C") has a part of its processors or of its time,
    and is in none.
    """
    words = name.replace("-", " ").split()
    if "MIG" in words or is_virtual(name):
        return None
    fitting = [known for known in PEAKS if all(word in words for word in known.split())]
    if not fitting:
        return None
    return Peak(PEAKS[max(fitting, key=len)], PEAK_SOURCE)


def is_virtual(name: str) -> bool:
    """Whether it is a card of NVIDIA vGPU, whose profile ends the name: "GRID A100-10C", "NVIDIA A40-48Q"."""
    return re.search(r"-\d+[ABCQ]$", name) is not None


def choose_dtype(capability: tuple[int, int]) -> Choice:
    if capability >= (8, 0):
        return Choice("bfloat16", "tensor cores multiply bfloat16 as fast as float16, with float32's range")
    return Choice("float16", f"compute capability {capability[0]}.{capability[1]} only emulates bfloat16")


def open_device() -> CudaDevice:
    """Sets this process up for work on the card; UserError where the card cannot be worked on."""
    _require_driver()
    os.environ.update(allocator.settings(os.environ))  # children have it from their start
    with opening(LEAST_FREE):  # which takes some 500 MB of the card
        torch.cuda.set_device(0)
        free, total = torch.cuda.mem_get_info()
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        fact = f"{name} has compute capability {capability[0]}.{capability[1]}; the cuda backend needs 8.0 or newer"
        raise UserError(fact, "choose --backend rtx or cpu")
    if free < LEAST_FREE:
        fact = f"{name} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {LEAST_FREE / 2**30:.0f} are needed"
        action = "end what uses it (nvidia-smi lists it), or choose another card by CUDA_VISIBLE_DEVICES"
        raise DeviceFull(fact, action, LEAST_FREE)
    with opening(LEAST_FREE):  # by a first block, so that a card that gives none is not told as a fault of the recipe
        suit_allocator(name)
        torch.ones(1, device="cuda")
    torch.set_float32_matmul_precision("high")
    return CudaDevice(choose_dtype(capability))


def suit_allocator(name: str) -> None:
    """Before the first allocation. Segments do not grow on a virtual card: its driver may refuse to (unsloth#1446)."""
    if is_virtual(name):
        with warnings.catch_warnings():  # its other name is younger than torch 2.10
            warnings.simplefilter("ignore", FutureWarning)
            torch.cuda.memory._set_allocator_settings("expandable_segments:False")


@contextmanager
def opening(needed: int) -> Iterator[None]:
    """`DeviceFull` where what this process needs of the card by itself is not there, or where the card is set to serve
    one process at a time and serves another; `UserError` where torch or the driver fails."""
    try:
        yield
    except RuntimeError as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        if "operation not supported" in said:
            action = "set PYTORCH_ALLOC_CONF=expandable_segments:False, and run it again"
            raise UserError(f"the card's driver refuses memory that grows ({said})", action) from None
        if NVML in said and not out_of_memory(error):
            action = (
                "see whether nvidia-smi answers, and restart the container or the machine where it does not; without "
                "NVML torch works with PYTORCH_ALLOC_CONF=expandable_segments:False"
            )
            raise UserError(f"torch asks NVML about the card and gets no answer ({said[:200]})", action) from None
        if cardfaults.fault(said, ""):
            raise UserError(f"the card cannot be opened ({said[:200]})", cardfaults.LOOK) from None
        if not out_of_memory(error) and "unavailable" not in said:
            raise
        fact = f"the card cannot be opened now ({said.partition('. ')[0]})"  # what torch goes on with is of no use here
        raise DeviceFull(fact, "end what uses it: nvidia-smi", needed) from None


def _require_driver() -> None:
    """UserError with the command to run where this torch and the driver do not work together."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        first = next(iter(str(error).splitlines()), type(error).__name__)
        wrong = torchbuild.problem(torchbuild.TorchBuild(torch.__version__, torch.version.cuda or ""), "")
        action = wrong.action if wrong else "run nvidia-smi, which tells the driver's version, then autoresearch doctor"
        raise UserError(f"torch {torch.__version__} cannot use the card: {first[:200]}", action) from None
