"""Registers that wgmma reads and writes while threads go on: NaN until waited for, fenced before they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ptx.memory import Fault
from benchmarks.ptx.parsing import Program

Array = NDArray[Any]
UNKNOWN = np.uint32(0xFFFFFFFF)


@dataclass
class Product:
    """Sums (threads, registers) that will be in the registers, and how many products go into them."""

    result: NDArray[np.float32]
    count: int = 0


class Accumulators:
    """All registers of a program's wgmma."""

    def __init__(self, registers: Mapping[str, Array], program: Program) -> None:
        used = [name for i in program.code if i.op.startswith("wgmma.mma") for text in i.operands[:2]
                for name in text.strip("{}").split(",")]  # fmt: skip
        self.registers = {name: registers[name] for name in used if name in registers and registers[name].itemsize == 4}
        self.seen: dict[str, Array] = {}  # as they were at the last fence
        self.flying: dict[tuple[str, ...], Product] = {}

    def clear(self) -> None:
        self.seen.clear()
        self.flying.clear()

    def fence(self) -> None:
        for name, register in self.registers.items():
            self.seen[name] = register.copy()

    def fenced(self, names: Mapping[str, Any] | Sequence[str]) -> None:
        """Raises Fault where one was written since the last wgmma.fence."""
        for name in names:
            if name not in self.seen or (self.registers[name] != self.seen[name]).any():
                raise Fault(f"{name} is read or written by tensor cores, and no wgmma.fence came after it was written")

    def taken(self, names: tuple[str, ...], registers: Sequence[Array]) -> NDArray[np.float32]:
        """The sums (threads, registers) that a product goes on with."""
        if (product := self.flying.get(names)) is not None:
            return product.result  # one after another, without a wait
        if any(set(names) & set(others) for others in self.flying):
            raise Fault("tensor cores still write some of the registers, in another shape")
        self.fenced(names)
        return np.stack(registers, axis=1)

    def begin(self, names: tuple[str, ...], registers: Sequence[Array], result: NDArray[np.float32]) -> None:
        product = self.flying.setdefault(names, Product(result))
        product.result, product.count = result, product.count + 1
        for register in registers:
            register.view(np.uint32)[:] = UNKNOWN

    def end(self, names: tuple[str, ...], registers: Sequence[Array]) -> None:
        """One product was waited for; behind the last the sums are in the registers."""
        product = self.flying[names]
        product.count -= 1
        if product.count:
            return
        del self.flying[names]
        for i, register in enumerate(registers):
            if (register.view(np.uint32) != UNKNOWN).any():
                raise Fault(f"{names[i]} was written while tensor cores still write it")
            register[:] = product.result[:, i]
            self.seen[names[i]] = self.registers[names[i]].copy()
