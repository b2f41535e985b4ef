"""Machines with data-centre cards that are not here: backend, profile and reason; and what a user is told who has
the wrong driver, the wrong torch, a full card or another card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hardware import CARD_ON_BUS, Machine

import backends
from backends import scaling
from backends.cuda import profiles as cuda
from console import making
from core import allocator, locks
from core.child import Place, Worker
from core.errors import DeviceFull, UserError
from core.facts import Gpu
from core.gpuwatch import TOLD_LAPTOP, Look
from core.hardware import GIB, Hardware, choose, probe
from core.recipe import constants
from core.settings import Settings
from core.torchbuild import TorchBuild
from core.versions import changes, versions

ALL = ("cuda", "rtx", "mlx", "cpu")


def card(name, gib, capability, free=None, **more):
    uuid = more.pop("uuid", f"GPU-{name.split()[-1]}")
    fields = {"driver": "580.65.06", **more}
    return Gpu(0, name, uuid, int(gib * GIB), int((gib - 0.6 if free is None else free) * GIB), capability, **fields)


H100 = card("NVIDIA H100 80GB HBM3", 79.6, (9, 0))
A100 = card("NVIDIA A100-SXM4-40GB", 39.4, (8, 0))
FULL = replace(H100, memory_free=GIB // 2, processes=2, uuid="GPU-full")
SLICES = [
    (card("NVIDIA H100 MIG 1g.10gb", 9.8, (9, 0), uuid="MIG-1"), "slice-10"),
    (card("NVIDIA H100 MIG 2g.20gb", 19.6, (9, 0), uuid="MIG-2"), "slice-20"),
    (card("NVIDIA H100 MIG 3g.40gb", 39.2, (9, 0), uuid="MIG-3"), "a100"),
]


@pytest.mark.parametrize(
    ("gpu", "profile", "words"),
    [
        (H100, "h100", "79.0 GiB of 79.6 GiB free"),
        (card("NVIDIA H200", 139.8, (9, 0)), "h100", "H200"),
        (card("NVIDIA B200", 179, (10, 0)), "b200", "Blackwell"),
        (A100, "a100", "A100"),
        (card("NVIDIA A100-SXM4-80GB", 79.2, (8, 0)), "a100", "Ampere"),
        (card("NVIDIA A30", 23.5, (8, 0)), "slice-20", "A30"),
        *((gpu, name, "a part of a card" if "slice" in name else "MIG") for gpu, name in SLICES if "10" not in name),
        (SLICES[0][0], "slice-10", "a small part of a card"),
        (replace(H100, memory_free=20 * GIB, processes=3), "a100", "too little for h100 (25.0 GiB); 3 other process"),
        (replace(H100, memory_free=7 * GIB), "slice-10", "7.0 GiB of 79.6 GiB free, too little for h100"),
    ],
)
def test_the_profile_follows_card_and_free_memory_and_says_why(gpu, profile, words):
    here = probe(Machine(gpus=[gpu]))
    assert choose(here, available=ALL).value == "cuda"
    found = backends.load("cuda").profiles(here)
    assert found[0].name == profile and words in found[0].reason
    assert found[-1].name == "demo" and found[-1].data == "kjv" and found[-1].budget == 30
    assert found[0].data == "climbmix" and found[0].eval_tokens == 20_971_520 and found[0].budget == 300
    assert found[0].constants["DEVICE_BATCH_SIZE"] * 2048 <= found[0].constants["TOTAL_BATCH_SIZE"]


PLAN = {"choice": SimpleNamespace(value="cuda"), "budget": 300.0, "verdict": "statistical", "min_delta": 0.001}
DATA = {"path": Path("data"), "sha256": "", "vocab_size": 8192, "bos_id": 8191}


@pytest.mark.parametrize(
    ("gpu", "rows"),
    [(H100, 64), (A100, 64), (card("NVIDIA A30", 23.5, (8, 0)), 32), (SLICES[0][0], 16)],
)
def test_a_score_takes_as_many_rows_at_once_as_the_card_has_room_for(gpu, rows):
    """Of 10,240 rows: 160 questions and answers on a whole card. Thrice the logits fit into the least that is free."""
    here = probe(Machine(gpus=[gpu]))
    profile = backends.load("cuda").profile(here)
    made = making._lock(SimpleNamespace(**PLAN, profile=profile, hardware=here), SimpleNamespace(**DATA), "bfloat16")
    assert made.rows() == rows
    (least,) = {c.least for c in cuda.CLASSES if c.name == profile.name}
    assert 3 * profile.logits_bytes < least


def test_an_h100_starts_from_what_is_known_to_work_in_five_minutes():
    start = backends.load("cuda").profile(probe(Machine(gpus=[H100]))).constants
    assert start["TOTAL_BATCH_SIZE"] == 2**18 and start["DEPTH"] == 9
    assert -(-start["DEPTH"] * start["ASPECT_RATIO"] // start["HEAD_DIM"]) * start["HEAD_DIM"] == 640
    assert start["WINDOW_PATTERN"] == "SSSSL" and start["SHORT_WINDOW"] == 8 and start["WARMDOWN_RATIO"] == 0.75
    assert start["ROPE_BASE"] == 200_000 and start["VALUE_DECAY"] == 0.003 and start["INIT_SCALE"] == 0.68


@pytest.mark.parametrize("gpu", [H100, A100, card("NVIDIA B200", 179, (10, 0)), *(gpu for gpu, _ in SLICES)])
def test_every_profile_fits_the_recipe(gpu):
    backend = backends.load("cuda")
    for profile in backend.profiles(probe(Machine(gpus=[gpu]))):
        assert profile.warmup_cap > Settings.warmup_cap  # the first run compiles for longer than on a CPU
        after = constants(backends.fit(backend.recipe(), profile).decode())
        for name, value in profile.constants.items():
            assert after[name].value == value
            assert after[name].search is None or after[name].search.contains(value), name


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-3, 30.0), st.sampled_from([H100, A100, SLICES[0][0]]))
def test_scaling_gives_hundreds_of_steps_where_that_is_possible(seconds, gpu):
    profile = cuda.profiles(probe(Machine(gpus=[gpu])))[0]
    scaled = cuda.scale(profile, seconds)
    old, new = (scaling.cost(p.constants, p.vocab_size) for p in (profile, scaled))
    steps = profile.budget / seconds * old / new
    batch = scaled.constants["TOTAL_BATCH_SIZE"]
    assert steps > 0.99 * cuda.FEWEST_STEPS or batch == cuda.SMALLEST_BATCH
    assert steps < 1.01 * cuda.MOST_STEPS or batch == cuda.LARGEST_BATCH
    assert cuda.SMALLEST_BATCH <= batch <= cuda.LARGEST_BATCH


def test_the_first_of_several_cards_is_taken_and_that_is_said():
    here = probe(Machine(gpus=[H100, replace(H100, index=1, uuid="GPU-two")]))
    assert "the first of 2 cards, CUDA_VISIBLE_DEVICES chooses another" in cuda.profiles(here)[0].reason


# --- what a user is told, through the door that `init` and `run` go through ----------------------


def plan(monkeypatch, machine, wanted: str | None = "cuda"):
    """What `autoresearch init --backend` does before anything is written, on this machine."""
    from console import making

    monkeypatch.setattr("core.hardware.probe", lambda: probe(machine))
    return making.plan(None, making.Wishes(backend=wanted, tag="x"))


OLD = replace(H100, driver="535.183.01")
CPU_ONLY = TorchBuild("2.14.1+cpu", "")
NEW = TorchBuild("2.14.1+cu130", "13.0")


@pytest.mark.parametrize(
    ("machine", "fact", "action"),
    [
        (Machine(gpus=[OLD], build=NEW), "535.183.01 is too old for torch 2.14.1+cu130, whose CUDA 13.0 needs 580",
         "-m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"),
        (Machine(gpus=[replace(H100, driver="470.1")], build=NEW), "too old", "update the driver to 525 or newer"),
        (Machine(gpus=[H100], build=CPU_ONLY), "torch 2.14.1+cpu is a build without CUDA",
         "-m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"),
        (Machine(gpus=[H100], build=TorchBuild()), "torch is not installed", "-m pip install"),
        (Machine(gpus=[FULL]), "0.5 GiB of 79.6 GiB free, at least 6.0 GiB are needed", "end the 2 process(es) on it"),
        (Machine(gpus=[FULL, replace(H100, index=1, uuid="GPU-free")]), "0.5 GiB", "CUDA_VISIBLE_DEVICES=GPU-free"),
        (Machine(gpus=[card("Tesla V100", 15.8, (7, 0))]), "compute capability 7.0, below 8.0", "--backend cpu"),
        (Machine(gpus=[card("Tesla T4", 14.6, (7, 5))]), "compute capability 7.5, below 8.0", "choose --backend"),
        (Machine(files=CARD_ON_BUS, gpus="the package nvidia-ml-py is not installed"), "nvidia-ml-py is not installed",
         "-m pip install nvidia-ml-py; or choose --backend"),
        (Machine(files=CARD_ON_BUS, gpus="Driver Not Loaded"), "does not answer", "run nvidia-smi"),
        (Machine(), "no NVIDIA GPU was found", "choose --backend cpu"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_with_the_next_action(monkeypatch, machine, fact, action):
    with pytest.raises(UserError) as caught:
        plan(monkeypatch, machine)
    assert fact in caught.value.fact and action in caught.value.action
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("machine", [Machine(gpus=[OLD], build=NEW), Machine(gpus=[H100], build=CPU_ONLY)])
def test_a_card_out_of_reach_is_told_where_it_was_not_asked_for(monkeypatch, machine):
    found = plan(monkeypatch, machine, wanted=None)
    assert found.choice.value == "cpu" and "to use it: " in found.choice.reason and "pip install" in found.choice.reason


def test_a_card_that_is_full_stops_a_run_that_did_not_name_it(monkeypatch):
    """A night on the processor beside an H100 is not what anybody wants; the card only has to be freed."""
    with pytest.raises(UserError, match="end the 2 process"):
        plan(monkeypatch, Machine(gpus=[FULL]), wanted=None)


def test_a_driver_that_tells_no_number_is_left_to_torch():
    assert choose(probe(Machine(gpus=[replace(H100, driver="")], build=NEW)), available=ALL).value == "cuda"


def test_the_version_file_of_this_torch_is_read():
    torch = pytest.importorskip("torch")
    assert probe().torch == TorchBuild(torch.__version__, torch.version.cuda or "")


def test_a_device_that_cannot_be_opened_is_no_fault_of_the_recipe(dataset, settings, tmp_path, tiny_recipe):
    """With real processes: a child of the cuda backend on a machine without a card."""
    from core.child import BackendFailed
    from core.referee import measure

    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(BackendFailed, match=f"torch {torch.__version__.replace('+', '.')} cannot use the card: "):
        measure(tiny_recipe.encode(), replace(settings, backend="cuda", device="cuda:0"), tmp_path)


def test_hardware_without_a_card_has_no_profile():
    here = replace(probe(Machine()), gpus=())
    assert isinstance(here, Hardware)
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        cuda.profiles(here)


def test_a_part_of_a_card_has_not_the_peak_of_the_whole():
    """It is measured then: a seventh of an H100 looked as if it did a seventh of what it does."""
    device = pytest.importorskip("backends.cuda.device", exc_type=ImportError)
    whole = device.known_peak("NVIDIA H100 80GB HBM3")
    assert whole is not None and whole.flops_per_second == 989.4e12
    for part in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "GRID A100-10C", "NVIDIA H100-20C", "NVIDIA A100X-40C"):
        assert device.known_peak(part) is None
    pcie, other = device.known_peak("NVIDIA H800 PCIe"), device.known_peak("NVIDIA H100 PCIe")
    assert pcie == other and pcie.flops_per_second == 756e12


# --- which card children run on ------------------------------------------------------------------

FIRST = replace(H100, uuid="GPU-first", index=1)
OTHER = replace(H100, name="NVIDIA A100-SXM4-80GB", uuid="GPU-other", index=0, capability=(8, 0))
SLICED = replace(H100, uuid="GPU-sliced", parts=(replace(H100, uuid="MIG-part"),))


class NoChild(Exception):
    """Nothing is started; the environment is what is looked at."""


@pytest.fixture
def shown(monkeypatch, settings, tmp_path):
    """A variable of a child's environment, with these cards in the machine and the user's own choice."""

    def child(gpus, device="cuda:0", env=None, name="CUDA_VISIBLE_DEVICES"):
        policies = []

        def launch(argv, policy, **more):
            policies.append(policy)
            raise NoChild

        monkeypatch.setattr("core.sandbox.launch", launch)
        monkeypatch.setattr("core.hardware.LocalFacts", lambda: Machine(gpus=gpus, env=env or {}))
        for key, value in (env or {}).items():
            monkeypatch.setenv(key, value)
        with pytest.raises(NoChild):
            Worker("scorer", Place(replace(settings, backend="cuda", device=device), tmp_path))
        return policies[0].env.get(name)

    return child


@pytest.mark.parametrize(
    ("gpus", "env", "card"),
    [
        ([OTHER, FIRST], {}, "GPU-first"),  # CUDA's own idea of the fastest may be another
        ([OTHER, FIRST], {"CUDA_VISIBLE_DEVICES": "1"}, "GPU-other"),  # the second in CUDA's order
        ([OTHER, FIRST], {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, "GPU-other"),
        ([OTHER, FIRST], {"CUDA_VISIBLE_DEVICES": "GPU-oth"}, "GPU-other"),
        ([SLICED], {}, "MIG-part"),
        ("NVML Shared Library Not Found", {"CUDA_VISIBLE_DEVICES": "1"}, "1"),  # nobody tells: the user's word stays
    ],
)
def test_children_see_the_card_that_is_locked_and_watched(shown, monkeypatch, gpus, env, card):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shown(gpus, env=env) == card


@pytest.mark.parametrize(("windows", "told"), [(True, str(5 * 2**30)), (False, None)])
def test_where_windows_gives_out_the_card_children_are_told_what_is_free(shown, monkeypatch, windows, told):
    """CUDA counts what others hold there as if this process could have it."""
    monkeypatch.setattr("core.allocator.shared_with_windows", lambda: windows)
    monkeypatch.setattr("core.nvml.Nvml.look", lambda self, device, ours: Look(free=5 * 2**30))
    assert shown([FIRST], name=allocator.TOLD_FREE) == told
    monkeypatch.setattr("core.nvml.Nvml.look", lambda self, device, ours: Look(error="Not Supported"))
    assert shown([FIRST], name=allocator.TOLD_FREE) is None


@pytest.mark.parametrize(
    ("name", "product", "told"),
    [
        ("NVIDIA GeForce RTX 2060", 0x1F11, "1"),
        ("NVIDIA GeForce RTX 2060", 0x1F08, None),
        ("NVIDIA GeForce RTX 2060", 0, None),  # the driver does not tell
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 0x28E0, "1"),
        ("NVIDIA H200", 0x2335, None),
    ],
)
def test_children_are_told_that_their_card_is_a_laptops(shown, name, product, told):
    """CUDA tells them the name alone, which may be a desktop card's: whose peak it has not."""
    card = replace(FIRST, name=name, product=product)
    assert shown([card], name=TOLD_LAPTOP) == told
    with locks.hold_device("cuda:0"):
        assert shown([OTHER], name=TOLD_LAPTOP) == told
    assert shown([card], device="cpu", name=TOLD_LAPTOP) is None


def test_children_without_a_card_are_shown_none(shown, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shown([FIRST], device="cpu") is None


def test_a_card_that_is_held_stays_what_it_is_when_another_comes_or_goes(shown, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("core.hardware.LocalFacts", lambda: Machine(gpus=[OTHER, FIRST]))
    with locks.hold_device("cuda:0"):
        assert shown([OTHER]) == "GPU-first" and locks.cuda_uuid(0) == "GPU-first"
    assert shown([OTHER]) == "GPU-other"


def test_a_lab_that_goes_on_on_another_card_is_told_of_a_change(settings, monkeypatch):
    """On a rented machine "cuda:0" is whatever was free; by a faster card no recipe gained."""
    there = {"gpus": [replace(H100, uuid="GPU-a")]}
    monkeypatch.setattr("core.hardware.LocalFacts", lambda: Machine(**there))
    on_card = replace(settings, backend="cuda", device="cuda:0")
    first = versions(on_card)
    assert first["card"] == H100.name and "processor" not in first
    assert "card" not in versions(settings) and versions(settings)["processor"] == "x86_64, 8 cores"
    there["gpus"] = [replace(H100, uuid="GPU-b")]
    assert changes(first, versions(on_card)) == []  # its twin
    there["gpus"] = "NVML: Unknown Error"
    assert versions(on_card)["card"] is None  # unknown is not taken for the same
    there["gpus"] = [replace(H100, uuid="GPU-c", name="NVIDIA A100-SXM4-80GB")]
    assert changes(first, versions(on_card)) == [f"card {H100.name} -> NVIDIA A100-SXM4-80GB"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with locks.hold_device("cuda:0"):  # in the middle of a run the driver may not answer for a moment
        there["gpus"] = "NVML: Unknown Error"
        assert versions(on_card)["card"] == "NVIDIA A100-SXM4-80GB"


def test_on_a_card_a_change_of_kernels_or_of_their_peers_is_one_of_what_measures(settings, monkeypatch, tmp_path):
    card = replace(settings, backend="cuda", device="cuda:0")
    for root in ("before", "after"):
        (tmp_path / root / "kernels").mkdir(parents=True)
        (tmp_path / root / "kernels" / "muon.py").write_text(f"made = {root!r}")
    before = versions(card, tmp_path / "before")
    assert "kernels" in before and "kernels" not in versions(settings, tmp_path / "before")
    monkeypatch.setattr("core.versions._installed", {"flash-attn-3": "3.0.0"}.get)
    changed = {line.split()[0] for line in changes(before, versions(card, tmp_path / "after"))}
    assert {"kernels", "flash-attn-3"} <= changed


@pytest.mark.parametrize(
    ("said", "kind"),
    [("CUDA error: out of memory", DeviceFull), ("CUDA-capable device(s) is/are busy or unavailable", DeviceFull),
     ("CUDA error: an illegal memory access was encountered", RuntimeError),
     ("CUDA error: unspecified launch failure", UserError),
     ('NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at "PeerToPeerAccess.cpp"', UserError)],
)  # fmt: skip
def test_a_card_that_cannot_be_opened_now_is_waited_for(monkeypatch, said, kind):
    device = pytest.importorskip("backends.cuda.device")

    rtx = pytest.importorskip("backends.rtx.device")

    def refuse(*given, **more):
        raise RuntimeError(said)

    for name, answer in {
        "init": None,
        "is_available": True,
        "set_device": None,
        "get_device_capability": (8, 6),
        "get_device_name": "NVIDIA GeForce RTX 4060",
    }.items():
        monkeypatch.setattr(device.torch.cuda, name, lambda *a, answer=answer: answer)
    monkeypatch.setattr(device.torch.cuda, "set_per_process_memory_fraction", lambda share: None)
    told = {DeviceFull: "cannot be opened now", RuntimeError: "illegal", UserError: "Xid|restart the container"}
    expected = pytest.raises(kind, match=told[kind])
    with monkeypatch.context() as patch:
        patch.setattr(device.torch.cuda, "mem_get_info", refuse)
        for opened in (device, rtx):
            with expected:
                opened.open_device()
    monkeypatch.setattr(device.torch.cuda, "mem_get_info", lambda: (2**33, 2**33))
    monkeypatch.setattr(rtx.torch, "ones", refuse)  # another program has taken it meanwhile
    for opened in (device, rtx):
        with expected:
            opened.open_device()
