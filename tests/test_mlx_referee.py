"""The MLX backend through the real referee, sandbox and loop, on the CPU. Cheats: tests/test_tamper_mlx.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core import guard
from core.outcome import Outcome, Request
from core.paths import project_root
from core.probing import Probe
from core.referee import execute

pytest.importorskip("mlx.core")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="MLX's build for Linux is what runs here"),
]

HONEST = '''\
"""A small honest MLX recipe: it predicts the next token from the last two."""

import mlx.core as mx
import numpy as np

WIDTH = 32
ROWS = 16
LR = 0.02


class Training:
    def __init__(self, spec):
        self.spec = spec
        keys = mx.random.split(mx.random.key(spec.seed), 2)
        V = spec.vocab_size
        self.w = {
            "embed": mx.random.normal((V, WIDTH), key=keys[0]),
            "before": mx.random.normal((V, WIDTH), key=keys[1]),
            "head": mx.zeros((V, WIDTH)),
            "bias": mx.zeros((V,)),
        }
        self.m = {n: (mx.zeros_like(w), mx.zeros_like(w)) for n, w in self.w.items()}
        self.steps = 0

    def model(self, w, tokens):
        first = mx.full((tokens.shape[0], 1), self.spec.bos_id, dtype=tokens.dtype)
        before = mx.concatenate([first, tokens[:, :-1]], axis=1)
        return mx.tanh(w["embed"][tokens] + w["before"][before]) @ w["head"].T + w["bias"]

    def loss(self, w, tokens):
        z = self.model(w, tokens[:, :-1])
        return (mx.logsumexp(z, axis=-1) - mx.take_along_axis(z, tokens[:, 1:, None], axis=-1)[..., 0]).mean()

    def step(self, batches, progress):
        loss, grads = mx.value_and_grad(self.loss)(self.w, batches.next(ROWS, self.spec.sequence_len))
        self.steps += 1
        for n, g in grads.items():
            a, b = self.m[n]
            a, b = 0.9 * a + 0.1 * g, 0.95 * b + 0.05 * g * g
            self.m[n] = (a, b)
            self.w[n] = self.w[n] - LR * (1 - 0.9 * progress) * a / (mx.sqrt(b / (1 - 0.95**self.steps)) + 1e-8)
        mx.async_eval(loss, self.w, self.m)
        return loss

    def logits(self, tokens):
        return self.model(self.w, tokens)

    def weights(self):
        return {n: np.array(w) for n, w in self.w.items()}

    def load_weights(self, weights):
        self.w = {n: mx.array(w) for n, w in weights.items()}

    def describe(self):
        return {"depth": 1}


def build(spec):
    return Training(spec)
'''


@pytest.fixture(scope="module")
def judge(dataset, settings, tmp_path_factory):
    """Run an MLX source as a candidate that would be kept, the lint off."""
    limits = replace(
        settings, backend="mlx", device="cpu", dtype="float32", warmup_cap=20.0, memory_limit=2 * 2**30,
        eval_tokens=8192, audit_points=1024, budget=1.5,
    )  # fmt: skip

    def run(source: str, lint: bool = False, **changed) -> Outcome:
        return execute(
            Request(
                source=source.encode(),
                settings=replace(limits, **changed),
                dataset=dataset,
                seed=settings.seed,
                experiment="1",
                workdir=tmp_path_factory.mktemp("work"),
                lint=lint,
                would_keep=lambda bpb: True,
                probe=Probe((0.3, 0.6), 2048),
            )
        )

    return run


@pytest.fixture(scope="module")
def honest(judge) -> Outcome:
    outcome = judge(HONEST, lint=True)
    assert outcome.status == "scored" and outcome.audited, f"{outcome.reason}\n{outcome.log_tail}"
    return outcome


def test_an_honest_recipe_is_scored_and_audited(honest):
    assert 1.0 < honest.val_bpb < 4.0
    assert honest.steps > 20
    assert honest.peak_memory > 2**20


def test_an_honest_recipe_is_looked_at_on_its_way(honest):
    assert honest.unprobed == []
    (first, _, early), (second, _, late) = honest.probes
    assert (first, second) == (0.3, 0.6) and 1.0 < late < early
    assert honest.training_seconds == pytest.approx(1.5, abs=0.5) and honest.timings["probing"] >= 1.0


def test_the_lint_knows_mlx_ways_to_files():
    for line in ("mx.load('x.npz')", "mx.save('x', mx.ones(3))", "mx.export_function('f', 1)", "mx.random.seed(1)"):
        assert guard.check(f"import mlx.core as mx\ndef build(spec):\n    {line}\n".encode()), line


@pytest.fixture
def shell(tmp_path):
    env = {**os.environ, "AUTORESEARCH_HOME": str(tmp_path / "home"), "NO_COLOR": "1"}

    def run(*argv: str) -> str:
        done = subprocess.run(
            [sys.executable, str(project_root() / "cli.py"), *argv],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_two_experiments_of_the_search(shell, tmp_path: Path):
    """The shipped recipe, fitted to this machine, through init, run, log and sample."""
    shell(
        "init",
        "night",
        "--backend",
        "mlx",
        "--data",
        "kjv",
        "--vocab",
        "512",
        "--profile",
        "demo",
        "--budget",
        "4",
        "--verdict",
        "simple",
    )
    settings = json.loads(shell("status", "night", "--json"))
    assert "mlx" in json.dumps(settings)
    shell("run", "night", "--experiments", "2")
    log = json.loads(shell("log", "night", "--json"))
    text = json.dumps(log)
    assert text.count('"status"') >= 2 and '"keep"' in text
    assert "crash" not in text, text
    assert shell("sample", "night", "--prompt", "And God")
