"""What is measured once on a card, and kept for every process that has the same to do.

A recipe asks before its clock starts. What the first process finds lies among the compile caches, from which trainer,
scorer and auditor of one experiment read it, and the next experiment too: two processes that measured for themselves
could settle on two kernels, whose roundings differ.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

REPEATS = 10  # timed runs after WARMUP; their median decides
WARMUP = 3
HEAD_START = 100_000_000  # cycles of the card (about 50 ms) in which Python launches all that is timed

Found = tuple[str, dict[str, float], str]  # the name that was chosen, milliseconds of all that were timed, the reason


def median(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call, by the card's own clock."""
    marks = []
    for i in range(WARMUP + REPEATS):
        if i == WARMUP:  # the host gets ahead, as in a training: the card is timed, not Python
            torch.cuda.synchronize(device)
            torch.cuda._sleep(HEAD_START)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in marks[WARMUP:])


def caches() -> Path | None:
    """XDG_CACHE_HOME, which is private to each child; None where it is not set."""
    place = os.environ.get("XDG_CACHE_HOME")
    return Path(place) if place else None


def triton_version() -> str:
    """Empty where Triton is not installed."""
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return ""


def installed(packages: Sequence[str]) -> list[str]:
    """ "flash_attn_3-3.0.0+20260217.cu130.x86.dist-info" of each of these that is there, sorted: one of another version
    may be faster or slower. By the names of what installers leave beside a package, which a recipe's sandbox shows of
    every package, and not what is in it, which it shows of few."""
    wanted, kept = tuple(f"{package.replace('-', '_')}-" for package in packages), (".dist-info", ".egg-info")
    found: set[str] = set()
    for folder in {place for place in sys.path if place.endswith("-packages")}:
        try:
            names = [path.name for path in Path(folder).iterdir()]
        except OSError:  # it is not there, or may not be looked into: then nothing of it can be imported either
            continue
        found |= {name for name in names if name.lower().startswith(wanted) and name.endswith(kept)}
    return sorted(found)


def digest(*parts: object) -> str:
    """16 hex digits that stand for these, in a file's name."""
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:16]


def leave(file: Path, name: str, milliseconds: dict[str, float], reason: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {"name": name, "milliseconds": milliseconds, "reason": reason}
    file.write_text(json.dumps(found), encoding="utf-8")


def read(file: Path) -> Found | None:
    """What `leave` left there; None where nothing is, or something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        name, times = str(found["name"]), {str(n): float(ms) for n, ms in found["milliseconds"].items()}
        reason = str(found["reason"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return (name, times, reason) if name in times else None


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]
