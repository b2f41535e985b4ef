"""What reads a card's binaries, which Triton's wheel for Windows does not bring along."""

from __future__ import annotations

import sys

import pytest

from benchmarks.compiled import cuobjdump


def require_cuobjdump() -> None:
    """Skip the module on a Windows machine without the CUDA toolkit; elsewhere a want of it fails."""
    try:
        cuobjdump()
    except FileNotFoundError as lacks:
        if sys.platform == "win32":
            pytest.skip(str(lacks), allow_module_level=True)
