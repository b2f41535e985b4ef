"""A machine that could not at the moment: tried again a few times, said each time, and then the end of the run."""

from __future__ import annotations

import pytest
from scripted import Limits, Loop, Scripted, check, make_lab
from test_loop import in_background, wait_until

from core import child, session
from core.errors import DataError, Transient, UserError
from core.executor import LocalExecutor


class Slow(Scripted):
    """Its first `times` runs do not begin in time; so do its first dry builds."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left, self.asked = times, 0

    def execute(self, request, on_event, stop):
        self.asked += 1
        self.left -= 1
        if self.left >= 0:
            request.workdir.mkdir(parents=True)  # half begun
            raise Transient("loading the library took more than 120 s", "see `autoresearch doctor`")
        return super().execute(request, on_event, stop)


@pytest.fixture
def night(tmp_path, settings):
    return make_lab(tmp_path / "night", settings)


def test_it_is_tried_again_and_said(night, monkeypatch):
    monkeypatch.setattr(session, "TRIED_AGAIN", (0.0, 0.0, 0.0))
    said, executor = [], Slow(3)
    loop = Loop(night, None, executor, lambda event: said.append(event.data.get("text")))
    assert loop.judge_pending(1).status == "keep" and executor.asked == 4
    check(night)
    lines = [f"loading the library took more than 120 s: tried again in 0 s ({k} of 3)" for k in (1, 2, 3)]
    assert [text for text in said if text] == lines == [e.text for e in night.ledger.events() if e.kind == "note"]


def test_in_the_end_the_run_ends_with_what_to_do_and_nothing_is_lost(night, monkeypatch):
    monkeypatch.setattr(session, "TRIED_AGAIN", (0.0, 0.0))
    with pytest.raises(UserError) as failed:
        Loop(night, None, Slow(99), lambda event: None).judge_pending(1)
    assert failed.value.fact == "loading the library took more than 120 s, 3 times in a row"
    assert "end what else uses the machine, then `autoresearch run` goes on" in failed.value.action
    assert (night.ledger.get(1).state, night.ledger.get(1).attempts) == ("proposed", 0)
    Loop(night, None, Scripted(), lambda event: None).judge_pending(1)
    check(night)


def test_a_stop_ends_the_wait(night, monkeypatch):
    monkeypatch.setattr(session, "TRIED_AGAIN", (600.0,))
    executor = Slow(99)
    loop = Loop(night, None, executor, lambda event: None)
    with in_background(loop, lambda: loop.run(Limits())):
        wait_until(lambda: executor.asked == 1)
        loop.stop()
    assert (night.ledger.get(1).state, executor.asked) == ("proposed", 1)


def test_what_time_does_not_mend_ends_at_once(night):
    class Broken(Slow):
        def execute(self, request, on_event, stop):
            self.asked += 1
            raise DataError("a shard is short", "prepare it again")

    executor = Broken(0)
    with pytest.raises(DataError):
        Loop(night, None, executor, lambda event: None).judge_pending(1)
    assert executor.asked == 1


def test_a_library_that_is_not_loaded_in_time_is_such_a_case(tmp_path, settings, tiny_recipe, monkeypatch):
    monkeypatch.setattr(child, "LIBRARY_CAP", 0.01)
    monkeypatch.setattr(session, "TRIED_AGAIN", (0.0,))
    lab, said = make_lab(tmp_path / "slow", settings, tiny_recipe.encode()), []
    with pytest.raises(UserError) as failed:
        Loop(lab, None, LocalExecutor(), lambda event: said.append(event.data.get("text"))).judge_pending(1)
    why = "the backend cpu cannot be loaded: loading the backend's library took more than 0.01 s"
    assert failed.value.fact == f"{why}, 2 times in a row"
    assert failed.value.action.endswith("nothing is lost (see `autoresearch doctor`)"), "it has printed nothing"
    assert f"{why}: tried again in 0 s (1 of 1)" in said


def test_a_run_that_is_repeated_is_said(night):
    said = []
    Loop(night, None, Scripted(audited=False), lambda event: said.append(event.data.get("text"))).run(
        Limits(experiments=1)
    )
    assert "#1 with seed 42: run again: would be kept and was not audited" in said
