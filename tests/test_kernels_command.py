"""`python -m benchmarks.kernels` where something that it needs is missing: a line that says what, and no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = """
import importlib.util, runpy, sys
lacks, sys.argv = sys.argv[1], ["kernels", *sys.argv[2:]]
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == lacks else real(name, *more)
sys.modules[lacks] = None
runpy.run_module("benchmarks.kernels", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("lacks", "arguments", "says"),
    [
        ("triton", ["--compile-only"], "Triton is not installed"),
        ("torch", ["--out", "results"], "PyTorch is not installed"),
    ],
)
def test_what_is_not_installed_is_told(lacks: str, arguments: list[str], says: str, tmp_path: Path) -> None:
    """On a Mac, or with PyPI's torch for Windows."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{HIDDEN}"
    given = [sys.executable, "-c", code, lacks, *arguments]
    done = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(says) and done.stderr.rstrip().endswith("see autoresearch doctor")


def test_a_missing_reader_of_binaries_is_told_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from benchmarks import compiled

    monkeypatch.setattr(compiled.Path, "is_file", lambda path: False)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(FileNotFoundError, match="none on the PATH; reinstall triton"):
        compiled.cuobjdump()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(FileNotFoundError, match="install NVIDIA's CUDA toolkit"):
        compiled.cuobjdump()
    monkeypatch.setattr(compiled.shutil, "which", lambda name: "/cuda/bin/cuobjdump")
    assert compiled.cuobjdump() == Path("/cuda/bin/cuobjdump")
