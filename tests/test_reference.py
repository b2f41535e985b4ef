"""The shipped reference numbers: what each backend computes, provable without any other backend's library."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

import backends
from backends import reference
from core.errors import UserError
from core.paths import project_root


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_a_backend_computes_the_reference(backend):
    pytest.importorskip(reference.LIBRARIES[backend])
    failed = [c for c in reference.compare(reference.compute(backend), reference.reference()) if not c.passed]
    assert not failed


def test_every_weight_has_its_numbers():
    names = {name.partition(" of ")[2] for name in reference.reference()} - {""}
    assert {f"{kind} of {n}" for n in names for kind in ("gradient", "step")} | {
        "logits",
        "loss",
    } == reference.reference().keys()
    assert {"value_embeds.3.weight", "transformer.h.1.attn.ve_gate.weight", "resid_lambdas", "lm_head.weight"} <= names
    assert all(np.isfinite(values).all() and values[0] > 0 for values in reference.reference().values())


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("SOFTCAP = 15.0", "SOFTCAP = 16.0", {"logits", "loss", "gradient"}),
        ("2 * torch.sigmoid", "1.9 * torch.sigmoid", {"logits", "loss", "gradient"}),
        ("distance > window", "distance >= window", {"logits", "loss", "gradient"}),
        ("MUON_BETA2 = 0.95", "MUON_BETA2 = 0.5", {"step"}),
        ("0.85 + 0.10", "0.95 + 0.0", {"step"}),
    ],
)
def test_a_model_that_differs_is_told(old, new, parts, monkeypatch):
    """The checks can fail: small mistakes of the kind that ports make."""
    pytest.importorskip("torch")
    source = backends.load("cpu").recipe().decode()
    assert source.count(old) == 1
    monkeypatch.setattr(backends.Backend, "recipe", lambda self: source.replace(old, new).encode())
    checks = reference.compare(reference.compute("cpu"), reference.reference())
    assert parts <= {c.name.split()[0] for c in checks if not c.passed}


def test_a_recipes_functions_are_found_by_the_name_of_its_module():
    """As torch.compile looks for them when it meets one, which may be after another recipe was loaded."""
    pytest.importorskip("torch")
    loaded = backends.load("cpu")
    made = [reference.training(loaded.recipe(), loaded.open_device()) for _ in range(2)]
    first, second = (sys.modules[type(one).__module__] for one in made)
    assert first is not second
    for one, module in zip(made, (first, second), strict=True):
        assert getattr(module, type(one).__name__) is type(one)


def test_a_missing_weight_is_an_error():
    with pytest.raises(UserError, match="missing or unknown: loss"):
        list(reference.compare({"logits": np.ones(3)}, {"logits": [1.0] * 4, "loss": [1.0] * 4}))


def test_numbers_of_nan_never_pass():
    check = next(reference.compare({"loss": np.array([np.nan])}, {"loss": [1.0, 1.0, 1.0, 1.0]}))
    assert not check.passed


@pytest.mark.slow
def test_the_command_prints_pass_for_what_is_installed():
    command = [sys.executable, "-m", "backends.reference"]
    how = {"cwd": project_root(), "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, check=False, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") % 4 == 0 and "FAIL" not in done.stdout
    told = subprocess.run([*command, "--json"], check=True, **how)
    installed = [b for b in ("cpu", "mlx") if importlib.util.find_spec(reference.LIBRARIES[b].split(".")[0])]
    assert set(json.loads(told.stdout)) == set(installed)
