"""Same work, proven: the shipped backends pass, and one that is broken on purpose is caught and named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from broken_ports import MISTAKES, broken
from hypothesis import given, settings
from hypothesis import strategies as st

import backends
from backends import reference
from benchmarks import faults, parity


@pytest.fixture(scope="module", params=["cpu", "mlx"])
def backend(request):
    pytest.importorskip(reference.LIBRARIES[request.param])
    return request.param


@pytest.fixture(scope="module")
def device(backend):
    return backends.load(backend).open_device()


def test_a_shipped_backend_computes_the_reference_in_float32_and_in_its_own_dtype(backend, device):
    recipe = backends.load(backend).recipe()
    dtypes = dict.fromkeys(("float32", device.dtype.value))
    rows, departs = parity.verdict({d: reference.computed(recipe, device, d) for d in dtypes})
    assert not departs
    assert all(row.passed for row in rows)
    assert {(row.dtype, row.kind) for row in rows} == {(d, k) for d in dtypes for k in parity.KINDS}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_backend_broken_on_purpose_is_caught_and_named(mistake, backend, device):
    found = reference.computed(broken(backend, mistake), device)
    rows, departs = parity.verdict({"float32": found})
    assert not all(row.passed for row in rows)
    assert len(departs) == 1 and mistake in departs[0]


def test_a_mistake_that_nobody_has_seen_is_told_by_where_it_parts():
    pytest.importorskip("torch")
    device = backends.load("cpu").open_device()
    source = backends.load("cpu").recipe().decode()
    for old, new, where in (
        ("2 * torch.sigmoid", "1.7 * torch.sigmoid", "the forward pass"),
        ("return (dy * h).mul_(2)", "return (dy * h).mul_(1.9)", "the backward pass"),
        ("MATRIX_LR = 0.04", "MATRIX_LR = 0.03", "the optimizer (Muon)"),
        ("EMBEDDING_LR = 0.6", "EMBEDDING_LR = 0.5", "the optimizer (AdamW)"),
    ):
        changed = source.replace(old, new, 1)
        assert changed != source
        _, departs = parity.verdict({"float32": reference.computed(changed.encode(), device)})
        assert len(departs) == 1 and where in departs[0], (old, departs)


def test_a_mistake_in_the_timed_dtype_only_is_told_apart():
    pytest.importorskip("torch")
    device = backends.load("cpu").open_device()
    right = reference.computed(backends.load("cpu").recipe(), device)
    wrong = {name: -x if name.startswith("gradient") else x for name, x in right.items()}
    _, departs = parity.verdict({"float32": right, "bfloat16": wrong})
    assert len(departs) == 1 and departs[0].startswith("in bfloat16 only: gradient of")


def test_arrays_that_are_not_finite_or_missing_never_pass():
    wanted = reference.reference()
    nothing = {name: np.full(3, np.nan) for name in wanted}
    rows, departs = parity.verdict({"float32": nothing})
    assert departs and not any(row.passed for row in rows) and all(row.difference is None for row in rows)
    _, departs = parity.verdict({"float32": {"logits": np.ones(3)}})
    assert "missing or unknown" in departs[0]


# --- the shipped numbers of mistakes -----------------------------------------------------------


def shipped():
    return json.loads(faults.NUMBERS.read_text(encoding="utf-8"))["faults"]


def test_every_known_mistake_is_told_from_the_reference_and_from_every_other():
    known = {**shipped(), "none": reference.reference()}
    assert known.keys() == {f.name for f in faults.FAULTS} | {"none"}
    names = sorted(known)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            apart = max(
                faults._away(known[a][array], known[b][array]) / reference.TOLERANCE[array.split()[0]]
                for array in known[a]
            )
            assert apart > 2 * faults.SAME_FAULT, (a, b, apart)


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda f: f.name)
def test_every_mistake_is_an_edit_of_the_recipe_as_it_is(fault):
    assert faults.broken(fault) != backends.load("cpu").recipe()


@pytest.mark.parametrize("name", ["window one short", "no QK-norm", "ReLU", "NorMuon axis", "Adam rate"])
def test_the_shipped_numbers_are_what_the_recipe_computes_with_the_mistake(name):
    pytest.importorskip("torch")
    (fault,) = [f for f in faults.FAULTS if f.name == name]
    found = reference.computed(faults.broken(fault), backends.load("cpu").open_device())
    assert faults.name(found) == [fault.says]
    for array, numbers in shipped()[name].items():
        assert faults._away(reference.numbers(found[array]), numbers) <= reference.TOLERANCE[array.split()[0]], array


@settings(deadline=None, max_examples=30)
@given(st.floats(5.0, 200.0), st.integers(0, 2**16))
def test_any_softcap_is_found_by_fitting(cap, seed):
    z = np.random.default_rng(seed).normal(0.0, 5.0, 4000)
    wanted = 15.0 * np.tanh(z / 15.0)
    found = faults.softcap(cap * np.tanh(z / cap), wanted[faults.sampled(z.size)])
    assert found is not None and abs(found / cap - 1) < 0.01
    assert faults.softcap(z, wanted[faults.sampled(z.size)]) == float("inf")
    assert faults.softcap(1.1 * wanted, wanted[faults.sampled(z.size)]) is None
