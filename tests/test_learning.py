"""`benchmarks.learning`: what our recipe learns in equal steps beside a clone of upstream's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from string import ascii_letters

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")  # which upstream's side is timed by on a card

from benchmarks import learning  # noqa: E402 - after the skips
from benchmarks.gpu_run import print_nothing  # noqa: E402
from core.documents import from_path  # noqa: E402
from core.paths import project_root  # noqa: E402
from core.shards import Plan, build  # noqa: E402
from core.tokenizer import SMALLEST_VOCABULARY  # noqa: E402

# A train.py with upstream's names and weights, whose model is a table of the next token and whose optimizer is SGD.
CLONE = """
import math
from dataclasses import dataclass
import torch
import torch.nn as nn
import torch.nn.functional as F

MATRIX_LR, EMBEDDING_LR, UNEMBEDDING_LR, SCALAR_LR, WEIGHT_DECAY, ADAM_BETAS = 0.04, 0.6, 0.004, 0.5, 0.2, (0.8, 0.95)


@dataclass
class GPTConfig:
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str


def part(module, path, shape):
    *folders, name = path.split(".")
    for folder in folders:
        if not hasattr(module, folder):
            module.add_module(folder, nn.Module())
        module = getattr(module, folder)
    module.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, V = config.n_embd, config.vocab_size
        for name in ("transformer.wte.weight", "lm_head.weight"):
            part(self, name, (V, C))
        for name in ("resid_lambdas", "x0_lambdas"):
            part(self, name, (config.n_layer,))
        for i in range(config.n_layer):
            for name in ("c_q", "c_k", "c_v", "c_proj"):
                part(self, f"transformer.h.{i}.attn.{name}.weight", (C, C))
            part(self, f"transformer.h.{i}.mlp.c_fc.weight", (4 * C, C))
            part(self, f"transformer.h.{i}.mlp.c_proj.weight", (C, 4 * C))
            if i % 2 == (config.n_layer - 1) % 2:
                part(self, f"transformer.h.{i}.attn.ve_gate.weight", (config.n_head, 32))
                part(self, f"value_embeds.{i}.weight", (V, C))

    def init_weights(self):
        print("a line that is no loss")

    def setup_optimizer(self, **rates):
        both = [self.transformer.wte.weight, self.lm_head.weight]
        optimizer = torch.optim.SGD(both, lr=1.0)
        for group in optimizer.param_groups:
            group |= {"kind": "adamw", "initial_lr": 1.0}
        return optimizer

    def forward(self, tokens, targets):
        x = F.rms_norm(self.transformer.wte.weight[tokens], (self.transformer.wte.weight.shape[1],))
        return F.cross_entropy((x @ self.lm_head.weight.T).flatten(0, 1).float(), targets.flatten())


def get_lr_multiplier(progress):
    return 1.0


def get_muon_momentum(step):
    return 0.95


def get_weight_decay(progress):
    return 0.0
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Text of which every token, a byte, says the next."""
    texts, root = tmp_path / "texts", tmp_path / "data"
    for place in (texts, root):
        place.mkdir()
    for i in range(200):
        (texts / f"{i}.txt").write_text(ascii_letters[i % 26 :] + 12 * ascii_letters)
    return build(Plan(from_path(texts), SMALLEST_VOCABULARY, []), root, print_nothing, print_nothing).path


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "autoresearch"
    folder.mkdir()
    (folder / "train.py").write_text(CLONE)
    return folder


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.learning", *map(str, arguments)],
        cwd=project_root(),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.slow
def test_all_sides_train_and_are_compared(clone, data, tmp_path):
    out = tmp_path / "losses.json"
    done = command("--upstream", clone, "--data", data, "--steps", 4, "--seeds", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert told["seeds"] == 2 and told["losses"].keys() == {*learning.SIDES}
    rows = {side: np.array(losses) for side, losses in told["losses"].items()}
    assert all(found.shape == (2, 4) and np.isfinite(found).all() for found in rows.values())
    assert not np.array_equal(rows[learning.OURS], rows[learning.ALIKE])
    for side in (learning.OURS, learning.ALIKE):
        assert (rows[side][:, -1] < rows[side][:, 0] - 0.5).all(), "each token says the next"
        assert not np.array_equal(rows[side][0], rows[side][1]), "other weights, other text"
    assert done.stdout.splitlines()[0] == "depth 4 of 256, vocabulary 257, 256 tokens of context, 4,096 a step"
    assert done.stdout.count("| 4 |") == 3 and "±" in done.stdout


def test_differences_are_of_equal_seeds():
    """Of the last ten steps, at each quarter; the error is of the mean difference, not of the losses."""
    upstream = [[5.0 - step / 100 for step in range(100)], [7.0 - step / 100 for step in range(100)]]
    ours = [[x - 0.1 for x in upstream[0]], [x - 0.3 for x in upstream[1]]]
    found = learning.learnt({learning.UPSTREAM: upstream, learning.OURS: ours})
    assert [one.steps for one in found if one.side == learning.OURS] == [25, 50, 75, 100]
    last = found[-1]
    assert (last.steps, last.side) == (100, learning.OURS)
    assert last.losses == pytest.approx([5.0 - 0.945 - 0.1, 7.0 - 0.945 - 0.3])
    assert (last.difference, last.error) == (pytest.approx(-0.2), pytest.approx(0.1))
    assert "| 100 | ours | 3.9550, 5.7550 | -0.2000 ± 0.1000 |" in learning.table(found)


def test_one_seed_has_no_error():
    found = learning.learnt({learning.UPSTREAM: [[1.0] * 4], learning.OURS: [[0.5] * 4]})
    assert "-0.5000 ± nan" not in learning.table(found) and "| -0.5000 |" in learning.table(found)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--data", "."], "--upstream is missing"),
        (["--upstream", "nowhere", "--data", "."], "--upstream is to be a folder, and nowhere is none"),
        (["--upstream", ".", "--data", "."], "is no data set"),
        (["--upstream", ".", "--data", ".", "--seeds", "0"], "--seeds 0: at least"),
        (["--upstream", ".", "--data", ".", "--steps", "3"], "--steps 3 "),
    ],
)
def test_what_is_missing_is_said_in_one_line(given, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        learning.main(given)
    assert says in str(ended.value.code) and "\n" not in str(ended.value.code)


def test_a_side_that_fails_ends_it_with_its_reason(clone, data):
    (clone / "train.py").write_text(CLONE.replace("class GPT(nn.Module)", "class Other(nn.Module)"))
    done = command("--upstream", clone, "--data", data, "--steps", 4)
    assert done.returncode == 1 and done.stderr.startswith("upstream ended after 0 of 4 steps: ")
    assert "does not define GPT" in done.stderr and len(done.stderr.splitlines()) == 1
