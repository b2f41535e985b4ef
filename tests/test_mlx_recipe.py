"""The MLX recipe, run on the CPU: the same numbers as the CPU recipe, from the same checkpoint."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from core.contract import Spec
from core.paths import project_root

mx = pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")

VOCAB, CONTEXT = 97, 300  # neither is a multiple of anything; the context is longer than two blocks of queries
SMALL = {
    "DEPTH": 4,
    "ASPECT_RATIO": 16,
    "HEAD_DIM": 32,
    "WINDOW_PATTERN": "SSSL",
    "TOTAL_BATCH_SIZE": 4 * CONTEXT,
    "DEVICE_BATCH_SIZE": 8,
}


def load(backend, **constants):
    """A fresh copy of a backend's recipe with other constants."""
    path = project_root() / "backends" / backend / "train.py"
    spec = importlib.util.spec_from_file_location(f"{backend}_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {**SMALL, **constants}.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    return module


def spec(device="cpu", dtype="float32", seed=1):
    return Spec(VOCAB, CONTEXT, VOCAB - 1, device, dtype, seed, 0)


def tokens(rows=3, length=CONTEXT, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def both(**constants):
    """(MLX training, CPU training) with the same weights, none of them zero or one."""
    ours, theirs = (load(name, **constants).build(spec()) for name in ("mlx", "cpu"))
    rng = np.random.default_rng(5)
    spread = {"wte": 1.0, "value_embeds": 0.5, "lm_head": 0.5, "ve_gate": 0.3, "c_proj": 0.1}
    weights = {}
    for name, old in theirs.weights().items():
        std = next((s for part, s in spread.items() if part in name), 0.2)
        weights[name] = rng.normal(0.5 if old.ndim == 1 else 0.0, std, old.shape).astype(np.float32)
    ours.load_weights(weights)
    theirs.load_weights(weights)
    return ours, theirs


class Rows:
    """Batches cut from given rows, one after the other."""

    def __init__(self, rows, convert):
        self.rows, self.at, self.convert = rows, 0, convert

    def next(self, rows, length):
        found = self.rows[self.at : self.at + rows, : length + 1]
        self.at += rows
        return self.convert(found)


def to_mlx(x):
    return mx.array(x.astype(np.int32))


def close(ours, theirs, tolerance=2e-5):
    scale = max(1e-6, float(np.abs(theirs).max()))
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= tolerance * scale


def mostly_close(ours, theirs, tolerance=1e-4):
    """But for entries where noise decides a sign: Adam's first step takes only that of a gradient which is nearly zero,
    and cautious decay asks for that of update times weight."""
    scale = max(1e-6, float(np.abs(theirs).max()))
    assert np.quantile(np.abs(np.asarray(ours) - np.asarray(theirs)), 0.99) <= tolerance * scale


# --- the same numbers ------------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_the_cpu_recipe():
    ours, theirs = both()
    assert {n: w.shape for n, w in ours.weights().items()} == {n: w.shape for n, w in theirs.weights().items()}
    assert {w.dtype for w in ours.weights().values()} == {np.dtype(np.float32)}
    assert ours.describe() == theirs.describe()


@pytest.mark.parametrize("pattern", ["L", "SSSL"])
@pytest.mark.parametrize("length", [1, 127, 128, 129, CONTEXT])
def test_logits_are_those_of_the_cpu_recipe(pattern, length):
    ours, theirs = both(WINDOW_PATTERN=pattern)
    x = tokens(length=length)
    close(np.array(ours.logits(to_mlx(x))), theirs.logits(torch.from_numpy(x)).numpy())


@pytest.mark.parametrize("pattern", ["L", "SSSL"])
@pytest.mark.parametrize("length", [1, 129, CONTEXT, CONTEXT + 70])
def test_fused_attention_for_scoring_sees_what_training_sees(pattern, length):
    """On Metal scoring takes MLX's fused attention; elsewhere the same call is not fused, and says the same."""
    ours, _ = both(WINDOW_PATTERN=pattern)
    x = to_mlx(tokens(length=length))
    blocks = np.array(ours.logits(x))
    ours.model.fused = True
    close(np.array(ours.logits(x)), blocks)


@pytest.mark.parametrize(("pattern", "depth"), [("L", 1), ("SSSL", 4), ("SL", 3)])
def test_gradients_are_those_of_the_cpu_recipe(pattern, depth):
    ours, theirs = both(WINDOW_PATTERN=pattern, DEPTH=depth)
    x = tokens(length=CONTEXT + 1)
    found, wanted = ours.gradients(to_mlx(x)), theirs.gradients(torch.from_numpy(x))
    assert found.keys() == wanted.keys()
    for name in wanted:
        close(found[name], wanted[name], 1e-4)


def test_one_step_gives_the_weights_of_the_cpu_recipe():
    ours, theirs = both()
    x = tokens(rows=4, length=CONTEXT + 1)
    loss = float(ours.step(Rows(x, to_mlx), 0.7).item())
    wanted = float(theirs.step(Rows(x, torch.from_numpy), 0.7))
    assert loss == pytest.approx(wanted, rel=1e-5)
    before, after = theirs.weights(), ours.weights()
    for name in before:
        mostly_close(after[name], before[name])


def test_one_optimizer_step_from_the_same_gradients_is_equal():
    ours, theirs = both()
    rng = np.random.default_rng(3)
    grads = {n: rng.normal(0, 1e-2, w.shape).astype(np.float32) for n, w in ours.weights().items()}
    for step in range(3):
        rates = ours.rates(0.6)
        for optimizer in ours.optimizers:
            optimizer.step(ours.w, {n: mx.array(g) for n, g in grads.items()}, rates)
        ours.steps += 1
        for name, p in theirs.model.weights.items():
            p.grad = torch.from_numpy(grads[name].copy())
        theirs.update(0.6)
        for name, wanted in theirs.weights().items():
            mostly_close(np.array(ours.w[name]), wanted, 2e-6 * (step + 1))


def test_fifty_steps_learn_as_the_cpu_recipe_does():
    ours, theirs = both(DEPTH=2, ASPECT_RATIO=32)
    text = np.cumsum(np.random.default_rng(2).integers(0, 3, (200, CONTEXT + 1)), axis=1) % VOCAB
    a, b = Rows(text, to_mlx), Rows(text, torch.from_numpy)
    losses = np.array([(float(ours.step(a, i / 50).item()), float(theirs.step(b, i / 50))) for i in range(50)])
    assert losses[-5:, 0].mean() < 0.6 * losses[0, 0]
    assert losses[-5:, 0].mean() == pytest.approx(losses[-5:, 1].mean(), rel=0.05)


# --- what is particular to MLX -----------------------------------------------------------------------


def test_accumulated_parts_equal_one_batch():
    x = tokens(rows=4, length=CONTEXT + 1)
    found = []
    for rows in (4, 3, 1):
        training, _ = both(DEVICE_BATCH_SIZE=rows)
        training.step(Rows(x, to_mlx), 0.2)
        found.append(training.weights())
    for other in found[1:]:
        for name, wanted in found[0].items():
            mostly_close(other[name], wanted)


def test_rates_are_not_compiled_in():
    """A rate that had become a constant of the compiled step would be the first step's for ever."""
    training, _ = both()
    x = tokens(rows=8, length=CONTEXT + 1)
    batches = Rows(x, to_mlx)
    training.step(batches, 0.0)
    before = training.weights()
    training.step(batches, 1.0)  # the rate is zero at the end
    after = training.weights()
    for name in before:
        assert np.array_equal(before[name], after[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nothing_is_promoted_to_float32(dtype):
    recipe = load("mlx")
    training = recipe.build(spec(dtype=dtype))
    model, w, wanted = training.model, training.w, getattr(mx, dtype)
    x = mx.random.normal((1, 200, model.dim)).astype(wanted)
    t = to_mlx(tokens(rows=1, length=200))
    model.prepare(200)
    for layer in range(recipe.DEPTH):
        assert model.attention(w, x, layer, t, False).dtype == wanted
        assert model.mlp(w, x, layer).dtype == wanted
    assert recipe.norm(x).dtype == wanted
    assert model.stream(w, t).dtype == wanted
    grads = mx.grad(model.loss)(w, to_mlx(tokens(rows=1, length=201)))
    assert {g.dtype for g in grads.values()} == {mx.float32}


def dense(q, k, v, window):
    """Attention with a mask of T x T, written out."""
    T = q.shape[2]
    distance = mx.arange(T)[:, None] - mx.arange(T)
    mask = mx.where((distance >= 0) & (distance <= window), 0.0, -mx.inf)
    return mx.softmax(q @ k.swapaxes(-1, -2) + mask, axis=-1) @ v


@pytest.mark.parametrize("length", [1, 5, 128, 300, 512])
@pytest.mark.parametrize("window", [1, 64, 128, 200, 512])
def test_attention_in_blocks_is_attention(length, window):
    attend = load("mlx").make_attention(length, window)
    q, k, v, g = (mx.random.normal((2, 2, length, 32), key=mx.random.key(i)) for i in range(4))
    close(np.array(attend(q, k, v)), np.array(dense(q, k, v, window)))
    found = mx.grad(lambda *a: (attend(*a) * g).sum(), argnums=(0, 1, 2))(q, k, v)
    wanted = mx.grad(lambda *a: (dense(*a, window) * g).sum(), argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(found, wanted, strict=True):
        close(np.array(a), np.array(b), 1e-4)


@pytest.mark.parametrize("n", [1, 7, 64, 65])
def test_the_loss_in_pieces_is_the_loss(n):
    recipe = load("mlx", LOGITS_BYTES=4 * VOCAB * 16)  # 16 rows at a time
    rng = np.random.default_rng(n)
    x, head = mx.array(rng.normal(0, 2, (n, 24)), mx.float32), mx.array(rng.normal(0, 1, (VOCAB, 24)), mx.float32)
    target = mx.array(rng.integers(0, VOCAB, n), mx.int32)

    def plain(x, head):
        z = 15 * mx.tanh(x @ head.T / 15)
        return (mx.logsumexp(z, axis=-1) - mx.take_along_axis(z, target[:, None], axis=-1)[:, 0]).mean()

    def pieces(x, head):
        return recipe.make_loss([mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)])(x, head, target)

    close(np.array(pieces(x, head)), np.array(plain(x, head)))
    for a, b in zip(mx.grad(pieces, argnums=(0, 1))(x, head), mx.grad(plain, argnums=(0, 1))(x, head), strict=True):
        close(np.array(a), np.array(b), 1e-4)


def test_logits_are_pure_and_causal():
    training, _ = both()
    x = tokens(rows=2)
    whole = np.array(training.logits(to_mlx(x)))
    assert np.array_equal(whole, np.array(training.logits(to_mlx(x))))
    x[:, 200:] = (x[:, 200:] + 1) % VOCAB
    changed = np.array(training.logits(to_mlx(x)))
    assert np.array_equal(whole[:, :200], changed[:, :200])
    assert not np.array_equal(whole[:, 200:], changed[:, 200:])


def test_weights_go_there_and_back_bit_for_bit_and_are_used():
    training, _ = both()
    weights = training.weights()
    other = load("mlx").build(spec(seed=9))
    x = to_mlx(tokens())
    first = np.array(other.logits(x))
    other.load_weights(weights)
    assert all(np.array_equal(w, weights[name]) for name, w in other.weights().items())
    assert np.array_equal(np.array(other.logits(x)), np.array(training.logits(x)))
    assert not np.array_equal(first, np.array(other.logits(x)))
    other.step(Rows(tokens(rows=4, length=CONTEXT + 1), to_mlx), 0.1)
    assert not np.array_equal(other.weights()["lm_head.weight"], weights["lm_head.weight"])


def test_weights_that_do_not_fit_are_refused():
    training = load("mlx").build(spec())
    weights = training.weights()
    with pytest.raises(ValueError, match="lm_head"):
        training.load_weights({n: w for n, w in weights.items() if n != "lm_head.weight"})
    with pytest.raises(ValueError, match="shape"):
        training.load_weights({**weights, "lm_head.weight": np.zeros((3, 3), np.float32)})


def test_the_seed_alone_decides():
    recipe = load("mlx")
    a, b, c = (recipe.build(spec(seed=s)).weights() for s in (4, 4, 5))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(a["transformer.wte.weight"], c["transformer.wte.weight"])


def test_the_process_holds_no_torch():
    code = (
        "import sys, json; from backends.mlx import device, train; from core.contract import Spec;"
        "d = device.open_device(); t = train.build(Spec(64, 32, 63, d.name, d.dtype.value, 1, 0));"
        "print(json.dumps([d.name, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project_root(), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[1] is False


def test_the_file_passes_the_lint_and_its_ranges_hold_its_values():
    from core import guard, recipe

    source = (project_root() / "backends" / "mlx" / "train.py").read_bytes()
    assert guard.check(source) == []
    found = recipe.constants(source.decode())
    assert {"DEPTH", "TOTAL_BATCH_SIZE", "WINDOW_PATTERN", "MATRIX_LR"} <= found.keys()
    assert all(c.search is None or c.search.contains(c.value) for c in found.values())


# --- the device ---------------------------------------------------------------------------------------


def test_the_device_turns_logits_into_nats():
    from backends.mlx.device import open_device
    from core import evaluate

    device = open_device()
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 5, (3, 50, VOCAB)).astype(np.float32), rng.integers(0, VOCAB, (3, 50))
    close(device.nats(mx.array(logits), targets), evaluate.nats(logits, targets))
    with pytest.raises(ValueError, match="shape"):
        device.nats(mx.array(logits), targets[:2])
    for bad in (np.nan, np.inf, -np.inf):
        broken = logits.copy()
        broken[2, 49, 3] = bad
        with pytest.raises(ValueError, match="not finite"):
            device.nats(mx.array(broken), targets)


def test_the_device_says_what_it_is():
    from backends.mlx.device import open_device

    device = open_device()
    assert device.name in ("cpu", "gpu")
    assert device.dtype.value == ("float32" if device.name == "cpu" else "bfloat16")
    memory = device.memory()
    assert 0 < memory.used <= memory.peak <= memory.limit
    assert device.peak().flops_per_second > 1e8
    assert device.to_numpy(mx.ones((2, 3), mx.bfloat16)).dtype == np.float32
    assert device.from_numpy(np.array([[1, 2]])).dtype == mx.int32


def test_the_loss_of_a_step_is_one_number():
    training = load("mlx").build(spec())
    loss = training.step(Rows(tokens(rows=4, length=CONTEXT + 1), to_mlx), 0.0)
    assert loss.shape == ()
    assert np.isfinite(float(loss.item()))
