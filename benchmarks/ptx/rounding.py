"""Sums and products rounded once, as the PTX ISA asks: bfloat16, fused, subnormal numbers, integers, zeros and NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SMALLEST = {"f32": 2.0**-126, "bf16": 2.0**-126, "f16": 2.0**-14}  # normal numbers


def to_odd(x: Array) -> NDArray[np.float32]:
    """float64 as float32 that can be rounded again: what is not exact becomes the neighbour with an odd last bit."""
    near: NDArray[np.float32] = np.asarray(x).astype(np.float32)
    if x.dtype == np.float32:
        return near
    back = near.astype(np.float64)
    inexact = (back != x) & np.isfinite(x)
    even = (near.view(np.uint32) & 1) == 0
    other = np.nextafter(near, np.where(x > back, np.inf, -np.inf).astype(np.float32))
    return np.where(inexact & even, other, near)


def to_bf16(x: Array) -> NDArray[np.uint16]:
    """float32 or float64, to nearest even; NaN is 0x7FFF."""
    bits = np.ascontiguousarray(to_odd(np.asarray(x))).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a b + c of numbers of float32, as float64 that can be rounded again (`to_odd`)."""
    product = a.astype(np.float64) * b  # exact
    total = np.asarray(product + c)
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    other = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & np.isfinite(total) & even, other, total)


def flushed(x: Array, kind: str) -> Array:
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST[kind.removesuffix("x2")], np.copysign(0.0, x).astype(x.dtype), x)


def divided_roughly(a: Array, b: Array) -> Array:
    """div.approx: above 2**126 the divisor's reciprocal is lost."""
    lost = (np.abs(b) > 2.0**126) & np.isfinite(b)
    return np.where(lost, np.where(np.isfinite(a), np.copysign(0.0, a) * np.sign(b), np.nan), a / b)


def lesser(a: Array, b: Array) -> Array:
    """min: of a number and NaN the number, -0 below +0."""
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def greater(a: Array, b: Array) -> Array:
    """max: of a number and NaN the number, +0 above -0."""
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


def lesser_or_nan(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), np.nan, lesser(a, b))


def greater_or_nan(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), np.nan, greater(a, b))


def to_integers(x: Array, dtype: Any, given: str) -> Array:
    """Whole float64 as integers, cut to their range. NaN is 0; of f64 or to 64 bits the highest bit alone."""
    limits = np.iinfo(dtype)
    below, above = x <= float(limits.min), x >= float(limits.max)
    found = np.where(below | above | np.isnan(x), 0.0, x).astype(dtype)
    found = np.where(below, limits.min, np.where(above, np.array(limits.max, dtype), found)).astype(dtype)
    bits = np.dtype(dtype).itemsize * 8
    nothing = 1 << (bits - 1) if given == "f64" or bits == 64 else 0
    unsigned = np.array(nothing, f"u{bits // 8}")
    return np.where(np.isnan(x), unsigned.view(dtype), found)
