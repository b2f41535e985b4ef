"""What Triton compiles for each card, run on a CPU (benchmarks/ptx): kernels against float64, whole recipes against the
reference numbers, with its watch over memory and barriers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from ptx_by_hand import fences

from backends import reference
from backends.cpu.device import open_device
from benchmarks.ptx import emulated
from benchmarks.ptx.__main__ import KNOWN, ORDER, rows
from core.paths import project_root

TARGETS = tuple(map(int, KNOWN))
# 200 tokens and 100 rows are no multiples of a tile; 256 are, and go through the copy engine (TMA) of sm_90.
ODD = replace(ORDER, rows=4, context=200, heads=2, head_dim=64, vocab=301)
EVEN = replace(ODD, rows=8, context=256)
CHECKS = (
    (ODD, ["attention, heads of 64, window 37 of 200", "mlp", "project, value embeddings", "softcapped_loss"]),
    (EVEN, ["feed, hidden made again", "muon, X X^T", "muon, 2 of 512 x 128"]),
)
# Of the reference numbers, which are of float32: as a share of each array's size. A step moves weights by signs of
# numbers that may be nearly zero.
BOUNDS = {
    "float32": reference.TOLERANCE,
    "float16": {"logits": 0.01, "loss": 1e-3, "gradient": 0.03, "step": 0.5},
    "bfloat16": {"logits": 0.04, "loss": 1e-3, "gradient": 0.2, "step": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_as_compiled_agree_with_float64(target):
    halves = "bfloat16" if target >= 80 else "float16"
    found = {}
    for order, names in CHECKS:
        wanted = {(name, halves) for name in names}
        found |= {
            r["kernel"]: r for r in rows(target, order, lambda *check, _all=wanted: check in _all, fences(target))
        }
    assert found.keys() == {name for _, names in CHECKS for name in names}
    if target < 80:  # Triton has no product there: torch's are taken, and its kernels for what stands between them
        assert "no tensor cores in Triton" in found.pop("attention, heads of 64, window 37 of 200")["not measured"]
        assert found.pop("muon, X X^T")["kernels"] == []
    assert all(row.get("passed") and row["kernels"] for row in found.values()), found
    if target in (90, 100):
        assert "_by_tma" in found["feed, hidden made again"]["kernels"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "target", "dtype", "kernels"),
    [("cuda", 90, "bfloat16", {"_by_tma", "forward_kernel", "_symmetric"}), ("rtx", 75, "float16", {"_squared"}),
     ("rtx", 120, "bfloat16", {"_by_pointers", "forward_kernel", "_symmetric"})],
)  # fmt: skip
def test_whole_recipes_as_compiled_compute_the_reference(backend, target, dtype, kernels):
    """Logits, loss, all gradients and an optimizer step, of one checkpoint; no access that the watch objects to."""
    recipe = (project_root() / "backends" / backend / "train.py").read_bytes()
    with emulated(target, fences=fences(target)) as launched:
        computed = reference.computed(recipe, open_device(), dtype)
    assert set(launched) >= kernels and len(launched) > 100
    worst = defaultdict(float)
    for check in reference.compare(computed, reference.reference()):
        kind = check.name.split()[0]
        worst[kind] = max(worst[kind], check.difference)
    assert worst.keys() == BOUNDS[dtype].keys()
    assert all(worst[kind] <= bound for kind, bound in BOUNDS[dtype].items()), dict(worst)


def test_the_command_prints_what_it_found(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.ptx",
        "--target",
        "86",
        "--only",
        "residual_norm, no",
        "--context",
        "40",
    ]
    done = subprocess.run([*command, "--json"], cwd=project_root(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["target"], r["dtype"], r["passed"]) for r in found] == [(86, d, True) for d in ("bfloat16", "float16")]
    assert all(r["kernels"] == ["_backward", "_forward"] and r["instructions"] > 100 for r in found)
    done = subprocess.run(command, cwd=project_root(), capture_output=True, text=True, timeout=300)
    assert done.stdout.count("PASS  sm_86") == 2


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "words"),
    [
        (["--only", "convolution"], {}, 2, "no check has 'convolution' in its name; try --only attention"),
        (["--target", "70"], {}, 2, "'70' is not one of '75', '80'"),
        ([], {"TRITON_INTERPRET": "1"}, 1, "nothing is compiled; unset it"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, settings, code, words):
    command = [sys.executable, "-m", "benchmarks.ptx", *arguments]
    done = subprocess.run(
        command, cwd=project_root(), env=os.environ | settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
