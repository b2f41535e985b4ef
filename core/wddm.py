r"""Who uses a graphics card under Windows' driver model (WDDM), by the counters that its Task Manager shows.

NVIDIA's driver tells no process there. Windows, which schedules the card itself, tells for each process and each engine
of each card the share of the time in which it ran. Bytes per process are among its counters too, but Microsoft says
that they stay too high once a program has given memory back (KB 4490156): they only show which card is ours.

The names and calls are from documentation and from what others read there; this never ran on Windows.
"""

from __future__ import annotations

import ctypes
import re
import weakref
from collections.abc import Callable, Collection, Mapping
from ctypes import wintypes
from dataclasses import dataclass
from typing import Any, Protocol

from core.windows import library

BUSY = r"\GPU Engine(*)\Utilization Percentage"
BYTES = r"\GPU Process Memory(*)\Dedicated Usage"
COMPUTING = ("3d", "compute", "cuda", "graphics", "vr")  # engines that share the processors; copies and films do not
SYSTEM = frozenset({0, 4})  # what Windows does for everybody
_NAME = re.compile(r"pid_(\d+)_luid_(0x[0-9a-f]+_0x[0-9a-f]+_phys_\d+)(?:_eng_(\d+)_engtype_(.*))?", re.IGNORECASE)


@dataclass(frozen=True)
class Instance:
    """What the name of a counter says: "pid_9524_luid_0x00000000_0x000095CA_phys_0_eng_0_engtype_3D"."""

    pid: int
    card: str  # "0x00000000_0x000095ca_phys_0"
    engine: str = ""  # its number; "" for a counter of memory
    kind: str = ""  # "3d", "compute_0", "copy", ...


def instance(name: str) -> Instance | None:
    """None: a name of another form."""
    match = _NAME.fullmatch(name.strip())
    return Instance(int(match[1]), match[2].lower(), match[3] or "", (match[4] or "").lower()) if match else None


def others_share(busy: Mapping[str, float], taken: Mapping[str, float], ours: Collection[int]) -> float | None:
    """Share of the busiest computing engine of our card that processes not ours had, 0..1. `busy`: percent by name of
    the counter; `taken`: bytes. None: none of our processes has memory on a card."""
    card = _our_card(taken, ours)
    if card is None:
        return None
    engines: dict[str, float] = {}
    for name, percent in busy.items():
        found = instance(name)
        if found is None or found.card != card or not found.kind.startswith(COMPUTING):
            continue
        if found.pid not in ours and found.pid not in SYSTEM:
            engines[found.engine] = engines.get(found.engine, 0.0) + percent
    return min(1.0, max(engines.values(), default=0.0) / 100)


def _our_card(taken: Mapping[str, float], ours: Collection[int]) -> str | None:
    """The one on which our processes have most memory: a laptop has a second one, in its processor."""
    cards: dict[str, float] = {}
    for name, size in taken.items():
        found = instance(name)
        if found is not None and found.pid in ours and size > 0:
            cards[found.card] = cards.get(found.card, 0.0) + size
    return max(cards, key=cards.__getitem__) if cards else None


class Reading(Protocol):
    """Counters whose shares are of the time since it was begun. Raises OSError where Windows refuses."""

    def end(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """(percent of `BUSY`, bytes of `BYTES`), by the names of the counters."""


class Users:
    """Others' share of our card since the last look. `begin` starts a reading, by default Windows' own."""

    def __init__(self, begin: Callable[[], Reading] | None = None) -> None:
        self._begin: Callable[[], Reading] = begin or Query
        self._reading: Reading | None = None
        self.problem = ""  # why the last look found nothing; "" if it did, or was the first

    def others_busy(self, ours: Collection[int]) -> float | None:
        """None at the first look, and where it cannot be told: `problem` says why then.

        A reading is begun anew at each look, so that programs that came since are in the next one.
        """
        before, self._reading, self.problem = self._reading, None, ""
        try:
            found = before.end() if before is not None else None
            self._reading = self._begin()
        except OSError as error:
            self.problem = f"Windows does not tell who uses the card: {error}"
            return None
        if found is None:
            return None
        share = others_share(*found, ours)
        if share is None:
            self.problem = "Windows counts no memory of this training on any card, so its card is not known"
        return share


# --- pdh.dll -----------------------------------------------------------------------------------------

MORE_DATA = 0x800007D2  # PDH_MORE_DATA: the buffer is too small
AS_DOUBLE, UNCAPPED = 0x200, 0x8000  # PDH_FMT_DOUBLE, PDH_FMT_NOCAP100
VALID = (0, 1)  # PDH_CSTATUS_VALID_DATA, _NEW_DATA; a process that has just come has neither


class Value(ctypes.Structure):
    _fields_ = [("status", wintypes.DWORD), ("number", ctypes.c_double)]


class Item(ctypes.Structure):
    _fields_ = [("name", wintypes.LPWSTR), ("value", Value)]


class Query:
    """A `Reading` through PDH, Windows' Performance Data Helper, by the English names on every Windows."""

    def __init__(self, pdh: Any = None) -> None:
        self._pdh = _declared(library("pdh") if pdh is None else pdh)
        self._query = ctypes.c_void_p()
        _asked(self._pdh.PdhOpenQueryW(None, 0, ctypes.byref(self._query)), "PdhOpenQueryW")
        self._close = weakref.finalize(self, self._pdh.PdhCloseQuery, self._query)
        self._counters = [self._add(path) for path in (BUSY, BYTES)]
        _asked(self._pdh.PdhCollectQueryData(self._query), "PdhCollectQueryData")

    def end(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        try:
            _asked(self._pdh.PdhCollectQueryData(self._query), "PdhCollectQueryData")
            busy, taken = (self._values(counter) for counter in self._counters)
            return busy, taken
        finally:
            self._close()

    def _add(self, path: str) -> ctypes.c_void_p:
        counter = ctypes.c_void_p()
        asked = self._pdh.PdhAddEnglishCounterW(self._query, path, 0, ctypes.byref(counter))
        _asked(asked, f"PdhAddEnglishCounterW of {path}")
        return counter

    def _values(self, counter: ctypes.c_void_p) -> dict[str, float]:
        size, count = wintypes.DWORD(0), wintypes.DWORD(0)
        arguments = (counter, AS_DOUBLE | UNCAPPED, ctypes.byref(size), ctypes.byref(count))
        status = self._pdh.PdhGetFormattedCounterArrayW(*arguments, None)
        if status != MORE_DATA:
            _asked(status, "PdhGetFormattedCounterArrayW")
            return {}  # no process at all
        buffer = ctypes.create_string_buffer(size.value)  # names lie behind the items
        _asked(self._pdh.PdhGetFormattedCounterArrayW(*arguments, buffer), "PdhGetFormattedCounterArrayW")
        items = (Item * count.value).from_buffer(buffer)
        return {item.name: item.value.number for item in items if item.value.status in VALID}


def _declared(pdh: Any) -> Any:
    """Handles are as wide as pointers, and a status is unsigned: ctypes has to be told."""
    handle, number, out = ctypes.c_void_p, wintypes.DWORD, ctypes.c_void_p
    pdh.PdhOpenQueryW.argtypes = [wintypes.LPCWSTR, ctypes.c_size_t, out]
    pdh.PdhAddEnglishCounterW.argtypes = [handle, wintypes.LPCWSTR, ctypes.c_size_t, out]
    pdh.PdhCollectQueryData.argtypes = pdh.PdhCloseQuery.argtypes = [handle]
    pdh.PdhGetFormattedCounterArrayW.argtypes = [handle, number, out, out, out]
    for name in ("OpenQueryW", "AddEnglishCounterW", "CollectQueryData", "CloseQuery", "GetFormattedCounterArrayW"):
        getattr(pdh, f"Pdh{name}").restype = number
    return pdh


def _asked(status: int, call: str) -> None:
    """`status` of a call that answers 0 when it is done."""
    if status:
        raise OSError(f"{call} answers {status:#010x}")
