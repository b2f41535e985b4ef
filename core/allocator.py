"""How PyTorch's allocator is set for a card: for children, their devices and the benchmarks alike. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from core.windows import under_wsl

DESKTOP = 3 * 2**28  # bytes that are left to Windows' desktop: beyond the card's end its driver swaps
LEFT = 2**28  # elsewhere
TOLD_FREE = "AUTORESEARCH_CARD_FREE"  # bytes of the card that NVML says are free before a child starts
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name


def settings(environ: Mapping[str, str], platform: str | None = None, release: str | None = None) -> dict[str, str]:
    """What to add to the environment before torch is loaded: segments that grow, so that changing shapes do not strew
    the memory.

    Nothing where the user has set the allocator; on Windows, for which such segments are not built; under WSL2, whose
    driver may refuse the first of them (pytorch/pytorch#192330). Without CUDA it means nothing."""
    if any(environ.get(name) for name in NAMES) or (platform or sys.platform) == "win32" or under_wsl(release):
        return {}
    return {NAMES[0]: "expandable_segments:True"}


def shared_with_windows(platform: str = sys.platform, wsl: bool | None = None) -> bool:
    """Whether Windows gives out the card's memory. CUDA then tells what this process could have, as if others would
    give theirs back (they are swapped out instead, and everything becomes slow); NVML tells what is really free."""
    return platform == "win32" or (under_wsl() if wsl is None else wsl)


def really_free(free: int, environ: Mapping[str, str]) -> int:
    """Bytes of the card that are free: what CUDA says, or less, where the referee has told it (`TOLD_FREE`)."""
    return min(free, int(environ.get(TOLD_FREE) or free))


def margin(platform: str = sys.platform, wsl: bool | None = None) -> int:
    """Bytes that are left to others. Windows' desktop draws on the same card under WSL2 too."""
    return DESKTOP if shared_with_windows(platform, wsl) else LEFT


def cap(free: int, total: int, left: int) -> int:
    """Bytes that the allocator may take: less than what is free, so that it fails rather than spills."""
    return max(0, min(free, total) - left)
