"""`benchmarks.gpu_rtx` on a CPU at small shapes: both sides train the same model, and what is told is whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from core.paths import project_root

pytest.importorskip("torch")

COMMAND = [sys.executable, "-m", "benchmarks.gpu_rtx"]


def test_both_sides_start_from_one_loss():
    done = subprocess.run([*COMMAND, "--smoke"], cwd=project_root(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ours, peer, ratio = (json.loads(line) for line in done.stdout.splitlines())
    assert (ours["side"], peer["side"]) == ("ours", "peer") and ours["rows_at_once"] == 2
    assert ratio["passed"] and ratio["losses_apart"] < 1e-5 and ratio["speed"] > 0


@pytest.mark.skipif(__import__("torch").cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so():
    done = subprocess.run(COMMAND, cwd=project_root(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr
