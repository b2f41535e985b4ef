"""A card that is not there: CUDA's runtime, driver, cuBLAS and NVML for a child, without a kernel being run.

    python -m benchmarks.blank_card h100 -- python -m benchmarks.gpu --out rehearsal

    child = blank_card.python(CARDS["h100"], ["-m", "benchmarks.memory_side", order], caches=folder)    # in the parent
    blank_card.reset(); step(); blank_card.counts().times("waits")                                     # in the child

The library (card.h and the C files beside it) stands in for what PyTorch and Triton call of a card. "Device" memory is
address space that nobody touches, given out until the card is full; launches, products, copies and waits are counted by
name. So all that a program does on the host beside a card happens for real: PyTorch's caching allocator and its errors,
streams, events and pinned memory, what torch.compile, Inductor and Triton compile for that capability and with which
grid and shared memory it is launched.

What it is not: no kernel is run, so numbers on the card are zeros or what was copied there, nothing is right or wrong,
and no time means anything. What it does not stand in for answers "not supported" and is counted as absent.

Processes whose BLANK_CARD_SHARED names one file share a card: what one holds the others cannot take, and NVML tells of
all; `tests/blank_sharing.py` is another program's part in it, and lets the card fail, fall off the bus or be taken out.
BLANK_CARD_VALUE is a number that stands on the host for every one that a kernel would have written.

The real libcuda is hidden from those children alone that are given `environment`; nothing is changed in this process.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.blank_card.building import library, obstacle
from core import caches as compile_caches
from core.paths import project_root

__all__ = ["CARDS", "Card", "Counts", "counts", "environment", "library", "obstacle", "python", "reset", "within"]

GIB = 2**30


@dataclass(frozen=True)
class Card:
    name: str  # as the driver gives it
    capability: int  # 90 for sm_90
    processors: int
    bytes: int
    context: int = GIB // 2  # bytes that the driver's context takes of it; an estimate

    @property
    def gib(self) -> float:
        return self.bytes / GIB


# Of GeForce cards the memory as sold: a card reports a little less.
CARDS: Mapping[str, Card] = {
    "h100": Card("NVIDIA H100 80GB HBM3", 90, 132, 85_017_493_504),
    "h200": Card("NVIDIA H200", 90, 132, 150_754_820_096),
    "a100": Card("NVIDIA A100-SXM4-80GB", 80, 108, 84_987_740_160),
    "a100-40": Card("NVIDIA A100-SXM4-40GB", 80, 108, int(39.39 * GIB)),
    "b200": Card("NVIDIA B200", 100, 148, 191_503_138_816),
    "2080ti": Card("NVIDIA GeForce RTX 2080 Ti", 75, 68, 11 * GIB),
    "3060": Card("NVIDIA GeForce RTX 3060", 86, 28, 12 * GIB),
    "4060": Card("NVIDIA GeForce RTX 4060", 89, 24, 8 * GIB),
    "4060-laptop": Card("NVIDIA GeForce RTX 4060 Laptop GPU", 89, 24, 8 * GIB),
    "4090": Card("NVIDIA GeForce RTX 4090", 89, 128, 24 * GIB),
    "5090": Card("NVIDIA GeForce RTX 5090", 120, 170, 32 * GIB),
}

# --- the parent's side ------------------------------------------------------------------------


def environment(card: Card, caches: Path | None = None) -> dict[str, str]:
    """The whole environment of a child that sees `card`, and this project on its path. Builds the library, once.

    caches: what the child compiles, by default beside the library. Never the user's own: a compiler keeps what it timed
    under the card's name, and a real card would take times that were never measured.
    """
    folder = library()
    caches = (caches or folder / "caches").resolve()
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return inherited | {
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "LD_LIBRARY_PATH": _before("LD_LIBRARY_PATH", folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTHONPATH": _before("PYTHONPATH", project_root()),
        "BLANK_CARD_NAME": card.name,
        "BLANK_CARD_CAPABILITY": str(card.capability),
        "BLANK_CARD_PROCESSORS": str(card.processors),
        "BLANK_CARD_BYTES": str(card.bytes),
        "BLANK_CARD_CONTEXT": str(card.context),
        # The rest as core.sandbox gives it to a trainer; torch before 2.10 reads the allocator's older name.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        **compile_caches.environment(caches),
    }


def _before(variable: str, place: Path) -> str:
    return os.pathsep.join(part for part in (str(place), os.environ.get(variable, "")) if part)


def python(
    card: Card, arguments: Sequence[str], caches: Path | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """This interpreter on a blank card, with what it printed. It is up to the caller to look at the exit status."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project_root(),
        env=environment(card, caches),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# --- the child's side -------------------------------------------------------------------------

KINDS = (
    "launches",
    "invalid",
    "products",
    "waits",
    "to host",
    "to card",
    "on card",
    "binaries",
    "absent",
)  # as in card.h


@dataclass(frozen=True)
class Counts:
    """Kind -> name -> (how often, bytes), since the last `reset`.

    launches: kernels and memsets; invalid: those of them that a card would refuse; products: cuBLAS's; waits: where
    the host waits for the card; the copies; binaries: those of Triton that were loaded; absent: calls of what is not
    stood in for.
    """

    found: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)

    def times(self, kind: str) -> int:
        return sum(times for times, _ in self.found[kind].values())

    def bytes(self, kind: str) -> int:
        return sum(size for _, size in self.found[kind].values())

    def names(self, kind: str) -> dict[str, int]:
        """Name -> how often, the most frequent first."""
        return {name: times for name, (times, _) in sorted(self.found[kind].items(), key=lambda x: -x[1][0])}


def within() -> bool:
    """Whether this process has a blank card."""
    return hasattr(ctypes.CDLL(None), "blank_rows") if sys.platform == "linux" else False


def counts() -> Counts:
    card = _card()
    found: dict[str, dict[str, tuple[int, int]]] = {kind: {} for kind in KINDS}
    for i in range(card.blank_rows()):
        if times := card.blank_times(i):
            found[KINDS[card.blank_kind(i)]][card.blank_name(i).decode()] = (times, card.blank_bytes(i))
    return Counts(found)


def reset() -> None:
    _card().blank_reset()


def _card() -> ctypes.CDLL:
    if not within():
        raise RuntimeError("this process has no blank card; start it by benchmarks.blank_card.python")
    card = ctypes.CDLL(None)
    card.blank_name.restype = ctypes.c_char_p
    card.blank_times.restype = ctypes.c_long
    card.blank_bytes.restype = ctypes.c_longlong
    return card
