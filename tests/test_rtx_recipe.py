"""The RTX recipe without Triton and without a card, for real on the CPU: parity, memory kept, float16, back-off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends import reference  # noqa: E402 - after the skip
from core import guard  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RECIPE = (ROOT / "backends" / "rtx" / "train.py").read_bytes()
BLOCKED = "import sys; sys.modules['triton'] = None"  # as where it is not installed


def in_process(code: str, **env: str) -> str:
    """Run Python in a process of its own; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_without_triton_it_computes_the_reference():
    code = """
from pathlib import Path
from backends import reference
from backends.cpu.device import open_device
from kernels import portable
import torch
assert portable.obstacle(torch.device("cpu")) == "triton is not installed"
for recompute in ("nothing", "hidden", "layer"):
    source = Path("backends/rtx/train.py").read_text()
    assert (found := source.replace('RECOMPUTE = "nothing"', f'RECOMPUTE = "{recompute}"'))
    checks = list(reference.compare(reference.computed(found.encode(), open_device()), reference.reference()))
    assert len(checks) > 60
    print(recompute, [c for c in checks if not c.passed])
"""
    found = in_process(BLOCKED + code)
    assert found.split("\n")[:3] == ["nothing []", "hidden []", "layer []"]


def test_the_recipe_passes_the_lint():
    assert not guard.check(RECIPE)
