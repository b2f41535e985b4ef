"""Who uses a card under WDDM: names of counters as Windows writes them, pdh.dll presented, the fall back to memory."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpuwatch import GONE, changed, nvml

from core import gpuwatch, wddm
from core.nvml import Nvml
from core.wddm import Instance, Query, Users, instance, others_share


class Sample:
    """What NVML says of a process at each look: of now."""

    def __init__(self, pid, share):
        self.pid, self.smUtil = pid, share

    @property
    def timeStamp(self):
        return int(time.time() * 1e6)


OURS, GAME, DESKTOP, SYSTEM = 9524, 14904, 1360, 4
CARD, INSIDE = "luid_0x00000000_0x000095CA_phys_0", "luid_0x00000000_0x0000A18D_phys_0"


def busy(pid, engine, kind, card=CARD):
    return f"pid_{pid}_{card}_eng_{engine}_engtype_{kind}"


def taken(pid, card=CARD):
    return f"pid_{pid}_{card}"


MEMORY = {taken(OURS): 5e9, taken(OURS, INSIDE): 1e6, taken(GAME): 9e9, taken(GAME, INSIDE): 9e9}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (busy(9524, 0, "3D"), Instance(9524, "0x00000000_0x000095ca_phys_0", "0", "3d")),
        (busy(856, 10, "Compute_1"), Instance(856, "0x00000000_0x000095ca_phys_0", "10", "compute_1")),
        (busy(13080, 2, "Compute 0"), Instance(13080, "0x00000000_0x000095ca_phys_0", "2", "compute 0")),
        (busy(14904, 4, "VideoDecode", INSIDE), Instance(14904, "0x00000000_0x0000a18d_phys_0", "4", "videodecode")),
        (busy(7, 5, ""), Instance(7, "0x00000000_0x000095ca_phys_0", "5", "")),
        (taken(10432), Instance(10432, "0x00000000_0x000095ca_phys_0")),
        ("PID_4_LUID_0x00000000_0x00012AB6_phys_1", Instance(4, "0x00000000_0x00012ab6_phys_1")),
        ("_Total", None),
        ("luid_0x00000000_0x000095CA_phys_0", None),
        ("pid_x_luid_0x0_0x1_phys_0", None),
    ],
)
def test_names_of_counters_are_read(name, said):
    assert instance(name) == said


@pytest.mark.parametrize(
    ("shares", "others"),
    [
        ({}, 0.0),
        ({busy(OURS, 1, "Cuda"): 99.0}, 0.0),
        ({busy(OURS, 1, "Cuda"): 60.0, busy(GAME, 0, "3D"): 70.0, busy(DESKTOP, 0, "3D"): 5.0}, 0.75),
        ({busy(GAME, 0, "3D"): 30.0, busy(GAME, 1, "Compute_0"): 40.0}, 0.4),  # engines run side by side
        ({busy(GAME, 0, "3D"): 90.0, busy(DESKTOP, 0, "3D"): 90.0}, 1.0),
        ({busy(GAME, 3, "Copy"): 90.0, busy(GAME, 4, "VideoDecode"): 80.0}, 0.0),
        ({busy(GAME, 0, "3D", INSIDE): 90.0}, 0.0),  # on the laptop's other card
        ({busy(SYSTEM, 0, "3D"): 80.0, "_Total": 80.0}, 0.0),
    ],
)
def test_others_share_is_that_of_the_busiest_computing_engine_of_our_card(shares, others):
    assert others_share(shares, MEMORY, {OURS}) == pytest.approx(others)


def test_without_memory_of_ours_no_card_is_ours():
    assert others_share({busy(GAME, 0, "3D"): 90.0}, {taken(GAME): 9e9, taken(OURS): 0.0}, {OURS}) is None


percents = st.dictionaries(
    st.builds(busy, st.integers(0, 20), st.integers(0, 3), st.sampled_from(["3D", "Cuda", "Copy", "Compute_0"])),
    st.floats(0.0, 120.0),
)


@settings(deadline=None)
@given(shares=percents, ours=st.sets(st.integers(5, 20), min_size=1))
def test_a_share_is_one_and_ours_is_never_in_it(shares, ours):
    memory = {taken(pid): 1.0 for pid in ours}
    found = others_share(shares, memory, ours)
    alone = {name: share for name, share in shares.items() if instance(name).pid not in ours}
    assert 0.0 <= found <= 1.0 and found == others_share(alone, memory, ours)


# --- looks -----------------------------------------------------------------------------------------


class Readings:
    """`core.wddm.Reading`s, one after another: what they found, or an error."""

    def __init__(self, *found):
        self.found = list(found)

    def begin(self):
        found = self.found.pop(0)
        if isinstance(found, OSError):
            raise found

        def end():
            if isinstance(found[0], OSError):
                raise found[0]
            return found

        return SimpleNamespace(end=end)


def test_a_game_that_starts_within_a_training_is_seen_at_the_next_look():
    quiet, game = ({busy(DESKTOP, 0, "3D"): 3.0}, MEMORY), ({busy(GAME, 0, "3D"): 90.0}, MEMORY)
    users = Users(Readings(quiet, game, game, quiet).begin)
    assert [users.others_busy({OURS}) for _ in range(4)] == [None, 0.03, 0.9, 0.9] and users.problem == ""


def test_what_windows_refuses_is_said_and_asked_again():
    fine = ({busy(GAME, 0, "3D"): 90.0}, MEMORY)
    refused = OSError("PdhCollectQueryData answers 0x800007d5")
    users = Users(Readings(refused, (refused,), fine, fine, ({}, {})).begin)
    assert users.others_busy({OURS}) is None and "0x800007d5" in users.problem
    assert users.others_busy({OURS}) is None and users.problem == ""  # the first reading is begun
    assert users.others_busy({OURS}) is None and "does not tell who uses the card" in users.problem
    users = Users(Readings(({}, {}), fine).begin)
    assert users.others_busy({OURS}) is None
    assert users.others_busy({OURS}) is None and "its card is not known" in users.problem


def look(monkeypatch, users, ours=(OURS,), **answers):
    told = {"MemoryInfo": SimpleNamespace(used=900, free=100), "UtilizationRates": SimpleNamespace(gpu=99), **answers}
    monkeypatch.setitem(sys.modules, "pynvml", nvml(**told))
    monkeypatch.setattr("core.nvml.cuda_uuid", lambda index: "GPU-1")
    source = Nvml(users)
    return [source.look("cuda:0", ours) for _ in range(3)]


def test_windows_is_asked_where_nvml_tells_no_process(monkeypatch):
    game = ({busy(GAME, 0, "3D"): 90.0, busy(os.getpid(), 0, "3D"): 9.0}, MEMORY)
    looks = look(monkeypatch, Users(Readings(game, game, game).begin))
    assert [(one.others_busy, one.untold) for one in looks] == [(None, ""), (0.9, ""), (0.9, "")]
    assert "kept the card 90% busy" in gpuwatch.summary(looks)["tainted"]


def test_windows_is_asked_before_nvml_and_nvml_where_windows_does_not_tell(monkeypatch):
    """NVML may know of the programs that compute only, and not of a game."""
    game = ({busy(GAME, 0, "3D"): 90.0}, MEMORY)
    samples = [Sample(pid, share) for pid, share in ((OURS, 50), (os.getppid(), 20))]
    looks = look(monkeypatch, Users(Readings(game, game, OSError("refused")).begin), ProcessUtilization=samples)
    assert [one.others_busy for one in looks] == [0.2, 0.9, 0.2]


def test_without_a_process_of_ours_all_that_is_busy_is_others(monkeypatch):
    users = Users(Readings().begin)  # a reading would be an error
    sample = Sample(GONE, 20)
    (seen, *_) = look(monkeypatch, users, ProcessUtilization=[sample], ours=())
    assert seen.others_busy is None and gpuwatch.used_by_others(seen) == 0.99


def test_a_failure_leaves_the_rule_for_memory_and_its_reason_in_the_record(monkeypatch):
    refused = OSError("PdhOpenQueryW answers 0xc0000bb8")
    looks = look(monkeypatch, Users(Readings(*[refused] * 3).begin))
    found = gpuwatch.summary(looks)
    assert "PdhOpenQueryW answers 0xc0000bb8" in found["untold"] and found["tainted"] == ""
    grown = [changed(others_busy=None, ours=None, used=n * 2**30, free=8 * 2**30, untold="why") for n in (4, 6)]
    found = gpuwatch.summary(grown)
    assert found["untold"] == "why" and "memory taken on the card went from 4096 to 6144 MiB" in found["tainted"]


# --- pdh.dll ---------------------------------------------------------------------------------------


class Pdh:
    """pdh.dll: two counters with these values, each call noted; `refused` answers with an error."""

    def __init__(self, busy=(), taken=(), refused=""):
        self.values, self.calls, self.counters = {wddm.BUSY: busy, wddm.BYTES: taken}, [], []
        for name in ("OpenQueryW", "AddEnglishCounterW", "CollectQueryData", "CloseQuery", "GetFormattedCounterArrayW"):
            setattr(self, f"Pdh{name}", self.noted(f"Pdh{name}", f"Pdh{name}" == refused))

    def noted(self, name, is_refused):
        def call(*arguments):
            self.calls.append(name)
            return 0xC0000BB8 if is_refused else getattr(self, name.removeprefix("Pdh").lower())(*arguments)

        return call

    def openqueryw(self, source, data, out):
        out._obj.value = 77
        return 0

    def addenglishcounterw(self, query, path, data, out):
        assert query.value == 77
        self.counters.append(path)
        out._obj.value = len(self.counters)
        return 0

    def collectquerydata(self, query):
        return 0

    def closequery(self, query):
        return 0

    def getformattedcounterarrayw(self, counter, form, size, count, buffer):
        values = self.values[self.counters[counter.value - 1]]
        assert form == 0x8200
        if buffer is None:
            size._obj.value = len(values) * ctypes.sizeof(wddm.Item) + 100 if values else 0
            return wddm.MORE_DATA if values else 0
        count._obj.value = len(values)
        items = (wddm.Item * len(values)).from_buffer(buffer)
        for item, (name, number, status) in zip(items, values):
            item.name, item.value.number, item.value.status = name, number, status
        self.kept = items  # and with them the names
        return 0


def test_pdh_is_asked_in_its_order_and_what_has_no_value_yet_is_left_out():
    pdh = Pdh([(busy(GAME, 0, "3D"), 130.5, 1), (busy(DESKTOP, 0, "3D"), 0.0, 0xC0000BBA)], [(taken(OURS), 5e9, 0)])
    query = Query(pdh)
    assert pdh.counters == [r"\GPU Engine(*)\Utilization Percentage", r"\GPU Process Memory(*)\Dedicated Usage"]
    assert pdh.calls.count("PdhCollectQueryData") == 1
    assert query.end() == ({busy(GAME, 0, "3D"): 130.5}, {taken(OURS): 5e9})
    assert pdh.calls.count("PdhCollectQueryData") == 2 and pdh.calls[-1] == "PdhCloseQuery"
    assert Query(Pdh()).end() == ({}, {})


CALLS = ("OpenQueryW", "AddEnglishCounterW", "CollectQueryData", "GetFormattedCounterArrayW")


@pytest.mark.parametrize("refused", CALLS)
def test_a_call_that_is_refused_is_named_and_leaves_no_query_open(refused):
    pdh = Pdh([(busy(GAME, 0, "3D"), 1.0, 0)], refused=f"Pdh{refused}")
    with pytest.raises(OSError, match=rf"Pdh{refused}.* answers 0xc0000bb8"):
        Query(pdh).end()
    gc.collect()
    assert pdh.calls.count("PdhCloseQuery") == (refused != "OpenQueryW")


def test_a_query_that_nobody_ends_is_closed_with_its_watch():
    pdh = Pdh()
    users = Users(lambda: Query(pdh))
    users.others_busy({OURS})
    assert "PdhCloseQuery" not in pdh.calls
    del users
    gc.collect()
    assert pdh.calls[-1] == "PdhCloseQuery"
