"""The cuda and rtx recipes on cards that are not there (benchmarks/blank_card): what the host does beside a card is
real, and no kernel is run. Whether numbers are right is for other tests, and how fast they come for a card."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from blank_sharing import Shared
from test_hardware import Machine
from test_rtx_profiles import rtx

from backends.rtx import profiles
from backends.rtx.memory import Shape, peak
from benchmarks import blank_card, memory
from benchmarks.blank_card import CARDS, GIB, building
from core import caches as compile_caches
from core.errors import UserError
from core.hardware import probe

HERE = Path(__file__).resolve().parent
MIB = 2**20

if why := blank_card.obstacle():
    pytest.skip(f"no blank card here: {why}", allow_module_level=True)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """One folder of what is compiled, for all children of this file."""
    return tmp_path_factory.mktemp("blank")


def told(card, caches, script, *arguments):
    """The lines of JSON that a script of this folder prints on a blank card."""
    done = blank_card.python(card, [str(HERE / script), *arguments], caches, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


# --- the card itself ----------------------------------------------------------------------------

LOOK = """
import json, torch
from benchmarks import blank_card
x = torch.randn(512, 512, device="cuda")
blank_card.reset()
y = x @ x
counts = [blank_card.counts()]
blank_card.reset()
there = torch.arange(6.0).cuda()
back = there.cpu().tolist()
counts += [blank_card.counts()]
try:
    torch.empty(2**40, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError as error:
    full = str(error)
free, total = torch.cuda.mem_get_info()
print(json.dumps([torch.cuda.get_device_name(), list(torch.cuda.get_device_capability()), total, free, back, full,
                  [c.found for c in counts]]))
"""


def test_a_child_sees_the_card_and_this_process_does_not(caches, tmp_path):
    card = replace(CARDS["3060"], name="NVIDIA Test")
    done = blank_card.python(card, ["-c", LOOK], caches, timeout=200)
    assert done.returncode == 0, done.stderr
    name, capability, total, free, back, full, (product, copies) = json.loads(done.stdout)
    assert (name, capability, total) == ("NVIDIA Test", [8, 6], 12 * GIB)
    assert 11 * GIB < free < 11.5 * GIB  # of the driver's context and what is held
    assert "CUDA out of memory. Tried to allocate 1024.00 GiB" in full
    assert sum(times for times, _ in product["products"].values()) == 1 and not product["waits"]
    assert copies["to card"] == {"cudaMemcpyAsync": [1, 24]} and copies["to host"] == {"cudaMemcpyAsync": [1, 24]}
    assert back == [0, 1, 2, 3, 4, 5]
    assert any("not pinned" in name for name in copies["waits"])
    assert not product["absent"] and not copies["absent"]
    assert not blank_card.within()
    with pytest.raises(RuntimeError, match="no blank card"):
        blank_card.counts()


OPENED = """
import json, sys, torch
import backends
backends.load(sys.argv[1]).open_device()
segments = torch.cuda.memory._snapshot()["segments"]
print(json.dumps([s["is_expandable"] for s in segments]))
"""


@pytest.mark.parametrize(
    ("name", "backend", "grows"),
    [("NVIDIA A40-48C", "rtx", False), ("GRID A100-40C", "cuda", False), ("NVIDIA A100-SXM4-80GB", "cuda", True)],
)
def test_segments_grow_but_on_a_virtual_card(name, backend, grows, caches):
    """Whose driver may refuse it, which every run would end by, as a fault of its recipe."""
    card = replace(CARDS["a100"], name=name)
    done = blank_card.python(card, ["-W", "error::FutureWarning", "-c", OPENED, backend], caches, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    segments = json.loads(done.stdout.splitlines()[-1])
    assert segments and set(segments) == {grows}


def test_a_card_that_refuses_such_segments_is_told_with_what_to_set():
    from backends.cuda.device import opening

    with pytest.raises(UserError, match="set PYTORCH_ALLOC_CONF=expandable_segments:False"), opening(1):
        raise RuntimeError("CUDA driver error: operation not supported")


SHARED = """
import json, sys
import torch
from core.facts import LocalFacts
from core.nvml import Nvml
x = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda")
(gpu,), look = LocalFacts().nvidia(), Nvml().look("cuda:0", ())
print(json.dumps([gpu.name, gpu.memory, gpu.processes, look.used, look.others_busy, torch.cuda.mem_get_info()[0]]))
sys.stdout.flush()
if input():
    try:
        x.add_(1)
    except RuntimeError as error:
        print(str(error).splitlines()[0], LocalFacts().nvidia()[0].name)
"""


def test_processes_share_a_card_where_they_are_told_to(caches, tmp_path, monkeypatch):
    """What one has the other cannot take, NVML tells of both, and what is killed leaves nothing."""
    monkeypatch.setenv("BLANK_CARD_SHARED", str(tmp_path / "card"))
    monkeypatch.setenv("BLANK_CARD_SHARE", "40")
    card, context, part = CARDS["4060"], CARDS["4060"].context, 1000 * MIB  # of whole segments, which have 20 MiB
    shared = Shared(tmp_path / "card", card)
    held = 5 * GIB + part + 2 * context

    def user(size):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-c", SHARED, str(size)]
        process = subprocess.Popen(command, env=blank_card.environment(card, caches), text=True, **pipes)
        return process, process.stdout.readline()

    first, said = user(5 * GIB)
    try:
        assert json.loads(said) == [card.name, 8 * GIB, 0, 5 * GIB + context, 0.0, 3 * GIB - context]
        assert shared.free() == 3 * GIB - context
        second, said = user(part)
        second.communicate("\n")
        assert json.loads(said) == [card.name, 8 * GIB, 1, held, 0.4, 8 * GIB - held]
        third, said = user(3 * GIB)
        assert not said and "CUDA out of memory" in third.communicate()[1]
    finally:
        first.kill()
        first.communicate()
    with shared.used(part):
        last, said = user(6 * part)
        assert json.loads(said)[2:4] == [1, 7 * part + context]
        shared.fail()  # what is on it now; what comes after is well
        assert last.communicate("again\n")[0] == f"CUDA error: unspecified launch failure {card.name}\n"
    assert shared.free() == card.bytes


PROOF = """
import json, sys
import backends
from backends import reference
from benchmarks.leaving import leave
from core.recipe import constants, replace
loaded = backends.load(sys.argv[1])
recipe = loaded.recipe().decode()
if "ATTENTION" in constants(recipe):  # else the others are compiled, to be timed, which takes a minute
    recipe = replace(recipe, {"ATTENTION": "triton"})
found = reference.computed(recipe.encode(), loaded.open_device())
checks = list(reference.compare(found, reference.reference()))
print(json.dumps([sorted({c.name.split()[0] for c in checks}), sum(not c.passed for c in checks)]))
leave()
"""


@pytest.mark.parametrize("backend", ["cuda", "rtx"])
def test_the_proof_in_float32_comes_to_its_end(backend, caches):
    """In which kernels and products are asked for that no training asks for. Of a blank card all numbers are wrong."""
    done = blank_card.python(CARDS["h100"], ["-c", PROOF, backend], caches, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds, failed = json.loads(done.stdout.splitlines()[-1])
    assert kinds == ["gradient", "logits", "loss", "step"] and failed > 60


def test_it_is_built_once_and_says_what_it_lacks(monkeypatch):
    folder = blank_card.library()
    built = (folder / building.NAME).stat().st_mtime_ns
    assert blank_card.library() == folder and (folder / building.NAME).stat().st_mtime_ns == built
    monkeypatch.setattr(building, "_needs", building._needs.__wrapped__)
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="gcc and nm not found; sudo apt install gcc"):
        blank_card.library()
    monkeypatch.setattr(building, "_version_file", lambda: "__version__ = '2.14.1+cpu'\ncuda: None = None")
    assert blank_card.obstacle().startswith("torch 2.14.1+cpu is a build without CUDA; install")


# --- the cuda recipe on a blank H100 --------------------------------------------------------------


@pytest.fixture(scope="module", params=["triton", "torch"])
def by(request):
    """What multiplies in the MLP."""
    return request.param


@pytest.fixture(scope="module")
def cuda(caches, by):
    """What tests/blank_cuda.py tells: kind -> rows."""
    rows = told(CARDS["h100"], caches, "blank_cuda.py", "all", by)
    return {kind: [row for row in rows if row["what"] == kind] for kind in ("first", "second", "step")}


@pytest.mark.slow
def test_the_recipe_is_one_graph_and_a_second_build_compiles_nothing(cuda):
    (first,), (second,), steps = cuda["first"], cuda["second"], cuda["step"]
    assert first["breaks"] == {} and first["graphs"] == 1 and first["binaries"] > 20
    assert second["rows"] == first["rows"] == 128
    assert (second["graphs"], second["binaries"]) == (1, 0)
    for step in steps:  # at any progress
        assert step["graphs"] == 1 and step["binaries"] == {}


@pytest.mark.slow
def test_the_next_experiment_finds_all_that_was_compiled_in_its_copy_of_the_caches(cuda, by, caches, tmp_path):
    """The graph, and every kernel that is launched by itself: where they were made nothing is left to be read."""
    mine, gone = tmp_path / "mine", tmp_path / "gone"
    compile_caches.copy(caches, mine)
    before = {file.relative_to(mine) for file in mine.rglob("*.cubin")}
    caches.rename(gone)
    try:
        (first,) = told(CARDS["h100"], mine, "blank_cuda.py", "first", by)
    finally:
        gone.rename(caches)
    assert 20 < first["binaries"] <= cuda["first"][0]["binaries"]  # of several that were timed the best one only
    assert (first["graphs hit"], first["graphs miss"], first["graphs bypass"]) == (1, 0, 0)
    assert {file.relative_to(mine) for file in mine.rglob("*.cubin")} == before


@pytest.mark.slow
def test_the_next_experiment_finds_its_graph_with_torchs_attention_too(caches, tmp_path):
    (made,) = told(CARDS["h100"], caches, "blank_cuda.py", "first", "triton", "flash")
    compile_caches.copy(caches, tmp_path)
    (found,) = told(CARDS["h100"], tmp_path, "blank_cuda.py", "first", "triton", "flash")
    assert (made["graphs hit"], made["graphs bypass"]) == (0, 0) and made["graphs miss"] > 0
    assert (found["graphs hit"], found["graphs miss"], found["graphs bypass"]) == (made["graphs miss"], 0, 0)


@pytest.mark.slow
def test_torchs_attention_is_the_graph_that_its_public_function_gives(caches):
    """Operators and all that they are given, forward and backward, of flash attention and of cuDNN's."""
    cases = told(CARDS["h100"], caches, "blank_attention.py")
    assert [(case["name"], case["key heads"]) for case in cases] == [(n, g) for n in ("flash", "cudnn") for g in (4, 2)]
    for case in cases:
        ways = ["", "_backward"]
        assert case["operators"] == [f"aten._scaled_dot_product_{case['name']}_attention{way}.default" for way in ways]
        assert case["ours"] == case["public"]


@pytest.mark.slow
def test_an_experiment_goes_through_warm_up_training_and_hand_over_in_the_sandbox(caches):
    """Up to the scorer, which loads the weights, finds what the trainer compiled, and refuses a blank card's zeros."""
    (ended,) = told(CARDS["h100"], caches, "blank_run.py")
    assert (ended["status"], ended["reason"]) == ("invalid", "logits(): logits that are not finite"), ended["log"]


@pytest.mark.slow
def test_an_experiment_whose_numbers_are_a_uniform_guess_is_scored_and_audited_in_the_sandbox(caches):
    (ended,) = told(CARDS["h100"], caches, "blank_run.py", "uniform")
    assert (ended["status"], ended["reason"]) == ("scored", ""), ended["log"]
    assert ended["points"] > 1024  # and the pairs


@pytest.mark.slow
def test_a_step_never_waits_for_the_card(cuda):
    for step in cuda["step"]:
        assert step["waits"] == {} and step["to host"] == {}
        assert (
            step["to card"] == {"cudaMemcpyAsync": 1} and step["bytes to card"] == 12
        )  # the rates, from pinned memory


@pytest.mark.slow
def test_every_launch_is_one_that_a_card_takes(cuda, by):
    for row in cuda["step"]:
        assert row["invalid"] == {} and row["absent"] == {}
        assert sum(row["launches"].values()) < 1000
        for kernel in ("forward_kernel", "backward_kernel", "_chunk"):  # attention and the head with the loss
            assert row["launches"][kernel] > 0
        passes = {name: row["launches"].get(name, 0) for name in ("_by_tma", "_squared", "_times_root")}
        eight = row["launches"]["forward_kernel"]  # one in each layer of each part of the rows
        assert passes == (
            {"_by_tma": 2 * eight, "_squared": 0, "_times_root": 0} if by == "triton"
            else {"_by_tma": 0, "_squared": eight, "_times_root": eight}
        )  # fmt: skip


@pytest.mark.slow
def test_the_peak_of_a_step_is_within_the_goal(cuda):
    """Of what upstream publishes at the same shapes."""
    assert max(step["peak"] for step in cuda["step"]) <= memory.GOAL * memory.PUBLISHED


# --- the rtx recipe on blank cards of gamers --------------------------------------------------------


def case(depth, ratio, batch, rows, how, more=0, vocab=4096, context=512, dtype="bfloat16", by="triton"):
    constants = {"DEPTH": depth, "ASPECT_RATIO": ratio, "HEAD_DIM": 64, "TOTAL_BATCH_SIZE": batch, "MLP": by}
    return [{**constants, "DEVICE_BATCH_SIZE": rows, "RECOMPUTE": how, "RECOMPUTE_MORE": more}, vocab, context, dtype]


CASES = [
    case(8, 48, 2**14, 8, "nothing"),
    case(8, 48, 2**14, 32, "hidden"),
    case(8, 48, 2**14, 32, "layer"),
    case(12, 64, 2**15, 16, "hidden"),
    case(4, 64, 2**14, 16, "nothing", vocab=8192, context=1024),
    case(6, 64, 2**14, 4, "layer"),
    case(8, 48, 2**14, 32, "nothing", 3),
    case(8, 48, 2**14, 32, "hidden", 6),
    case(8, 48, 2**14, 32, "hidden", 7),
    case(12, 64, 2**15, 16, "nothing", 5),
    case(12, 64, 2**15, 16, "hidden", 6),
    case(4, 64, 2**14, 16, "nothing", 2, vocab=8192, context=1024),
    case(6, 64, 2**14, 4, "hidden", 3),
    case(4, 64, 2**13, 16, "hidden", 1),
    case(8, 48, 2**14, 8, "nothing", by="torch"),
    case(8, 48, 2**14, 32, "hidden", by="torch"),
]
CHOSEN = [case(8, 48, 2**14, 8, "nothing", by="auto")] * 2


def predicted(constants, vocab, context, found, fused):
    """The memory model's peak for the rows and the way that the recipe ended up with."""
    shape, more = Shape.of(constants, vocab, context), found["recompute_more"]
    return peak(shape, found["rows_at_once"], found["recompute"], constants["TOTAL_BATCH_SIZE"], fused, more)


def profile_of(card):
    facts = rtx(card.name.removeprefix("NVIDIA GeForce RTX "), card.gib, divmod(card.capability, 10))
    return profiles.profiles(probe(Machine(gpus=[facts])))[0]


@pytest.fixture(scope="module")
def ada(caches):
    """On a blank card of 8 GB: the tier's own profile, one that asks for too much, and CASES."""
    profile = profile_of(CARDS["4060"])
    assert profile.name == "rtx-8"
    own = [dict(profile.constants), profile.vocab_size, profile.sequence_len, "bfloat16"]
    return own, told(CARDS["4060"], caches, "blank_rtx.py", json.dumps([own, TOO_MUCH, *CASES, *CHOSEN]))


TOO_MUCH = case(8, 48, 2**17, 256, "nothing")


@pytest.mark.slow
def test_a_tiers_profile_runs_on_its_card(ada):
    (constants, vocab, context, _), (found, *_) = ada
    assert found["kernels"] == "triton" and found["steps"] == 2 and found["out of memory"] == 0
    assert found["rows_at_once"] == constants["DEVICE_BATCH_SIZE"]
    assert found["waits"] == {} and found["invalid"] == {} and found["absent"] == {}
    assert found["launches"]["forward_kernel"] > 0
    assert found["peak"] == pytest.approx(predicted(constants, vocab, context, found, True), rel=0.1)


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_done_with_fewer_rows(ada):
    """PyTorch's own error, of its own allocator: the step is made again, and none is lost."""
    found = ada[1][1]
    assert found["out of memory"] > 0 and found["steps"] == 2
    assert found["rows_at_once"] == 128 and found["recompute"] == "nothing"
    assert found["peak"] == pytest.approx(predicted(*TOO_MUCH[:3], found, True), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("i", range(len(CASES)))
def test_the_memory_model_is_within_a_tenth_of_the_allocator(ada, i):
    found, by = ada[1][2 + i], CASES[i][0]["MLP"]
    assert found["mlp"] == f"{by}: forced" and ("_squared" in found["launches"]) == (by == "torch")
    assert found["out of memory"] == 0
    assert found["peak"] == pytest.approx(predicted(*CASES[i][:3], found, True), rel=0.1)


@pytest.mark.slow
def test_what_multiplies_in_the_mlp_is_timed_once_and_costs_no_memory(ada):
    """Times mean nothing here: which of the two it is may differ from run to run, and not from build to build."""
    first, again = ada[1][-2:]
    assert "ms forward and backward; " in first["mlp"] and again["mlp"] == f"{first['mlp']} (as measured before)"
    assert first["out of memory"] == again["out of memory"] == 0 and first["waits"] == {}
    assert first["peak"] == again["peak"] == pytest.approx(predicted(*CHOSEN[0][:3], first, True), rel=0.1)


@pytest.mark.slow
def test_turing_takes_torch_for_products_and_float16(caches):
    """An sm_75 runs Triton's norms and loss, and neither its attention nor its MLP."""
    ways = (("nothing", 0), ("nothing", 5), ("hidden", 0), ("hidden", 3), ("layer", 0))
    cases = [case(8, 48, 2**14, 32, *way, dtype="float16", by="auto") for way in ways]
    for (constants, vocab, context, _), found in zip(
        cases, told(CARDS["2080ti"], caches, "blank_rtx.py", json.dumps(cases)), strict=True
    ):
        assert found["kernels"].startswith("triton for norms and loss, torch for products")
        assert found["waits"] == {} and found["invalid"] == {} and found["absent"] == {}
        assert "forward_kernel" not in found["launches"] and "_by_pointers" not in found["launches"]
        assert found["mlp"].startswith("torch: triton for norms and loss, torch for products: sm_75")
        assert found["peak"] == pytest.approx(predicted(constants, vocab, context, found, False), rel=0.1)


SLICES = """
import json, sys
sys.modules["triton"] = None
import torch
from benchmarks import blank_card
from benchmarks.leaving import leave
from kernels import attention_slices
torch.zeros(1, device="cuda")
blank_card.reset()
dtypes = [torch.float16, torch.float32] + [torch.bfloat16] * (torch.cuda.get_device_capability() >= (8, 0))
for dtype in dtypes:
    for length in (1, 64, 300, 512, 1000):
        for window in (0, 1, 17, 100, 256, 5000):
            for width in (64, 128):
                qkv = torch.randn(2, length, 6, width, device="cuda", dtype=dtype, requires_grad=True)
                angles = torch.randn(length, width // 2, device="cuda")
                y = attention_slices.attention_(*(qkv * 1).chunk(3, 2), angles, angles, window)
                y.sum().backward()
                assert y.shape == (2, length, 2, width) and qkv.grad.shape == qkv.shape
counts = blank_card.counts()
print(json.dumps({kind: counts.names(kind) for kind in blank_card.KINDS}))
leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2080ti", "3060", "5090"])
def test_torchs_kernels_take_slices_of_any_length(name, caches):
    """Of a tensor that holds q, k and v, with masks whose rows begin anywhere: what torch checks before a launch is
    real. Scores are made within the kernels, and a forward once for each backward."""
    done = blank_card.python(CARDS[name], ["-c", SLICES], caches, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    launches = found["launches"]
    assert found["invalid"] == {} and found["absent"] == {} and not any("softmax" in name for name in launches)
    assert any("fmha_cutlassB" in name for name in launches)
    forward, backward = (sum(n for k, n in launches.items() if f"fmha_cutlass{way}_" in k) for way in "FB")
    assert forward == backward > 0
    assert any("flash_fwd" in name for name in launches) == (name != "2080ti")


@pytest.mark.slow
def test_ampere_takes_triton_for_all(caches):
    profile = profile_of(CARDS["3060"])
    own = [dict(profile.constants), profile.vocab_size, profile.sequence_len, "bfloat16"]
    (found,) = told(CARDS["3060"], caches, "blank_rtx.py", json.dumps([own]))
    assert profile.name == "rtx-12" and found["kernels"] == "triton" and found["launches"]["forward_kernel"] > 0
    assert found["waits"] == {} and found["invalid"] == {} and found["absent"] == {}
    assert found["peak"] == pytest.approx(predicted(*own[:3], found, True), rel=0.1)
