"""Edits of the model's shape that change several constants together, so that one thing is compared at a time.

They work on upstream's names and only where the recipe has them: depth against width at equal parameters,
the window pattern, the head size, the batch against the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.recipe import Choices, Constant, Range

_PATTERNS = ("L", "SL", "SSL", "SSSL", "SSSSL")
RATES = ("MATRIX_LR", "EMBEDDING_LR", "UNEMBEDDING_LR", "SCALAR_LR")


@dataclass(frozen=True)
class Edit:
    values: Mapping[str, Any]
    reason: str


def edits(found: Mapping[str, Constant], sequence_len: int) -> list[Edit]:
    """All edits of the present shape, the ones that usually matter most first. Values stay within their ranges."""
    made = [
        *_depth_against_width(found),
        *_batch_against_steps(found, sequence_len),
        *_windows(found),
        *_head_size(found),
    ]
    return [e for e in made if _allowed(found, e.values)]


def _allowed(found: Mapping[str, Constant], values: Mapping[str, Any]) -> bool:
    changed = False
    for name, value in values.items():
        search = found[name].search
        if search is not None and not search.contains(value):
            return False
        changed = changed or repr(value) != repr(found[name].value)
    return changed


def width(values: Mapping[str, Any]) -> int | None:
    """Width of upstream's model: DEPTH * ASPECT_RATIO, rounded up to whole heads. None where a recipe is built else."""
    depth, aspect, head = (values.get(name) for name in ("DEPTH", "ASPECT_RATIO", "HEAD_DIM"))
    if isinstance(depth, int) and isinstance(aspect, int) and isinstance(head, int) and min(depth, aspect, head) > 0:
        return math.ceil(depth * aspect / head) * head
    return None


def _number(found: Mapping[str, Constant], name: str) -> int | None:
    value = found[name].value if name in found else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _depth_against_width(found: Mapping[str, Constant]) -> Iterator[Edit]:
    """Matrices hold about 12 * depth * dim^2 parameters: with another depth, dim goes by the square root."""
    depth, aspect, head = (_number(found, n) for n in ("DEPTH", "ASPECT_RATIO", "HEAD_DIM"))
    if depth is None or aspect is None:
        return
    multiple = head or 1
    dim = math.ceil(depth * aspect / multiple) * multiple  # upstream rounds up to whole heads
    for new_depth in (depth - 1, depth + 1, depth - 2, depth + 2):
        if new_depth < 1:
            continue
        new_dim = max(multiple, round(dim * math.sqrt(depth / new_depth) / multiple) * multiple)
        new_aspect = math.floor(new_dim / new_depth)
        if new_aspect < 1 or math.ceil(new_depth * new_aspect / multiple) * multiple != new_dim:
            continue
        ratio = new_depth * new_dim**2 / (depth * dim**2)
        if not 0.7 <= ratio <= 1.4:
            continue  # whole heads are too coarse here: it would be another size, not another shape
        layers = f"{new_depth} layer{'s' if new_depth > 1 else ''}"
        reason = f"{layers} of {new_dim} in place of {depth} of {dim}, {ratio:.2f} of the matrix parameters"
        yield Edit({"DEPTH": new_depth, "ASPECT_RATIO": new_aspect}, reason)


def _batch_against_steps(found: Mapping[str, Constant], sequence_len: int) -> Iterator[Edit]:
    """Half the tokens a step gives about twice the steps; learning rates go with the square root of the batch."""
    total, device = _number(found, "TOTAL_BATCH_SIZE"), _number(found, "DEVICE_BATCH_SIZE")
    if total is None:
        return
    for factor, what in ((0.5, "half the tokens a step, about twice the steps"), (2, "twice the tokens a step")):
        new = int(total * factor)
        if new < sequence_len or new * 2 != total * int(factor * 2):
            continue
        values: dict[str, Any] = {"TOTAL_BATCH_SIZE": new}
        if device is not None and (new % (device * sequence_len) or device * sequence_len > new):
            values["DEVICE_BATCH_SIZE"] = max(1, new // sequence_len)
        for name in RATES:
            if name in found and isinstance(found[name].value, float):
                values[name] = _within(found[name], float(f"{found[name].value * math.sqrt(factor):.3g}"))
        yield Edit(values, f"{what}, rates by the square root")
        yield Edit({k: v for k, v in values.items() if k not in RATES}, f"{what}, rates as they are")


def _within(constant: Constant, value: float) -> float:
    return constant.search.clip(value) if isinstance(constant.search, Range) else value


def _windows(found: Mapping[str, Constant]) -> Iterator[Edit]:
    pattern = found.get("WINDOW_PATTERN")
    if pattern is None or not isinstance(pattern.value, str):
        return
    choices = pattern.search.values if isinstance(pattern.search, Choices) else _PATTERNS
    for other in choices:
        yield Edit({"WINDOW_PATTERN": other}, "another mix of short and long attention windows")


def _head_size(found: Mapping[str, Constant]) -> Iterator[Edit]:
    head, depth, aspect = (_number(found, n) for n in ("HEAD_DIM", "DEPTH", "ASPECT_RATIO"))
    if head is None:
        return
    for new in (head // 2, head * 2):
        if new < 8 or new % 2:
            continue
        whole = depth is None or aspect is None or math.ceil(depth * aspect / head) * head % new == 0
        if whole:
            yield Edit({"HEAD_DIM": new}, f"heads of {new} in place of {head}, the width stays")
