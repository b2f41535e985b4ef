"""The Triton kernels without a GPU: Triton's interpreter runs them on the CPU, each in a process of its own.

TRITON_INTERPRET changes what `@triton.jit` makes of a function, for as long as the process lives: the cases in
tests/interpreted/ must not share one with tests that compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
CASES = (
    "attention",
    "linear_relu2",
    "softcapped_loss",
    "residual_norm",
    "muon",
    "recomputed",
    "whole_graph",
    "cuda_recipe",
    "rtx_recipe",
    "sound",
    "far",
)


def interpreted(case: str, folder: Path) -> subprocess.CompletedProcess[str]:
    settings = {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "1000000000",  # the interpreter's many small arrays: half of its time went to mmap
        "MALLOC_TRIM_THRESHOLD_": "4000000000",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder),
    }
    plugins = ["-p", "no:cacheprovider", "-p", "interpreted.quick"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", *plugins, f"tests/interpreted/{case}.py"],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, tmp_path: Path) -> None:
    done = interpreted(case, tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
