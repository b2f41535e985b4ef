"""The Triton kernels without a GPU: Triton's interpreter runs them on the CPU, each in a process of its own.

TRITON_INTERPRET changes what `@triton.jit` makes of a function, for as long as the process lives: the cases in
tests/interpreted/ must not share one with tests that compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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


Started = Mapping[str, "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """The wanted cases, two at a time: each is one thread's work, and takes minutes."""
    wanted = {str(item.callspec.params["case"]) for item in request.session.items if item.path == Path(__file__)}
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(interpreted, case, tmp_path_factory.mktemp(case)) for case in CASES if case in wanted}


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
def test_interpreted(case: str, started: Started) -> None:
    done = started[case].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
