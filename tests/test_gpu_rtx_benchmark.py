"""`benchmarks.gpu_rtx` on a CPU at small shapes: both sides train the same model, and what is told is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from core.paths import project_root

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks import gpu, gpu_rtx, gpu_sections  # noqa: E402 - after the skips

GIB = 2**30

COMMAND = [sys.executable, "-m", "benchmarks.gpu_rtx"]


def test_both_sides_start_from_one_loss():
    done = subprocess.run([*COMMAND, "--smoke"], cwd=project_root(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ours, lean, peer, *ratios = (json.loads(line) for line in done.stdout.splitlines())
    assert [row["side"] for row in (ours, lean, peer)] == ["ours", "ours, 4 MLPs made again", "peer"]
    assert ours["rows_at_once"] == lean["rows_at_once"] == 2
    assert [row["side"] for row in ratios] == ["peer / ours", "peer / ours, 4 MLPs made again"]
    for row in ratios:
        assert row["passed"] and row["losses_apart"] < 1e-5 and row["gradients_apart"] < 1e-4 and row["speed"] > 0
    assert ours["proof_gradient"] > 1e-3, "a gradient of zeros proves nothing"


def test_each_of_ours_makes_again_what_its_name_says(monkeypatch):
    made = []
    real = gpu_rtx.recipe

    def watched(shape, **more):
        made.append(more)
        return real(shape, **more)

    monkeypatch.setattr(gpu_rtx, "recipe", watched)
    monkeypatch.setattr(gpu_rtx, "SMOKE", replace(gpu_rtx.SMOKE, steps=1))
    assert len(list(gpu_rtx.small())) == 5
    assert made == [{"RECOMPUTE": "nothing"}, {"RECOMPUTE": "nothing", "RECOMPUTE_MORE": 4}, {}]


def test_a_peer_that_does_not_fit_takes_no_row_of_ours_with_it(monkeypatch):
    real = gpu_rtx.measure

    def full(side, *given):
        if side == "peer":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")
        return real(side, *given)

    monkeypatch.setattr(gpu_rtx, "measure", full)
    monkeypatch.setattr(gpu_rtx, "SMOKE", replace(gpu_rtx.SMOKE, steps=1))
    ours, lean, peer = gpu_rtx.small()
    assert "out_of_memory" in peer and "passed" not in peer and ours["ms"] > 0 and lean["ms"] > 0


def test_what_kernels_take_is_told_apart_from_what_the_card_waits(monkeypatch):
    """On a card that is far faster than the ones the recipe is for, both sides' steps are Python's in part."""
    took = iter([2.0, 3.0, 9.0])
    monkeypatch.setattr("benchmarks.gpu_profile.kernels", lambda *_: iter([{"kernel": "all", "ms_a_step": next(took)}]))
    monkeypatch.setattr(gpu_rtx, "SMOKE", replace(gpu_rtx.SMOKE, steps=1))
    *sides, first, second = gpu_rtx.small()
    assert [row["kernels_ms"] for row in sides] == [2.0, 3.0, 9.0]
    assert (first["speed_of_kernels"], second["speed_of_kernels"]) == (4.5, 3.0)


@pytest.mark.parametrize("broken", ["ours", "peer"])
def test_a_side_that_breaks_takes_no_row_of_the_others_with_it(monkeypatch, broken):
    """As cuDNN may within the peer, and Triton's compiler, whose errors are no RuntimeError, within ours."""
    real = gpu_rtx.measure

    def breaks(side, *given):
        if side == broken:
            raise ValueError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED")
        return real(side, *given)

    monkeypatch.setattr(gpu_rtx, "measure", breaks)
    monkeypatch.setattr(gpu_rtx, "SMOKE", replace(gpu_rtx.SMOKE, steps=1))
    rows = {row["side"]: row for row in gpu_rtx.small()}
    assert rows[broken]["failed"] == "ValueError: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"
    assert rows[broken]["passed"] is False and all(rows[s]["ms"] > 0 for s in (*gpu_rtx.OURS, "peer") if s != broken)
    ratios = [side for side in rows if side.startswith("peer / ")]
    assert ratios == ([] if broken == "peer" else ["peer / ours, 4 MLPs made again"])


def test_a_peer_that_sees_less_is_refused(monkeypatch):
    """From the recipe's own first weights it would pass: what attention finds reaches nothing there."""
    real = gpu_rtx.make_peer

    def broken(training, module):
        training.model.windows = [1] * len(training.model.windows)
        real(training, module)

    monkeypatch.setattr(gpu_rtx, "make_peer", broken)
    monkeypatch.setattr(gpu_rtx, "SMOKE", replace(gpu_rtx.SMOKE, steps=1))
    ratio = list(gpu_rtx.small())[-1]
    assert ratio["side"].startswith("peer / ours") and ratio["passed"] is False and ratio["gradients_apart"] > 0.05
    monkeypatch.setattr(gpu_rtx, "randomize", lambda training: None)
    assert list(gpu_rtx.small())[-1]["losses_apart"] < gpu_rtx.LOSSES_APART


def test_what_is_no_number_is_not_equal():
    one, nan, zero = ({"proof_loss": x, "proof_gradient": x} for x in (1.0, float("nan"), 0.0))
    assert not gpu_rtx.apart(zero, zero)["passed"], "of a card that computes nothing"
    assert gpu_rtx.apart(one, one)["passed"]
    assert not gpu_rtx.apart(one, nan)["passed"] and not gpu_rtx.apart(nan, one)["passed"]


@pytest.mark.parametrize(
    ("free", "wish", "held"), [(12, 8.0, 8e9), (12, 6.0, 6e9), (5, 8.0, 5 * GIB - 2**28), (12, None, 12 * GIB - 2**28)]
)
def test_a_card_is_held_to_the_wish_and_to_what_the_backend_allows(monkeypatch, free, wish, held):
    """Beyond that Windows' driver swaps, and does not fail."""
    fractions = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4060")
    monkeypatch.setattr(gpu_rtx, "margin", lambda: 2**28)
    monkeypatch.setattr(gpu_rtx, "compare", lambda *given: [])
    (card,) = gpu_rtx.on_card(wish)
    assert fractions == [pytest.approx(held / (16 * GIB))] and card["held_gb"] == pytest.approx(held / 1e9)


@pytest.mark.parametrize(("given", "limit"), [([], 8.0), (["--limit-gb", "6"], 6.0)])
def test_the_command_for_everything_hands_the_limit_on(monkeypatch, tmp_path, given, limit):
    orders = []
    monkeypatch.setattr(gpu, "measure", lambda order, names, out: orders.append(order) or 0)
    monkeypatch.setattr(gpu, "without_card", lambda: "")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", "rtx", *given])
    held = []
    monkeypatch.setattr(gpu_rtx, "on_card", lambda limit_gb: held.append(limit_gb) or [])
    list(gpu_sections.rtx(orders[0]))
    assert held == [limit]


@pytest.mark.skipif(__import__("torch").cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so():
    done = subprocess.run(COMMAND, cwd=project_root(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr
