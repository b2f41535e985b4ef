"""How the attention kernels are cut on each card: tiles, warps and pipeline stages, in tables to be read and changed.

Compute capability -> padded head size -> Tile. A capability that is not listed takes the nearest lower one of its
table (8.7 runs as 8.6, 10.3 as 10.0, 12.1 as 12.0). What limits the tiles:

- shared memory per block: 163 KB on sm_80, 99 on sm_86, sm_89 and sm_120, 227 on sm_90 and sm_100;
- 255 registers per thread. Forward keeps `queries x head` and `queries x keys` in float32 over its warps; backward
  keeps `keys x head` twice, `queries x keys` twice and `queries x head` once, and is the one that spills;
- three stages, where they fit: with two Triton begins a load behind the products of the one before and waits for it at
  the loop's head, so that at most the last of these (Hopper's, which run on) runs meanwhile; and registers leave room
  for one block on a multiprocessor, so that no other does;
- 64 rows per group of four warps, below which Hopper's wgmma cannot be used.

sm_75 is not here: Triton (3.8) makes no tensor-core products for it, and without them the sums do not fit.

Every entry compiles without spills and to tensor-core products (tests/test_attention_compile.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    queries: int  # tokens whose queries are worked on together
    keys: int  # tokens whose keys and values are worked on together
    warps: int
    stages: int  # depth of the software pipeline over the inner loop's loads; with 2 next to nothing runs beside them
    lean: bool = False  # the masked loop computes what does not change anew in each step, which frees registers


Table = Mapping[int, Mapping[int, Tile]]

FORWARD: Table = {
    80: {32: Tile(128, 64, 4, 3), 64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3)},
    86: {32: Tile(128, 64, 4, 3), 64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3)},
    89: {32: Tile(128, 64, 4, 3), 64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3)},
    90: {32: Tile(128, 128, 8, 3), 64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 3, lean=True)},
    100: {32: Tile(128, 128, 8, 3), 64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 3)},
    120: {32: Tile(128, 64, 4, 3), 64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3)},
}

BACKWARD: Table = {
    80: {32: Tile(64, 128, 8, 3), 64: Tile(32, 64, 8, 3), 128: Tile(64, 64, 8, 3)},
    86: {32: Tile(64, 128, 8, 3), 64: Tile(32, 64, 8, 3), 128: Tile(64, 64, 8, 2)},
    89: {32: Tile(64, 128, 8, 3), 64: Tile(32, 64, 8, 3), 128: Tile(64, 64, 8, 2)},
    90: {32: Tile(64, 128, 8, 3), 64: Tile(64, 128, 8, 3), 128: Tile(64, 64, 8, 3)},
    100: {32: Tile(64, 128, 8, 3), 64: Tile(64, 128, 8, 3), 128: Tile(64, 64, 8, 3)},
    120: {32: Tile(64, 128, 8, 3), 64: Tile(32, 64, 8, 3), 128: Tile(64, 64, 8, 2)},
}

FLOAT32 = Tile(32, 32, 4, 1)  # for tests on a device: exact products, no tensor cores
INTERPRETED = Tile(32, 16, 1, 1)  # Triton's interpreter on a CPU: small, so that short sequences have all three ranges
ROWS = 16  # tokens per program of the passes over memory, 4 warps


def padded(head: int) -> int:
    """Both halves of a head's channels padded to a power of two, 16 each at least: 48 -> 64, 80 -> 128."""
    return 2 * max(16, 1 << (head // 2 - 1).bit_length())


def tile(table: Table, device: torch.device, dtype: torch.dtype, head: int) -> Tile:
    """The entry for this device; ValueError where there is none."""
    if device.type != "cuda":
        return INTERPRETED
    if dtype == torch.float32:
        return FLOAT32
    major, minor = torch.cuda.get_device_capability(device)
    return table[nearest(table, 10 * major + minor)][padded(head)]


def nearest(table: Table, capability: int) -> int:
    """The highest listed capability that is not above `capability`."""
    known = [cc for cc in table if cc <= capability]
    if not known:
        raise ValueError(f"no attention tiles for sm_{capability}; known: {', '.join(f'sm_{cc}' for cc in table)}")
    return max(known)
