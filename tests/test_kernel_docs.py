"""kernels/README.md: what a recipe may import is there, and its edits of the recipe do what it says of them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

import written_out  # noqa: E402 - after the skip

from core import guard  # noqa: E402
from core.contract import Spec  # noqa: E402
from core.paths import project_root  # noqa: E402
from core.recipe import replace  # noqa: E402

SMALL = {"DEPTH": 3, "ASPECT_RATIO": 32, "HEAD_DIM": 32, "TOTAL_BATCH_SIZE": 256, "DEVICE_BATCH_SIZE": 2}
VOCAB, LENGTH = 97, 64


def built(source: str):
    """A training of it whose weights are none at zero, float32."""
    module = ModuleType("train")
    exec(compile(replace(source, SMALL), "train.py", "exec"), module.__dict__)
    made = module.build(Spec(VOCAB, LENGTH, VOCAB - 1, "cpu", "float32", 1, 0))
    rng = torch.Generator().manual_seed(2)
    weights = {n: w + 0.1 * torch.randn(w.shape, generator=rng).numpy() for n, w in sorted(made.weights().items())}
    made.load_weights(weights)
    return made


@pytest.fixture(scope="module")
def shipped():
    return built((project_root() / "backends" / "rtx" / "train.py").read_text("utf-8"))


def tokens():
    return torch.randint(VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("sections", [["first"], ["second"], ["first", "second"]])
def test_halves_written_out_compute_what_the_shipped_layer_does(sections, shipped):
    made = built(written_out.recipe("rtx", sections))
    torch.testing.assert_close(made.logits(tokens()[:, :-1]), shipped.logits(tokens()[:, :-1]))
    found, wanted = made.gradients(tokens()), shipped.gradients(tokens())
    assert found.keys() == wanted.keys()
    for name, g in found.items():
        torch.testing.assert_close(g, wanted[name], msg=lambda said, name=name: f"{name}: {said}")


def test_the_other_loss_is_the_shipped_one_and_z_loss(shipped):
    made = built(written_out.recipe("rtx", ["loss"]))
    logits = shipped.logits(tokens()[:, :-1])
    wanted = shipped.model.loss(tokens()) + 1e-4 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(made.model.loss(tokens()), wanted)
    assert set(made.gradients(tokens())) == set(shipped.gradients(tokens()))


@pytest.mark.parametrize("backend", ["cuda", "rtx"])
def test_the_guard_takes_them_all_together(backend):
    source = written_out.recipe(backend)
    assert not guard.check(source.encode())
    tree = ast.parse(source)
    assert {"attend", "feed", "softcapped_loss"}.isdisjoint(n.id for n in ast.walk(tree) if isinstance(n, ast.Name))


def arguments(function) -> list[str]:
    if isinstance(function, torch.library.CustomOpDef):
        return [a.name for a in getattr(torch.ops.autoresearch, function._name).default._schema.arguments]
    return list(inspect.signature(function).parameters)


def test_what_the_table_names_can_be_imported_and_takes_what_it_says():
    """But for `settled`, of whose result it tells."""
    pytest.importorskip("triton")
    text = (project_root() / "kernels" / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (`kernels[^|]*) \| `(\w+)\(([^`|]*)\)[^`|]*` \|", text, re.M)
    assert {name for _, name, _ in rows} >= {"attend", "feed", "last_norm", "attention", "softcapped_loss", "linear"}
    for places, name, told in rows:
        for place in re.findall(r"`(kernels\.\w+)`", places):
            given = arguments(getattr(importlib.import_module(place), name))
            asked = [part.strip() for part in told.split(",") if part.strip() != "..."]
            assert given[: len(asked)] == asked or name == "settled", f"{place}.{name}({given})"


def test_what_the_mlx_recipe_imports_written_out_is_the_same():
    mx = pytest.importorskip("mlx.core")
    from kernels.qk_norm_rope import qk_norm_rope

    lines = {}
    (block,) = written_out.blocks("mlx")
    exec(f"def written(x, cos, sin, eps, mx):\n{block}", lines)
    x = mx.random.normal((2, 5, 3, 8), key=mx.random.key(1)).astype(mx.bfloat16)
    angle = mx.random.uniform(shape=(5, 4), key=mx.random.key(2))
    found, wanted = (
        f(x, mx.cos(angle), mx.sin(angle), 2.0**-23, *more)
        for f, more in ((lines["written"], [mx]), (qk_norm_rope, []))
    )
    assert found.dtype == wanted.dtype and mx.array_equal(found, wanted)
