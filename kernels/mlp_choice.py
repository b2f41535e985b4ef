"""What makes the MLP's two products that have the squared ReLU beside them: the faster here, with its reason.

    choice = settled(Case(tokens, dim, hidden, dtype, device))
    choice.name, choice.reason, choice.milliseconds       # the name is what `mlp`, `feed` and `relu2` take as `by`

    triton   fused: the product's own epilogue squares, or multiplies by the root (kernels/linear_relu2.py)
    torch    cuBLAS, and one pass over its result, in place; where Triton's kernels do not run, plain torch

Both keep the squared ReLU alone for the backward: memory does not depend on the choice. What cuBLAS gains in its
products on some cards it pays with hidden numbers that are read or written five times more, which weighs the more the
narrower the model is: a product has 2 C operations for each of them. So both are timed in the warm-up, and the choice
is kept for all processes (kernels/measured.py). The other four products are torch's in either case, and not timed.

What gives other numbers than exact arithmetic does (kernels/mlp_agreement.py) is not taken, however fast; nor is what
fails. Where neither is left, which no card should show, it is `plain`: cuBLAS, and PyTorch's own operations behind it
(kernels/plain.py), slower and of as little memory. A forced name is neither timed nor compared.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kernels import portable
from kernels.errors import out_of_memory
from kernels.measured import caches, digest, first_line, installed, leave, median, read, triton_version
from kernels.mlp_agreement import Case, inputs, why_apart
from kernels.tolerance import TOLERANCE

__all__ = ["Case", "Choice", "choose", "inputs", "keep", "milliseconds", "obstacle", "settled"]

NAMES = ("triton", "torch", "plain")
TIMED = ("torch", "triton")
LIBRARIES = ("nvidia-cublas", "nvidia-cublas-cu12")  # which multiply; another version may be another choice
TIE = 0.02  # share of the time within which neither is faster, and the fused one is taken
TIMED_TOKENS = 2**16  # at most: the hidden units of more lie in no card's cache either, and their order is the same
HALF = (torch.float16, torch.bfloat16)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    name: str  # one of NAMES
    reason: str
    milliseconds: dict[str, float] = field(default_factory=dict)  # forward and backward, of what was timed and is right
    refused: dict[str, str] = field(default_factory=dict)  # name -> why it was not taken: it is wrong, or failed

    @property
    def told(self) -> str:
        return f"{self.name}: {self.reason}"


def obstacle(case: Case) -> str:
    """Why the fused kernels cannot do this, or ""."""
    if why := portable.obstacle(case.device):
        return why
    if not portable.products(case.device):
        return portable.told(case.device)
    if case.device.type == "cuda" and case.dtype not in HALF:
        return f"the fused kernels take bf16 and fp16, not {case.dtype}"
    return ""


def choose(case: Case, forced: str | None = None) -> Choice:
    """The faster one, or the forced one. ValueError where a forced one is unknown or cannot."""
    if forced is not None and forced not in NAMES:
        raise ValueError(f"no MLP called {forced!r}; known: {', '.join(NAMES)}")
    why = obstacle(case)
    if forced == "triton" and why:
        raise ValueError(f"MLP 'triton' cannot do this: {why}")
    if forced is not None:
        return _made(case, Choice(forced, "forced"))
    if why:
        return _made(case, Choice("torch", why))
    if case.device.type != "cuda":
        return _made(case, Choice("triton", "its kernels are interpreted, as TRITON_INTERPRET says"))
    times, refused = _timed(case)
    return _made(case, _faster(times, refused))


def _faster(times: dict[str, float], refused: dict[str, str]) -> Choice:
    """Of those that are left; the fused one where neither is faster."""
    passed_by = "; ".join(f"{name} {why}" for name, why in refused.items())
    if not times:
        return Choice("plain", passed_by, times, refused)
    if refused:
        return Choice(next(iter(times)), passed_by, times, refused)
    ours, theirs = times["triton"], times["torch"]
    if theirs < ours * (1 - TIE):
        return Choice("torch", f"{theirs:.3f} ms forward and backward; triton {ours:.3f}", times)
    near = f", not faster by {TIE:.0%}" if theirs < ours else ""
    return Choice("triton", f"{ours:.3f} ms forward and backward; torch {theirs:.3f}{near}", times)


def _timed(case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of each that runs and is right, and why the others have none; of fewer tokens where memory is out,
    as steps will be too."""
    tokens = min(case.tokens, TIMED_TOKENS)
    while True:
        try:
            return _all(replace(case, tokens=tokens))
        except RuntimeError as error:
            if tokens == 1 or not out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        tokens //= 2


def _all(case: Case) -> tuple[dict[str, float], dict[str, str]]:
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name in TIMED:
        try:
            took, why = milliseconds(name, case), why_apart(name, case)
        except Exception as error:  # Triton's own share no base but this
            if out_of_memory(error):
                raise
            refused[name] = f"failed when timed: {type(error).__name__}: {first_line(error)}"
        else:
            if why:
                refused[name] = f"refused: {why}"
            else:
                times[name] = took
    return times, refused


def _made(case: Case, choice: Choice) -> Choice:
    level = logging.WARNING if choice.refused else logging.INFO
    _log.log(level, "MLP of %d by %d: %s (%s)", case.dim, case.hidden, choice.name, choice.reason)
    return choice


# --- one choice for all processes of an experiment ----------------------------------------------


def settled(case: Case, forced: str | None = None, folder: Path | None = None) -> Choice:
    """As `choose`, but measured once: by the first process that asks, kept among the compile caches.

    folder: where; by default XDG_CACHE_HOME, which is private to each child, and nowhere if that is not set. Tokens do
    not count.
    """
    if forced is not None or case.device.type != "cuda" or obstacle(case):
        return choose(case, forced)
    folder = folder or caches()
    found = read(folder / _file(case)) if folder else None
    if found is not None and found[0] in NAMES:
        name, times, reason = found
        return _made(case, Choice(name, f"{reason} (as measured before)", times))
    choice = choose(case)
    torch.cuda.empty_cache()  # what is timed here does not count against the recipe's memory
    keep(case, choice, folder)
    return choice


def keep(case: Case, choice: Choice, folder: Path | None = None) -> None:
    """Leave what was measured where `settled` looks for it."""
    folder = folder or caches()
    if folder and choice.milliseconds:
        leave(folder / _file(case), choice.name, choice.milliseconds, choice.reason)


def _file(case: Case) -> str:
    """Names the case without its tokens, the card, the versions of what computes, and how right it has to be."""
    ours = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")  # children have it: of these kernels' code
    card = torch.cuda.get_device_name(case.device)
    versions = [torch.__version__, triton_version(), installed(LIBRARIES), ours, sorted(TOLERANCE.items())]
    return f"mlp-{digest(case.dim, case.hidden, case.dtype, card, versions)}.json"


# --- measuring ----------------------------------------------------------------------------------


def milliseconds(name: str, case: Case) -> float:
    """Median time of the two products with the squared ReLU, forward and backward, on the device."""
    x, w1, w2, dout = inputs(case)
    scale = torch.ones(case.tokens, device=case.device)  # of the norm before, as within a layer

    def both() -> None:
        portable.relu2_backward(dout, w2, portable.relu2(x, w1, scale, name), scale, name)

    return median(both, case.device)
