"""The CPU recipe against plain float64 references that are written here: model, loss, optimizer, schedules."""

from __future__ import annotations

import importlib.util
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.contract import Spec
from core.paths import project_root

VOCAB, CONTEXT = 97, 160  # neither is a multiple of anything; the context is longer than one block of queries
PATH = project_root() / "backends" / "cpu" / "train.py"
EPSILON = 2.0**-23


def load(**constants):
    """A fresh copy of the recipe with other constants."""
    spec = importlib.util.spec_from_file_location("recipe_under_test", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"DEPTH": 4, "ASPECT_RATIO": 16, "HEAD_DIM": 32, "TOTAL_BATCH_SIZE": 4 * CONTEXT, "DEVICE_BATCH_SIZE": 8}
    for name, value in {**small, **constants}.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    return module


def spec(dtype="float32", seed=1):
    return Spec(VOCAB, CONTEXT, VOCAB - 1, "cpu", dtype, seed, 0)


def tokens(rows=3, length=CONTEXT, seed=0):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


class Fixed:
    """Batches cut from given rows, one after the other."""

    def __init__(self, rows):
        self.rows, self.at = rows, 0

    def next(self, rows, length):
        found = self.rows[self.at : self.at + rows, : length + 1]
        self.at += rows
        return found


def random_weights(training, seed=0):
    """None of them zero or one, so that every path counts; names and shapes of the recipe's own."""
    rng = np.random.default_rng(seed)
    spread = {"wte": 1.0, "value_embeds": 0.5, "lm_head": 0.5, "ve_gate": 0.3, "c_proj": 0.1}
    weights = {}
    for name, old in training.weights().items():
        scale = next((s for word, s in spread.items() if word in name), 0.2)
        weights[name] = (rng.standard_normal(old.shape) * scale + ("lambdas" in name) * 0.7).astype(np.float32)
    return weights


# --- reference: float64, dense masks, everything written out ------------------------------------


def rms(x):
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


def turned(x):
    """RoPE on (B, T, H, D), entry by entry."""
    T, D = x.shape[1], x.shape[3]
    angle = torch.outer(torch.arange(T).double(), 10000.0 ** (-torch.arange(0, D, 2).double() / D))[None, :, None]
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1)


def reference_logits(w, inputs, pattern, context=CONTEXT, head=32):
    """w: name -> float64 tensor. Windows from the pattern: L sees `context` tokens back, S half; the last layer L."""
    depth = len(w["resid_lambdas"])
    x = first = rms(w["transformer.wte.weight"][inputs])
    B, T, C = x.shape
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    for i in range(depth):
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * first
        at = f"transformer.h.{i}."
        y = rms(x)
        q, k, v = ((y @ w[f"{at}attn.{n}.weight"].T).view(B, T, -1, head) for n in ("c_q", "c_k", "c_v"))
        if f"value_embeds.{i}.weight" in w:
            gate = 2 * torch.sigmoid(y[..., :32] @ w[f"{at}attn.ve_gate.weight"].T)
            v = v + gate[..., None] * w[f"value_embeds.{i}.weight"][inputs].view(v.shape)
        q, k = rms(turned(q)), rms(turned(k))
        back = context if i == depth - 1 or pattern[i % len(pattern)] == "L" else context // 2
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(head)
        scores = scores.masked_fill((distance < 0) | (distance > back), -math.inf)
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).reshape(B, T, C)
        x = x + mixed @ w[f"{at}attn.c_proj.weight"].T
        x = x + torch.relu(rms(x) @ w[f"{at}mlp.c_fc.weight"].T).square() @ w[f"{at}mlp.c_proj.weight"].T
    return 15 * torch.tanh(rms(x) @ w["lm_head.weight"].T / 15)


def reference_loss(w, rows, pattern):
    logits = reference_logits(w, rows[:, :-1], pattern)
    return F.cross_entropy(logits.reshape(-1, VOCAB), rows[:, 1:].reshape(-1))


def doubles(weights, grad=False):
    return {name: torch.from_numpy(w).double().requires_grad_(grad) for name, w in weights.items()}


def distance(found, expected):
    """Relative error of a whole array."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# --- model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["L", "SL", "SSL", "SSSL"])
@pytest.mark.parametrize("length", [1, 37, 128, 129, CONTEXT])
def test_logits_are_those_of_the_reference(pattern, length):
    training = load(WINDOW_PATTERN=pattern).build(spec())
    weights = random_weights(training)
    training.load_weights(weights)
    found = training.logits(tokens(length=length))
    assert found.shape == (3, length, VOCAB)
    assert found.dtype == torch.float32
    expected = reference_logits(doubles(weights), tokens(length=length), pattern)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-5)


def test_a_context_longer_than_the_scored_one_keeps_the_windows():
    training = load(WINDOW_PATTERN="SSSL").build(spec())
    weights = random_weights(training)
    training.load_weights(weights)
    rows = tokens(rows=2, length=2 * CONTEXT + 5)
    expected = reference_logits(doubles(weights), rows, "SSSL")
    torch.testing.assert_close(training.logits(rows).double(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("pattern", ["L", "SSSL"])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_gradients_are_those_of_the_reference(pattern, depth):
    training = load(WINDOW_PATTERN=pattern, DEPTH=depth, ASPECT_RATIO=64 // depth).build(spec())
    weights = random_weights(training)
    training.load_weights(weights)
    rows = tokens(length=CONTEXT + 1)
    w = doubles(weights, grad=True)
    reference_loss(w, rows, pattern).backward()
    found = training.gradients(rows)
    assert found.keys() == w.keys() == training.weights().keys()
    for name, grad in found.items():
        assert grad.dtype == np.float32
        assert distance(grad, w[name].grad.numpy()) < 2e-5, name


def test_bfloat16_stays_near_float32():
    recipe = load()
    exact, rounded = recipe.build(spec("float32")), recipe.build(spec("bfloat16"))
    weights = random_weights(exact)
    for training in (exact, rounded):
        training.load_weights(weights)
    logits = exact.logits(tokens())
    difference = (logits - rounded.logits(tokens())).abs()
    spread = logits.max() - logits.min()
    assert difference.mean() < 2**-9 * spread
    assert difference.max() < 2**-6 * spread
    a, b = (t.gradients(tokens(length=CONTEXT + 1)) for t in (exact, rounded))
    for name in a:
        assert distance(b[name], a[name]) < 0.06, name


def test_names_and_shapes_are_upstreams():
    shapes = {name: w.shape for name, w in load().build(spec()).weights().items()}
    expected = {
        "transformer.wte.weight": (VOCAB, 64),
        "lm_head.weight": (VOCAB, 64),
        "resid_lambdas": (4,),
        "x0_lambdas": (4,),
    }
    for i in range(4):
        for name in ("c_q", "c_k", "c_v", "c_proj"):
            expected[f"transformer.h.{i}.attn.{name}.weight"] = (64, 64)
        expected[f"transformer.h.{i}.mlp.c_fc.weight"] = (256, 64)
        expected[f"transformer.h.{i}.mlp.c_proj.weight"] = (64, 256)
    for i in (1, 3):
        expected[f"transformer.h.{i}.attn.ve_gate.weight"] = (2, 32)
        expected[f"value_embeds.{i}.weight"] = (VOCAB, 64)
    assert shapes == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_pure_and_causal(dtype):
    training = load().build(spec(dtype))
    training.load_weights(random_weights(training))
    rows = tokens()
    first = training.logits(rows)
    for cut in (1, 64, 127, 128, 150):
        other = rows.clone()
        other[:, cut:] = tokens(seed=9)[:, cut:]
        changed = training.logits(other)
        torch.testing.assert_close(changed[:, :cut], first[:, :cut], rtol=0, atol=1e-5)
        assert not torch.equal(changed[:, cut:], first[:, cut:])
    assert torch.equal(training.logits(rows), first)


def test_an_untrained_model_knows_nothing():
    logits = load().build(spec()).logits(tokens())
    nats = F.cross_entropy(logits.reshape(-1, VOCAB), tokens(seed=5).reshape(-1))
    assert abs(float(nats) - math.log(VOCAB)) < 0.01


# --- weights and seeds -----------------------------------------------------------------------------


def test_weights_go_there_and_back_bit_for_bit():
    recipe = load()
    training = recipe.build(spec("bfloat16"))
    training.step(Fixed(tokens(8, CONTEXT + 1)), 0.0)
    kept = training.weights()
    before = {name: w.copy() for name, w in kept.items()}
    other = recipe.build(spec("bfloat16", seed=2))
    other.load_weights(kept)
    assert all((w == before[name]).all() and w.dtype == np.float32 for name, w in other.weights().items())
    assert torch.equal(other.logits(tokens()), training.logits(tokens()))
    training.step(Fixed(tokens(8, CONTEXT + 1)), 0.0)  # neither what was handed out nor what was taken in moves along
    assert all((kept[name] == w).all() and (other.weights()[name] == w).all() for name, w in before.items())


def test_weights_that_do_not_fit_are_refused():
    training = load().build(spec())
    weights = training.weights()
    with pytest.raises(ValueError, match="has shape"):
        training.load_weights({**weights, "lm_head.weight": weights["lm_head.weight"][1:]})
    with pytest.raises(ValueError, match="extra"):
        training.load_weights({**weights, "extra": weights["lm_head.weight"]})
    del weights["resid_lambdas"]
    with pytest.raises(ValueError, match="resid_lambdas"):
        training.load_weights(weights)


def test_the_seed_alone_decides():
    recipe = load()
    trained = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(trained))  # must not matter
        training = recipe.build(spec("bfloat16", seed))
        for k in range(3):
            training.step(Fixed(tokens(4, CONTEXT + 1, seed=k)), 0.2)
        trained.append(training.weights())
    assert all((trained[0][name] == w).all() for name, w in trained[1].items())
    assert not (trained[0]["lm_head.weight"] == trained[2]["lm_head.weight"]).all()


# --- loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "vocab"), [(1, 3), (31, 97), (513, 97), (1100, 211)])
def test_the_loss_in_pieces_is_the_loss(n, vocab):
    recipe = load(LOSS_LOGITS=32 * 97)
    rng = torch.Generator().manual_seed(n)
    x = torch.randn(n, 48, generator=rng)
    head = torch.randn(vocab, 48, generator=rng) * 2  # logits of up to 50, far into the softcap
    targets = torch.randint(0, vocab, (n,), generator=rng)
    found_x, found_head = x.clone().requires_grad_(), head.clone().requires_grad_()
    found = recipe.SoftcappedLoss.apply(found_x, found_head, targets) * 3
    found.backward()
    x, head = x.double().requires_grad_(), head.double().requires_grad_()
    expected = F.cross_entropy(15 * torch.tanh(x @ head.T / 15), targets) * 3
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert distance(found_x.grad.numpy(), x.grad.numpy()) < 1e-5
    assert distance(found_head.grad.numpy(), head.grad.numpy()) < 1e-5


# --- optimizer -----------------------------------------------------------------------------------------


def reference_muon(w, g, m, v, lr, momentum, decay):
    """One step on one matrix; returns the new weight, momentum and second moment."""
    coefficients = (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    )
    m = momentum * m + (1 - momentum) * g
    x = (1 - momentum) * g + momentum * m
    x = x / (np.linalg.norm(x) * 1.02 + 1e-6)
    for a, b, c in coefficients:
        gram = x.T @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    rows, columns = w.shape
    axis = 1 if rows >= columns else 0
    mean = (x**2).mean(axis, keepdims=True)
    v = 0.95 * v + 0.05 * mean
    scaled = x / np.sqrt(np.maximum(v, 1e-10))
    x = scaled * np.linalg.norm(x) / np.linalg.norm(scaled)
    lr *= max(1.0, rows / columns) ** 0.5
    return w - lr * x - lr * decay * w * ((x * w) >= 0), m, v


@pytest.mark.parametrize("shape", [(48, 48), (64, 16), (16, 64), (2, 32)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_muon_is_the_reference(shape, dtype, tolerance):
    recipe = load()
    rng = np.random.default_rng(3)
    expected = rng.standard_normal((3, *shape)) * 0.1
    params = [torch.from_numpy(w).float().requires_grad_() for w in expected]
    muon = recipe.Muon(params, dtype)
    m = np.zeros_like(expected)
    v = np.zeros_like(expected[:, :, :1] if shape[0] >= shape[1] else expected[:, :1])
    start = expected.copy()
    for step in range(3):
        grads = rng.standard_normal((3, *shape)) * 10.0**-step
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.from_numpy(g).float()
        muon.step(0.03, 0.9, 0.2)
        for i in range(3):
            expected[i], m[i], v[i] = reference_muon(expected[i], grads[i], m[i], v[i], 0.03, 0.9, 0.2)
    for p, w, w0 in zip(params, expected, start, strict=True):
        assert distance(p.detach().numpy() - w0, w - w0) < tolerance


def test_orthogonalise_brings_singular_values_to_one():
    g = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(load().orthogonalise(g, torch.float32))
    assert (values > 0.6).all()
    assert (values < 1.3).all()


def test_one_update_is_adamw_and_muon_at_the_scheduled_rates():
    recipe = load()
    training = recipe.build(spec())
    weights = random_weights(training)
    training.load_weights(weights)
    rng = np.random.default_rng(1)
    moments = {name: (np.zeros(w.shape), np.zeros(w.shape)) for name, w in weights.items()}
    scale = (64 / 768) ** -0.5
    progress = 0.75  # half way down the warm-down
    for step in (1, 2):
        grads = {name: rng.standard_normal(w.shape) for name, w in weights.items()}
        for name, p in training.model.weights.items():
            p.grad = torch.from_numpy(grads[name]).float()
        training.update(progress)
        for name in weights:
            if name.startswith("transformer.h."):
                continue
            rate, (b1, b2) = {
                "lm_head.weight": (0.004 * scale, (0.8, 0.95)),
                "resid_lambdas": (0.005, (0.8, 0.95)),
                "x0_lambdas": (0.5, (0.96, 0.95)),
            }.get(name, (0.6 * scale, (0.8, 0.95)))
            m, v = moments[name]
            m[...] = b1 * m + (1 - b1) * grads[name]
            v[...] = b2 * v + (1 - b2) * grads[name] ** 2
            update = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + 1e-10)
            weights[name] = weights[name] - 0.5 * rate * update
    for name, w in training.weights().items():
        if not name.startswith("transformer.h."):
            np.testing.assert_allclose(w, weights[name], rtol=2e-5, atol=2e-6, err_msg=name)
        assert training.model.weights[name].grad is None


def test_accumulated_parts_equal_one_batch():
    """Odd batches too: 5 rows in parts of 5, 2 and 1."""
    rows = tokens(5, CONTEXT + 1)
    grads, losses = [], []
    for part in (8, 2, 1):
        recipe = load(TOTAL_BATCH_SIZE=5 * CONTEXT + 17, DEVICE_BATCH_SIZE=part)
        training = recipe.build(spec())
        training.load_weights(random_weights(training))
        training.update = lambda progress: None  # leaves the gradients where they are
        losses.append(float(training.step(Fixed(rows), 0.0)))
        grads.append({name: p.grad.numpy() for name, p in training.model.weights.items()})
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    for other in grads[1:]:
        for name, grad in other.items():
            assert distance(grad, grads[0][name]) < 1e-5, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns(dtype):
    training = load(DEPTH=2, ASPECT_RATIO=32).build(spec(dtype))
    text = torch.arange(4 * (CONTEXT + 1)).view(4, -1) * 7 % VOCAB
    losses = [float(training.step(Fixed(text), k / 60)) for k in range(60)]
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.05)
    assert losses[-1] < 0.1


# --- schedules and display -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.5, 1.0), (0.6, 1.0), (0.8, 0.6), (0.9, 0.4), (1.0, 0.2)],
)
def test_rates_follow_progress(progress, expected):
    recipe = load(WARMUP_RATIO=0.1, WARMDOWN_RATIO=0.4, FINAL_LR_FRAC=0.2)
    assert recipe.lr_multiplier(progress) == pytest.approx(expected)


@pytest.mark.parametrize("warmdown", [0.0, 0.5, 1.0])
def test_rates_are_defined_everywhere(warmdown):
    recipe = load(WARMUP_RATIO=0.0, WARMDOWN_RATIO=warmdown, FINAL_LR_FRAC=0.0)
    rates = [recipe.lr_multiplier(p / 100) for p in range(101)]
    assert all(0 <= r <= 1 for r in rates)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1.0


def test_momentum_and_decay():
    recipe = load(WEIGHT_DECAY=0.3)
    assert [recipe.muon_momentum(s) for s in (0, 150, 300, 9999)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert [recipe.weight_decay(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.3, 0.15, 0.0])


def test_description_counts_flops():
    training = load(WINDOW_PATTERN="SL").build(spec())
    found = json.loads(json.dumps(dict(training.describe())))
    matrices = VOCAB * 64 + 4 * 12 * 64 * 64 + 2 * 2 * 32
    windows = CONTEXT // 2 + CONTEXT + CONTEXT // 2 + CONTEXT
    assert found["flops_per_token"] == 6 * matrices + 12 * 64 * windows
    assert (found["depth"], found["dim"], found["heads"]) == (4, 64, 2)
    assert found["tokens_per_step"] == 4 * CONTEXT


def test_the_file_passes_the_lint_and_its_ranges_hold_its_values():
    from core import guard, recipe

    source = PATH.read_bytes()
    assert guard.check(source) == []
    searched = {n: c for n, c in recipe.constants(source.decode()).items() if c.search is not None}
    assert {"DEPTH", "MATRIX_LR", "EMBEDDING_LR", "WINDOW_PATTERN", "TOTAL_BATCH_SIZE"} <= searched.keys()
    assert all(c.search.contains(c.value) for c in searched.values())


# --- the benchmark's peer -------------------------------------------------------------------------------


PEER = """
import torch
from kernels import get_kernel
cap = torch.cuda.get_device_capability()
fa3 = get_kernel("x").flash_attn_interface
from prepare import evaluate_bpb
from dataclasses import dataclass
@dataclass
class GPTConfig:
    n_layer: int = 1
class GPT:
    def attend(self, q, k, v, window): return fa3.flash_attn_func(q, k, v, causal=True, window_size=window)
MATRIX_LR = 0.04; EMBEDDING_LR = 0.6; UNEMBEDDING_LR = 0.004; SCALAR_LR = 0.5; ADAM_BETAS = (0.8, 0.95)
raise SystemExit("the training loop was run")
"""


def test_the_benchmark_takes_definitions_of_a_peer_and_replaces_its_attention(tmp_path):
    from benchmarks.peers import load_peer
    from benchmarks.step import windowed_sdpa

    (tmp_path / "train.py").write_text(PEER)
    given = {"fa3": SimpleNamespace(flash_attn_func=windowed_sdpa)}
    peer = load_peer(tmp_path / "train.py", given, ("GPT", "GPTConfig"))
    assert peer["GPTConfig"]().n_layer == 1
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 20, 3, 8, generator=rng, dtype=torch.float64) for _ in range(3))
    gaps = torch.arange(20)[:, None] - torch.arange(20)
    for window in (20, 7):
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(8)
        scores = scores.masked_fill((gaps < 0) | (gaps > window), -math.inf)
        expected = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
        torch.testing.assert_close(peer["GPT"]().attend(q, k, v, (window, 0)), expected)


def test_the_benchmark_names_what_a_peer_lacks(tmp_path):
    from benchmarks.peers import load_peer
    from core.errors import UserError

    with pytest.raises(UserError, match="does not exist"):
        load_peer(tmp_path / "train.py", {}, ("GPT", "GPTConfig"))
    (tmp_path / "train.py").write_text("X = 1\n")
    with pytest.raises(UserError, match="GPTConfig"):
        load_peer(tmp_path / "train.py", {}, ("GPT", "GPTConfig"))


def test_the_benchmark_measures_its_own_side():
    from benchmarks.step import Shapes, measure, our_side

    shapes = Shapes(depth=2, dim=32, head_dim=32, context=32, vocab=64, tokens=64, steps=2)
    found = measure(our_side(shapes), shapes)
    assert len(found["seconds"]) == 2
    assert set(found["split"]) == {"data", "forward and loss", "backward", "optimizer"}
    assert isinstance(SimpleNamespace(**found).peak_memory, int)
