"""Tensor cores: mma.sync of one warp, wgmma of four."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ptx import warp
from benchmarks.ptx.loading import within_shared
from benchmarks.ptx.machine import Copy, Machine, Run, Where, whole_warps
from benchmarks.ptx.memory import GRAIN, Fault, Ints
from benchmarks.ptx.operands import several, target, value
from benchmarks.ptx.parsing import Instruction

Array = NDArray[Any]


def multiply(machine: Machine, instruction: Instruction) -> Run:
    """mma.sync.aligned.m16n8kK.row.col.f32.T.T.f32 d, a, b, c"""
    found = re.search(r"m16n8k(\d+)\.row\.col\.f32\.(bf16|f16)\.\2\.f32$", instruction.op)
    if found is None:
        raise NotImplementedError("this shape or type")
    k, kind = int(found[1]), found[2]
    d = [target(machine, name, np.float32) for name in several(instruction.operands[0])]
    a, b = ([value(machine, n, np.uint32) for n in several(text)] for text in instruction.operands[1:3])
    c = [value(machine, name, np.float32) for name in several(instruction.operands[3])]
    if [len(x) for x in (d, a, b, c)] != [4, k // 4, k // 8, 4]:
        raise NotImplementedError("numbers of registers")

    def run(where: Where) -> None:
        whole_warps(where)
        result = warp.mma(_stacked(machine, a), _stacked(machine, b), _stacked(machine, c), k, kind)
        for i, out in enumerate(d):
            found = result[:, :, i].ravel()
            out[... if where is True else where] = found if where is True else found[where]

    return run


def _stacked(machine: Machine, registers: list[Any]) -> Array:
    """(warps, 32, registers)"""
    return np.stack([np.broadcast_to(x, machine.threads) for x in registers], axis=1).reshape(machine.warps, 32, -1)


def multiply_group(machine: Machine, instruction: Instruction) -> Run:
    """wgmma.mma_async.sync.aligned.m64nNk16.f32.T.T d, a, b, scale-d, 1, 1[, across a], across b"""
    found = re.search(r"m64n(\d+)k16\.f32\.(bf16|f16)\.\2$", instruction.op)
    if found is None or machine.warps % 4:
        raise NotImplementedError("this shape or type")
    n, kind = int(found[1]), found[2]
    names = tuple(several(instruction.operands[0]))
    d = [target(machine, name, np.float32) for name in names]
    from_registers = instruction.operands[1].startswith("{")
    a = [value(machine, x, np.uint32 if from_registers else np.uint64) for x in several(instruction.operands[1])]
    b = value(machine, instruction.operands[2], np.uint64)
    if len(d) != n // 2 or len(a) != (4 if from_registers else 1) or n % 8 or n > 256:
        raise NotImplementedError("numbers of registers")
    keep, *signs = (value(machine, x, np.bool_) if x.startswith("%") else int(x) for x in instruction.operands[3:])
    if signs[:2] != [1, 1]:
        raise NotImplementedError("negated operands")
    across = [bool(x) for x in signs[2:]]
    fragments = dict(zip(several(instruction.operands[1]), a)) if from_registers else {}

    def run(where: Where) -> None:
        if where is not True:
            raise Fault("threads of a warp group are missing")
        kept = bool(np.broadcast_to(keep, machine.threads)[0])
        if (np.broadcast_to(keep, machine.threads) != kept).any():
            raise Fault("threads of a warp group do not agree whether the sum goes on")
        before = machine.accumulators.taken(names, d, kept and not from_registers)
        read: list[Ints] = []
        result = np.empty((machine.threads, len(d)), np.float32)
        for group in range(machine.warps // 4):
            threads = slice(128 * group, 128 * group + 128)
            right = _operand(machine, b, threads, n, kind, across[-1], read).T
            if from_registers:
                registers = np.stack([x[threads] for x in a], axis=1).reshape(4, 32, -1)
                left = warp.fragment_a(registers, 16, kind).reshape(64, 16)
            else:
                left = _operand(machine, a[0], threads, 64, kind, across[0], read)
            rows, columns = warp.places_c(n)
            product = (left @ right).reshape(4, 16, n)[:, rows, columns].reshape(128, -1)
            with np.errstate(over="ignore", invalid="ignore"):
                result[threads] = (product + before[threads] if kept else product).astype(np.float32)
        machine.accumulators.begin(names, d, result)
        given = {name: x.copy() for name, x in fragments.items()}

        def land() -> None:
            _release(machine, read)
            if any((fragments[name] != x).any() for name, x in given.items()):
                raise Fault("registers were written while tensor cores still read them")
            machine.accumulators.end(names, d)

        machine.begun["wgmma"].append(Copy(land))

    return run


def fence(machine: Machine, instruction: Instruction) -> Run:
    """wgmma.fence: registers written until now may be read by what follows."""

    def run(where: Where) -> None:
        if where is not True:
            raise Fault("a fence that not all threads of the block come to")
        machine.accumulators.fenced = True

    return run


def _release(machine: Machine, read: list[Ints]) -> None:
    for grains in read:
        machine.shared_watch.engine_done(grains)


def _operand(
    machine: Machine, descriptor: Any, threads: slice, rows: int, kind: str, across: bool, read: list[Ints]
) -> NDArray[np.float64]:
    """(rows, 16), read from shared memory as its descriptor says."""
    words = np.broadcast_to(descriptor, machine.threads)[threads]
    if (words != words[0]).any():
        raise Fault("threads of a warp group have different descriptors")
    found, used = from_shared(machine, warp.operand(int(words[0]), rows, 16, across), kind)
    read.append(used)
    return found


def from_shared(machine: Machine, places: Ints, kind: str) -> tuple[NDArray[np.float64], Ints]:
    """The numbers at these addresses, for tensor cores, and the grains that are in use from now on."""
    within_shared(machine, places.ravel(), 2)
    used = places.ravel() // GRAIN
    machine.shared_watch.engine_reads(used)
    bits = machine.shared[places[..., None] + np.arange(2)].view(np.uint16)[..., 0]
    return warp.from_bits(np.ascontiguousarray(bits), kind), used


FAMILIES: dict[str, Callable[[Machine, Instruction], Run]] = {
    "mma.sync": multiply,
    "wgmma.fence": fence,
    "wgmma.mma_async": multiply_group,
}
