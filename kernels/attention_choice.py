"""The choice of what computes attention: by capability, numbers and time on the device, kept with its reason.

    choice = choose(Case(rows, length, heads, key_heads, head, window, dtype, device))
    y = choice.run(q, k, v, cos, sin, window, scale)      # shapes as in kernels/attention.py
    choice.name, choice.reason, choice.milliseconds       # kept for the record

Without a forced name all that can do the case are timed, norm and RoPE included, forward and backward; what cannot
says why, and so does what was timed and gives other numbers (kernels/attention_agreement.py). A forced name is taken or
refused, never replaced, and neither timed nor compared.

`settled` is the same for a recipe: the first process that asks measures, and leaves what it found among the compile
caches, from which trainer, scorer and auditor of one experiment read it, and the next experiment too. Two processes
that measured for themselves could settle on two kernels, whose roundings differ. For that reason what was left out is
not timed later either. A warm-up has an end: once those that compile have taken `PATIENCE` together, Triton not
counted, the next one is left out, and the reason names it, now and whenever it is read again. FlexAttention alone is
never left out.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kernels.attention_agreement import inputs, why_apart
from kernels.attention_cores import CORES
from kernels.attention_peers import PEERS, Attention, Case, block_mask
from kernels.errors import out_of_memory
from kernels.measured import caches as _caches
from kernels.measured import digest, installed, leave, median, read
from kernels.measured import first_line as _first_line
from kernels.measured import triton_version as _triton
from kernels.tolerance import TOLERANCE

__all__ = ["Attention", "Case", "Choice", "available", "block_mask", "choose", "inputs", "milliseconds", "settled"]

TIMED_ROWS = 16  # at most, when a recipe asks: times grow with the rows, their order does not change
LIBRARIES = ("flash-attn-3", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # of another version it is measured anew
PATIENCE = 15.0  # seconds of a recipe's warm-up for those that compile; Triton, the recipe's own compiler, is extra
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    name: str
    run: Attention
    reason: str
    milliseconds: dict[str, float] = field(default_factory=dict)  # forward and backward, of all that were timed
    refused: dict[str, str] = field(
        default_factory=dict
    )  # name -> why it cannot do the case, is wrong, or was not timed

    @property
    def beside(self) -> str | Attention | None:
        """What `lean.attend` takes for attention: None for Triton's kernels, the name of what it has within, too."""
        if self.name == "triton":
            return None
        return self.name if self.name in CORES else self.run

    @property
    def whole(self) -> bool:
        """Whether torch.compile takes it into one graph with what stands around it."""
        return PEERS[self.name].whole


def available(case: Case) -> dict[str, str]:
    """Name -> "" where it can do the case, else why not."""
    return {name: peer.why_not(case) for name, peer in PEERS.items()}


def choose(case: Case, forced: str | None = None, patience: float = float("inf")) -> Choice:
    """The fastest that can do the case, or the forced one. ValueError where a forced one is unknown or cannot.

    patience: seconds of compiling after which no further one is compiled. The first that can, and what comes compiled,
    is always timed, and their seconds do not count: Triton's first compilation is the recipe's too, and one slow
    compiler must not keep out what needs none.
    """
    if forced is not None and forced not in PEERS:
        raise ValueError(f"no attention called {forced!r}; known: {', '.join(PEERS)}")
    found = available(case)
    refused = {name: why for name, why in found.items() if why}
    if forced is not None:
        if refused.get(forced):
            raise ValueError(f"attention {forced!r} cannot do this: {refused[forced]}")
        try:
            return _made(case, forced, "forced", {}, refused)
        except (ImportError, OSError) as error:  # a package whose libraries do not fit this torch, or are not opened
            raise ValueError(f"attention {forced!r} cannot be loaded: {_first_line(error)}") from error
    if case.device.type != "cuda":
        if not found["triton"] and case.device.type == "cpu":
            return _made(case, "triton", "its kernels are interpreted, as TRITON_INTERPRET says", {}, refused)
        return _made(case, "reference", f"no device to time the others on ({case.device.type})", {}, refused)
    able = [n for n, why in found.items() if not why and n != "reference"]
    times, passed_by = _timed(case, able, patience)
    refused |= passed_by
    if not times:
        return _made(case, "reference", f"nothing else can do this: {_reasons(refused)}", {}, refused)
    # What splits the graph leaves much of what stands around it uncompiled, which its own time does not show.
    best = min(times, key=lambda name: (not PEERS[name].whole, times[name]))
    others = [
        f"{name} {ms:.3f}" + ("" if PEERS[name].whole else ", not taken as it would split the graph")
        for name, ms in sorted(times.items(), key=lambda x: x[1])
        if name != best
    ]
    others += [f"{name} {why}" for name, why in passed_by.items()]
    reason = "; ".join([f"{times[best]:.3f} ms forward and backward", *(others or ["nothing else can do this"])])
    return _made(case, best, reason, times, refused)


def _timed(case: Case, names: list[str], patience: float) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of each that runs and is right; and why the others, which could do the case, have none."""
    times: dict[str, float] = {}
    passed_by: dict[str, str] = {}
    used = 0.0  # seconds of those that compile, beyond the first
    for name in sorted(names, key=lambda name: name != names[0] and PEERS[name].compiles):
        counts = name != names[0] and PEERS[name].compiles
        if times and counts and used > patience:
            passed_by[name] = f"not timed: {used:.0f} s were used up, {patience:g} s are given to it"
            continue
        began = time.monotonic()
        try:
            run = PEERS[name].make(case)
            took, why = milliseconds(run, case), why_apart(run, case)
            if why:
                passed_by[name] = f"refused: {why}"
            else:
                times[name] = took
        except Exception as error:  # Triton's, CUTLASS's and the packages' own share no base but this
            if out_of_memory(error):
                raise  # of the recipe's whole step, which is made smaller then; it says nothing about a peer
            passed_by[name] = f"failed when timed: {type(error).__name__}: {_first_line(error)}"
        used += time.monotonic() - began if counts else 0.0
    return times, passed_by


def _made(case: Case, name: str, reason: str, times: dict[str, float], refused: dict[str, str]) -> Choice:
    level = logging.WARNING if name == "reference" and case.device.type == "cuda" else logging.INFO
    _log.log(level, "attention over %d of %d tokens: %s (%s)", case.window, case.length, name, reason)
    return Choice(name, PEERS[name].make(case), reason, times, refused)


def _reasons(refused: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in refused.items())


# --- one choice for all processes of an experiment ----------------------------------------------


def settled(case: Case, forced: str | None = None, folder: Path | None = None) -> Choice:
    """As `choose`, but measured once: by the first process that asks, kept among the compile caches.

    folder: where; by default XDG_CACHE_HOME, which is private to each child, and nowhere if that is not set. Rows do
    not count: the scorer's differ.
    """
    if forced is not None or case.device.type != "cuda":
        return choose(case, forced)
    folder = folder or _caches()
    found = _read(folder / _file(case), available(case)) if folder else None
    if found is not None:
        name, times, reason = found
        return _made(case, name, f"{reason} (as measured before)", times, {})
    few = Case(**{**vars(case), "rows": min(case.rows, TIMED_ROWS)})
    choice = choose(few, patience=PATIENCE)
    keep(case, choice, folder)
    return choice


def keep(case: Case, choice: Choice, folder: Path | None = None) -> None:
    """Leave what was measured where `settled` looks for it."""
    folder = folder or _caches()
    if folder and choice.milliseconds:
        leave(folder / _file(case), choice.name, choice.milliseconds, choice.reason)


def _file(case: Case) -> str:
    return f"attention-{key(case)}.json"


def key(case: Case) -> str:
    """Names the case without its rows, the card, what can do it, the versions of what computes, and how right it has to
    be: where something is installed that was not there, or one of these is another, it is measured anew. What splits a
    graph is never taken, and children do not see it: it does not count."""
    card = torch.cuda.get_device_name(case.device) if case.device.type == "cuda" else case.device.type
    able = sorted(name for name, why in available(case).items() if not why and PEERS[name].whole)
    ours = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")  # children have it: of these kernels' code
    versions = [torch.__version__, _triton(), installed(LIBRARIES), ours, sorted(TOLERANCE.items())]
    parts = [case.length, case.heads, case.key_heads, case.head, case.window, case.dtype, card, able, versions]
    return digest(*parts)


def _read(file: Path, why_not: dict[str, str]) -> tuple[str, dict[str, float], str] | None:
    """What was measured before; None where nothing is there, or nothing that still holds."""
    found = read(file)
    return found if found is not None and why_not.get(found[0]) == "" else None


# --- measuring --------------------------------------------------------------------------------


def milliseconds(run: Attention, case: Case) -> float:
    """Median time of a forward and backward on the device, norm and RoPE included."""
    q, k, v, cos, sin = inputs(case)
    dy = torch.randn_like(q)

    def both() -> None:
        y = run(q, k, v, cos, sin, case.window)
        torch.autograd.grad(y, (q, k, v), dy)

    return median(both, case.device)
