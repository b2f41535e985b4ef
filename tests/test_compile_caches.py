"""What torch.compile keeps for the next process, in a recipe's environment: it is found again, and nothing stale."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from core import caches, sandbox
from core.paths import project_root

pytest.importorskip("torch")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")), reason="torch.compile needs a C++ compiler on a CPU"
)

RUN = """
import json, sys
from pathlib import Path
import torch
from backends.worker import load_recipe
from torch._dynamo.utils import counters
print(json.dumps([load_recipe(Path(sys.argv[1]).read_bytes()).build(None), dict(counters["aot_autograd"])]))
"""

LAYERS = """
import torch
from kernels.lean import project
from kernels.recomputed import embedded_norm

def loss(x0, w, a, b, table, values, gate, tokens):
    x = embedded_norm(tokens, table, torch.float32)
    total, z = project(x, x0, a, b, w, gate, values, tokens)
    return z.square().mean() + total.square().mean()

def build(spec):
    torch.manual_seed(1)
    shapes = ((2, 6, 8), (24, 8), (), (), (5, 8), (5, 8), (2, 3))
    leaves = [torch.randn(s).requires_grad_() for s in shapes]
    torch.compile(loss, fullgraph=True)(*leaves, torch.arange(12).view(2, 6) % 5).backward()
    return [float(x.grad.sum()) for x in leaves]
"""

FUNCTION = """
import torch

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 2
    @staticmethod
    def backward(ctx, d): return d * FACTOR

twice = Twice.apply
"""

OPERATOR = """
import torch

@torch.library.custom_op("mine::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2

twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, d: d * FACTOR)
"""

BUILD = """
def build(spec):
    x = torch.ones(8, requires_grad=True)
    torch.compile(lambda x: twice(x + 1).sum(), fullgraph=True)(x).backward()
    return float(x.grad[0])
"""


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where torch puts its precompiled header, fifteen seconds of g++: a part of no graph, and the same for all."""
    return tmp_path_factory.mktemp("headers")


def run(folder: Path, headers: Path, recipe: str):
    """What it builds, and torch's counters, from a process of its own with the caches of the ones before."""
    (folder / "tmp").mkdir(exist_ok=True)
    if sys.platform != "win32" and not (link := folder / "tmp" / f"torchinductor_{sandbox.USER}").is_symlink():
        link.symlink_to(headers, target_is_directory=True)  # as the sandbox does
    (folder / "recipe").write_text(recipe)
    environment = sandbox.environment(folder, folder / "tmp", folder / "caches") | {"PYTHONPATH": str(project_root())}
    command = [sys.executable, "-c", RUN, str(folder / "recipe")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    built, counters = json.loads(done.stdout.splitlines()[-1])
    return built, {name: counters.get(f"autograd_cache_{name}", 0) for name in ("hit", "miss", "bypass")}


@needs_compiler
@pytest.mark.slow
def test_the_next_process_finds_layers_with_a_backward_of_their_own(tmp_path: Path, headers: Path) -> None:
    first, said = run(tmp_path, headers, LAYERS)
    assert said == {"hit": 0, "miss": 1, "bypass": 0}
    again, said = run(tmp_path, headers, LAYERS)
    assert said == {"hit": 1, "miss": 0, "bypass": 0} and again == pytest.approx(first)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("layer", [FUNCTION, OPERATOR], ids=["function", "operator"])
def test_a_changed_backward_of_a_recipe_is_not_taken_for_the_old_one(tmp_path: Path, headers: Path, layer: str) -> None:
    for factor in ("2.0", "3.0"):
        found, _ = run(tmp_path, headers, layer.replace("FACTOR", factor) + BUILD)
        assert found == float(factor)


def test_changed_kernels_have_another_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    before = caches.kernels_tag(tmp_path)
    caches.kernels_tag.cache_clear()
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert caches.kernels_tag(tmp_path) != before
    caches.kernels_tag.cache_clear()
    monkeypatch.setitem(os.environ, "TORCH_COMPILE_CACHE_KEY_TAG", "not this")
    given = sandbox.environment(tmp_path, tmp_path, tmp_path)["TORCH_COMPILE_CACHE_KEY_TAG"]
    assert given == caches.kernels_tag() and len(given) == 16
