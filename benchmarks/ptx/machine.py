"""A block of threads that go through a kernel's PTX in step, diverging where branches do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ptx.accumulators import Accumulators
from benchmarks.ptx.memory import SHARED_BASE, Fault, Global, Ints, Order, Watch
from benchmarks.ptx.parsing import Instruction, Program
from benchmarks.ptx.tensor_memory import TensorMemory

Array = NDArray[Any]
Where = Any  # True, or the threads (N,) that take part
Run = Callable[[Where], None]
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
PARAMETERS = 0x7000_0000  # where their addresses begin, 4 KiB each; of 32 bits, in which Triton 3.9 takes them
TOGETHER = (  # where the parts of a block come together
    "bar.sync", "barrier.sync", "mbarrier.try_wait", "fence.proxy", "wgmma.", "cp.async.commit", "cp.async.wait",
    "cp.async.bulk.commit", "cp.async.bulk.wait",
)  # fmt: skip
LONGEST = 20_000_000  # instructions of one block


@dataclass
class Copy:
    """A copy or product that was begun and not waited for."""

    land: Callable[[], None]
    release: Callable[[], None] | None = None  # of a copy to global memory: its source was read, and is free again
    released: bool = False


@dataclass
class Barrier:
    """An mbarrier: what it waits for, and the copies that will come to it."""

    expected: int
    waiting: int
    phase: int = 0
    bytes: int = 0
    copies: list[tuple[int, Callable[[], None]]] = field(default_factory=list)


class Machine:
    """Registers are arrays of all threads (N,), views of which the instructions' functions hold.

    Of a kernel one is enough: what a block begins with is made anew, and arguments are looked up as it runs.
    """

    def __init__(self, program: Program, warps: int, shared: int, arguments: Mapping[str, Any]) -> None:
        """arguments: parameter -> bytes (little-endian), or a TMA descriptor."""
        self.program, self.threads, self.warps = program, 32 * warps, warps
        self.arguments = arguments
        self.registers: dict[str, Array] = {}
        for name, bits in program.registers.items():
            self.registers[name] = np.zeros(self.threads, UNSIGNED[bits])
        self.order = Order()
        self.shared = np.zeros(shared + SHARED_BASE, np.uint8)
        self.shared_watch = Watch(self.shared.size, self.order, "shared memory")
        self.tensor_memory = TensorMemory(self.order)
        self.memory = Global((), self.order)
        self.block = (0, 0, 0)
        self.grid = (1, 1, 1)
        self.thread = np.arange(self.threads)
        self.groups: dict[str, list[list[Copy]]] = {}
        self.begun: dict[str, list[Copy]] = {}
        self.accumulators = Accumulators()
        self.barriers: dict[int, Barrier] = {}
        self.guards = [self.registers[i.guard] if i.guard else None for i in program.code]
        self.waits = {at: i.op.split(".")[0] for at, i in enumerate(program.code) if i.op.startswith(TOGETHER)}
        self.code = self._translated()

    def _translated(self) -> list[Run | None]:
        from benchmarks.ptx.instructions import translate

        found: list[Run | None] = []
        for instruction in self.program.code:
            try:
                found.append(None if _jumps(instruction) else translate(self, instruction))
            except (KeyError, ValueError, NotImplementedError, AttributeError) as error:
                raise NotImplementedError(
                    f"line {instruction.line}: {instruction.op} {', '.join(instruction.operands)[:80]}: {error!r}"
                ) from error
        return found

    def fences(self, needed: str) -> None:
        """What must be fenced before tensor cores or the copy engine read it: "all", or "stores" but not cp.async."""
        self.shared_watch.fences = needed

    def launch(self, grid: tuple[int, int, int], storages: Sequence[tuple[int, int, str]], seed: int = 0) -> int:
        """All blocks, one after another in random order; instructions that were run. Raises Fault."""
        self.memory, self.grid = Global(storages, self.order), grid
        total, steps = grid[0] * grid[1] * grid[2], 0
        for number in np.random.default_rng(seed).permutation(total):
            self.block = (int(number % grid[0]), int(number // grid[0] % grid[1]), int(number // grid[0] // grid[1]))
            self.order.start(int(number))
            self._begin()
            steps += self._run()
            self._end()
        return steps

    def _begin(self) -> None:
        self.shared[:] = 0xFF
        for register in self.registers.values():
            register.view(np.uint8)[:] = 0 if register.dtype == np.bool_ else 0xFF
        for name in ("cp.async", "bulk", "wgmma"):
            self.groups[name], self.begun[name] = [], []
        self.shared_watch.clear()
        self.barriers.clear()
        self.accumulators.clear()
        self.tensor_memory.start()

    def _end(self) -> None:
        left = [copy for groups in self.groups.values() for group in groups for copy in group]
        if any(self.begun.values()) or not all(copy.released for copy in left):
            raise Fault("the block ended while copies or products were not waited for")
        for copy in left:  # their sources were waited for
            copy.land()
        self.tensor_memory.end()

    def who(self, where: Where = True) -> Ints:
        """Numbers of the threads that take part, for the watch."""
        return self.order.block * 1024 + (self.thread if where is True else self.thread[where])

    def _run(self) -> int:
        everyone = np.ones(self.threads, bool)
        groups: dict[int, Array] = {0: everyone}
        steps = 0
        while groups:
            at = self._next(groups)
            mask = groups.pop(at)
            steps += self._straight(at, mask, groups)
            if steps > LONGEST:
                raise Fault(f"no end after {steps} instructions")
        return steps

    def _next(self, groups: dict[int, Array]) -> int:
        """Where to go on: at the first place; but a part of the block lets others go first where all come together."""
        waiting = {at for at in groups if at in self.waits and not groups[at].all()}
        if others := set(groups) - waiting:
            return min(others)
        if alone := [at for at in waiting if self.waits[at] not in ("bar", "barrier")]:
            return min(alone)
        if len(groups) > 1 and sum(mask.sum() for mask in groups.values()) == self.threads:
            self.order.bar()  # to which warps may come at several places
            for at in sorted(waiting, reverse=True):
                _join(groups, at + 1, groups.pop(at))
        return min(groups)

    def _straight(self, at: int, mask: Array, groups: dict[int, Array]) -> int:
        """From `at` to a branch, or to where others wait."""
        code, guards, program = self.code, self.guards, self.program.code
        where: Where = True if mask.all() else mask
        stop = min((place for place in groups if place > at), default=len(code))
        first = at
        while at < stop:
            if where is not True and groups and at > first and at in self.waits:
                break
            run, guard = code[at], guards[at]
            taken = where
            if guard is not None:
                wanted = ~guard if program[at].negated else guard
                taken = wanted & mask
                taken = True if taken.all() else taken
            if run is None:
                self._jump(at, mask, taken, groups)
                return at - first + 1
            if taken is True or guard is None or taken.any():
                try:
                    run(taken)
                except (Fault, NotImplementedError) as error:
                    raise type(error)(f"line {program[at].line}, {program[at].op}: {error}") from None
            at += 1
        if at < len(code):  # else it ends, as by ret
            _join(groups, at, mask)
        return at - first

    def _jump(self, at: int, mask: Array, taken: Where, groups: dict[int, Array]) -> None:
        instruction = self.program.code[at]
        going = mask if taken is True else (taken & mask)
        if instruction.op.startswith("bra") and going.any():
            _join(groups, self.program.labels[instruction.operands[0]], going)
        if (staying := mask & ~going).any():
            _join(groups, at + 1, staying)


def whole_warps(where: Where) -> None:
    """Raises Fault where threads of a warp are missing in what all of them do together."""
    if where is not True:
        counts = where.reshape(-1, 32).sum(1)
        if ((counts != 0) & (counts != 32)).any():
            raise Fault("threads of a warp are missing")


def _jumps(instruction: Instruction) -> bool:
    return instruction.op.split(".")[0] in ("bra", "ret", "exit")


def _join(groups: dict[int, Array], at: int, mask: Array) -> None:
    groups[at] = groups[at] | mask if at in groups else mask
