"""The CUDA recipe on a CPU, its kernels interpreted: logits, loss, gradients and a step of the reference numbers."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import written_out
from interpreted.watched import watched
from torch._dynamo.testing import CompileCounterWithBackend

from backends import reference
from backends.cpu.device import open_device
from core import guard
from core.contract import Spec
from core.paths import project_root
from core.recipe import replace
from kernels import attention_tiles, linear_relu2

RECIPE = (project_root() / "backends" / "cuda" / "train.py").read_bytes()
SMALL = {"DEPTH": 4, "ASPECT_RATIO": 16, "HEAD_DIM": 32, "TOTAL_BATCH_SIZE": 128, "DEVICE_BATCH_SIZE": 2}


def built(length=32, source=None, **constants):
    module = ModuleType("train")
    exec(compile(replace(source or RECIPE.decode(), {**SMALL, **constants}), "train.py", "exec"), module.__dict__)
    return module, module.build(spec(length))


def spec(length=32):
    return Spec(64, length, 63, "cpu", "float32", 1, 0)


def test_the_recipe_computes_the_reference_and_its_kernels_are_sound(monkeypatch):
    """A whole step, every access of it watched, its programs in random order."""
    monkeypatch.setattr(attention_tiles, "INTERPRETED", attention_tiles.Tile(64, 64, 1, 1))  # fewer programs: a minute
    with watched() as watch:
        computed = reference.computed(RECIPE, open_device())
    assert watch.found == [] and watch.launches > 100 and watch.accesses > 10**7
    checks = list(reference.compare(computed, reference.reference()))
    assert len(checks) > 60
    assert not [check for check in checks if not check.passed]


@pytest.mark.parametrize(("attention", "mlp"), [("auto", "auto"), ("reference", "torch")])
def test_the_loss_is_one_graph_and_the_second_build_compiles_nothing(attention, mlp, monkeypatch):
    """As on a card, where the first build is before the clock and the second one on it."""
    module, made = built(ATTENTION=attention, MLP=mlp)
    monkeypatch.setitem(sys.modules, "train", module)  # as the worker does: torch.compile looks up functions there
    graphs = CompileCounterWithBackend("aot_eager")
    tokens = torch.randint(64, (2, 33))
    wanted = made.gradients(tokens)
    whole, again = (
        torch.compile(training.model.loss, backend=graphs, dynamic=False, fullgraph=True)
        for training in (made, module.build(spec()))
    )
    torch.testing.assert_close(whole(tokens), made.model.loss(tokens))
    whole(tokens).backward()
    found = made.model.weights.gradients()
    assert found.keys() == wanted.keys()
    for name, g in found.items():
        torch.testing.assert_close(g, torch.from_numpy(wanted[name]), msg=lambda said, name=name: f"{name}: {said}")
    again(tokens).backward()
    assert graphs.frame_count == 1


def test_what_the_readme_of_kernels_writes_out_computes_the_same():
    source = written_out.recipe("cuda", ["first", "second"])
    (_, made), (_, wanted) = built(source=source, DEPTH=2), built(DEPTH=2)
    wanted.load_weights({n: w + 0.1 for n, w in wanted.weights().items()})  # none is zero
    made.load_weights(wanted.weights())
    tokens = torch.randint(64, (2, 33))
    torch.testing.assert_close(made.logits(tokens[:, :-1]), wanted.logits(tokens[:, :-1]))
    found = made.gradients(tokens)
    for name, g in wanted.gradients(tokens).items():
        torch.testing.assert_close(found[name], g, msg=lambda said, name=name: f"{name}: {said}")


def test_a_second_build_takes_the_rows_that_the_first_one_measured(monkeypatch):
    module, made = built()
    measured = iter([(2, "measured"), (1, "measured again")])
    monkeypatch.setattr(module, "fitted_rows", lambda *given: next(measured))
    assert made.fitted(2) == module.build(spec()).fitted(2) == (2, "measured")
    assert module.build(spec(16)).fitted(2) == (1, "measured again")


def test_the_recipe_passes_the_lint():
    assert not guard.check(RECIPE)


def test_attention_is_told_for_each_window_and_can_be_forced():
    _, made = built()
    told = {k: v for k, v in made.describe().items() if k.startswith("attention")}
    assert told.keys() == {"attention over 16", "attention over 32"}
    assert all(text.startswith("triton: its kernels are interpreted") for text in told.values())
    _, forced = built(ATTENTION="reference")
    assert forced.describe()["attention over 32"] == "reference: forced"
    tokens = torch.randint(64, (2, 32))
    torch.testing.assert_close(made.logits(tokens), forced.logits(tokens))
    with pytest.raises(ValueError, match="'flash' cannot do this: knows no windows; 16 of 32"):
        built(ATTENTION="flash")


def test_the_mlp_is_told_and_can_be_forced(monkeypatch):
    small = {"DEPTH": 2, "ATTENTION": "reference"}  # attention's programs would take most of the time
    _, made = built(**small)
    assert made.describe()["mlp"].startswith("triton: its kernels are interpreted")
    _, forced = built(**small, MLP="torch")
    assert forced.describe()["mlp"] == "torch: forced"
    monkeypatch.setattr(linear_relu2, "choose", lambda configs, x: pytest.fail("a fused product was made"))
    tokens = torch.randint(64, (2, 33))
    found = forced.gradients(tokens)
    monkeypatch.undo()
    for name, g in made.gradients(tokens).items():
        torch.testing.assert_close(found[name], g, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")
    with pytest.raises(ValueError, match="no MLP called 'cublas'; known: triton, torch"):
        built(MLP="cublas")


@pytest.mark.parametrize(("head", "words"), [(33, "HEAD_DIM = 33 is odd"), (256, "")])
def test_a_head_that_no_kernel_takes_is_told(head, words):
    """Falls to the reference, with the reason in the record, or is refused in one line."""
    if words:
        with pytest.raises(ValueError, match=words):
            built(HEAD_DIM=head)
        return
    _, made = built(HEAD_DIM=head, DEPTH=2)
    assert made.describe()["attention over 32"].startswith("reference: ")
    with pytest.raises(ValueError, match="head size 256; this kernel takes even ones from 32 to 128"):
        built(HEAD_DIM=head, DEPTH=2, ATTENTION="triton")


@pytest.mark.parametrize(("length", "window"), [(1, 0), (1, 5), (7, 0), (7, 3), (7, 6), (7, 7), (64, 8), (64, 100)])
def test_attention_counts_by_its_true_area(length, window):
    module, _ = built(length)
    seen = [sum(i - window <= j <= i for j in range(length)) for i in range(length)]
    assert module.mean_keys(length, window) == pytest.approx(sum(seen) / length)


def test_short_windows_see_their_part_of_the_context():
    module, made = built(SHORT_WINDOW=8)
    assert made.model.windows == [4, 4, 4, 32] == module.window_sizes(32)
