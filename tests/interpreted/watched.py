"""Triton's interpreter with a watch on memory: what compute-sanitizer would say of a kernel, without a card.

The interpreter runs the programs of a launch one after another and reads whatever lies at an address, so it computes
what is wanted where a card would not. `watched()` finds, for every load, store and atomic of every program:

- outside: an address in the storage of none of the launch's arguments. Storages are copied apart, with nothing that is
  theirs between; what lies beyond a view and within its storage is not told.
- race: what one program writes, another reads or writes in the same launch, unless both add to it atomically.
- lanes: within a program, an element that one lane reads or writes and another lane writes, with no barrier that
  Triton would have to set; two lanes of one store that write the same element; an element that is added to atomically
  and read or stored otherwise.
- undefined: an element of a `torch.empty` that is read before anything is written there.
- promise: a `tl.multiple_of` that is not true, on which the compiler would build.

And it runs the programs in a random order, so that a result which depends on it differs.

`far()` instead runs a few chosen programs of a launch, on arguments of any size where they lie, and raises where one
touches what is in none of them: for places whose number does not fit into 32 bits, in memory that is hardly ever used.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, interpreter_builder

GUARD = 2**20  # bytes on both sides of an argument: more than a tile's rows lie apart in these tests
POISON = 0xFB  # each byte of an empty tensor: -2.6e36 in bfloat16 and float32, -65,376 in float16
NOBODY, SEVERAL = -1, -2
Programs = Callable[[tuple[int, int, int]], Iterable[tuple[int, int, int]]]  # of a grid


@dataclass
class Place:
    """One argument's memory during one launch. All arrays: one number per element."""

    start: int  # address
    end: int
    size: int  # bytes of an element
    writer: np.ndarray  # the program that stored there, or NOBODY
    reader: np.ndarray  # that loaded there, or NOBODY, or SEVERAL
    adder: np.ndarray  # that added atomically
    read_lane: np.ndarray  # the lane of the last load
    write_lane: np.ndarray

    @classmethod
    def of(cls, start: int, length: int, size: int) -> Place:
        count = -(-length // size)
        return cls(start, start + length, size, *(np.full(count, NOBODY, np.int32) for _ in range(5)))


@dataclass
class Watch:
    """What was found, in words. `accesses` counts elements, so that a test can tell that it watched something."""

    found: list[str] = field(default_factory=list)
    kernel: str = ""
    program: int = 0
    accesses: int = 0
    promises: int = 0
    launches: int = 0
    areas: list[tuple[int, int]] = field(default_factory=list)  # addresses of the arguments
    places: dict[int, Place] = field(default_factory=dict)  # by start

    def say(self, what: str) -> None:
        line = f"{self.kernel}: {what}"
        if line not in self.found:
            self.found.append(line)

    def locate(self, pointers: Any, mask: Any) -> tuple[Place, np.ndarray, np.ndarray] | None:
        """The place, and element and lane of what is really touched; None where that is nothing or outside."""
        addresses = np.asarray(pointers.data).ravel()
        active = np.broadcast_to(np.asarray(mask.data, dtype=bool), np.shape(pointers.data)).ravel()
        lanes = np.flatnonzero(active)
        touched = addresses[lanes].astype(np.int64)
        self.accesses += len(touched)
        if not len(touched):
            return None
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        low, high = int(touched.min()), int(touched.max())
        area = next(((a, b) for a, b in self.areas if a <= low < b), None)
        if area is None or high + size > area[1]:
            self.say(f"outside: an address beyond the arguments ({low:#x} to {high:#x}, they are {self.areas})")
            return None
        place = self.places.get(area[0])
        if place is None:
            place = self.places[area[0]] = Place.of(area[0], area[1] - area[0], size)
        if place.size != size:
            self.say(f"elements of {place.size} and of {size} bytes in one argument")
            return None
        return place, (touched - place.start) // size, lanes

    def load(self, pointers: Any, mask: Any, values: Any) -> None:
        if not (at := self.locate(pointers, mask)):
            return
        place, where, lanes = at
        me = self.program
        self._others(place.writer[where], "race: a program reads what another stores")
        self._others(place.adder[where], "race: a program reads what another adds to")
        if ((place.writer[where] == me) & (place.write_lane[where] != lanes)).any():
            self.say("lanes: one reads what another of the program has stored")
        if (place.adder[where] == me).any():
            self.say("lanes: the program reads what it adds to atomically")
        before = place.reader[where]
        other = (before == me) & (place.read_lane[where] != lanes)
        place.reader[where] = np.where((before == NOBODY) | (before == me), me, SEVERAL)
        place.read_lane[where] = np.where(other, SEVERAL, lanes)
        elements, times = np.unique(where, return_counts=True)
        place.read_lane[elements[times > 1]] = SEVERAL  # one load, in which several lanes read them
        raw = np.ascontiguousarray(values.data).ravel()[lanes].view(np.uint8).reshape(len(lanes), -1)
        if (raw == POISON).all(1).any():
            self.say("undefined: an element is read that nothing was written to")

    def store(self, pointers: Any, mask: Any) -> None:
        if not (at := self.locate(pointers, mask)):
            return
        place, where, lanes = at
        me = self.program
        if len(np.unique(where)) != len(where):
            self.say("lanes: two of one store write the same element")
        self._others(place.writer[where], "race: two programs store to one element")
        self._others(place.reader[where], "race: a program stores what another reads")
        self._others(place.adder[where], "race: a program stores what another adds to")
        if ((place.reader[where] == me) & (place.read_lane[where] != lanes)).any():
            self.say("lanes: one stores what another of the program has read")
        if ((place.writer[where] == me) & (place.write_lane[where] != lanes)).any():
            self.say("lanes: one stores what another of the program has stored")
        if (place.adder[where] == me).any():
            self.say("lanes: the program stores what it adds to atomically")
        place.writer[where], place.write_lane[where] = me, lanes

    def add(self, pointers: Any, mask: Any) -> None:
        if not (at := self.locate(pointers, mask)):
            return
        place, where, _ = at
        self._others(place.writer[where], "race: a program adds to what another stores")
        self._others(place.reader[where], "race: a program adds to what another reads")
        before = place.adder[where]
        place.adder[where] = np.where((before == NOBODY) | (before == self.program), self.program, SEVERAL)

    def promise(self, handle: TensorHandle, name: str, values: list[int]) -> None:
        if name != "tt.divisibility":
            self.say(f"promise: {name} is not watched")
        elif (np.asarray(handle.data) % np.array(values)).any():
            self.say(f"promise: a multiple of {values}, and is {np.unique(handle.data)[:4]}")

    def _others(self, who: np.ndarray, said: str) -> None:
        if ((who != NOBODY) & (who != self.program)).any():
            self.say(said)


def apart(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy with GUARD bytes on both sides."""
    length = storage.nbytes()
    memory = torch.full((length + 2 * GUARD,), POISON, dtype=torch.uint8)
    inner = torch.frombuffer(memory.numpy(), dtype=torch.uint8, count=length, offset=GUARD).untyped_storage()
    inner.copy_(storage)
    return inner


def launch(watch: Watch, executor: GridExecutor, *given: Any, **named: Any) -> None:
    """GridExecutor.__call__ with arguments that lie apart and programs in random order."""

    def noted(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        copied = apart(storage) if storage.nbytes() else storage
        watch.areas.append((copied.data_ptr(), copied.data_ptr() + copied.nbytes()))
        return copied

    def shuffled(grid: tuple[int, int, int]) -> Iterable[tuple[int, int, int]]:
        programs: list[Any] = list(np.ndindex(*grid))
        random.shuffle(programs)
        return programs

    watch.kernel, watch.launches, watch.areas, watch.places = executor.fn.__name__, watch.launches + 1, [], {}
    copies = run(watch, executor, noted, shuffled, given, named)
    executor._restore_args_dev(given, copies, {}, {})


def run(watch: Watch, executor: GridExecutor, noted: Any, chosen: Programs, given: Any, named: Any) -> list[Any]:
    """The chosen programs, on what `noted` makes of each argument's storage. All arguments, in their order."""
    names = inspect.getfullargspec(executor.fn).args
    named = {name: value for name, value in named.items() if name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "cpu", noted)
        copies, named_copies = executor._init_args_hst(given, named)
    if any(hasattr(value, "data_ptr") for value in named.values()):
        raise TypeError("tensors are expected by position here")
    scope = interpreter._patch_lang(executor.fn)
    try:
        arguments = inspect.getcallargs(executor.fn, *copies, **named_copies)
        arguments = {
            name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
            for name, value in arguments.items()
        }
        grid = executor.grid(arguments) if callable(executor.grid) else executor.grid
        grid = (*grid, 1, 1)[:3]
        interpreter_builder.set_grid_dim(*grid)
        for place in chosen(grid):
            watch.program = int(np.ravel_multi_index(place, grid))
            interpreter_builder.set_grid_idx(*(int(x) for x in place))
            executor.fn(**arguments)
    finally:
        scope.restore()
    return list(copies)


def poisoned(make: Any) -> Any:
    """`make`, a function that returns a tensor of no defined contents, with all of it POISON."""

    @functools.wraps(make)
    def made(*given: Any, **named: Any) -> torch.Tensor:
        tensor: torch.Tensor = make(*given, **named)
        if tensor.device.type == "cpu" and type(tensor) is torch.Tensor and tensor.numel():
            tensor.untyped_storage().fill_(POISON)
        return tensor

    return made


@contextmanager
def watched() -> Iterator[Watch]:
    """Every launch within is watched; the caller looks at `found`."""
    watch = Watch()
    plain_load, plain_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    plain_add = InterpreterBuilder.create_atomic_rmw

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        values = plain_load(self, pointers, mask, *rest, **named)
        watch.load(pointers, mask, values)
        return values

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.store(pointers, mask)
        return plain_store(self, pointers, value, mask, *rest)

    def add(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.add(pointers, mask)
        return plain_add(self, operation, pointers, value, mask, *rest)

    def promise(self: TensorHandle, name: str, values: list[int]) -> None:
        watch.promises += 1
        watch.promise(self, name, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", load)
        patch.setattr(InterpreterBuilder, "create_masked_store", store)
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", add)
        patch.setattr(GridExecutor, "__call__", lambda self, *given, **named: launch(watch, self, *given, **named))
        patch.setattr(TensorHandle, "set_attr", promise)
        for where, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(where, name, poisoned(getattr(where, name)))
        yield watch


@contextmanager
def far(chosen: Programs) -> Iterator[Watch]:
    """Launches within run the chosen programs, in place. IndexError where one goes outside of the arguments."""
    watch = Watch()

    def noted(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        watch.areas.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return storage

    def launched(self: GridExecutor, *given: Any, **named: Any) -> None:
        watch.launches, watch.areas = watch.launches + 1, []
        run(watch, self, noted, chosen, given, named)

    def checked(access: Any, first: int, second: int) -> Any:
        """`access` with the pointers and the mask as its arguments of these numbers."""

        def of(self: Any, *given: Any, **named: Any) -> Any:
            pointers, mask = given[first].data, given[second].data
            watch.accesses += 1
            touched = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
            if len(touched) and not any(a <= touched.min() and touched.max() < b for a, b in watch.areas):
                raise IndexError(f"{touched.min():#x} to {touched.max():#x} lies in none of {watch.areas}")
            return access(self, *given, **named)

        return of

    def zeros(*shape: Any, **named: Any) -> torch.Tensor:
        """What the system hands out is zero; to write that would use the memory."""
        return (
            torch.empty(*shape, **named) if np.prod(np.array(shape, np.int64)) > 2**28 else plain_zeros(*shape, **named)
        )

    plain_zeros = torch.zeros
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", checked(InterpreterBuilder.create_masked_load, 0, 1))
        patch.setattr(InterpreterBuilder, "create_masked_store", checked(InterpreterBuilder.create_masked_store, 0, 2))
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", checked(InterpreterBuilder.create_atomic_rmw, 1, 3))
        patch.setattr(GridExecutor, "__call__", launched)
        patch.setattr(torch, "zeros", zeros)
        yield watch
