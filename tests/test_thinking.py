"""Thinking ahead, waiting, standing in, taking turns: the loop with researchers that are slow, away, broken or paid."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scripted import Ahead, Limits, Loop, Night, Scripted, check, idea, make_lab, recipe
from test_loop import in_background, wait_until

from console.looking import log_verb
from console.output import Screen
from console.rows import Row
from console.running import run_verb
from console.timeuse import uses
from core import caches, lab, live
from core.contract import Exhausted, Proposal, Unavailable
from core.deadline import Deadline
from core.errors import UserError
from core.gitstore import GitStore
from core.health import Watch
from core.keeping import Products
from core.reapply import reapply
from core.thinking import FAULTS, READY
from core.waiting import FIRST, LONGEST, MOST, SHORTEST, Patience

FILLER = "".join(f"LINE_{k} = {k}\n" for k in range(8))


def spread(score: float, mark: str = "") -> bytes:
    """A recipe whose two ends can be changed apart."""
    return f"SCORE = {score}\n{FILLER}MARK = {mark!r}\n".encode()


@pytest.fixture
def night(tmp_path, settings):
    return make_lab(tmp_path / "night", settings, first=spread(2.0))


def loop_of(place, researcher, executor=None, on_event=lambda event: None, **given) -> Loop:
    return Loop(place, researcher, executor or Scripted(), on_event, **given)


class Says:
    """A researcher that does what `acts` say, one after another: a proposal, or an exception. Keeps what it saw."""

    def __init__(self, *acts, name="says", thinks_ahead=True) -> None:
        self.name, self.thinks_ahead = name, thinks_ahead
        self.left = list(acts)
        self.views = []
        self.asked = threading.Event()

    def propose(self, view):
        self.views.append(view)
        self.asked.set()
        act = self.left.pop(0) if self.left else Exhausted("nothing left")
        act = act(view) if callable(act) else act
        if isinstance(act, BaseException):
            raise act
        return act


def once_decided(place, number, act):
    """What `Says` does when that experiment has its verdict: from then on the loop waits for nothing else."""

    def waits(view):
        wait_until(lambda: place.ledger.get(number).status is not None)
        return act

    return waits


def events(place, kind):
    return [e.text for e in place.ledger.events() if e.kind == kind]


# --- ahead -----------------------------------------------------------------------------------------


def test_the_next_proposal_is_made_while_an_experiment_runs(night):
    """The executor waits for it: without thinking ahead this would not end."""
    researcher = Says(*(Proposal(spread(2.0, str(k)), f"idea {k}") for k in range(3)))

    class Waits(Scripted):
        def execute(self, request, on_event, stop):
            if len(self.runs) < 3:
                assert researcher.asked.wait(30)
                researcher.asked.clear()
            return super().execute(request, on_event, stop)

    executor = Waits()
    summary = loop_of(night, researcher, executor).run(Limits(experiments=4))
    assert summary.decided == 4
    check(night)
    assert len(researcher.views) == 3
    assert researcher.views[0].best_bpb is None  # the baseline was running
    assert any("is being measured as #1" in note for note in researcher.views[0].notes)


def test_an_edit_is_made_again_to_the_new_best_where_it_fits(night):
    first = Proposal(spread(1.5), "a better score")
    researcher = Says(first, lambda view: Proposal(view.best_source.replace(b"MARK = ''", b"MARK = 'm'"), "a mark"))
    loop_of(night, researcher).run(Limits(experiments=3))
    found = night.ledger.get(3)
    assert night.source(3) == spread(1.5, "m")
    assert researcher.views[1].best_source == spread(2.0)
    assert found.detail["reapplied"] == {"from": 1, "to": 2}
    assert found.parent == 2
    check(night)


@pytest.mark.parametrize("lints", [True, False])
def test_an_edit_that_does_not_fit_is_asked_again(night, lints):
    """Because of a conflict, or because what comes out is refused by the lint."""

    def second(view):
        if lints:
            return Proposal(view.best_source.replace(b"SCORE = 2.0", b"SCORE = 1.4"), "another score")
        return Proposal(view.best_source.replace(b"MARK = ''", b"MARK = 'm'"), "a mark")

    researcher = Says(Proposal(spread(1.5), "a better score"), second, Proposal(spread(1.3), "asked again"))
    executor = Scripted()
    executor.lints = lints
    loop_of(night, researcher, executor).run(Limits(experiments=3))
    assert [e.description for e in night.ledger.experiments()] == ["baseline", "a better score", "asked again"]
    told = night.ledger.get(3).detail["asked_again"]
    assert "was made for #1 and does not fit #2, which was kept meanwhile" in told
    assert told in researcher.views[2].notes
    assert researcher.views[2].best_source == spread(1.5)
    check(night)


def test_a_ready_proposal_outlives_the_run_and_is_used_once(night):
    researcher = Says(Proposal(spread(2.0, "one"), "one"), Proposal(spread(2.0, "two"), "two"))
    loop = loop_of(night, researcher, Scripted(seconds=60))
    with in_background(loop, lambda: loop.run(Limits())):
        wait_until(lambda: night.ledger.meta(READY))
        loop.stop()
    assert night.ledger.get(1).state == "proposed"
    again = lab.Lab.open(night.path)
    late = Says(Proposal(spread(2.0, "three"), "three"))
    loop_of(again, late).run(Limits(experiments=3))
    assert [e.description for e in again.ledger.experiments()] == ["baseline", "one", "three"]
    assert again.ledger.meta(READY) == {}
    check(again)


def test_nobody_thinks_for_an_experiment_that_will_not_come(night):
    researcher = Says(Proposal(spread(1.9), "one"))
    loop_of(night, researcher).run(Limits(experiments=1))
    assert researcher.views == []


def test_program_is_read_again_at_each_proposal(night):
    def writes(view):
        (night.path / "program.md").write_bytes(b"# only this now\n")
        return Proposal(spread(2.1), "one")

    researcher = Says(writes, Proposal(spread(2.2), "two"))
    loop_of(night, researcher).run(Limits(experiments=3))
    assert [v.program for v in researcher.views[:2]] == ["# try things\n", "# only this now\n"]


def test_the_search_sees_every_result(night):
    class Sees(Night):
        seen = ()

        def propose(self, view):
            self.seen += (len(view.past),)
            return super().propose(view)

    researcher = Sees()
    loop_of(night, researcher).run(Limits(experiments=4))
    assert researcher.seen == (1, 2, 3)


# --- priority and the device -----------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_who_thinks_beside_a_clock_has_the_lowest_priority_and_so_have_its_processes(night):
    found = []

    def looks(view):
        ask = "import os, psutil; print(os.nice(0), int(psutil.Process().ionice().ioclass))"
        found.append(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout)
        return Proposal(spread(1.9), "one")

    before = os.nice(0)
    loop_of(night, Says(looks)).run(Limits(experiments=2))
    assert found == ["19 3\n"]
    assert os.nice(0) == before


def test_dry_builds_wait_for_the_gap(night):
    def checks(view):
        assert view.check(spread(-1.0)) == "it does not run"
        assert view.check(view.best_source).startswith("it is the same program as #")
        assert view.check(spread(1.9 - len(view.past) / 10)) == ""
        return Proposal(spread(1.9 - len(view.past) / 10), f"idea {len(view.past)}")

    executor = Scripted(seconds=0.3)
    executor.dry_seconds = 0.05
    loop_of(night, Says(checks, checks, checks, checks), executor).run(Limits(experiments=3))
    assert len(executor.dry) >= 4
    assert not executor.together
    assert events(night, "fault") == []
    check(night)


def test_a_dry_build_has_the_caches_of_the_best(night):
    def checks(view):
        assert view.check(spread(1.9 - len(view.past) / 10)) == ""
        return Proposal(spread(1.9 - len(view.past) / 10), f"idea {len(view.past)}")

    class Compiles(Scripted):
        def execute(self, request, on_event, stop):
            outcome = super().execute(request, on_event, stop)
            outcome.caches = request.workdir / "caches-trainer"
            (outcome.caches / "triton").mkdir(parents=True)
            (outcome.caches / "triton" / "kernel").write_text("compiled")
            return outcome

    executor = Compiles()
    loop_of(night, Says(checks, checks, thinks_ahead=False), executor).run(Limits(experiments=3))
    assert executor.dry_caches == [["triton"], ["triton"]]
    kept = night.best_caches()
    assert kept is not None and (kept / "triton" / "kernel").read_text() == "compiled"
    check(night)


def test_a_best_that_is_kept_meanwhile_waits_for_who_copies_the_caches(tmp_path, monkeypatch):
    """A half of a cache is no cache miss: Triton takes a kernel's list of files for granted."""
    products = Products(tmp_path)
    old, new = tmp_path / "caches" / "1", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "kernel").write_text(folder.name)
    copy, copying, go_on = caches.copy, threading.Event(), threading.Event()

    def slowly(source, target):
        copying.set()
        assert go_on.wait(30)
        return copy(source, target)

    monkeypatch.setattr(caches, "copy", slowly)
    copier = threading.Thread(target=products.copy_caches, args=(1, tmp_path / "copied"))
    keeper = threading.Thread(target=products.keep, args=(2, None, new))
    copier.start()
    assert copying.wait(30)
    keeper.start()
    keeper.join(0.3)
    assert keeper.is_alive() and old.is_dir()
    go_on.set()
    copier.join()
    keeper.join()
    assert (tmp_path / "copied" / "kernel").read_text() == "1"
    assert products.caches(1) is None and (tmp_path / "caches" / "2" / "kernel").read_text() == "new"
    assert products.copy_caches(1, tmp_path / "none") is None


def test_the_same_change_to_another_best_is_recognised(night):
    loop = loop_of(night, None)
    loop.judge(spread(2.0, "a"), "baseline")
    loop.judge(spread(2.2), "worse")
    loop.judge(spread(1.9), "better")
    found = []
    third = f"SCORE = 1.9\n{FILLER}MARK = 'a'\n".encode()

    def checks(view):
        found.append(view.check(third))
        found.append(view.check(third + b"# more\nNEW = 1\n"))
        return Exhausted("done")

    loop_of(night, Says(checks, thinks_ahead=False)).run(Limits())
    assert found[0].startswith("it makes the same change as #2 made to #1 (discard at 2.000000)")
    assert found[1] == ""


def test_idle_time_is_in_the_record(night):
    def slow(view):
        time.sleep(0.5)
        return Proposal(spread(2.1 + len(view.past) / 10), f"idea {len(view.past)}")

    loop_of(night, Says(slow, slow, thinks_ahead=False)).run(Limits(experiments=3))
    for number in (2, 3):
        idle = night.ledger.get(number).outcome["idle"]
        assert idle["seconds"] >= idle["thinking"] >= 0.4
    assert "thinking" not in night.ledger.get(1).outcome["idle"]


def test_our_own_load_counts_as_load():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as trainer:
        watch = Watch(trainer.pid)
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        found = watch.report()
        trainer.communicate(b"\n")
    assert found["loop_cores"] > 0
    assert found["others_cores"] > 0


def test_idle_time_is_shown(night, capsys):
    def slow(view):
        time.sleep(1.0)
        return Proposal(spread(2.1), "one")

    executor = Scripted(timings={"total": 9.0})
    loop_of(night, Says(slow, thinks_ahead=False), executor).run(Limits(experiments=2))
    log_verb(Screen(False), str(night.path), False, None, False)
    shown = capsys.readouterr().out
    share = float(shown.partition("device idle ")[2].split()[0])
    assert 100 / 19 < share < 100
    assert " thinking" in shown.partition("device idle ")[2]
    log_verb(Screen(True), str(night.path), False, None, False)
    told = json.loads(capsys.readouterr().out)
    assert told["total"]["device"]["busy_seconds"] == 18.0
    assert told["total"]["device"]["waits"]["thinking"] >= 0.9
    assert told["experiments"][1]["idle"]["thinking"] >= 0.9


def test_pauses_are_no_idle_time():
    told = {"timings": {"total": 8.0}, "idle": {"seconds": 12.0, "paused": 10.0}}
    found = uses([Row(1, "keep", 1.0, None, "", outcome=told)], {})
    assert (found.busy, found.idle, found.idle_share) == (8.0, 2.0, 0.2)
    assert found.waits == {"other": 2.0}


@pytest.mark.parametrize("name", ["search", "search+benchmarks.thinking:Instant"])
def test_nobody_stands_in_for_themselves(name):
    options = {"experiments": 1, "hours": None, "until": None, "demo": False, "strict": False}
    with pytest.raises(UserError, match="cannot stand in for search"):
        run_verb(Screen(False), "nowhere", researcher="search", meanwhile=name, **options)


def test_what_an_answer_costs_is_on_the_account(night):
    def paid(view):
        view.spend({"model": "m", "input_tokens": 10, "output_tokens": 5, "usd": 0.25})
        return Proposal(spread(2.1 + len(view.past) / 10), f"idea {len(view.past)}", {"usage": {}})

    loop_of(night, Says(paid, paid)).run(Limits(experiments=3))
    assert [night.ledger.spent(n).usd for n in (1, 2, 3)] == [0.0, 0.25, 0.25]


# --- away and broken -------------------------------------------------------------------------------


def test_it_waits_as_told_and_says_so(night):
    told = []
    away = once_decided(night, 1, Unavailable("overloaded", retry_after=1.5))
    researcher = Says(away, Proposal(spread(1.9), "one"))
    loop = loop_of(night, researcher, on_event=told.append)
    seen = []
    with in_background(loop, lambda: loop.run(Limits(experiments=2))):
        while night.ledger.get(1).status is None or len(night.ledger.experiments()) < 2:
            seen.append(live.read(night.record))
            time.sleep(0.02)
    waits = [s for s in seen if s.get("state") == "waiting"]
    assert waits
    assert waits[-1]["phase"].endswith("overloaded")
    assert waits[-1]["until"] > time.time() - 60
    assert [t.data["text"] for t in told if t.kind == "waiting"][-1].endswith("overloaded")
    assert night.ledger.get(2).outcome["idle"]["waiting"] > 0.5
    assert events(night, "unavailable") == ["says: overloaded"]
    check(night)


def test_a_stop_and_a_try_do_not_wait_for_it(night):
    researcher = Says(Unavailable("overloaded", retry_after=3600.0))
    loop = loop_of(night, researcher)
    with in_background(loop, lambda: loop.run(Limits())):
        wait_until(lambda: live.read(night.record).get("state") == "waiting")
        other = lab.Lab.open(night.path)
        number = other.ledger.propose(
            source=spread(1.7),
            program=other.program(),
            fingerprint="theirs",
            description="by hand",
            researcher="you",
            parent=1,
        )
        wait_until(lambda: other.ledger.get(number).status == "keep")
        other.ask("pause")
        wait_until(lambda: live.read(night.record).get("state") == "paused")
        other.ask("resume")
        wait_until(lambda: live.read(night.record).get("state") == "waiting")
        other.ask("stop")
    check(night)


def test_a_deadline_ends_the_waiting(night):
    researcher = Says(Unavailable("overloaded", retry_after=3600.0))
    loop_of(night, None).judge_pending(1)
    summary = loop_of(night, researcher).run(Limits(deadline=Deadline.after(2.5 / 3600)))
    assert summary.reason == "the next experiment would not end in time"


def test_the_search_stands_in_while_it_is_away(night):
    def away(view):
        if len(night.ledger.experiments()) < 3:
            return Unavailable("overloaded", retry_after=1.0)
        researcher.left.clear()
        return Proposal(spread(0.5, "back"), "back")

    researcher = Says(*[away] * 12)
    loop = loop_of(night, researcher, Scripted(seconds=0.3), meanwhile=Night())
    loop.run(Limits(experiments=12))
    found = night.ledger.experiments()
    assert (found[1].researcher, found[1].detail["by"]) == ("night", "night")
    assert [e.description for e in found if e.researcher == "says"] == ["back"]
    assert found[-1].researcher == "night"  # the other one is exhausted
    check(night)


@pytest.mark.parametrize("stand_in", [None, Night()])
def test_what_is_final(night, stand_in):
    end = Unavailable("the key was refused (HTTP 401); set ANTHROPIC_API_KEY", final=True)
    summary = loop_of(night, Says(end), meanwhile=stand_in).run(Limits(experiments=3))
    if stand_in is None:
        assert summary.reason == "says cannot go on: the key was refused (HTTP 401); set ANTHROPIC_API_KEY"
        assert summary.decided == 1
    else:
        assert summary.decided == 3
        assert events(night, "unavailable")[0].startswith("says, for the rest of this run: the key was refused")
    check(night)


def test_faults_are_told_and_bounded(night, monkeypatch):
    monkeypatch.setattr("core.waiting.FIRST", 0.0)
    monkeypatch.setattr("core.waiting.SHORTEST", 0.0)
    researcher = Says(KeyError("a"), SystemExit(3), Proposal(spread(1.9), "one"), *[ValueError("b")] * FAULTS)
    summary = loop_of(night, researcher).run(Limits())
    assert summary.decided == 2
    assert f"says cannot go on: it failed {FAULTS} times in a row, the last time with ValueError: b" in summary.reason
    assert "says failed: KeyError: 'a' at" in events(night, "fault")[0]
    assert len(events(night, "fault")) == 2 + FAULTS


# --- an edit made to another file ------------------------------------------------------------------

lines = st.lists(
    st.sampled_from([b"a = 1\n", b"b = 2\n", b"c = 3\n", b"d = 4", b"e\r\n", b"\n", b"\xff\xfe\n"]), max_size=12
)
text = lines.map(b"".join)


@hypothesis_settings(max_examples=60, deadline=None)
@given(base=text, mine=text, best=text)
def test_a_merge_holds_what_both_changed(tmp_path_factory, base, mine, best):
    store = GitStore(tmp_path_factory.getbasetemp())
    assert store.merge(base, mine, base) == mine
    assert store.merge(base, base, best) == best
    merged = store.merge(base, mine, best)
    if merged is not None:
        known = {*base.splitlines(), *mine.splitlines(), *best.splitlines()}
        assert set(merged.splitlines()) <= known
        assert b"<<<<" not in merged
    apart = b"first\n" + b"between\n" * 8 + base
    assert store.merge(apart, apart.replace(b"first", b"1st"), b"between\n".join([b"first\n", *[b""] * 7, mine])) in (
        b"between\n".join([b"1st\n", *[b""] * 7, mine]),
        None,
    )


values = st.lists(st.sampled_from([1, 2, 3]), min_size=4, max_size=4)


@hypothesis_settings(max_examples=40, deadline=None)
@given(base=values, mine=values, best=values)
def test_constants_that_stand_side_by_side(tmp_path_factory, base, mine, best):
    """It fits unless both set the same one to different values, and then each has the value that was set."""
    store = GitStore(tmp_path_factory.getbasetemp())

    def source(numbers):
        return "".join(f"{name} = {n}\n" for name, n in zip("ABCD", numbers, strict=True)).encode()

    found = reapply(store, source(base), source(mine), source(best))
    both = list(zip(base, mine, best, strict=True))
    if all(m == b or n == b for b, m, n in both):
        assert found == source([n if m == b else m for b, m, n in both])
    elif any(len({b, m, n}) == 3 for b, m, n in both):
        assert found is None


def test_a_merge_of_what_is_no_text(tmp_path):
    assert GitStore(tmp_path).merge(b"\0a\n", b"\0b\n", b"\0c\n") is None
    long = [b"x%d\n" % k for k in range(400)]
    many = [b"y%d\n" % k if k % 2 else line for k, line in enumerate(long)]
    other = [b"z%d\n" % k if k % 2 else line for k, line in enumerate(long)]
    assert GitStore(tmp_path).merge(b"".join(long), b"".join(many), b"".join(other)) is None


def test_thinking_ahead_all_night(tmp_path, settings):
    place = make_lab(tmp_path / "ahead", settings)
    loop_of(place, Ahead(0.01), Scripted(seconds=0.02)).run(Limits(experiments=25))
    assert [e.description for e in place.ledger.experiments()] == ["baseline", *(f"idea {k}" for k in range(1, 25))]
    assert [place.source(k + 1) for k in range(1, 25)] == [idea(k) for k in range(1, 25)]
    assert all(place.ledger.spent(n).answers for n in range(2, 26))
    check(place)
    assert recipe(2.0) == place.source(1)


# --- how long --------------------------------------------------------------------------------------


@given(told=st.lists(st.none() | st.floats(min_value=0.0, max_value=1e7), max_size=40))
def test_waits_are_as_told_and_bounded(told):
    patience = Patience()
    for seconds in told:
        found = patience.seconds(seconds)
        if seconds is None or seconds < SHORTEST:
            assert SHORTEST <= found <= MOST
        else:
            assert min(seconds, LONGEST) <= found <= min(seconds, LONGEST) + 1.0


def test_waits_grow_when_nobody_tells_how_long():
    patience = Patience(random.Random(1))
    bounds = [min(MOST, FIRST * 2**k) for k in range(12)]
    found = [patience.seconds(None) for _ in bounds]
    assert all(wait <= bound for wait, bound in zip(found, bounds, strict=True))
    assert sum(found[6:]) > 10 * sum(found[:3])
