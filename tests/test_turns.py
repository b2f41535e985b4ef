"""Turns of several researchers: who gets them, and a team at work in the loop."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from scripted import Ahead, Limits, Loop, Night, Scripted, check, make_lab

import researchers
from core.contract import Past, Unavailable, View
from core.errors import UserError
from researchers.turns import Turns, payoffs


class Named(Night):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def experiment(number, by, gain, seconds, **changes):
    """What `by` brought: `gain` bits per byte in `seconds` of the device; none where it was not kept."""
    status = "keep" if gain > 0 else "discard"
    fields = {
        "number": number, "status": status, "val_bpb": 2.0 - gain, "description": "", "source": b"", "reason": "",
        "log_tail": "", "detail": {"by": by}, "facts": {"seconds": seconds}, "best_before": 2.0,
    }  # fmt: skip
    return replace(Past(**fields), **changes)


def played(team, worth, turns=200, start=()):
    """How often each got the turn, if `worth` says what one turn of each brings: chance of a keep, gain, seconds."""
    dice = random.Random(5)
    view = View(program="", best_source=b"", best_bpb=2.0, past=[], device={}, settings={})
    past = list(start)
    for _ in range(turns):
        name = team.turn(replace(view, past=past), team.members).name
        chance, gain, seconds = worth[name]
        past.append(experiment(len(past) + 1, name, gain if dice.random() < chance else 0.0, seconds))
    return {name: sum(p.detail["by"] == name for p in past[len(start) :]) for name in worth}


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ((0.4, 0.01, 60.0), (0.05, 0.01, 60.0)),  # more often
        ((0.2, 0.03, 60.0), (0.2, 0.001, 60.0)),  # by more
        ((0.2, 0.01, 60.0), (0.2, 0.01, 400.0)),  # in less time
    ],
)
def test_turns_go_to_what_pays_per_hour_of_the_device(good, bad):
    for names in (("good", "bad"), ("bad", "good")):  # whoever comes first
        team = Turns([Named(name) for name in names])
        counts = played(team, {"good": good, "bad": bad})
        assert counts["good"] > 1.5 * counts["bad"], counts
        assert counts["bad"] > 0


def test_one_lucky_jump_does_not_decide_the_night():
    team = Turns([Named("lucky"), Named("steady")])
    start = [experiment(1, "lucky", 0.5, 60.0)]
    counts = played(team, {"lucky": (0.0, 0.0, 60.0), "steady": (0.3, 0.005, 60.0)}, start=start)
    assert counts["steady"] > 2 * counts["lucky"], counts


def test_the_turn_follows_from_the_record_alone():
    past = [experiment(k, "ab"[k % 2], 0.01 * (k % 3), 60.0) for k in range(1, 30)]
    view = View(program="", best_source=b"", best_bpb=2.0, past=past, device={}, settings={})
    turns = [Turns([Named("a"), Named("b")]) for _ in range(5)]
    assert len({team.turn(view, team.members).name for team in turns}) == 1
    assert turns[0].turn(view, turns[0].members[1:]).name == "b"


def test_what_counts():
    found = payoffs(
        [
            experiment(1, "a", 0.02, 30.0),
            experiment(2, "a", 0.01, 60.0),
            experiment(3, "b", 0.0, 60.0),
            experiment(4, "b", 0.0, 60.0, tainted=True),
            experiment(5, "b", 0.0, 20.0, status="crash", val_bpb=None),
            experiment(6, None, 0.5, 60.0),
        ]
    )
    assert [(n, by) for n, by, _, _ in found] == [(1, "a"), (2, "a"), (3, "b"), (5, "b")]
    assert [gain for _, _, gain, _ in found] == [1.0, pytest.approx(0.01 / 0.015), 0.0, 0.0]
    assert [cost for *_, cost in found] == [0.5, 1.0, 1.0, pytest.approx(1 / 3)]


def test_a_team_by_name():
    team = researchers.make("search+benchmarks.thinking:Instant")
    assert (team.name, [who.name for who in team.members]) == ("search+instant", ["search", "instant"])
    with pytest.raises(UserError, match="two or more different"):
        researchers.make("search+search")
    with pytest.raises(UserError, match="there is no researcher 'nobody'"):
        researchers.make("search+nobody")


def test_a_team_at_work(tmp_path, settings):
    """One thinks ahead and the other needs each result; both get turns, and their names stand in the record."""
    place = make_lab(tmp_path / "night", settings)
    loop = Loop(place, Turns([Ahead(), Night()]), Scripted(seconds=0.01), lambda event: None)
    loop.run(Limits(experiments=25))
    check(place)
    found = place.ledger.experiments()[1:]
    assert {e.researcher for e in found} == {"ahead", "night"}
    assert all(e.detail["by"] == e.researcher for e in found)
    assert place.ledger.spent().answers >= sum(e.researcher == "ahead" for e in found)


def test_one_that_is_gone_leaves_the_turns_to_the_other(tmp_path, settings):
    class Gone(Ahead):
        def propose(self, view):
            raise Unavailable("no credit", final=True)

    place = make_lab(tmp_path / "night", settings)
    summary = Loop(place, Turns([Gone(), Night()]), Scripted(), lambda event: None).run(Limits(experiments=8))
    assert summary.decided == 8
    assert {e.researcher for e in place.ledger.experiments()[1:]} == {"night"}
    check(place)
