"""Triton's driver for a card that is emulated: what a kernel is launched with goes to `Machine`."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from benchmarks.ptx.copying import Descriptor
from benchmarks.ptx.machine import Machine
from benchmarks.ptx.parsing import Program, parse
from kernels import attention, attention_backward, attention_tiles, portable, targets

SCALARS = {
    "i1": np.uint8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "u1": np.uint8, "u8": np.uint8,
    "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "fp32": np.float32, "fp64": np.float64,
}  # fmt: skip
SWIZZLES = (0, 32, 64, 128)  # bytes, as Triton numbers them
DRIVERS = itertools.count()
Change = Callable[[str, str], str]  # of a kernel's name and its PTX: what is run in its place


class Launched(list[str]):
    """Names of the kernels that ran, in order."""

    instructions = 0  # of all blocks


@contextlib.contextmanager
def emulated(capability: int, change: Change | None = None, seed: int = 0, fences: str = "all") -> Iterator[Launched]:
    """Within it, Triton compiles for `capability` (90: sm_90) and kernels on CPU tensors run as PTX.

    change: rewrites the PTX of a kernel, for tests of what is noticed. seed: of the order of blocks. fences: "stores"
    does not ask for a fence between cp.async and wgmma, which Triton leaves out before 3.8 (its pull request 9610), and
    on sm_100 before 3.9. Raises Fault where a kernel does what a card would not allow, or not do alike each time;
    NotImplementedError where its PTX has what is not known here.
    """
    launched, before = Launched(), driver._active
    shipped = functools.partial(_tile, capability)
    with contextlib.ExitStack() as stack:
        for place, name, new in (
            (CompiledKernel, "_init_handles", functools.partialmethod(_init_handles, launched, change, seed, fences)),
            (targets, "_target", lambda index: targets.target_of(capability)),
            (portable, "without_card", lambda: True),
            (portable, "obstacle", lambda device: ""),
            (portable, "products", lambda device: capability >= portable.TENSOR_CORES),
            (portable, "_capability", lambda device: capability),
            (attention, "tile", shipped),
            (attention_backward, "tile", shipped),
        ):
            stack.enter_context(mock.patch.object(place, name, new))
        driver.set_active(Driver(capability))  # type: ignore[arg-type]
        try:
            yield launched
        finally:
            driver._active = before


def _tile(capability: int, table: attention_tiles.Table, device: object, dtype: torch.dtype, head: int) -> Any:
    if dtype == torch.float32:
        return attention_tiles.FLOAT32
    return table[attention_tiles.nearest(table, capability)][attention_tiles.padded(head)]


class Driver:
    """What Triton asks of the active driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = self
        self.index = 1000 + next(DRIVERS)  # kernels are kept by it: none of another time

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def unload_module(self, module: object) -> None:
        pass


def _init_handles(kernel: Any, launched: Launched, change: Change | None, seed: int, fences: str) -> None:
    if kernel._run is None:
        text = kernel.asm["ptx"]
        program = parse(change(kernel.name, text) if change else text)
        machine = Machine(program, kernel.metadata.num_warps, kernel.metadata.shared, {})
        machine.fences(fences)
        kernel._run = functools.partial(_launch, kernel, machine, launched, seed)
        kernel.module, kernel.function = object(), 0


def _launch(kernel: Any, machine: Machine, launched: Launched, seed: int, x: int, y: int, z: int, *rest: Any) -> None:
    given = rest[6:]  # behind stream, function, metadata of kernel and launch, two hooks
    machine.arguments, storages = _arguments(kernel, machine.program, given)
    launched.append(kernel.name)
    launched.instructions += machine.launch((x, y, z), storages, seed)


def _arguments(kernel: Any, program: Program, given: Sequence[Any]) -> tuple[Mapping[str, Any], list[Any]]:
    """Parameter -> bytes or descriptor; and the storages that they point into."""
    values: list[Any] = []
    storages: list[tuple[int, int, str]] = []
    tiles = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())
    for name, kind, value in zip(kernel.src.signature, kernel.src.signature.values(), given, strict=True):
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            values += _described(value, next(tiles))
            storages.append(_storage(value.base, name))
        elif kind.startswith("*"):
            values.append(np.uint64(value.data_ptr()).tobytes())
            storages.append(_storage(value, name))
        else:
            values.append(np.array(value).astype(SCALARS[kind]).tobytes())
    names = list(program.parameters)
    values += [bytes(8)] * (len(names) - len(values))  # scratch, of which no kernel here has any
    if kernel.metadata.global_scratch_size:
        raise NotImplementedError("scratch memory")
    return dict(zip(names, values, strict=True)), storages


def _storage(tensor: torch.Tensor, name: str) -> tuple[int, int, str]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes(), name


def _described(given: Any, meta: Mapping[str, Any]) -> list[Any]:
    base = given.base
    box, shape, strides = (_pair(x) for x in (meta["block_size"], given.shape, given.strides))
    found = Descriptor(base.data_ptr(), shape, strides[0], base.element_size(), box, SWIZZLES[meta["swizzle"]])
    return [found, *(np.int32(n).tobytes() for n in shape), *(np.int64(n).tobytes() for n in strides)]


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    rows, columns = numbers  # of two dimensions: kernels here have no others
    return int(rows), int(columns)
