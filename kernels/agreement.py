"""How numbers of a kernel are held against exact ones: what attention and the MLP are asked before they are chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.tolerance import TOLERANCE


def not_finite(parts: Sequence[str], found: Sequence[Tensor]) -> str:
    """ "its output is not finite everywhere", of the first part with something in it that is no number; else "".

    parts: what each of `found` is called; these may have any shape.
    """
    for part, x in zip(parts, found, strict=True):
        if not all(math.isfinite(float(end)) for end in (x.amin(), x.amax())):  # which are NaN where one is
            return f"its {part} is not finite everywhere"
    return ""


def off(parts: Sequence[str], found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> str:
    """ "its output is 4 % off, 3 % is allowed", of the first part that is further from what is wanted than the compute
    dtype allows (kernels/tolerance.py); "" where none is. `found` and `wanted` have equal shapes, part by part."""
    allowed = TOLERANCE[str(dtype).removeprefix("torch.")]
    for part, f, w in zip(parts, found, wanted, strict=True):
        if (share := apart(f, w)) > allowed:
            return f"its {part} is {100 * share:.3g} % off, {100 * allowed:g} % is allowed"
    return ""


def apart(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, as a share of that of what is wanted; infinite where something is no number.
    Where all that is wanted is zeros, as on a card that computes nothing, 0 for zeros."""
    difference, size = (float(x.double().norm()) for x in (found.double() - wanted.double(), wanted))
    share = difference / size if size else (0.0 if difference == 0.0 else math.inf)
    return share if math.isfinite(share) else math.inf
