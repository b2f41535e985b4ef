"""A card that others use: watched, waited for, its scores taken again. The card is presented, the loop is real."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from scripted import Scripted, recipe
from test_loop import check, loop_of, night  # noqa: F401 - the fixture

from core import gpuwatch
from core.errors import DeviceFull, UserError
from core.executor import LocalExecutor
from core.facts import Power
from core.gpuwatch import Look
from core.health import Watch
from core.loop import Limits
from core.nvml import Nvml
from core.outcome import Outcome
from core.steady import Steady, departure
from core.verdict import taint

MIB = 2**20
CALM = Look(busy=0.98, others_busy=0.0, used=5000 * MIB, ours=4600 * MIB, free=7000 * MIB, clock=1900, temperature=68,
            power_limit=170.0)  # fmt: skip


def changed(**fields):
    return Look(**{**CALM.__dict__, **fields})


def untold(used, total=12000):
    """A look at a card of so many MiB whose processes are not told apart."""
    return changed(others_busy=None, ours=None, used=used * MIB, free=(total - used) * MIB)


class Card:
    """`core.gpuwatch.Source` that shows these looks, and then the last again and again."""

    def __init__(self, *looks):
        self.looks, self.asked = list(looks), []

    def look(self, device, ours):
        self.asked.append((device, tuple(ours)))
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


@pytest.mark.parametrize(
    ("looks", "why"),
    [
        ([CALM, CALM], ""),
        ([CALM, changed(others_busy=0.7), changed(others_busy=0.8)], "other programs kept the card 50% busy"),
        ([CALM, changed(used=7000 * MIB)], "memory on the card went from 400 to 400..2400 MiB"),
        ([changed(used=7000 * MIB), CALM], "memory on the card went from 2400 to 400..2400 MiB"),
        ([CALM, changed(power_limit=80.0)], "power limit changed from 170 to 80 W"),
        ([CALM, changed(slowed=True, temperature=91)], "held back by heat or its power supply at 91 °C for 50%"),
        # WDDM, WSL2: whose memory it is is not told
        ([changed(others_busy=None, ours=None)] * 3, ""),
        ([untold(5000), untold(5600)], ""),  # an eighth of it may be our own gaps
        ([untold(5000), untold(7000), untold(5000)], "memory taken on the card went from 5000 to 7000 MiB"),
        ([untold(7000), untold(3000)], ""),  # ours gave some back: nobody is slowed by that
        ([untold(2000), untold(2500)], ""),
        ([untold(2000), untold(2600)], "memory taken on the card went from 2000 to 2600 MiB"),
        ([untold(70000, 80000), untold(76000, 80000)], "memory taken on the card went from 70000 to 76000 MiB"),
        ([untold(5000), changed(others_busy=0.5, ours=None)], "other programs kept the card 50% busy"),
        ([changed(others_busy=None, ours=None, power_limit=p) for p in (170.0, 90.0)], "power limit changed"),
        ([Look(error="Driver Not Loaded")], ""),
    ],
)
def test_what_makes_a_score_worthless(looks, why):
    said = gpuwatch.summary(looks)["tainted"]
    assert why in said and bool(said) == bool(why)


def swings(watts, laptop, looks=150):
    """A power limit that moves with the load, at random but the same in each test."""
    dice = random.Random(1)
    return [changed(power_limit=float(dice.choice(watts)), laptop=laptop) for _ in range(looks)]


@pytest.mark.parametrize(
    ("looks", "why"),
    [
        (swings((80, 90, 105), True), ""),  # Dynamic Boost
        (swings((80, 90, 105), False), ""),
        ([changed(power_limit=105.0)] * 40 + [changed(power_limit=80.0, laptop=True)] * 40, ""),  # warm by then
        ([changed(power_limit=105.0)] * 40 + [changed(power_limit=80.0)] + [changed(power_limit=105.0)] * 40, ""),
        ([changed(power_limit=300.0)] * 100 + [changed(power_limit=200.0)] * 50, "limit changed from 300 to 200 W"),
    ],
)
def test_a_power_limit_counts_where_it_was_lowered_for_good(looks, why):
    said = gpuwatch.summary(looks)["tainted"]
    assert why in said and bool(said) == bool(why)


def test_a_laptops_power_limit_is_compared_with_that_of_the_steady_state():
    cards = [gpuwatch.summary([changed(power_limit=w, laptop=True)] * 8) for w in (85.0, 82.0, 45.0)]
    steady = Steady(health={"card": cards[0]}, is_good=True)
    said = [departure({"health": {"card": card}}, steady) for card in cards]
    assert said == ["", "", "the card's power limit was 45 W at the end, and 85 W in this lab's steady state"]


@pytest.mark.parametrize(
    ("busy", "looks", "why"),
    [
        (0.9, 30, "more than 50% busy for 20% of the time"),  # a game in the last fifth: 18 % of the whole
        (0.9, 8, ""),  # somebody moved a window
        (0.4, 30, ""),
    ],
)
def test_a_game_that_starts_near_the_end_is_seen(busy, looks, why):
    said = gpuwatch.summary([CALM] * (150 - looks) + [changed(others_busy=busy)] * looks)["tainted"]
    assert why in said and bool(said) == bool(why)


def test_one_blip_in_a_short_timing_is_no_game():
    assert gpuwatch.summary([CALM, CALM, CALM, CALM, changed(others_busy=0.9)])["tainted"] == ""


def test_a_training_is_watched_from_its_start_to_its_end():
    card = Card(CALM, changed(others_busy=0.9))
    watch = Watch(os.getpid(), "cuda:0", card)
    report = watch.report()
    assert card.asked[0][0] == "cuda:0" and os.getpid() in card.asked[0][1]
    assert report["card"]["looks"] >= 1 and "others_cores" in report
    enough, looks = threading.Event(), []

    def ours():
        looks.append(1)
        if len(looks) > 4:
            enough.set()
        return [1]

    seen = gpuwatch.Watch("cuda:0", ours, Card(CALM, changed(others_busy=1.0)), every=0.01)
    assert enough.wait(30)
    health = {"card": seen.report()}
    assert "busy" in health["card"]["tainted"]
    assert "busy" in taint({"others_cores": 0.0, "our_cores": 1.0, "tainted": health["card"]["tainted"]})


def test_a_cpu_training_asks_no_card():
    assert "card" not in Watch(os.getpid(), "cpu", Card(CALM)).report()


# --- waiting ---------------------------------------------------------------------------------------


def wait(card, most=60.0, needed=0):
    said, stop = [], threading.Event()
    done = gpuwatch.wait_until_free("cuda:0", card, said.append, stop, most, every=0.001, lingers=0.001, needed=needed)
    return done, said


def test_a_free_card_is_not_waited_for():
    for look in (changed(others_busy=0.05), changed(busy=0.0, others_busy=None), Look(error="no NVML")):
        card = Card(look)
        assert wait(card) == (True, []) and len(card.asked) == 1


def test_what_our_own_last_child_did_is_not_waited_out(monkeypatch):
    """Where processes are not told apart, a driver's figure of a second ago is of our own training."""
    ours, desktop = changed(others_busy=None, busy=0.97), changed(others_busy=None, busy=0.04)
    waited = []
    monkeypatch.setattr(gpuwatch, "wait", lambda stop, seconds: waited.append(seconds))
    card, said = Card(ours, desktop), []
    assert gpuwatch.wait_until_free("cuda:0", card, said.append, threading.Event())
    assert (said, waited, len(card.asked)) == ([], [gpuwatch.LINGERS], 2)


@pytest.mark.parametrize(
    ("busy", "clock", "clock_most", "free"),
    [
        (0.45, 300, 1900, True),  # a film, or a desktop of 4K, on a card that idles
        (0.97, 1800, 1900, False),
        (0.45, 1800, 1900, False),
        (0.97, 800, 1900, False),  # a game on a laptop's battery
        (0.45, 300, None, False),
        (0.45, None, 1900, False),
        (0.97, 1950, 1900, False),
    ],
)
def test_a_desktop_at_an_idle_clock_leaves_the_card_free(busy, clock, clock_most, free):
    look = changed(others_busy=None, busy=busy, clock=clock, clock_most=clock_most)
    assert wait(Card(look), most=0.0)[0] is free


def test_a_wait_lets_ctrl_c_through():
    """Each single wait is short: on Windows before Python 3.14 the main thread sees a signal only between them."""
    waits = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return super().wait(timeout)

    gpuwatch.wait(Stop(), 0.5)
    assert len(waits) >= 3 and max(waits) <= 0.25


def test_a_busy_card_is_waited_for_until_it_was_quiet_twice():
    game, quiet = changed(others_busy=None, busy=0.97), changed(others_busy=None, busy=0.03)
    card = Card(game, game, quiet, game, quiet, quiet, game)
    done, said = wait(card)
    assert done and len(card.asked) == 6
    assert said == ["the card is 97% busy with other programs: waits until it is free"]


def test_memory_that_another_program_only_holds_is_waited_for():
    """A paused game, a language model that is kept loaded: 0 % busy, and the card is full."""
    full, free = (changed(busy=0.0, others_busy=0.0, free=gib * 2**30) for gib in (1, 5))
    done, said = wait(Card(full, full, full, free), needed=4 * 2**30)
    assert done and said == ["other programs leave 1.0 GiB of the card, and 4.0 GiB are needed: waits until it is free"]
    assert wait(Card(full), most=0.0, needed=4 * 2**30)[0] is False
    assert wait(Card(full)) == (True, []), "what is needed is not known"
    nearly = changed(busy=0.0, others_busy=0.0, free=int(3.7 * 2**30))
    assert wait(Card(nearly), needed=4 * 2**30) == (True, []), "an allocator keeps more than it uses"


def test_waiting_ends_with_its_limit_or_a_stop():
    assert wait(Card(changed(others_busy=0.9)), most=0.0)[0] is False
    stop = threading.Event()
    stop.set()
    assert gpuwatch.wait_until_free("cuda:0", Card(changed(others_busy=0.9)), print, stop)


def test_the_executor_waits_and_then_says_what_to_do():
    request = SimpleNamespace(settings=SimpleNamespace(device="cuda:0"), experiment="night-1", card_bytes=0)
    executor = LocalExecutor(card=Card(changed(others_busy=0.9)), card_wait=0.0, card_every=0.001)
    said = []
    with pytest.raises(UserError, match="other programs have kept the card busy"):
        executor.execute(request, said.append, threading.Event())
    assert "waits until it is free" in said[0].data["phase"]
    assert [said[1].kind, said[1].data["text"]] == ["waiting", said[0].data["phase"]]  # in a log file a line of its own


class Runs:
    """`core.referee.execute` whose runs end so, one after another."""

    def __init__(self, *ends):
        self.ends, self.made = list(ends), 0

    def __call__(self, request, on_event, stop, sharing):
        self.made += 1
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


@pytest.fixture
def on_card(monkeypatch, tmp_path):
    """An executor before a presented card, and what it said."""

    def execute(card, *ends, needed=0, card_wait=60.0):
        runs, said = Runs(*ends), []
        monkeypatch.setattr("core.referee.execute", runs)
        monkeypatch.setattr(gpuwatch, "LINGERS", 0.001)
        settings = SimpleNamespace(device="cuda:0")
        request = SimpleNamespace(settings=settings, experiment="night-1", card_bytes=needed, workdir=tmp_path / "work")
        executor = LocalExecutor(card=card, card_wait=card_wait, card_every=0.001)
        tell = lambda event: said.append(event.data["text"]) if event.kind == "waiting" else None  # noqa: E731
        return executor.execute(request, tell, threading.Event()), runs.made, said

    return execute


FULL = DeviceFull("only 0.2 of 8.0 GiB of the card are free", "close what else uses it", 2**30)


def test_a_card_that_is_full_when_it_is_opened_ends_no_night(on_card):
    taken, free = (changed(busy=0.0, others_busy=0.0, free=mib * MIB) for mib in (200, 7000))
    outcome, made, said = on_card(Card(free, free, taken, taken, free), FULL, Outcome(status="scored"))
    assert (outcome.status, made) == ("scored", 2) and outcome.health["card"]["free_before"] == 7000 * MIB
    assert said[0] == "only 0.2 of 8.0 GiB of the card are free: waits until it is free"
    assert "other programs leave 0.2 GiB" in said[1]
    with pytest.raises(UserError, match=r"only 0\.2 of 8\.0 GiB"):
        on_card(Card(free), FULL, card_wait=0.0)


def test_a_card_that_is_full_while_a_candidate_is_tried_refuses_no_candidate_and_ends_no_night(monkeypatch, tmp_path):
    def full(*given, **more):
        raise FULL

    monkeypatch.setattr("core.dryrun.dry_build", full)
    assert LocalExecutor().dry_build(b"", SimpleNamespace(), tmp_path, threading.Event(), None) == ""


def test_what_the_best_took_is_waited_for_before_a_run(on_card):
    taken, free = (changed(busy=0.0, others_busy=0.0, free=gib * 2**30) for gib in (1, 6))
    _, made, said = on_card(Card(taken, taken, free), Outcome(status="scored"), needed=4 * 2**30)
    assert made == 1 and "4.0 GiB are needed" in said[0]


def test_a_run_without_memory_is_others_doing_where_they_have_the_card_after_it(on_card):
    free, game = changed(busy=0.0, others_busy=0.0), changed(others_busy=0.9)
    outcome, _, _ = on_card(Card(free, free, game), Outcome(status="crash", out_of_memory=True))
    assert "90% busy" in departure(outcome.to_dict(), Steady())
    outcome, _, _ = on_card(Card(free), Outcome(status="crash", out_of_memory=True))
    assert departure(outcome.to_dict(), Steady()) == "", "it asked for too much by itself"
    outcome, _, _ = on_card(Card(free, free, game), Outcome(status="crash"))
    assert departure(outcome.to_dict(), Steady()) == "", "what is broken is broken beside a game too"


def test_what_runs_took_of_a_card_is_what_the_next_ones_need(night):  # noqa: F811
    executor = Scripted(health={"card": {"free_before": 2**27, "tainted": ""}})
    asked, execute = [], executor.execute
    executor.execute = lambda request, *rest: asked.append(request.card_bytes) or execute(request, *rest)
    loop_of(night, executor).run(Limits(experiments=2))
    assert asked == [0, 2**27], "2**28 were taken, but no more than was free is believed"


# --- the loop --------------------------------------------------------------------------------------

SHARED = {"card": {"tainted": "other programs kept the card 80% busy"}, "tainted": "other programs kept the card busy"}


def test_a_score_of_a_shared_card_never_decides_and_is_measured_again(night):  # noqa: F811
    loop_of(night).run(Limits(experiments=1))
    before = night.best_bpb()
    executor = Scripted(health=SHARED)
    e = loop_of(night, executor).judge(recipe(0.1), "beside a game")
    assert (e.status, e.val_bpb) == ("invalid", None) and "80% busy" in e.reason
    assert len(executor.runs) == 3 and night.best_bpb() == before
    check(night)


@pytest.mark.parametrize(
    ("status", "out_of_memory", "runs"), [("crash", True, 3), ("crash", False, 1), ("invalid", False, 1)]
)
def test_only_a_crash_for_want_of_memory_is_repeated_beside_others(night, status, out_of_memory, runs):  # noqa: F811
    loop_of(night).run(Limits(experiments=1))
    executor = Scripted(health=SHARED, out_of_memory=out_of_memory)
    e = loop_of(night, executor).judge(recipe(status=status), "beside a game")
    assert (e.status, len(executor.runs)) == (status, runs)
    check(night)


def test_a_crash_for_want_of_memory_on_a_quiet_card_is_final(night):  # noqa: F811
    loop_of(night).run(Limits(experiments=1))
    executor = Scripted(out_of_memory=True)
    assert loop_of(night, executor).judge(recipe(status="crash"), "too large").status == "crash"
    assert len(executor.runs) == 1


# --- NVML ------------------------------------------------------------------------------------------


class Error(Exception):
    pass


def nvml(**answers):
    """A pynvml that answers this and refuses everything else, as a driver under WDDM does."""
    module = SimpleNamespace(NVMLError=Error, NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0)
    module.nvmlInit = module.nvmlShutdown = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid

    def refuse(*arguments):
        raise Error("Not Supported")

    for name in ("UtilizationRates", "MemoryInfo", "EnforcedPowerLimit", "CurrentClocksThrottleReasons",
                 "ComputeRunningProcesses", "ClockInfo", "MaxClockInfo", "Temperature", "Name",
                 "PciInfo", "ProcessUtilization"):  # fmt: skip
        value = answers.get(name)
        setattr(module, f"nvmlDeviceGet{name}", refuse if value is None else lambda *a, v=value: v)
    return module


def now():
    """In microseconds, as NVML counts."""
    return int(time.time() * 1e6)


GONE = 2**22 + 1  # no process of Linux has a higher number than 2**22


def looked(monkeypatch, ours=(), **answers):
    """One look where the driver alone tells who uses the card; what Windows tells is tests/test_wddm.py's."""
    monkeypatch.setattr("core.nvml.sys", SimpleNamespace(platform="linux"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml(**answers))
    monkeypatch.setattr("core.nvml.cuda_uuid", lambda index: "GPU-1")
    return Nvml().look("cuda:0", ours)


def test_nvml_tells_others_from_ours(monkeypatch):
    process = lambda pid, used: SimpleNamespace(pid=pid, usedGpuMemory=used)  # noqa: E731
    sample = lambda pid, share, ago=0: SimpleNamespace(pid=pid, smUtil=share, timeStamp=now() - ago)  # noqa: E731
    found = looked(
        monkeypatch,
        ours=(10, 11),
        UtilizationRates=SimpleNamespace(gpu=90),
        MemoryInfo=SimpleNamespace(used=900, free=100),
        ComputeRunningProcesses=[process(11, 600), process(1, 200)],
        # Some drivers tell of more than they are asked for: what was before, and shares that cannot be.
        ProcessUtilization=[
            sample(11, 60),
            sample(1, 30),
            sample(GONE, 20),
            sample(1, 50, 60_000_000),
            sample(1, 37100),
        ],
        CurrentClocksThrottleReasons=0x40,
        EnforcedPowerLimit=170_000,
    )
    assert (found.busy, found.others_busy, found.used, found.ours, found.free) == (0.9, 0.3, 900, 600, 100)
    assert found.slowed and found.power_limit == 170.0 and found.clock is None


def test_in_a_container_whose_processes_have_other_numbers_for_the_driver_nobody_is_blamed(monkeypatch):
    sample = SimpleNamespace(pid=645400, smUtil=97, timeStamp=now())
    found = looked(
        monkeypatch,
        ours=(324,),
        ComputeRunningProcesses=[SimpleNamespace(pid=324, usedGpuMemory=0)],
        ProcessUtilization=[sample],
    )
    assert (found.others_busy, found.ours) == (None, None) and "in a container" in found.untold


def test_in_a_container_a_busy_card_is_busy_with_others_where_nothing_of_ours_runs(monkeypatch):
    busy = SimpleNamespace(pid=GONE, smUtil=95, timeStamp=now())
    found = looked(monkeypatch, UtilizationRates=SimpleNamespace(gpu=95), ProcessUtilization=[busy])
    assert found.others_busy is None and "95% busy" in gpuwatch.in_use(found)
    here = SimpleNamespace(pid=1, smUtil=4, timeStamp=now())  # our last child beside somebody who can be seen
    found = looked(monkeypatch, UtilizationRates=SimpleNamespace(gpu=95), ProcessUtilization=[busy, here])
    assert found.others_busy == 0.04 and not gpuwatch.in_use(found)


def test_nvml_is_opened_once_for_all_looks_and_anew_after_an_error(monkeypatch):
    calls, module = [], nvml(UtilizationRates=SimpleNamespace(gpu=1))
    module.nvmlInit, module.nvmlShutdown = (lambda: calls.append("open")), (lambda: calls.append("close"))
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr("core.nvml.cuda_uuid", lambda index: "GPU-1")
    source = Nvml()
    assert [source.look("cuda:0", ()).busy for _ in range(3)] == [0.01] * 3 and calls == ["open"]

    def lost(uuid):
        raise Error("GPU is lost")

    monkeypatch.setattr(module, "nvmlDeviceGetHandleByUUID", lost)
    assert source.look("cuda:0", ()).error == "GPU is lost" and calls == ["open", "close"]
    monkeypatch.setattr(module, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    assert source.look("cuda:0", ()).busy == 0.01 and calls == ["open", "close", "open"]


def test_under_wddm_what_is_not_told_stays_unknown(monkeypatch):
    found = looked(
        monkeypatch,
        ours=(10,),
        UtilizationRates=SimpleNamespace(gpu=40),
        MemoryInfo=SimpleNamespace(used=900, free=100),
        ComputeRunningProcesses=[SimpleNamespace(pid=10, usedGpuMemory=None)],
    )
    assert (found.busy, found.others_busy, found.ours, found.slowed, found.error) == (0.4, None, None, False, "")


@pytest.mark.parametrize(
    ("name", "power", "laptop"),
    [
        ("NVIDIA GeForce RTX 2080", Power(True, 100.0), True),  # in a laptop, by its desktop card's name
        ("NVIDIA GeForce RTX 2080", Power(None, 40.0), True),
        ("NVIDIA GeForce RTX 2080", Power(), False),
        ("NVIDIA GeForce RTX 4090", Power(None, 80.0), False),  # a mouse's battery, or a UPS's
        (b"NVIDIA GeForce RTX 2080 with Max-Q Design", Power(), True),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", Power(), True),
    ],
)
def test_a_laptop_is_known_by_its_cards_name_or_its_battery(monkeypatch, name, power, laptop):
    monkeypatch.setattr("core.facts.LocalFacts.power", lambda self: power)
    assert looked(monkeypatch, Name=name).laptop is laptop


@pytest.mark.parametrize(
    ("name", "product", "laptop"),
    [
        ("NVIDIA GeForce RTX 2070", 0x1F10, True),
        ("NVIDIA GeForce RTX 2070", 0x1F02, False),  # a desktop's, whose UPS reports as a battery
        ("NVIDIA GeForce GTX 1650", 0x1F99, True),
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", 0x1E90, True),
        ("NVIDIA GeForce RTX 4090", 0x2684, False),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0x2717, True),
    ],
)
@pytest.mark.parametrize("battery", [Power(), Power(True, 100.0)])
def test_what_pci_says_of_a_card_goes_before_a_battery(monkeypatch, name, product, laptop, battery):
    monkeypatch.setattr("core.nvml.LocalFacts.power", lambda self: battery)
    pci = SimpleNamespace(pciDeviceId=product << 16 | 0x10DE)
    assert looked(monkeypatch, Name=name, PciInfo=pci).laptop is laptop


def test_without_nvml_or_a_card_the_look_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "not installed" in Nvml().look("cuda:0", ()).error
    broken = nvml()
    broken.nvmlInit = lambda: (_ for _ in ()).throw(Error("Driver Not Loaded"))
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert Nvml().look("cuda:0", ()).error == "Driver Not Loaded"
