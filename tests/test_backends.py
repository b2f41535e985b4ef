"""Backends by name, and the profiles that a CPU starts from."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backends
from backends import scaling
from backends.cpu import profiles as cpu
from core.errors import UserError
from core.guard import require
from core.hardware import BACKENDS, probe
from core.recipe import constants

HERE = probe()


@pytest.fixture(params=[1, 2, 4, 8, 16, 64], ids=lambda n: f"{n} cores")
def machine(request):
    return replace(HERE, cores=request.param, threads=request.param, memory=8 * request.param * 2**30)


def test_the_cpu_backend_is_there_and_whole():
    assert "cpu" in backends.names()
    backend = backends.load("cpu")
    assert backend.recipe_path.is_file()
    require(backend.recipe())


def test_names_stand_in_the_order_of_detection():
    assert backends.names() == [name for name in BACKENDS if name in backends.names()]


def test_backends_that_are_not_there_are_named():
    with pytest.raises(UserError, match=r"no backend 'tpu'; known are: cuda, rtx, mlx, cpu"):
        backends.load("tpu")
    for name in set(BACKENDS) - set(backends.names()):
        with pytest.raises(UserError, match=rf"{name} .*not built in this version; choose --backend .*cpu"):
            backends.load(name)


def test_every_profile_fits_the_recipe(machine):
    backend = backends.load("cpu")
    found = backend.profiles(machine)
    assert found[-1].name == "demo"
    assert len({p.name for p in found}) == len(found)
    for profile in found:
        assert profile.backend == "cpu"
        assert profile.reason
        fitted = backends.fit(backend.recipe(), profile)
        require(fitted)
        after = constants(fitted.decode())
        assert {name: after[name].value for name in profile.constants} == dict(profile.constants)
        for name in profile.constants:
            search = after[name].search
            assert search is None or search.contains(after[name].value), name


def test_more_cores_start_from_no_smaller_a_model():
    sizes = [cpu.profiles(replace(HERE, cores=n))[0].constants["DEPTH"] for n in (1, 2, 4, 8, 16, 64)]
    assert sizes == sorted(sizes)


def test_little_memory_takes_the_smallest_class():
    small = cpu.profiles(replace(HERE, cores=64, memory=2 * 2**30))
    assert [p.name for p in small] == ["cpu-2", "demo"]


def test_a_profile_is_found_by_name():
    backend = backends.load("cpu")
    assert backend.profile(HERE, "demo").name == "demo"
    assert backend.profile(HERE) == backend.profiles(HERE)[0]
    with pytest.raises(UserError, match=r"no profile 'huge'; known are: .*demo"):
        backend.profile(HERE, "huge")


def test_a_profile_with_an_unknown_constant_is_refused():
    profile = replace(cpu.profiles(HERE)[0], constants={"NO_SUCH_CONSTANT": 1})
    with pytest.raises(UserError, match="NO_SUCH_CONSTANT"):
        backends.fit(backends.load("cpu").recipe(), profile)


@settings(deadline=None)
@given(st.floats(1e-4, 60.0), st.sampled_from([1, 8, 32]))
def test_scaling_gives_hundreds_of_steps_where_that_is_possible(seconds, cores):
    profile = cpu.profiles(replace(HERE, cores=cores))[0]
    scaled = cpu.scale(profile, seconds)
    old, new = (scaling.cost(p.constants, p.vocab_size) for p in (profile, scaled))
    steps = profile.budget / seconds * old / new
    batch = scaled.constants["TOTAL_BATCH_SIZE"]
    shapes = [scaling.cost({**scaled.constants, **shape}, scaled.vocab_size) for shape in cpu.SHAPES]
    assert steps > 0.99 * cpu.FEWEST_STEPS or (batch == cpu.SMALLEST_BATCH and new == min(shapes))
    assert steps < 1.01 * cpu.MOST_STEPS or (batch == cpu.LARGEST_BATCH and new == max(shapes))
    assert batch % scaled.sequence_len == 0
    if cpu.FEWEST_STEPS <= profile.budget / seconds <= cpu.MOST_STEPS:
        assert scaled is profile
    else:
        assert scaled == profile or "refitted" in scaled.reason
    fitted = constants(backends.fit(backends.load("cpu").recipe(), scaled).decode())
    assert all(fitted[n].search is None or fitted[n].search.contains(v) for n, v in scaled.constants.items())


def test_scaling_refuses_nonsense():
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="cannot take"):
            cpu.scale(cpu.profiles(HERE)[0], seconds)


def test_names_and_profiles_load_no_torch():
    code = (
        "import sys, backends; from core.hardware import probe; backends.load('cpu').profiles(probe());"
        "print({'torch', 'mlx'} & set(sys.modules))"
    )
    root = Path(backends.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "set()"
