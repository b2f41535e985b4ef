"""The CUDA recipe on a CPU, its kernels interpreted: logits, loss, gradients and a step of the reference numbers."""

from __future__ import annotations

from backends import reference
from backends.cpu.device import open_device
from core import guard
from core.paths import project_root

RECIPE = (project_root() / "backends" / "cuda" / "train.py").read_bytes()


def test_the_recipe_computes_the_reference():
    checks = list(reference.compare(reference.computed(RECIPE, open_device()), reference.reference()))
    assert len(checks) > 60
    assert not [check for check in checks if not check.passed]


def test_the_recipe_passes_the_lint():
    assert not guard.check(RECIPE)
