"""Macs that are not here, through the facts interface: chip, GPU, limits, and what makes them slow."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Limits, Loop, Scripted, make_lab, recipe
from test_hardware import GIB, M4, Machine

from backends.mlx import profiles
from backends.scaling import cost, tokens_per_weight
from core import executor
from core.apple import CHIPS, GpuLoad, conditions, departure, identify
from core.contract import Proposal
from core.doctor import _torch_install
from core.errors import UserError
from core.executor import LocalExecutor, settled
from core.hardware import choose, probe, torch_for_cpu
from core.outcome import Request
from core.verdict import taint

IOREG = "ioreg -rc AGXAccelerator -d 1"


def mac(chip="Apple M4 Max", cores=40, gib=64, darwin="24.1.0", **more):
    commands = {
        **M4,
        "sysctl -n machdep.cpu.brand_string": chip,
        IOREG: f'  | "gpu-core-count" = {cores}\n',
        **more.pop("commands", {}),
    }
    return Machine(os=("Darwin", darwin, "arm64"), commands=commands, ram=(gib * GIB, gib * GIB // 2), **more)


def test_an_m4_max_says_what_it_is():
    hardware = probe(mac())
    assert hardware.apple.gpu_cores == 40
    assert hardware.apple.bandwidth == 546e9
    assert "40 GPU cores, 546 GB/s" in hardware.summary()
    choice = choose(hardware, None, ("mlx", "cpu"))
    assert (choice.value, "546 GB/s" in choice.reason) == ("mlx", True)


def test_a_wired_limit_that_was_set_is_told():
    hardware = probe(mac(commands={"sysctl -n iogpu.wired_limit_mb": "49152"}))
    assert hardware.apple.wired_limit == 48 * GIB
    assert "wired limit 48 GiB" in hardware.summary()


@pytest.mark.parametrize("model", ["MacBookAir10,1", "Mac16,13"])
def test_an_air_has_no_fan(model):
    assert probe(mac("Apple M4", 10, 16, commands={"sysctl -n hw.model": model})).apple.fanless
    assert not probe(mac("Apple M4", 10, 16, commands={"sysctl -n hw.model": "Mac16,1"})).apple.fanless


def test_a_mac_that_tells_nothing_is_still_a_mac():
    machine = Machine(os=("Darwin", "24.1.0", "arm64"), commands=M4)
    assert identify("Apple M9 Omega", machine).summary() == ""
    assert choose(probe(machine), None, ("mlx", "cpu")).value == "mlx"


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        (mac(), "-m pip install torch"),
        (mac("Intel(R) Core(TM) i7-9750H", 0), "none for Macs with Intel's processors since PyTorch 2.3"),
        (mac("VirtualApple", commands={"sysctl -n sysctl.proc_translated": "1"}), "install Python for arm64"),
    ],
)
def test_where_the_cpu_backends_library_comes_from(machine, says):
    """pip has none to bring to an Intel Mac, and under Rosetta another Python is what helps."""
    hardware = probe(machine)
    assert says in torch_for_cpu(hardware)
    if not says.startswith("-m pip"):
        assert _torch_install(hardware, "torch") == torch_for_cpu(hardware)


@pytest.mark.parametrize(
    ("machine", "fact"),
    [
        (mac("Intel(R) Core(TM) i7-9750H", 0), "no Apple Silicon"),
        (mac(darwin="22.6.0"), "macOS 13 is too old for MLX"),
        (mac("Apple M1", 8, 4), "4.0 GiB of unified memory"),
        (mac(modules=()), "-m pip install mlx"),
    ],
)
def test_what_mlx_lacks_is_said_with_the_next_step(machine, fact):
    hardware = probe(machine)
    with pytest.raises(UserError) as error:
        choose(hardware, "mlx", ("mlx", "cpu"))
    assert fact in str(error.value)
    choice = choose(hardware, None, ("mlx", "cpu"))
    assert choice.value == "cpu"
    assert fact in choice.reason


def test_linux_takes_mlx_only_when_it_is_asked_for():
    here = probe(Machine())
    assert choose(here, None, ("mlx", "cpu")).value == "cpu"
    assert "MLX's build for Linux" in choose(here, "mlx", ("mlx", "cpu")).reason
    with pytest.raises(UserError, match=r"pip install -e '\.\[mlx\]'"):
        choose(probe(Machine(modules=())), "mlx", ("mlx", "cpu"))


# --- profiles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "gib", "name"),
    [
        ("Apple M1", 8, "mlx-base"),
        ("Apple M2 Pro", 32, "mlx-pro"),
        ("Apple M4 Max", 64, "mlx-max"),
        ("Apple M3 Ultra", 256, "mlx-ultra"),
        ("Apple M3 Max", 8, "mlx-base"),
    ],
)
def test_profiles_follow_chip_and_memory(chip, gib, name):
    found = profiles.profiles(probe(mac(chip, 10, gib)))
    assert found[0].name == name
    assert found[-1].name == "demo"
    sizes = [p.constants["DEPTH"] * p.constants["TOTAL_BATCH_SIZE"] for p in found]
    assert sizes == sorted(sizes, reverse=True)


@given(st.floats(1e-3, 60.0))
def test_a_budget_holds_hundreds_of_steps_where_that_is_possible(seconds):
    profile = profiles.profiles(probe(mac()))[0]
    scaled = profiles.scale(profile, seconds)
    batch = scaled.constants["TOTAL_BATCH_SIZE"]
    assert profiles.SMALLEST_BATCH <= batch <= profiles.LARGEST_BATCH
    assert batch % scaled.sequence_len == 0
    steps = profile.budget / seconds
    (fewest, most), per_weight = profiles.PER_WEIGHT, steps * tokens_per_weight(profile.constants)
    if fewest <= per_weight <= most and profiles.FEWEST_STEPS <= steps <= profiles.MOST_STEPS:
        assert scaled is profile


@pytest.mark.parametrize(("chip", "flops"), [("Apple M1", 1e12), ("Apple M4 Pro", 3e12), ("Apple M3 Ultra", 1.2e13)])
def test_a_mac_gets_a_model_of_the_size_that_its_budget_trains(chip, flops):
    """By what it would reach: its measured step decides."""
    profile = profiles.profiles(probe(mac(chip, 10, 64)))[0]
    scaled = profiles.scale(profile, 6 * cost(profile.constants, profile.vocab_size) / flops)
    steps = profile.budget * flops / (6 * cost(scaled.constants, profile.vocab_size))
    assert 800 <= steps <= 4000 and 3 <= steps * tokens_per_weight(scaled.constants) <= 20


# --- what slows a Mac down ------------------------------------------------------------------------------

STATES = {
    "notifyutil -g com.apple.system.thermalpressurelevel": "com.apple.system.thermalpressurelevel 1",
    "sysctl -n kern.memorystatus_vm_pressure_level": "2",
    "pmset -g": "System-wide power settings:\nCurrently in use:\n lowpowermode         1\n sleep  1\n",
    "pmset -g batt": "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1) 80%; discharging;",
}


def test_conditions_are_read():
    assert conditions(mac(commands=STATES)) == {
        "thermal": 1,
        "memory_pressure": 1,
        "low_power": True,
        "battery": True,
    }
    assert conditions(mac()) == {}


def test_how_busy_the_gpu_is():
    said = '  | "PerformanceStatistics" = {"In use system memory"=9,"Device Utilization %"=37,"Tiler Utilization %"=3}'
    assert GpuLoad(mac(commands={IOREG: said})).look("gpu", ()).busy == 0.37
    unknown = GpuLoad(mac()).look("gpu", ())
    assert unknown.busy is None and unknown.error


def test_only_a_departure_from_the_steady_state_taints():
    warm = {"conditions": {"thermal": 1, "memory_pressure": 0, "low_power": False, "battery": False}}
    assert taint(warm, warm) == ""
    assert taint({"conditions": {**warm["conditions"], "thermal": 0}}, warm) == ""
    for name, value, said in (
        ("thermal", 2, "hotter than at the baseline: heavy, was moderate"),
        ("memory_pressure", 3, "more pressure than at the baseline: critical, was normal"),
        ("low_power", True, "low-power mode"),
        ("battery", True, "battery"),
    ):
        assert said in taint({"conditions": {**warm["conditions"], name: value}}, warm)
    assert taint({"conditions": {"thermal": 4}}, None) == "", "the baseline itself has nothing to depart from"


def test_an_unknown_thermal_state_counts_as_the_worst():
    assert departure({"thermal": 99}, {"thermal": 0}).endswith("sleeping, was nominal")


class Air(Scripted):
    """A Mac without a fan: work heats it, and heat slows it to 60 %. What a recipe reaches depends on its speed."""

    def __init__(self, settles: bool) -> None:
        super().__init__()
        self.heat, self.settles = 0.0, settles

    def work(self, minutes: float) -> float:
        """The mean speed meanwhile."""
        before = self.heat
        self.heat = 1 - (1 - self.heat) * math.exp(-minutes / 4)
        return 1 - 0.4 * (before + self.heat) / 2

    def execute(self, request, on_event, stop):
        outcome = super().execute(request, on_event, stop)
        speed = self.work(5.0)
        if outcome.val_bpb is not None:
            outcome.val_bpb += 0.1 / speed
            outcome.audited = True
        outcome.health = {"our_cores": 1.0, "conditions": {"thermal": round(2 * self.heat)}}
        return outcome

    def settle(self, request, say, stop):
        return settled(lambda: self.work(1 / 3), say, stop) if self.settles else ""


class Alternating:
    """Proposes what is 0.01 better than the best, then what is 0.01 worse, and so on."""

    name = "alternating"

    def propose(self, view):
        better = len(view.past) % 2 == 1
        best = float(view.best_source.split()[2])
        score = best - 0.01 if better else best + 0.01
        return Proposal(recipe(score, mark=str(len(view.past))), f"idea {len(view.past)}")


@pytest.mark.parametrize("settles", [True, False])
def test_a_night_without_a_fan_keeps_what_is_better_because_it_settles_first(settles, tmp_path, settings):
    lab = make_lab(tmp_path / "lab", settings, first=recipe(1.0))
    told = []
    Loop(lab, Alternating(), Air(settles), told.append).run(Limits(experiments=9))
    experiments = lab.ledger.experiments()
    kept = [e.number for e in experiments[1:] if e.is_kept]
    if settles:
        assert not any(e.tainted for e in experiments)
        assert kept == [2, 4, 6, 8], "each second idea is 0.01 better, the others are as much worse"
        assert any("settled at" in str(e.data.get("text")) for e in told)
    else:
        assert 2 not in kept, "the cold baseline is faster than anything after it"


def test_the_table_is_ordered():
    for chip in CHIPS:
        assert list(chip.bandwidth) == sorted(chip.bandwidth)
        assert all(60e9 < b < 1000e9 for b in chip.bandwidth.values())
    assert replace(probe(mac()).apple, gpu_cores=0).summary() == "546 GB/s"


def test_readings_are_taken_until_they_stay_the_same():
    rates = iter([10.0, 8.0, 7.0, 6.6, 6.4, 6.5, 6.4, 6.4, 6.5, 6.4, 99.0])
    said: list[str] = []
    assert settled(lambda: next(rates), said.append, threading.Event()).startswith(
        "settled at 6.4 steps/s, 64% of the first of 10 readings"
    )
    assert len(said) == 10
    rising = iter(range(1, 1000))
    assert "did not settle" in settled(lambda: float(next(rising)), said.append, threading.Event())


@pytest.mark.alone
@pytest.mark.slow
def test_this_machine_settles_when_it_is_told_that_it_has_no_fan(tmp_path, settings, dataset, tiny_recipe, monkeypatch):
    """The real children; only the facts are those of a MacBook Air. How many readings are enough is shown above."""
    monkeypatch.setattr(executor, "SETTLE_READINGS", 1)
    monkeypatch.setattr(executor, "SETTLE_MOST", 2)
    air = mac("Apple M4", 10, 16, commands={"sysctl -n hw.model": "Mac16,13"})
    request = Request(tiny_recipe.encode(), settings, dataset, settings.seed, "1", tmp_path / "1")
    said: list[str] = []
    done = LocalExecutor(air, settle_seconds=0.2).settle(request, said.append, threading.Event())
    assert "settle" in done and "no fan" in said[0] and "steps/s at reading 2" in said[2]
    assert list(tmp_path.iterdir()) == []
    assert LocalExecutor(mac(), settle_seconds=0.2).settle(request, said.append, threading.Event()) == ""
