"""Same work, proven: the arrays of one checkpoint against the shipped reference, and of backends against each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from backends import reference
from benchmarks import faults
from benchmarks.results import Parity
from core.errors import UserError

# Shares of an array's size by which a backend may differ that computes in a narrower dtype than the reference's
# float32: two to fifteen times what bfloat16 was measured to differ by on a CPU with AVX512-BF16 (0.015, 0.0001, 0.15,
# 0.30; the largest gradient is that of four scalars, the largest step one of signs). The model itself is proven in
# float32; this shows that the path that is timed is not another one.
NARROW = {"logits": 0.05, "loss": 0.002, "gradient": 0.3, "step": 0.6}
KINDS = ("logits", "loss", "gradient", "step")


def tolerance(kind: str, dtype: str) -> float:
    return reference.TOLERANCE[kind] if dtype == "float32" else NARROW[kind]


def load(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}


def against_reference(found: Mapping[str, np.ndarray], dtype: str) -> list[Parity]:
    return _by_kind(reference.compare(found, reference.reference()), dtype, "reference")


def against(found: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], dtype: str, name: str) -> list[Parity]:
    """Against another backend's arrays, by the same numbers."""
    wanted = {array: reference.numbers(values) for array, values in other.items()}
    return _by_kind(reference.compare(found, wanted), dtype, name)


def _by_kind(checks: Iterable[reference.Check], dtype: str, name: str) -> list[Parity]:
    """The worst array of each kind."""
    listed, rows = list(checks), []
    for kind in KINDS:
        of_kind = [c for c in listed if c.name.split()[0] == kind]
        allowed = tolerance(kind, dtype)
        worst = max(of_kind, key=lambda c: c.difference if np.isfinite(c.difference) else np.inf)
        finite = bool(np.isfinite(worst.difference))
        rows.append(
            Parity(
                kind=kind,  # type: ignore[arg-type]  # one of KINDS
                dtype=dtype,
                against=name,
                arrays=len(of_kind),
                worst=worst.name,
                difference=worst.difference if finite else None,
                tolerance=allowed,
                passed=finite and worst.difference <= allowed,
            )
        )
    return rows


def verdict(arrays: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[list[Parity], list[str]]:
    """(checks, where it departs) of one backend. `arrays`: dtype -> what it computed, float32 among them."""
    rows: list[Parity] = []
    departs: list[str] = []
    for dtype, found in sorted(arrays.items(), key=lambda item: item[0] != "float32"):
        try:
            made = against_reference(found, dtype)
        except UserError as error:  # other weights than the reference's
            return rows, [error.fact]
        rows += made
        if departs or all(row.passed for row in made):
            continue
        if dtype == "float32":
            departs = faults.name(found)
        else:
            worst = next(row for row in made if not row.passed)
            departs = [f"in {dtype} only: {worst.worst} departs by {_share(worst)}; in float32 it agrees"]
    return rows, departs


def _share(row: Parity) -> str:
    return "more than can be counted (not finite)" if row.difference is None else f"{row.difference:.1%} of its size"
