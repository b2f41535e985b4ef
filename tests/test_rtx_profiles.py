"""Consumer cards that are not here, presented as facts: backend, profile, dtype, attention, memory plan."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from test_hardware import ALL, CARD_ON_BUS, H100, Machine  # noqa: E402

import backends  # noqa: E402 - after the skip
from backends.rtx import device, profiles  # noqa: E402
from backends.rtx.cards import known  # noqa: E402
from backends.rtx.memory import Plan, Shape, made_again, peak, ways  # noqa: E402
from backends.scaling import tokens_per_weight  # noqa: E402
from benchmarks import gpu  # noqa: E402
from console import fitting  # noqa: E402
from core import allocator, guard, sandbox  # noqa: E402
from core.errors import DeviceFull, UserError  # noqa: E402
from core.facts import Gpu, Power  # noqa: E402
from core.gpuwatch import Look  # noqa: E402
from core.hardware import GIB, choose, probe  # noqa: E402
from core.recipe import constants  # noqa: E402
from core.settings import Settings  # noqa: E402
from kernels import errors, portable  # noqa: E402

WINDOWS = ("Windows", "10", "AMD64")
WSL = ("Linux", "5.15.153.1-microsoft-standard-WSL2", "x86_64")


def card(name, gib, capability, free=None, **more):
    free = 0.94 * gib if free is None else free
    uuid = f"GPU-{name[-4:]}-{gib}"
    return Gpu(0, f"NVIDIA {name}", uuid, int(gib * GIB), int(free * GIB), capability, "581.1", **more)


def rtx(name, gib, capability, free=None, **more):
    return card(f"GeForce RTX {name}", gib, capability, free, **more)


SLICE = replace(H100, name="NVIDIA H100 MIG 1g.10gb", uuid="MIG-99", memory=int(9.75 * GIB))
# machine -> backend, profile, dtype, attention (on Linux with Triton), rows at once, what is made again
MATRIX = {
    "1650": (Machine(gpus=[card("GeForce GTX 1650", 3.8, (7, 5))]), "rtx", "rtx-6", "float16", "sliced", 64, "nothing"),
    "2060": (Machine(gpus=[rtx("2060", 5.79, (7, 5))]), "rtx", "rtx-6", "float16", "sliced", 64, "nothing"),
    "3050 6GB": (Machine(gpus=[rtx("3050", 5.8, (8, 6))]), "rtx", "rtx-6", "bfloat16", "triton", 64, "nothing"),
    "3050": (Machine(gpus=[rtx("3050", 7.9997, (8, 6))]), "rtx", "rtx-8", "bfloat16", "triton", 64, "nothing"),
    "2080 Ti": (Machine(gpus=[rtx("2080 Ti", 10.75, (7, 5))]), "rtx", "rtx-12", "float16", "sliced", 64, "nothing"),
    "3080": (Machine(gpus=[rtx("3080", 9.77, (8, 6))]), "rtx", "rtx-12", "bfloat16", "triton", 64, "nothing"),
    "3060": (Machine(gpus=[rtx("3060", 11.76, (8, 6))]), "rtx", "rtx-12", "bfloat16", "triton", 64, "nothing"),
    "4060 Ti": (Machine(gpus=[rtx("4060 Ti", 15.7, (8, 9))]), "rtx", "rtx-16", "bfloat16", "triton", 64, "nothing"),
    "3090": (Machine(gpus=[rtx("3090", 23.7, (8, 6))]), "rtx", "rtx-24", "bfloat16", "triton", 128, "nothing"),
    "4090": (Machine(gpus=[rtx("4090", 23.99, (8, 9))]), "rtx", "rtx-24", "bfloat16", "triton", 128, "nothing"),
    "5090": (Machine(gpus=[rtx("5090", 31.36, (12, 0))]), "rtx", "rtx-32", "bfloat16", "triton", 256, "nothing"),
    "laptop 4070": (
        Machine(gpus=[rtx("4070 Laptop GPU", 7.9997, (8, 9))], battery=Power(True, 90.0)),
        *("rtx", "rtx-8", "bfloat16", "triton", 64, "nothing"),
    ),
    "fast enough memory, slow card": (
        Machine(gpus=[rtx("3050", 15.9, (8, 6))]),
        *("rtx", "rtx-12", "bfloat16", "triton", 64, "nothing"),
    ),
    "a game holds most of a 3060": (
        Machine(gpus=[rtx("3060", 11.76, (8, 6), free=1.5)]),
        *("rtx", "rtx-12", "bfloat16", "triton", 32, "nothing+1"),
    ),
    "an eGPU that shrank": (
        Machine(gpus=[rtx("3060", 11.76, (8, 6), free=0.9)]),
        *("rtx", "rtx-12", "bfloat16", "triton", 4, "nothing+4"),
    ),
    "hardly anything is free": (
        Machine(gpus=[rtx("3060", 11.76, (8, 6), free=0.8)]),
        *("rtx", "rtx-8", "bfloat16", "triton", 8, "layer"),
    ),
    "windows": (
        Machine(os=WINDOWS, gpus=[rtx("3060", 11.76, (8, 6), display=True)]),
        *("rtx", "rtx-12", "bfloat16", "triton", 64, "nothing"),
    ),
    "wsl2": (
        Machine(os=WSL, gpus=[rtx("4070", 11.99, (8, 9))]),
        *("rtx", "rtx-12", "bfloat16", "triton", 64, "nothing"),
    ),
    "two cards": (
        Machine(gpus=[rtx("3060", 11.76, (8, 6)), replace(rtx("4090", 23.99, (8, 9)), index=1)]),
        *("rtx", "rtx-24", "bfloat16", "triton", 128, "nothing"),
    ),
    "data centre": (Machine(gpus=[H100]), "cuda", None, None, None, None, None),
    "mig": (Machine(gpus=[replace(H100, parts=(SLICE,))]), "cuda", None, None, None, None, None),
    "pascal": (Machine(gpus=[card("GeForce GTX 1080", 8, (6, 1))]), "cpu", None, None, None, None, None),
    "broken driver": (
        Machine(files=CARD_ON_BUS, gpus="Driver/library version mismatch"),
        *("cpu", None, None, None, None, None),
    ),
    "no nvml": (
        Machine(files=CARD_ON_BUS, gpus="the package nvidia-ml-py is not installed"),
        *("cpu", None, None, None, None, None),
    ),
}


@pytest.mark.parametrize("row", MATRIX.values(), ids=MATRIX.keys())
def test_the_matrix_of_cards(row, monkeypatch):
    machine, backend, profile, dtype, attention, rows, again = row  # "nothing+2": RECOMPUTE and RECOMPUTE_MORE
    here = probe(machine)
    choice = choose(here, available=ALL)
    assert choice.value == backend and choice.reason
    if backend != "rtx":
        return
    found = backends.load("rtx").profile(here)
    assert (found.name, found.data) == (profile, "tinystories")
    assert device.choose_dtype(here.gpus[0].capability).value == dtype
    planned = profiles.plans(found, here)[0]
    how, _, more = again.partition("+")
    assert (planned.rows, planned.recompute, planned.more) == (rows, how, int(more or 0))
    assert found.constants.items() >= planned.constants().items()
    assert planned.peak <= profiles.available(here) < here.gpus[0].memory_free
    scored = found.logits_bytes // (4 * found.vocab_size * found.sequence_len)
    assert scored == (64 if here.gpus[0].memory > 15 * GIB and found.name != "rtx-12" else 32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: here.gpus[0].capability)
    monkeypatch.setattr(portable, "fused", lambda device: True)
    assert ("triton" if portable.products(torch.device("cuda", 0)) else "sliced") == attention


def test_what_is_particular_about_a_card_is_said():
    laptop = replace(MATRIX["laptop 4070"][0], battery=Power(False, 40.0))
    both = replace(MATRIX["two cards"][0], os=WSL)
    said = [" | ".join(profiles.remarks(probe(m))) for m in (laptop, MATRIX["windows"][0], both, MATRIX["3060"][0])]
    assert "laptop's card" in said[0] and "on battery at 40 %" in said[0] and "--backend cpu" in said[0]
    assert "drives a display" in said[1]
    assert "4090 is used, not NVIDIA GeForce RTX 3060" in said[2] and "WSL2" in said[2]
    assert not said[3]


def test_too_little_memory_is_refused_with_the_figures():
    full = probe(Machine(gpus=[rtx("3060", 11.76, (8, 6), free=0.7)]))
    with pytest.raises(UserError, match=r"3060 has 0\.18 GiB for a training, and the smallest .* 0\.22 GiB") as caught:
        profiles.profiles(full)
    assert "--backend cpu" in caught.value.action


def test_unusable_cards_and_builds_are_named(monkeypatch):
    with pytest.raises(UserError, match=r"compute capability 6\.1 is below 7\.5") as caught:
        device.choose_dtype((6, 1))
    assert "--backend cpu" in caught.value.action
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "PyPI's torch for Windows" in device.no_cuda("win32").fact and "whl/cu" in device.no_cuda("win32").action
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver" in device.no_cuda().fact and "--backend cpu" in device.no_cuda().action


def test_the_cap_leaves_room_below_what_is_free():
    for platform, wsl, left in (("linux", False, 2**28), ("linux", True, 3 * 2**28), ("win32", False, 3 * 2**28)):
        assert device.cap(8 * GIB, 12 * GIB, device.margin(platform, wsl)) == 8 * GIB - left
    assert device.cap(GIB // 8, 12 * GIB, device.margin("linux", False)) == 0


def test_wsl_s_way_to_refuse_memory_is_known():
    assert errors.refused_by_wsl(RuntimeError("CUDA error: device not ready"))
    assert not errors.refused_by_wsl(ValueError("device not ready"))
    assert not errors.refused_by_wsl(RuntimeError("CUDA error: device-side assert triggered"))


def test_what_is_free_is_what_the_less_hopeful_of_two_says():
    assert allocator.really_free(11 * GIB, {}) == 11 * GIB
    assert allocator.really_free(11 * GIB, {allocator.TOLD_FREE: str(7 * GIB)}) == 7 * GIB
    assert allocator.really_free(3 * GIB, {allocator.TOLD_FREE: str(7 * GIB)}) == 3 * GIB
    assert [allocator.shared_with_windows(*of) for of in (("win32", False), ("linux", True), ("linux", False))] == [
        True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("backend", ["rtx", "cuda"])
def test_a_card_without_free_memory_is_told_as_such(monkeypatch, backend):
    """So that it can be waited for: a card that cannot be used at all is another error."""
    opened = importlib.import_module(f"backends.{backend}.device")
    answers = {"is_available": True, "init": None, "set_device": None, "get_device_capability": (8, 6)}
    answers |= {"mem_get_info": (GIB // 8, 8 * GIB), "get_device_name": "NVIDIA GeForce RTX 4060"}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, answer=answer: answer)
    with pytest.raises(DeviceFull, match=r"0\.1 of 8\.0 GiB") as caught:
        opened.open_device()
    assert caught.value.needed >= 2**28 + 2**29


@pytest.mark.parametrize(
    ("environ", "platform", "release", "grows"),
    [
        ({}, "linux", "6.8.0-45-generic", True),
        ({}, "linux", "5.15.153.1-microsoft-standard-WSL2", False),  # the first allocation may fail there
        ({}, "win32", "11", False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, "linux", "6.8.0", False),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "linux", "6.8.0", False),
    ],
)
def test_memory_grows_in_segments_where_that_works_and_nobody_has_set_it(environ, platform, release, grows):
    found = allocator.settings(environ, platform, release)
    assert found == ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if grows else {})


def test_children_devices_and_benchmarks_set_the_allocator_alike(monkeypatch, tmp_path):
    for name in allocator.NAMES:
        monkeypatch.delenv(name, raising=False)
    names = set(allocator.NAMES)
    assert names & set(sandbox.environment(tmp_path, tmp_path, tmp_path)) == {"PYTORCH_ALLOC_CONF"}
    monkeypatch.setattr("platform.release", lambda: WSL[1])
    assert not names & set(sandbox.environment(tmp_path, tmp_path, tmp_path))
    given = []
    ended = SimpleNamespace(wait=int, poll=lambda: 0, returncode=0)
    monkeypatch.setattr("subprocess.Popen", lambda command, env, **more: given.append(env) or ended)
    list(gpu.run_section("rtx", gpu.SMOKE, 1.0))
    for backend in ("rtx", "cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UserError):
            importlib.import_module(f"backends.{backend}.device").open_device()
    assert not names & set(given[0]) and not names & set(os.environ)


@pytest.mark.parametrize("tier", profiles.TIERS, ids=lambda tier: tier.name)
def test_every_tiers_slowest_card_trains_its_model_for_500_steps_and_with_enough_tokens(tier):
    steps = profiles.steps(tier.slowest[1], tier.constants, 4096, tier.context)
    assert 800 <= steps <= 2000 and 4.0 <= steps * tokens_per_weight(tier.constants) <= 8.0


@pytest.mark.parametrize("name", ["2060", "3050", "3060 Ti", "3080", "4060", "4070 Ti SUPER", "4090", "5080", "5090"])
@pytest.mark.parametrize("budget", [30.0, 300.0, 3600.0])
def test_a_measured_step_gives_each_card_a_model_of_the_size_that_it_can_train(name, budget):
    """As its table says that it is measured: another model is taken where the tier's is too small or too large."""
    found = known(f"NVIDIA GeForce RTX {name}")
    profile = replace(backends.load("rtx").profile(probe(Machine(gpus=[rtx(name, 15.9, (8, 9))]))), budget=budget)

    def steps(constants):
        return profiles.steps(found, constants, profile.vocab_size, profile.sequence_len, budget)

    fitted = profiles.scale(profile, budget / steps(profile.constants))
    per_weight = steps(fitted.constants) * tokens_per_weight(fitted.constants)
    assert 500 / 1.5 <= steps(fitted.constants) <= 3000 * 1.5 and 2 <= per_weight <= 25
    again = profiles.scale(fitted, budget / steps(fitted.constants))
    assert again.constants["DEPTH"] == fitted.constants["DEPTH"], "measured again it stays what it is"


def test_every_profile_fits_the_recipe():
    backend = backends.load("rtx")
    here = probe(MATRIX["5090"][0])
    found = backend.profiles(here)
    assert [p.name for p in found] == [*(t.name for t in profiles.TIERS), "demo"]
    for profile in (*found, profiles.scale(found[0], 5.0), profiles.scale(found[-2], 0.001)):
        assert profile.warmup_cap > Settings.warmup_cap  # the first run compiles for longer than on a CPU
        fitted = backends.fit(backend.recipe(), profile)
        guard.require(fitted)
        after = constants(fitted.decode())
        assert {name: after[name].value for name in profile.constants} == dict(profile.constants)
        assert all(after[n].search is None or after[n].search.contains(v) for n, v in profile.constants.items())


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("3090", 71.2), ("4090", 165.2), ("2080 Ti", 53.8), ("5090", 209.5), ("4070 Ti SUPER", 88.2), ("3060", 25.5)],
)
def test_peaks_are_dense_with_float32_sums(name, tflops):
    found = known(f"NVIDIA GeForce RTX {name}")
    assert found is not None and found.flops / 1e12 == pytest.approx(tflops, abs=0.06)


def test_other_cards_of_a_number_are_not_taken_for_it():
    assert known("NVIDIA GeForce RTX 4090 Laptop GPU") is None and known("NVIDIA RTX A4000") is None
    assert known("NVIDIA GeForce RTX 2060") and known("NVIDIA GeForce RTX 2060", laptop=True) is None
    assert known("NVIDIA GeForce GTX 1650") is None and known("NVIDIA GeForce RTX 4070 Ti Foo") is None
    small, large = (known("NVIDIA GeForce RTX 3050", int(gib * GIB)) for gib in (5.8, 7.9))
    assert small is not None and large is not None and small.flops < large.flops
    names = (("3080", 10), ("3080", 12), ("2060", 6), ("2060", 12), ("3060", 8), ("3060", 12))
    found = [known(f"NVIDIA GeForce RTX {number}", int((gib - 0.3) * GIB)) for number, gib in names]
    assert [card.processors for card in found] == [68, 70, 30, 34, 28, 28]
    assert [card.bandwidth / 1e9 for card in found] == [760, 912, 336, 336, 240, 360]


def test_a_reference_step_takes_the_share_of_upstreams_memory_that_was_promised():
    """45 GB for 128 rows of 2048 tokens at depth 8 x 512 is the published figure of upstream's H100 run."""
    reference = Shape(8, 512, 4, 8192, 2048, 2)
    assert reference.kept_per_token("nothing") <= 90e3
    assert reference.kept_per_token("hidden") <= 52e3 and reference.kept_per_token("layer") <= 11e3
    assert peak(reference, 128, "nothing", 2**19) <= 0.57 * 45e9


# --- the choice among plans ---------------------------------------------------------------------


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """Two plans; what a trial of each says; the lines that were said."""
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    ways = [{"DEVICE_BATCH_SIZE": n, "RECOMPUTE": "nothing", "RECOMPUTE_MORE": 1} for n in (32, 16)]
    tried, said = [], []

    def run(seconds, known_as="card", describe=lambda way: {}, health=None, more=0):
        def measure(way):
            tried.append(way["DEVICE_BATCH_SIZE"])
            facts = {"seconds_per_step": seconds[way["DEVICE_BATCH_SIZE"]], "describe": describe(way)}
            return {**facts, "health": health or {}}

        now = [{**way, "RECOMPUTE_MORE": way["RECOMPUTE_MORE"] + more} for way in ways]
        return fitting.choose(now, measure, said.append, known_as)[0]

    return run, tried, said


def test_the_fastest_plan_is_taken_and_remembered_for_this_card_only(trial):
    run, tried, said = trial
    assert run({32: 0.2, 16: 0.1})["DEVICE_BATCH_SIZE"] == 16
    assert run({32: 0.1, 16: 0.2})["DEVICE_BATCH_SIZE"] == 16 and tried == [32, 16]
    assert "as measured on this card before" in said[-1]
    assert run({32: 0.1, 16: 0.2}, "another card")["DEVICE_BATCH_SIZE"] == 32 and tried == [32, 16, 32, 16]


def test_a_plan_that_ran_out_of_memory_counts_as_what_it_went_on_with(trial):
    run, _, said = trial
    half = lambda way: {"rows_at_once": 8, "recompute": "nothing"} if way["DEVICE_BATCH_SIZE"] == 32 else {}  # noqa: E731
    assert run({32: 0.1, 16: 0.2}, describe=half)["DEVICE_BATCH_SIZE"] == 8
    assert "out of memory with 32 rows" in said[0]


@pytest.mark.parametrize(("more", "holds"), [(0, True), (-fitting.NEAR, True), (-fitting.NEAR - 1, False), (1, False)])
def test_a_choice_holds_while_as_much_made_again_or_a_little_less_is_needed(trial, more, holds):
    """What is free differs from day to day; with one layer more that has to make again what was chosen does not fit,
    and with many fewer it is not the fastest any more."""
    run, tried, _ = trial
    run({32: 0.2, 16: 0.1}, more=3)
    assert run({32: 0.1, 16: 0.2}, more=3 + more)["DEVICE_BATCH_SIZE"] == (16 if holds else 32)
    assert len(tried) == (2 if holds else 4)


@pytest.mark.parametrize(
    ("recompute", "more", "said"),
    [
        ("nothing", 0, "8 rows at once, nothing made again"),
        ("nothing", 1, "8 rows at once, 1 MLP made again"),
        ("nothing", 5, "8 rows at once, 5 MLPs made again"),
        ("hidden", 0, "8 rows at once, all MLPs made again"),
        ("hidden", 2, "8 rows at once, 2 layers and the other MLPs made again"),
        ("layer", 0, "8 rows at once, all layers made again"),
    ],
)
def test_a_plan_is_told_in_words(recompute, more, said):
    assert fitting.told(Plan(8, recompute, more, 0).constants()) == said


def test_for_each_number_of_rows_the_fewest_layers_that_fit_make_anything_again():
    for free in (1.0, 1.3, 1.5, 2.0, 4.0):
        here = probe(Machine(gpus=[rtx("3060", 11.76, (8, 6), free=free)]))
        profile = backends.load("rtx").profile(here)
        shape = Shape.of(profile.constants, profile.vocab_size, profile.sequence_len)
        batch, memory = profile.constants["TOTAL_BATCH_SIZE"], profiles.available(here)
        found = profiles.plans(profile, here)
        assert len({plan.rows for plan in found}) == len(found) > 0
        for plan in found:
            assert plan.peak <= memory
            steps = ways(shape.depth)
            for how, more in steps[: steps.index((plan.recompute, plan.more))]:
                assert peak(shape, plan.rows, how, batch, fused=False, more=more) > memory


@given(depth=st.integers(2, 14), rows=st.integers(1, 64), context=st.sampled_from([256, 512, 2048]))
@settings(max_examples=60, deadline=None)
def test_a_layer_further_never_takes_more_memory(depth, rows, context):
    """But for some MiB of matrices, where the last of all layers is made again."""
    shape = Shape(depth, 64 * depth, depth, 4096, context, 2)
    batch = rows * context
    peaks = [peak(shape, rows, how, batch, more=more) for how, more in ways(depth)]
    assert all(after <= before for before, after in pairwise(peaks[:-1]))
    assert peaks[-1] <= peaks[-2] + shape.matrices_of_layer()
    again = [made_again(how, more, depth) for how, more in ways(depth)]
    assert again[0] == ["nothing"] * depth and again[-1] == ["layer"] * depth
    assert all(sum(a != b for a, b in zip(*pair)) == 1 for pair in pairwise(again))


def test_a_choice_beside_a_game_is_not_remembered(trial):
    run, tried, _ = trial
    game = {
        "card": {"tainted": "other programs kept the card 80% busy"},
        "tainted": "other programs kept the card busy",
    }
    assert run({32: 0.1, 16: 0.2}, health=game)["DEVICE_BATCH_SIZE"] == 32
    assert run({32: 0.2, 16: 0.1})["DEVICE_BATCH_SIZE"] == 16 and tried == [32, 16, 32, 16]


def test_a_damaged_memory_of_choices_is_made_again(trial, tmp_path):
    run, _, _ = trial
    (tmp_path / "fits.json").write_text('{"card": ')
    assert run({32: 0.1, 16: 0.2})["DEVICE_BATCH_SIZE"] == 32
    assert json.loads((tmp_path / "fits.json").read_text())["card"]["DEVICE_BATCH_SIZE"] == 32


def test_the_key_changes_with_card_driver_torch_and_shape():
    here = probe(MATRIX["3060"][0])
    newer = replace(here, gpus=(replace(here.gpus[0], driver="590.0"),))
    keys = {
        fitting.key(here, {"torch": "2.14"}, {"DEPTH": 8}),
        fitting.key(newer, {"torch": "2.14"}, {"DEPTH": 8}),
        fitting.key(here, {"torch": "2.15"}, {"DEPTH": 8}),
        fitting.key(here, {"torch": "2.14"}, {"DEPTH": 6}),
    }
    assert len(keys) == 4 and fitting.key(here, {"torch": "2.14"}, {"DEPTH": 8}) in keys


def test_profiles_load_no_torch():
    code = "import sys, backends.rtx.profiles, backends.rtx.memory; print({'torch', 'triton'} & set(sys.modules))"
    from test_rtx_recipe import in_process

    assert in_process(code).strip() == "set()"
    assert Path(backends.load("rtx").recipe_path).is_file()


@pytest.fixture
def fitted(monkeypatch, tmp_path):
    """The fitting for a card that is not here: what it said, and the settings of each timing."""
    from console import making

    def fit(card, facts, keep_shape=True, each=None):
        here = probe(Machine(gpus=[card]))
        monkeypatch.setattr("core.hardware.probe", lambda: here)
        monkeypatch.chdir(tmp_path)
        chosen = making.plan(None, making.Wishes(backend="rtx", tag="x"))
        said, timed = [], []

        def measure(recipe, settings):
            timed.append(settings)
            usual = {"dtype": device.choose_dtype(here.gpus[0].capability).value, "dtype_reason": here.gpus[0].arch}
            seconds = {"seconds_per_step": next(each)} if each else {}
            return {**usual, "seconds_per_step": 0.1, "params": 10**7, "describe": {}, "health": {}, **facts, **seconds}

        monkeypatch.setattr(making, "_Timing", lambda screen, compiled: measure)
        data = SimpleNamespace(path=Path("text"), sha256="0" * 64, vocab_size=8192, bos_id=0)
        recipe = backends.fit(backends.load("rtx").recipe(), chosen.profile)
        _, settings = making._fitted(SimpleNamespace(say=said.append), chosen, data, recipe, keep_shape, tmp_path)
        return said, [s.dtype for s in timed], settings

    return fit


@pytest.mark.parametrize(("name", "dtype"), [("2080 Ti", "float16"), ("3060", "bfloat16"), ("5090", "bfloat16")])
def test_the_first_timing_computes_in_what_the_card_can(fitted, name, dtype):
    """On a Turing card without Triton's products bfloat16 crashes, and no lab would be made."""
    _, timed, settings = fitted(MATRIX[name][0].gpus[0], {})
    assert timed == [dtype] and settings.dtype == dtype


@pytest.mark.parametrize("described", [{"kernels": "torch: triton is not installed", "depth": 8}, {"depth": 8}])
def test_fitting_tells_which_kernels_the_night_will_have(fitted, described):
    said, _, _ = fitted(rtx("3060", 11.76, (8, 6)), {"describe": described})
    assert ("  kernels: torch: triton is not installed" in said) == ("kernels" in described)
    assert any("`autoresearch doctor` says what it lacks" in line for line in said) == ("kernels" in described)


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_a_lab_on_windows_is_told_once_that_nothing_is_looked_at_on_its_way(fitted, monkeypatch, platform):
    monkeypatch.setattr("core.freezing.sys", SimpleNamespace(platform=platform))
    said, _, settings = fitted(rtx("3060", 11.76, (8, 6)), {})
    assert settings.probe == (platform == "linux")
    assert sum("early stopping is off" in line for line in said) == (platform == "win32")


def test_no_way_through_the_card_is_timed_twice_and_each_is_told_before_it_is_compiled(fitted, tmp_path, monkeypatch):
    """A timing compiles the whole recipe: minutes, of which a user has to know what they are for."""
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    said, timed, _ = fitted(rtx("3060", 11.76, (8, 6)), {}, keep_shape=False)
    assert len(timed) == fitting.TRIED  # the first of the ways is the profile as it is, which is timed anyway
    assert "compiled first" in said[0]
    assert sum(line.startswith("  timing ") for line in said) == fitting.TRIED - 1


def test_the_steps_that_are_told_are_those_of_the_way_that_was_chosen(fitted, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    for times in ([0.3, 0.25, 0.5], [0.3]):  # timed, and remembered
        said = fitted(rtx("3060", 11.76, (8, 6)), {}, keep_shape=False, each=iter(times))[0]
        assert "  about 1.2k steps in 5 min, 10M parameters" in said


GAME = {
    "card": {"tainted": "other programs kept the card 80% busy"},
    "tainted": "other programs kept the card 80% busy",
}


def test_what_was_timed_beside_a_game_does_not_shrink_the_model(fitted):
    slow = {"seconds_per_step": 3.0}  # far too few steps
    quiet, game = (
        " ".join(fitted(rtx("3060", 11.76, (8, 6)), {**slow, **health}, keep_shape=False)[0])
        for health in ({}, {"health": GAME})
    )
    assert "refitted" in quiet
    assert "refitted" not in game and "about 100 steps" in game


@pytest.mark.parametrize(
    ("games", "timings", "said"), [(0, 1, []), (1, 2, ["timed again"]), (9, 3, ["timed again"] * 2)]
)
def test_a_timing_beside_a_game_is_taken_again(monkeypatch, tmp_path, games, timings, said):
    from console import making

    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    busy, free = Look(busy=0.9, others_busy=0.9), Look(busy=0.0, others_busy=0.0)
    looks, made, lines = [busy, busy] + [free] * 9, [], []
    nvml = SimpleNamespace(look=lambda device, ours: looks.pop(0))
    monkeypatch.setattr("core.nvml.Nvml", lambda: nvml)
    monkeypatch.setattr("core.gpuwatch.wait", lambda stop, seconds: None)

    def measure(*given, **more):
        made.append(len(looks))
        return {"seconds_per_step": 0.1, "health": GAME if len(made) <= games else {"card": {"tainted": ""}}}

    monkeypatch.setattr("core.referee.measure", measure)
    timing = making._Timing(SimpleNamespace(say=lines.append), tmp_path)
    facts = timing(b"", SimpleNamespace(device="cuda:0"))
    assert len(made) == timings and made[0] == 7, "the card was waited for until it was quiet twice"
    assert "90% busy with other programs: waits until it is free" in lines[0]
    assert [line.split(": ")[-1] for line in lines[1:] if "timed again" in line] == said
    assert bool(fitting.shared(facts)) == any("the model is not fitted" in line for line in lines) == (games > 2)
    if games > 2:  # the next recipe is timed once, and nothing is said again
        before = len(lines)
        timing(b"", SimpleNamespace(device="cuda:0"))
        assert (len(made), len(lines)) == (timings + 1, before)
