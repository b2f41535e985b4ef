"""Registers that wgmma reads and writes while threads go on: NaN until waited for, fenced before they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ptx.memory import Fault

Array = NDArray[Any]
UNKNOWN = np.uint32(0xFFFFFFFF)


@dataclass
class Product:
    """Sums (threads, registers) that will be in the registers, and how many products go into them."""

    result: NDArray[np.float32]
    count: int = 0


class Accumulators:
    """All registers that a program's wgmma add to."""

    def __init__(self) -> None:
        self.fenced = False  # since the last group of products was committed or waited for
        self.seen: dict[tuple[str, ...], Array] = {}  # sums as products left them
        self.flying: dict[tuple[str, ...], Product] = {}

    def clear(self) -> None:
        self.fenced = False
        self.seen.clear()
        self.flying.clear()

    def taken(self, names: tuple[str, ...], registers: Sequence[Array], sums_only: bool) -> NDArray[np.float32]:
        """The sums (threads, registers) that a product goes on with. sums_only: it reads no other registers.

        LLVM moves arithmetic of registers across a fence, and ptxas sees to it: looked at is only that there is one.
        """
        if (product := self.flying.get(names)) is not None:
            return product.result  # one after another, without a wait
        if any(set(names) & set(others) for others in self.flying):
            raise Fault("tensor cores still write some of the registers, in another shape")
        given: NDArray[np.float32] = np.stack(registers, axis=1)
        untouched = sums_only and names in self.seen and (self.seen[names] == given.view(np.uint32)).all()
        if not self.fenced and not untouched:
            raise Fault("tensor cores use registers that no wgmma.fence was behind")
        return given

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
        self.fenced = False
        for i, register in enumerate(registers):
            if (register.view(np.uint32) != UNKNOWN).any():
                raise Fault(f"{names[i]} was written while tensor cores still write it")
            register[:] = product.result[:, i]
        self.seen[names] = np.stack(registers, axis=1).view(np.uint32)
