"""The RTX recipe with Triton's kernels interpreted: the reference numbers, and float16 against plain torch."""

from __future__ import annotations

import pytest
import torch
from interpreted.watched import watched

from backends import reference
from backends.cpu.device import open_device
from core.paths import project_root
from kernels import attention_tiles, lean, plain, portable

RECIPE = (project_root() / "backends" / "rtx" / "train.py").read_bytes()


def test_the_recipe_computes_the_reference_and_its_kernels_are_sound(monkeypatch):
    """A whole step, every access of it watched, its programs in random order."""
    monkeypatch.setattr(attention_tiles, "INTERPRETED", attention_tiles.Tile(64, 64, 1, 1))  # fewer programs: a minute
    assert portable.products(torch.device("cpu"))
    with watched() as watch:
        computed = reference.computed(RECIPE, open_device())
    assert watch.found == [] and watch.launches > 100 and watch.accesses > 10**7
    checks = list(reference.compare(computed, reference.reference()))
    assert len(checks) > 60
    assert not [check for check in checks if not check.passed]


def halves(dtype, monkeypatch, fused, keep_hidden=True, by="triton"):
    """Results and gradients of both halves of a layer at one seed, by Triton's kernels or in plain torch."""
    monkeypatch.setattr(portable, "fused", lambda device: fused)
    monkeypatch.setattr(portable, "products", lambda device: fused)
    g = torch.Generator().manual_seed(3)
    N, C, heads, vocab = 70, 64, 2, 31
    shapes = ((N, C), (N, C), (3 * C, C), (heads, 32), (4 * C, C), (C, 4 * C), (C, C))
    made = [torch.randn(s, generator=g) for s in shapes]
    x, x0, w, gate, w1, w2, wu = ((t * (1 if i < 2 else 0.1)).to(dtype).requires_grad_() for i, t in enumerate(made))
    a, b = torch.tensor(0.9).requires_grad_(), torch.tensor(0.2).requires_grad_()
    table = torch.randn(vocab, C, generator=g).requires_grad_()
    tokens = torch.randint(0, vocab, (N,), generator=g)
    out, qkv = lean.project(x, x0, a, b, w, gate, table, tokens)
    y = lean.feed(out, qkv[:, -C:], wu, w1, w2, keep_hidden, by)
    weight = torch.randn(y.shape, generator=g).to(dtype)
    leaves = (x, x0, a, b, w, gate, table, wu, w1, w2)
    return [y.detach(), *torch.autograd.grad((y * weight).float().sum() + qkv.float().sum(), leaves)]


@pytest.mark.parametrize("how", [(True, "triton"), (True, "torch"), (False, "torch")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_halves_of_a_layer_agree_with_float32(dtype, how, monkeypatch):
    found = halves(dtype, monkeypatch, True, *how)
    wanted = halves(torch.float32, monkeypatch, fused=False)
    share = 0.01 if dtype == torch.float16 else 0.06
    for ours, right in zip(found, wanted):
        size = right.float().square().mean().sqrt()
        assert (ours.float() - right).square().mean().sqrt() <= share * size


def test_plain_and_triton_muon_have_the_same_coefficients():
    from kernels import muon

    assert plain.POLAR_EXPRESS == muon.POLAR_EXPRESS and plain.FLOOR == muon.FLOOR
