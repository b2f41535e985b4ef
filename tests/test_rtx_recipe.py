"""The RTX recipe without Triton and without a card, for real on the CPU: parity, memory kept, float16, back-off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends import reference  # noqa: E402 - after the skip
from backends.rtx.memory import Shape, peak, ways  # noqa: E402
from core import guard  # noqa: E402
from core.contract import Spec  # noqa: E402
from core.recipe import replace as replace_constants  # noqa: E402
from kernels import plain  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RECIPE = (ROOT / "backends" / "rtx" / "train.py").read_bytes()
BLOCKED = "import sys; sys.modules['triton'] = None"  # as where it is not installed


def in_process(code: str, **env: str) -> str:
    """Run Python in a process of its own; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_without_triton_it_computes_the_reference():
    code = """
from pathlib import Path
from backends import reference
from backends.cpu.device import open_device
from core.recipe import replace
from kernels import portable
import torch
assert portable.obstacle(torch.device("cpu")) == "triton is not installed"
for recompute, more in (("nothing", 0), ("nothing", 1), ("hidden", 0), ("hidden", 1), ("layer", 0)):
    source = Path("backends/rtx/train.py").read_text()
    found = replace(source, {"RECOMPUTE": recompute, "RECOMPUTE_MORE": more})
    checks = list(reference.compare(reference.computed(found.encode(), open_device()), reference.reference()))
    assert len(checks) > 60
    print(recompute, more, [c for c in checks if not c.passed])
"""
    found = in_process(BLOCKED + code)
    assert found.splitlines() == ["nothing 0 []", "nothing 1 []", "hidden 0 []", "hidden 1 []", "layer 0 []"]


def test_the_recipe_passes_the_lint():
    assert not guard.check(RECIPE)


# --- the recipe in this process, without Triton --------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread():
    """Small products gain nothing from more, and wait for each other where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Rows:
    """`contract.Batches` of seeded random tokens."""

    def __init__(self, vocab):
        self.random, self.vocab = np.random.default_rng(0), vocab

    def next(self, rows, length):
        return torch.from_numpy(self.random.integers(0, self.vocab, (rows, length + 1)))


def made(vocab=97, context=64, dtype="float32", **constants):
    """The recipe's module and its training at these constants."""
    given = {"DEPTH": 3, "ASPECT_RATIO": 32, "HEAD_DIM": 32, "TOTAL_BATCH_SIZE": 4 * context, "DEVICE_BATCH_SIZE": 4}
    module = ModuleType("rtx_recipe")
    exec(compile(replace_constants(RECIPE.decode(), given | constants), "train.py", "exec"), module.__dict__)
    return module, module.build(Spec(vocab, context, 0, "cpu", dtype, 1, 0))


def kept(training, tokens):
    """Bytes of distinct storages that the graph of one loss holds beyond weights, as autograd packs them."""
    own = {w.untyped_storage().data_ptr() for w in training.model.weights.by_name().values()}
    own |= {x.untyped_storage().data_ptr() for x in (training.model.cos, training.model.sin, tokens)}
    found = {}

    def pack(x):
        found.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = training.model.loss(tokens)
    dim, vocab = training.model.dim, len(training.model.weights.singles["lm_head.weight"])
    weights = {(vocab, dim), (dim, dim), (3 * dim, dim), (4 * dim, dim), (dim, 4 * dim)}
    sizes = {
        p: x.untyped_storage().nbytes() for p, x in found.items() if p not in own and tuple(x.shape) not in weights
    }
    assert loss.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize(("recompute", "more"), ways(3))
@pytest.mark.parametrize(("depth", "ratio"), [(3, 32), (4, 64)])
def test_what_is_kept_per_token_is_what_the_formula_says(depth, ratio, recompute, more):
    rows, context, vocab = 5, 256, 97  # so that no tensor of the stream has the shape of a weight
    given = {"DEPTH": depth, "ASPECT_RATIO": ratio, "RECOMPUTE": recompute, "RECOMPUTE_MORE": more}
    module, training = made(vocab, context, "bfloat16", VE_GATE_CHANNELS=16, **given)
    tokens = Rows(vocab).next(rows, context)
    per_token = kept(training, tokens) / (rows * context)
    shape = Shape.of({n: getattr(module, n) for n in ("DEPTH", "ASPECT_RATIO", "HEAD_DIM")}, vocab, context)
    assert per_token == pytest.approx(shape.kept_per_token(recompute, more), rel=0.1)


def worst(training, batches):
    """Bytes that torch's CPU allocator held at the worst moment of a step, weights and moments included."""
    training.step(batches, 0.0)
    weights = training.model.weights
    tensors = [*weights.singles.values(), *weights.stacks.values()]
    tensors += [x for group in training.adam.groups for moments in group["moments"] for x in moments]
    tensors += [x for muon in training.muons for x in (muon.momentum, muon.second)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        training.step(batches, 0.5)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return sum(x.numel() * x.element_size() for x in tensors) + int(held.max())


@pytest.mark.parametrize(
    ("recompute", "more", "rows"),
    [("nothing", 0, 16), ("nothing", 2, 16), ("hidden", 0, 8), ("hidden", 1, 16), ("hidden", 3, 8), ("layer", 0, 16)],
)
def test_the_predicted_peak_is_within_a_tenth_of_the_allocators(recompute, more, rows):
    vocab, context, batch = 1024, 256, 16
    constants = {"DEPTH": 4, "ASPECT_RATIO": 64, "HEAD_DIM": 64, "TOTAL_BATCH_SIZE": batch * context}
    again = {"RECOMPUTE": recompute, "RECOMPUTE_MORE": more}
    _, training = made(vocab, context, "bfloat16", **constants, DEVICE_BATCH_SIZE=rows, **again)
    found = worst(training, Rows(vocab))
    predicted = peak(Shape.of(constants, vocab, context), rows, recompute, batch * context, fused=False, more=more)
    assert predicted == pytest.approx(found, rel=0.1)


# --- float16 -------------------------------------------------------------------------------------


def everything(training):
    """All that a step changes: weights and moments."""
    found = [torch.from_numpy(w) for w in training.weights().values()]
    found += [x.clone() for group in training.adam.groups for moments in group["moments"] for x in moments]
    return found + [x.clone() for muon in training.muons for x in (muon.momentum, muon.second)]


def test_float16_gradients_are_those_of_float32():
    tokens = Rows(97).next(4, 64)
    wide, narrow = (made(dtype=dtype)[1] for dtype in ("float32", "float16"))
    given = reference.checkpoint({name: w.shape for name, w in wide.weights().items()})
    for training in (wide, narrow):
        training.load_weights(given)
    wanted = wide.gradients(tokens)
    narrow.accumulate(tokens)
    assert narrow.scale.unscale(narrow.model.weights.all_gradients())
    for name, g in narrow.model.weights.gradients().items():
        size = np.sqrt(np.mean(wanted[name] ** 2))
        assert np.sqrt(np.mean((g.numpy() - wanted[name]) ** 2)) < 0.02 * size, name


def test_a_step_with_gradients_that_are_not_finite_changes_nothing_and_halves_the_scale():
    _, training = made(dtype="float16")
    batches = Rows(97)
    for _ in range(3):
        training.step(batches, 0.2)
    before, scale = everything(training), float(training.scale.scale)
    training.accumulate(batches.next(4, 64))
    next(iter(training.model.weights.stacks.values())).grad[0, 0, 0] = torch.inf
    training.update(0.2)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(training)))
    assert float(training.scale.scale) == scale / 2 and training.describe()["skipped_steps"] == 1
    training.step(batches, 0.2)
    assert not all(torch.equal(a, b) for a, b in zip(before, everything(training)))


def test_the_scale_doubles_after_enough_good_steps_and_is_never_read_in_a_step():
    module, training = made(dtype="float16", LOSS_SCALE_STEPS=3)
    scales = []
    for _ in range(7):
        training.scale.follow(torch.tensor(True))
        scales.append(float(training.scale.scale) / module.LOSS_SCALE)
    assert scales == [1, 1, 2, 2, 2, 4, 4]
    reads = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), given=None):
            reads.extend([function] if "_local_scalar_dense" in str(function) else [])
            return function(*arguments, **(given or {}))

    with Watched():
        training.accumulate(Rows(97).next(4, 64))
        training.update(0.2)
    assert not reads  # each would stop the host until the card is done


def test_training_in_float16_goes_as_in_float32():
    losses = []
    for dtype in ("float32", "float16"):
        _, training = made(dtype=dtype, TOTAL_BATCH_SIZE=8 * 64)
        tokens = Rows(97).next(8, 64)
        same = type("Same", (), {"next": lambda self, rows, length, t=tokens: t})()
        losses.append([float(training.step(same, 0.1)) for _ in range(6)])
    assert losses[0][-1] < losses[0][0] - 0.5
    assert np.allclose(losses[0], losses[1], rtol=0.03)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e15])
@pytest.mark.parametrize("kind", ["random", "one direction", "orthogonal"])
def test_orthogonalisation_in_float16_never_overflows(kind, size):
    g = torch.randn(2, 48, 160, generator=torch.Generator().manual_seed(1))
    if kind == "one direction":
        g = g[:, :, :1] @ g[:, :1]
    elif kind == "orthogonal":
        g = torch.linalg.svd(g, full_matrices=False)[2]
    found, wanted = (plain.orthogonalise(g * size, dtype, 5) for dtype in (torch.float16, torch.float32))
    assert torch.isfinite(found).all() and torch.linalg.matrix_norm(found, 2).max() < 1.7
    if size >= 1:  # below, the floor of the length decides
        assert (found * wanted).sum() > 0.95 * wanted.square().sum()


# --- out of memory -------------------------------------------------------------------------------

STARVED = """
import resource, torch
from test_rtx_recipe import Rows, made
torch.set_num_threads(1)
_, training = made(512, 256, "float32", DEPTH=4, ASPECT_RATIO=64, TOTAL_BATCH_SIZE=16*256, DEVICE_BATCH_SIZE=16)
_, calm = made(512, 256, "float32", DEPTH=4, ASPECT_RATIO=64, TOTAL_BATCH_SIZE=16*256, DEVICE_BATCH_SIZE=4)
wanted = [float(calm.step(rows, 0.1)) for rows in [Rows(512)] for _ in range(2)]
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 150 * 2**20,) * 2)
found = [float(training.step(rows, 0.1)) for rows in [Rows(512)] for _ in range(2)]
print(training.rows_at_once < 16, abs(found[0] - wanted[0]) < 1e-5, abs(found[1] - wanted[1]) < 1e-3)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the process's address space")
def test_a_step_that_runs_out_of_memory_goes_on_with_fewer_rows_and_the_same_result():
    """The operating system refuses the memory for real; the error is the CPU allocator's, not a card's."""
    found = in_process(f"{BLOCKED}; sys.path.insert(0, 'tests')\n{STARVED}", MALLOC_ARENA_MAX="1")
    assert found.strip() == "True True True"


def test_what_no_smaller_batch_can_mend_is_raised(monkeypatch):
    _, training = made(RECOMPUTE="layer", DEVICE_BATCH_SIZE=1)
    monkeypatch.setattr(training.model, "loss", lambda tokens: torch.empty(2**55))
    with pytest.raises(RuntimeError, match=r"can't allocate memory|not enough memory: you tried"):
        training.step(Rows(97), 0.1)
    _, training = made()
    monkeypatch.setattr(training.model, "loss", lambda tokens: torch.empty(2).view(3))
    with pytest.raises(RuntimeError, match="invalid for input"):
        training.step(Rows(97), 0.1)


def test_backing_off_halves_rows_then_makes_more_again_by_layers():
    _, training = made(DEPTH=5)
    seen = []
    for _ in range(8):
        training.back_off()
        told = training.describe()
        seen.append((told["rows_at_once"], told["recompute"], told["recompute_more"]))
    assert seen[:3] == [(2, "nothing", 0), (1, "nothing", 0), (1, "nothing", 2)]
    assert seen[3:] == [(1, "nothing", 4), (1, "hidden", 0), (1, "hidden", 2), (1, "hidden", 4), (1, "layer", 0)]


@pytest.mark.parametrize(
    ("recompute", "more", "wanted"),
    [
        ("nothing", 2, ["hidden", "hidden", "nothing"]),
        ("hidden", 1, ["layer", "hidden", "hidden"]),
        ("nothing", 9, ["hidden"] * 3),
        ("layer", 2, ["layer"] * 3),
    ],
)
def test_the_first_layers_make_more_again(recompute, more, wanted, monkeypatch):
    module, training = made(RECOMPUTE=recompute, RECOMPUTE_MORE=more)
    keeps, whole = [], []
    feed, checkpoint = module.feed, module.checkpoint
    monkeypatch.setattr(module, "feed", lambda *given, **by: keeps.append(given[5]) or feed(*given, **by))
    monkeypatch.setattr(module, "checkpoint", lambda f, w, i, *x, **k: whole.append(i) or checkpoint(f, w, i, *x, **k))
    training.model.loss(Rows(97).next(4, 64))
    assert keeps == [how != "hidden" for how in wanted]
    assert whole == [i for i, how in enumerate(wanted) if how == "layer"]
