"""Constants of the recipes that a profile may set and the reference numbers leave at upstream's values: decay of
embeddings, RoPE's base, what weights start from, the rise of Muon's momentum, the epsilon of the layers' scalars. They
mean the same in every recipe."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import backends  # noqa: E402 - after the skip
from backends import reference  # noqa: E402
from backends.cpu.device import open_device  # noqa: E402
from core.contract import Spec  # noqa: E402
from core.recipe import replace  # noqa: E402

DECAYS = {"EMBEDDING_DECAY": 0.4, "VALUE_DECAY": 0.6, "UNEMBEDDING_DECAY": 0.8}
STARTS = {"INIT_SCALE": 0.5, "X0_INIT": 0.25, "ROPE_BASE": 200.0}
LIBRARY = {"cpu": "torch", "rtx": "torch", "cuda": "triton", "mlx": "mlx.core"}


def source(backend: str, **constants) -> bytes:
    return replace(backends.load(backend).recipe().decode(), constants).encode()


def built(backend: str, dtype: str, **constants):
    """The recipe as a module, and a small training of it on the CPU."""
    pytest.importorskip(LIBRARY[backend])
    module = ModuleType("train")
    small = {"DEPTH": 2, "ASPECT_RATIO": 64, "HEAD_DIM": 64, "TOTAL_BATCH_SIZE": 4096, "DEVICE_BATCH_SIZE": 128}
    exec(compile(source(backend, **small, **constants), "train.py", "exec"), module.__dict__)
    return module, module.build(Spec(97, 32, 96, "cpu", dtype, 1, 0))


@pytest.fixture(scope="module")
def wanted() -> dict[str, list[float]]:
    """By the CPU recipe, with all of them set."""
    computed = reference.computed(source("cpu", **DECAYS, **STARTS), open_device())
    return {name: reference.numbers(array) for name, array in computed.items()}


def apart(**constants) -> set[str]:
    """What the CPU recipe computes other than the reference with these."""
    computed = reference.computed(source("cpu", **constants), open_device())
    return {c.name for c in reference.compare(computed, reference.reference()) if not c.passed}


def test_decays_change_the_steps_of_their_weights_alone():
    assert apart(**DECAYS) == {
        f"step of {name}"
        for name in ("transformer.wte.weight", "value_embeds.1.weight", "value_embeds.3.weight", "lm_head.weight")
    }


def test_ropes_base_changes_the_model():
    assert {"logits", "loss"} <= apart(ROPE_BASE=200.0)


@pytest.mark.parametrize("backend", ["rtx", "mlx"])
def test_every_recipe_computes_the_same_with_them(backend, wanted, request):
    library = pytest.importorskip(LIBRARY[backend])
    if backend == "mlx":  # a graph that is new is half a minute of g++
        library.disable_compile()
        request.addfinalizer(library.enable_compile)
    device = open_device() if backend == "rtx" else backends.load(backend).open_device()
    checks = list(reference.compare(reference.computed(source(backend, **DECAYS, **STARTS), device), wanted))
    assert len(checks) > 60 and not [c for c in checks if not c.passed]


@pytest.mark.parametrize("backend", list(LIBRARY))
def test_what_weights_start_from_and_the_rise_of_momentum(backend):
    module, training = built(backend, "float32", **STARTS, MOMENTUM_STEPS=100)
    weights = training.weights()
    reach = 0.5 * (3 / 128) ** 0.5
    for name in ("transformer.h.0.attn.c_q.weight", "transformer.h.1.mlp.c_fc.weight", "value_embeds.1.weight"):
        assert 0.99 * reach < np.abs(weights[name]).max() <= reach, name
    assert weights["x0_lambdas"].tolist() == [0.25, 0.25]
    found = [module.muon_momentum(step) for step in (0, 50, 100, 1000)]
    assert found == pytest.approx([0.85, 0.9, 0.95, 0.95])


@pytest.mark.parametrize("backend", ["cpu", "rtx", "cuda"])
def test_decay_is_pytorchs(backend):
    """Three steps beside torch.optim.AdamW's."""
    pytest.importorskip(LIBRARY[backend])
    module = ModuleType("train")
    exec(compile(source(backend), "train.py", "exec"), module.__dict__)
    rng = torch.Generator().manual_seed(1)
    ours = torch.randn(5, 7, generator=rng).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    adam = module.AdamW([{"params": [ours], "lr": 0.3, "betas": (0.8, 0.95), "decay": 0.2}])
    wanted = torch.optim.AdamW([theirs], lr=0.3, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.2)
    for _ in range(3):
        ours.grad = torch.randn(5, 7, generator=rng)
        theirs.grad = ours.grad.clone()
        adam.step()
        wanted.step()
    torch.testing.assert_close(ours, theirs)


class Rows:
    """`contract.Batches` of seeded tokens."""

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(2)

    def next(self, rows: int, length: int):
        return torch.randint(97, (rows, length + 1), generator=self.rng)


@pytest.mark.parametrize("backend", ["cpu", "rtx"])
def test_the_first_step_can_leave_the_scalars_of_layers_where_they_are(backend):
    """Layers write nothing yet and the stream is normed in the end, so no scalar matters: gradients are what bfloat16
    rounds off. Upstream's epsilon, 1e-10, makes whole steps of them: 0.1 becomes 0.6 or -0.4 in all layers at once."""
    _, training = built(backend, "bfloat16", SCALAR_EPSILON=1e-5)
    training.step(Rows(), 0.0)
    weights = training.weights()
    np.testing.assert_allclose(weights["x0_lambdas"], 0.1, atol=0.1)
    np.testing.assert_allclose(weights["resid_lambdas"], 1.0, atol=0.001)
    training.step(Rows(), 0.0)
    assert np.abs(training.weights()["x0_lambdas"] - weights["x0_lambdas"]).min() > 0.05, "then they matter"
    if backend == "rtx":  # as cuda and upstream; the stream of cpu is float32
        _, training = built(backend, "bfloat16")
        training.step(Rows(), 0.0)
        assert np.abs(training.weights()["x0_lambdas"] - 0.1).min() > 0.4


@pytest.mark.parametrize(
    ("epsilon", "gradient", "share"), [(1e-5, 4e-7, 0.04), (1e-5, -4e-7, -0.04), (1e-5, 0.02, 1.0), (1e-10, 4e-7, 1.0)]
)
@pytest.mark.parametrize("backend", list(LIBRARY))
def test_what_a_gradient_of_scalars_moves(backend, epsilon, gradient, share):
    """In shares of their rate: with 1e-5 rounding errors next to nothing, anything else the whole of it."""
    module, training = built(backend, "float32", SCALAR_EPSILON=epsilon)
    before = training.weights()
    if backend == "mlx":
        import mlx.core as mx

        grads = {name: mx.full(w.shape, gradient) for name, w in training.w.items()}
        for optimizer in training.optimizers:
            optimizer.step(training.w, grads, training.rates(0.0))
    else:
        for group in training.adam.groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, gradient)
        training.adam.step()
    moved = {name: before[name] - after for name, after in training.weights().items()}
    np.testing.assert_allclose(moved["x0_lambdas"], share * module.SCALAR_LR, rtol=0.05)
    np.testing.assert_allclose(moved["resid_lambdas"], share * module.SCALAR_LR * 0.01, rtol=0.05)
    whole = np.sign(gradient) * module.UNEMBEDDING_LR * (128 / 768) ** -0.5
    np.testing.assert_allclose(moved["lm_head.weight"], whole, rtol=0.01)
