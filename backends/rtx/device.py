"""A GeForce card as a device: dtype and why, a cap below the free memory, the peak of a named table, else measured."""

from __future__ import annotations

import functools
import importlib
import os
import sys

import torch

from backends.cuda.device import CudaDevice, opening, suit_allocator
from backends.rtx.cards import SOURCE, known
from core import allocator
from core.allocator import cap, margin
from core.contract import Choice, Memory, Peak
from core.errors import DeviceFull, UserError
from core.gpuwatch import TOLD_LAPTOP
from core.torchbuild import install

OLDEST = (7, 5)
AMPERE = (8, 0)
LEAST = 2**29  # bytes beyond what is left to others, with which a training can begin


class RtxDevice(CudaDevice):
    """See core.contract.Device."""

    def __init__(self, dtype: Choice, limit: int) -> None:
        super().__init__(dtype)
        self._limit = limit

    def memory(self) -> Memory:
        """What PyTorch's allocator took from the card, and the cap under which it was set."""
        return Memory(torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved(), self._limit)

    @functools.cached_property
    def _peak(self) -> Peak:
        name = torch.cuda.get_device_name()
        laptop = os.environ.get(TOLD_LAPTOP) == "1"  # CUDA tells names alone
        card = known(name, torch.cuda.get_device_properties(0).total_memory, laptop)
        return Peak(card.flops, SOURCE) if card else self._measure(f"a laptop's {name}" if laptop else name)


def choose_dtype(capability: tuple[int, int]) -> Choice:
    """bfloat16 from Ampere on. UserError below Turing."""
    named = f"compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST:
        raise UserError(f"{named} is below 7.5 (Turing), the oldest that runs", "use the processor: --backend cpu")
    if capability >= AMPERE:
        return Choice("bfloat16", f"{named} multiplies bfloat16 as fast as float16, and it has float32's range")
    return Choice("float16", f"{named} (Turing) only emulates bfloat16; the loss is scaled so that float16 suffices")


def no_cuda(platform: str = sys.platform, said: str = "") -> UserError:
    """Why torch does not reach the card, with the next command. `said`: its own words."""
    if torch.version.cuda is None:
        where = " (PyPI's torch for Windows is one)" if platform == "win32" else ""
        return UserError(
            f"torch {torch.__version__} is a build without CUDA{where}", f"{install(0)}, or use --backend cpu"
        )
    fact = f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use this machine's driver"
    return UserError(
        f"{fact} ({said})" if said else fact,
        "run nvidia-smi: it tells whether the card answers and which CUDA the driver knows; update an older driver, or "
        "use --backend cpu",
    )


def _said() -> str:
    """Why torch finds no card, in its own words."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        return next(iter(str(error).splitlines()), type(error).__name__)[:200]
    return ""


def open_device() -> RtxDevice:
    """Sets this process up for work on the card: memory capped below what is free, float16 sums in float32."""
    os.environ.update(allocator.settings(os.environ))
    if not torch.cuda.is_available():
        raise no_cuda(said=_said())
    with opening(margin() + LEAST):
        torch.cuda.set_device(0)
        free, total = torch.cuda.mem_get_info()
    dtype = choose_dtype(torch.cuda.get_device_capability())
    free = allocator.really_free(free, os.environ)
    limit = cap(free, total, margin())
    if limit <= 0:
        fact = f"only {free / 2**30:.1f} of {total / 2**30:.1f} GiB of the card are free"
        action = "close what else uses it (nvidia-smi lists it), or use --backend cpu"
        raise DeviceFull(fact, action, margin() + LEAST)
    torch.cuda.set_per_process_memory_fraction(limit / total)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    # What the first operator of ours and the first product load, which would be the recipe's seconds where nothing is
    # compiled (Windows without Triton).
    importlib.import_module("torch._dynamo")
    suit_allocator(torch.cuda.get_device_name())
    with opening(margin() + LEAST):
        torch.ones(16, 16, device="cuda").mm(torch.ones(16, 16, device="cuda"))
    return RtxDevice(dtype, limit)
