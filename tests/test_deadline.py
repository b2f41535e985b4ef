"""When a night ends: hours are hours, however the clock is set and whether the machine slept; a time of day is one."""

from __future__ import annotations

import sys
import time

import pytest
from scripted import Night, Scripted, make_lab

from core import deadline, interruptions, thinking
from core.contract import Unavailable
from core.deadline import Deadline, of_day, running
from core.interruptions import Clocks
from core.loop import Limits, Loop

HOUR = 3600.0


@pytest.fixture
def night(tmp_path, settings):
    return make_lab(tmp_path / "night", settings)


@pytest.fixture
def clocks(monkeypatch):
    """Seconds by which the time of day was set, and by which both clocks go on in sleep."""
    moved = {"set": 0.0, "slept": 0.0}
    day, real = time.time, deadline.running
    monkeypatch.setattr(time, "time", lambda: day() + moved["set"] + moved["slept"])
    for module in (deadline, thinking):
        monkeypatch.setattr(module, "running", lambda: real() + moved["slept"])
    return moved


class Happens(Scripted):
    """In its second run something happens to the clocks."""

    def __init__(self, clocks, **moves):
        super().__init__()
        self.clocks, self.moves = clocks, moves

    def execute(self, request, on_event, stop):
        outcome = super().execute(request, on_event, stop)
        if len(self.runs) == 2:
            self.clocks.update(self.moves)
        return outcome


@pytest.mark.parametrize(
    ("moves", "hours", "time_of_day"),
    [
        ({"set": 9 * HOUR}, 4, 2),  # another system's clock, which was the local time's, is corrected
        ({"set": -9 * HOUR}, 4, 4),
        ({"slept": 9 * HOUR}, 2, 2),
        ({"slept": 1 * HOUR}, 4, 4),
        ({}, 4, 4),
    ],
)
def test_hours_pass_in_sleep_and_are_not_set_and_a_time_of_day_is_what_the_clock_says(
    night, clocks, moves, hours, time_of_day
):
    """A night of eight hours and four experiments at most; it happens in the second."""
    for limit, made in ((Deadline.after(8), hours), (Deadline.at_time(time.time() + 8 * HOUR), time_of_day)):
        clocks.update({"set": 0.0, "slept": 0.0})
        executor = Happens(clocks, **moves)
        summary = Loop(night, Night(), executor, lambda event: None).run(Limits(4, limit))
        assert summary.decided == made, summary.reason
        assert ("in time" in summary.reason) == (made == 2)


def test_in_wsl2_hours_in_which_windows_slept_pass_too(clocks, monkeypatch):
    """It stands still, and is told the time of day when it goes on."""
    here = Deadline.after(8)
    monkeypatch.setattr(deadline, "under_wsl", lambda: True)
    there = Deadline.after(8)
    clocks["set"] = 3 * HOUR
    assert (here.left(), there.left()) == (pytest.approx(8 * HOUR, abs=1), pytest.approx(5 * HOUR, abs=1))
    clocks["set"] = -3 * HOUR
    assert there.left() == pytest.approx(8 * HOUR, abs=1), "a clock that is set back makes no night longer"


@pytest.mark.parametrize(
    ("moved", "slept", "moved_told"), [(3600.0, 3600.0, 0.0), (1.5, 0.0, 1.5), (-90.0, 0.0, -90.0)]
)
def test_in_wsl2_a_sleep_of_windows_is_one_of_the_machine(monkeypatch, moved, slept, moved_told):
    def report():
        reads = iter([Clocks(5.0, 5.0, 1e9), Clocks(65.0, 65.0, 1e9 + 60 + moved)])
        return interruptions.Interruptions(lambda: next(reads)).report()

    assert (report()["slept_seconds"], report()["clock_set_seconds"]) == (0.0, moved)
    monkeypatch.setattr(interruptions, "under_wsl", lambda: True)
    assert (report()["slept_seconds"], report()["clock_set_seconds"]) == (slept, moved_told)


def test_it_is_told_as_the_clock_is_set_now(clocks):
    hours, moment = Deadline.after(8), Deadline.at_time(of_day() + 8 * HOUR)
    for limit in (hours, moment):
        assert limit.left() == pytest.approx(8 * HOUR, abs=1)
        assert limit.earlier(HOUR).left() == pytest.approx(7 * HOUR, abs=1)
        assert limit.time() == pytest.approx(of_day() + 8 * HOUR, abs=1)
    clocks["set"] = HOUR
    assert hours.left() == pytest.approx(8 * HOUR, abs=1) and hours.time() == pytest.approx(of_day() + 8 * HOUR, abs=1)
    assert moment.left() == pytest.approx(7 * HOUR, abs=1) and moment.time() == pytest.approx(moment.at, abs=1)


def test_a_limit_of_use_is_over_at_its_time_though_the_machine_slept(night, clocks):
    """Five hours, says the service; the lid is closed for six."""

    class Away(Night):
        asked = 0

        def propose(self, view):
            self.asked += 1
            if self.asked == 1:
                raise Unavailable("limit reached", retry_after=5 * HOUR)
            return super().propose(view)

    def tell(event):
        if event.kind == "waiting" and "limit reached" in event.data["text"]:
            clocks["slept"] = 6 * HOUR

    summary = Loop(night, Away(), Scripted(), tell).run(Limits(experiments=2))
    assert (summary.decided, summary.reason) == (2, "2 experiments are done")


@pytest.mark.skipif(sys.platform != "linux", reason="the clock that counts sleep has this name there")
def test_the_clock_of_hours_is_the_one_that_counts_sleep():
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= running() <= time.clock_gettime(time.CLOCK_BOOTTIME)
