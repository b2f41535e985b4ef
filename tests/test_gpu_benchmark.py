"""`benchmarks.gpu` on a CPU: every section runs small by Triton's interpreter, and what it writes is whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from core.paths import project_root

pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks import gpu
from benchmarks.gpu import LIMITS, SMOKE, run_section, table


@pytest.mark.slow
def test_all_sections_run_small_and_write_what_they_found(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=project_root(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["section"] for row in rows} == LIMITS.keys() - {"upstream"}
    assert len([row for row in rows if row.get("passed")]) == 9
    assert [row["side"] for row in rows if row["section"] == "rtx"] == ["ours", "peer", "ratio"]
    (scored,) = [row for row in rows if row["section"] == "run" and row.get("status")]
    assert scored["status"] == "scored" and scored["val_bpb"] > 0
    assert "## correctness" in (tmp_path / "results.md").read_text()


def test_a_section_that_fails_leaves_a_row_with_the_reason():
    rows = list(run_section("nonesuch", SMOKE, 60))
    assert rows[-1]["failed"] == "exit status 1" and "nonesuch" in rows[-1]["error"]


def test_one_that_hangs_is_ended():
    assert list(run_section("step", SMOKE, 0.01))[-1]["failed"] == "not done within 0 s"


def test_nine_minutes_at_most(tmp_path, monkeypatch):
    """Without an upstream every section has its time; a section that finds none left says so."""
    assert sum(seconds for name, seconds in LIMITS.items() if name != "upstream") <= gpu.TOTAL <= 540
    monkeypatch.setattr(gpu, "TOTAL", 0.01)
    assert gpu.measure(SMOKE, ["facts", "step"], tmp_path) == 1
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["failed"] for row in rows] == ["not done within 0 s"] * 2


def test_the_table_has_a_column_for_every_name():
    text = table([{"section": "a", "x": 1.23456}, {"section": "a", "y": "p|q"}, {"section": "b", "z": None}])
    assert "| x | y |" in text and "| 1.235 |  |" in text and "p/q" in text and "## b" in text


def test_it_imports_nothing_beyond_what_its_machine_has():
    """torch, triton, numpy, tiktoken, pyarrow: what else is there makes a section say that it was not measured."""
    absent = ("click", "rich", "psutil", "scipy", "git", "anthropic", "optuna", "rustbpe", "safetensors", "pynvml")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
    code += "from benchmarks.gpu import SMOKE, LIMITS; from benchmarks import gpu_sections, kernels\n"
    code += "assert gpu_sections.SECTIONS.keys() == LIMITS.keys()\n"
    code += "print(list(gpu_sections.run(SMOKE)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project_root(), capture_output=True, text=True, timeout=120)
    assert "is not installed" in done.stdout, done.stderr
