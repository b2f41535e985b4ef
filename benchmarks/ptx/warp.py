"""What threads of a warp do together: mma, ldmatrix, stmatrix, shuffles' lanes, wgmma. Index tables and products.

Fragments as in "Warp-level matrix instructions" of NVIDIA's PTX ISA. Products are exact, sums of float64, rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LANE = np.arange(32)
GROUP, IN_GROUP = LANE // 4, LANE % 4


def from_bits(x: Array, kind: str) -> NDArray[np.float64]:
    """16-bit patterns as numbers: bf16 or f16."""
    if kind == "bf16":
        with np.errstate(invalid="ignore"):  # signalling NaN
            return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.view(np.float16).astype(np.float64)


def halves(registers: Array) -> Array:
    """(..., n) 32-bit registers -> (..., n, 2) 16-bit patterns."""
    return np.ascontiguousarray(registers, np.uint32).view(np.uint16).reshape(*registers.shape, 2)


@functools.cache
def places_a(k: int) -> tuple[Array, Array]:
    """Row and column of A (16, k): (32 lanes, registers, 2)."""
    register = np.arange(k // 4)[None, :, None]
    row = GROUP[:, None, None] + 8 * (register % 2)
    column = 2 * IN_GROUP[:, None, None] + 8 * (register // 2) + np.arange(2)
    return np.broadcast_arrays(row, column)[0], np.broadcast_arrays(row, column)[1]


@functools.cache
def places_b(k: int) -> tuple[Array, Array]:
    """Row (of k) and column of B (k, 8)."""
    register = np.arange(k // 8)[None, :, None]
    row = 2 * IN_GROUP[:, None, None] + 8 * register + np.arange(2)
    column = GROUP[:, None, None]
    return np.broadcast_arrays(row, column)[0], np.broadcast_arrays(row, column)[1]


@functools.cache
def places_c(n: int) -> tuple[Array, Array]:
    """Row and column of a warp's 16 rows of C (16, n): (32 lanes, registers)."""
    register = np.arange(n // 2)[None, :]
    row = GROUP[:, None] + 8 * (register // 2 % 2)
    column = 8 * (register // 4) + 2 * IN_GROUP[:, None] + register % 2
    return np.broadcast_arrays(row, column)[0], np.broadcast_arrays(row, column)[1]


def fragment_a(registers: Array, k: int, kind: str) -> NDArray[np.float64]:
    """(W, 32, registers) -> (W, 16, k)."""
    a = np.empty((registers.shape[0], 16, k))
    a[:, places_a(k)[0], places_a(k)[1]] = from_bits(halves(registers), kind)
    return a


def mma(a: Array, b: Array, c: Array, k: int, kind: str) -> NDArray[np.float32]:
    """m16n8: registers (W, 32, ...) of A, B (32-bit) and C (float32) -> those of A B + C."""
    left = fragment_a(a, k, kind)
    right = np.empty((b.shape[0], k, 8))
    right[:, places_b(k)[0], places_b(k)[1]] = from_bits(halves(b), kind)
    rows, columns = places_c(8)
    with np.errstate(over="ignore", invalid="ignore"):
        product: NDArray[np.float32] = ((left @ right)[:, rows, columns] + c).astype(np.float32)
    return product


def swizzled(addresses: Array, bytes_: int) -> Array:
    """Of 128, 64 or 32 bytes: 16-byte columns, by bits 7 to 9 of the address."""
    mask = {128: 7, 64: 3, 32: 1, 0: 0}[bytes_]
    return addresses ^ (((addresses >> 7) & mask) << 4)


@functools.lru_cache(4096)
def operand(descriptor: int, rows: int, k: int, across: bool) -> NDArray[np.int64]:
    """Shared-memory addresses of a wgmma operand (rows, k) of 16-bit elements.

    across: MN-major, elements of one column of k beside each other; else K-major.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    width = {1: 128, 2: 64, 3: 32}.get(int(descriptor >> 62))
    if width is None or descriptor >> 49 & 7:
        raise NotImplementedError("wgmma operands without a swizzle, or with an offset of its pattern")
    return tiled(start, leading, stride, width, rows, k, across)


def tiled(start: int, leading: int, stride: int, width: int, rows: int, k: int, across: bool) -> NDArray[np.int64]:
    """Addresses of an operand (rows, k) that lies in swizzled tiles of eight lines of `width` bytes ("Canonical
    Layouts"): lines are rows, or, across, columns of k. All in bytes."""
    row, column = np.arange(rows)[:, None], np.arange(k)[None, :]
    if across:
        chunk = width // 2
        linear = (row // chunk) * leading + (column // 8) * stride + (column % 8) * width + (row % chunk) * 2
    else:
        linear = (row // 8) * stride + (row % 8) * width + column * 2
    return swizzled(start + linear, width).astype(np.int64)
