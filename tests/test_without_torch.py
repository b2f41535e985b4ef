"""A machine on which PyTorch is not installed: a Mac after `pip install -e .`, or an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WITHOUT = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "torch" else real(name, *more)
sys.modules["torch"] = None
sys.path.insert(0, sys.argv.pop(1))
import cli
cli.main()
"""


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["run", "--demo"], "needs PyTorch, which is not installed"),
        (["init", "--backend", "cpu"], "(as asked with --backend cpu: "),
        (["bench", "--backend", "cpu", "--quick"], "the backend cpu cannot run here: torch is not installed: "),
    ],
)
def test_the_cpu_backend_is_refused_with_the_command_that_mends_it(
    arguments: list[str], fact: str, tmp_path: Path
) -> None:
    """At once, and not by a child's traceback after the data was prepared."""
    env = {**os.environ, "AUTORESEARCH_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}
    given = [sys.executable, "-c", WITHOUT, str(ROOT), *arguments, "--json"]
    done = subprocess.run(given, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120)
    error = json.loads(done.stderr)["error"]
    assert done.returncode == 1 and error["kind"] == "UserError"
    assert fact in error["fact"] and "-m pip install torch" in error["fact"] + error["action"]
    assert not (tmp_path / "labs").exists() and not (tmp_path / "home" / "data").exists()
