"""A card that fails, that is lost or taken out in the middle of a night: no recipe is blamed, and nothing is lost."""

from __future__ import annotations

import sys
import threading

import pytest
from scripted import Scripted, recipe
from test_gpuwatch import Card, changed, nvml, on_card  # noqa: F401 - the fixture
from test_hardware import H100, Machine
from test_loop import Limits, check, loop_of, night  # noqa: F401 - the fixture

from core import cardfaults, session
from core.child import BackendFailed
from core.errors import CardGone, UserError
from core.nvml import Nvml
from core.outcome import Outcome
from core.sharing import SharedCard
from core.steady import Steady, can_be_others, departure

XID = "step 17: RuntimeError: Triton Error [CUDA]: unspecified launch failure (train.py, line 181)"
HERE = changed(busy=0.0, others_busy=0.0)
AWAY = changed(error="GPU is lost")


@pytest.mark.parametrize(
    ("reason", "log_tail", "its_own"),
    [
        (XID, "", False),
        ("loss of step 3: AcceleratorError: CUDA error: unknown error Search for `cudaError'", "", False),
        ("step 2: RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling", "", False),
        ("the scorer was killed by SIGABRT in logits()", "what():  CUDA error: unspecified launch failure", False),
        ("the scorer was killed by SIGABRT in logits()", "free(): invalid pointer", True),
        ("step 1: ValueError: no", "an earlier CUDA error: unspecified launch failure, which was caught", True),
        ("step 1: AcceleratorError: CUDA error: an illegal memory access was encountered", "", True),
        ("step 1: AcceleratorError: CUDA error: device-side assert triggered", "", True),
    ],
)
def test_what_the_driver_ended_is_known_by_its_words(on_card, reason, log_tail, its_own):  # noqa: F811
    outcome, _, _ = on_card(Card(HERE), Outcome(status="crash", reason=reason, log_tail=log_tail))
    said = departure(outcome.to_dict(), Steady())
    assert can_be_others(outcome.to_dict()) != its_own and bool(said) != its_own
    assert its_own or said == outcome.health["tainted"] == "the card's driver ended what ran on it"


@pytest.mark.parametrize("end", [Outcome(status="crash", reason=XID), Outcome(status="timeout", reason="no step")])
def test_a_run_without_a_card_is_no_run(on_card, monkeypatch, end):  # noqa: F811
    monkeypatch.setattr("core.locks.cuda_name", lambda index: "NVIDIA Test")
    with pytest.raises(CardGone) as failed:
        on_card(Card(HERE, HERE, AWAY), end)
    assert failed.value.fact == "NVIDIA Test does not answer any more (GPU is lost)"
    assert "nvidia-smi" in failed.value.action and "nothing is lost" in failed.value.action
    outcome, _, _ = on_card(Card(AWAY), Outcome(status="crash", reason="a bug"))
    assert outcome.status == "crash", "where nothing was ever told, nothing is known of it now"


@pytest.mark.parametrize(
    ("said", "after", "kind", "fact"),
    [
        ("the device cannot be used: no CUDA GPUs", AWAY, CardGone, r"does not answer any more \(GPU is lost\)"),
        ("no", changed(error="Driver/library version mismatch"), CardGone, "was renewed while it was in use"),
        ("the card cannot be opened (CUDA error: unspecified launch failure)", HERE, CardGone, "driver failed when"),
        ("the device cannot be used: a bug", HERE, BackendFailed, "a bug"),
    ],
)
def test_a_card_that_cannot_be_opened_is_told_by_what_its_driver_says(on_card, said, after, kind, fact):  # noqa: F811
    with pytest.raises(kind, match=fact):
        on_card(Card(HERE, HERE, after), BackendFailed(said, "see `autoresearch doctor`"))


def test_memory_that_others_took_meanwhile_is_told_though_what_is_left_would_do(on_card):  # noqa: F811
    before, after = (changed(busy=0.0, others_busy=0.0, free=gib * 2**30) for gib in (6, 3))
    ended = lambda: Outcome(status="crash", out_of_memory=True)  # noqa: E731
    outcome, _, _ = on_card(Card(before, before, after), ended(), needed=2**30)
    assert outcome.health["tainted"] == "other programs took 3072 MiB of the card meanwhile"
    outcome, _, _ = on_card(Card(before), ended(), needed=2**30)
    assert "tainted" not in outcome.health


# --- what was trained ----


def shared(*looks, comes_back=60.0):
    said = []
    card = SharedCard("cuda:0", Card(*looks), said.append, threading.Event(), every=0.001, comes_back=comes_back)
    card.look()
    return card, said


def test_what_was_trained_waits_until_the_driver_answers(monkeypatch):
    monkeypatch.setattr("core.locks.cuda_name", lambda index: "NVIDIA Test")
    card, said = shared(HERE, AWAY, AWAY, AWAY, HERE, AWAY)
    lost = card.lost()
    assert lost == "NVIDIA Test does not answer any more (GPU is lost)"
    assert card.wait_for_answer(lost) and 0 < card.waited < 30
    assert said == [f"{lost}: the training is done and kept, its score waits until the card answers, 1 min at most"]


def test_it_does_not_wait_for_ever():
    card, said = shared(HERE, AWAY, comes_back=0.05)
    assert not card.wait_for_answer("lost") and len(said) == 1
    assert not card.wait_for_answer("lost") and len(said) == 1, "one limit for all waits of an experiment"


@pytest.mark.parametrize(
    ("looks", "said", "fact"),
    [
        ([HERE], "", ""),
        (
            [HERE],
            "the card cannot be opened (CUDA error: unspecified launch failure)",
            "driver failed when the card was",
        ),
        ([HERE], "the device cannot be used: a bug", ""),
        ([AWAY], "the card cannot be opened (CUDA error: unspecified launch failure)", ""),  # it never answered
    ],
)
def test_a_driver_that_failed_is_known_by_what_it_says_itself(looks, said, fact):
    lost = shared(*looks)[0].lost(said)
    assert fact in lost and bool(lost) == bool(fact)


# --- the loop --------------------------------------------------------------------------------------


class Failing(Scripted):
    """Its first `times` runs are ended by the driver."""

    def __init__(self, times):
        super().__init__()
        self.left = times

    def execute(self, request, on_event, stop):
        self.left -= 1
        failed = {"status": "crash", "reason": XID, "val_bpb": None}
        card = {"fault": "unspecified launch failure", "tainted": "the card's driver ended what ran on it"}
        self.changes = failed | {"health": {"card": card, "tainted": card["tainted"]}} if self.left >= 0 else {}
        return super().execute(request, on_event, stop)


@pytest.mark.parametrize(("times", "status", "runs"), [(2, "keep", 3), (3, "crash", 3)])
def test_a_candidate_that_the_driver_ended_is_run_again(night, times, status, runs):  # noqa: F811
    loop_of(night).run(Limits(experiments=1))
    executor = Failing(times)
    e = loop_of(night, executor).judge(recipe(1.5), "an idea")
    assert (e.status, len(executor.runs)) == (status, runs)
    check(night)


@pytest.mark.parametrize(("times", "ends"), [(2, False), (3, True)])
def test_the_best_is_run_again_too_after_a_change(night, times, ends):  # noqa: F811
    """One failure of a driver is none of the best's, and ends no night."""
    loop_of(night, measured_with=lambda settings: {"torch": "2.9"}).run(Limits(experiments=1))
    executor, said = Failing(times), []
    tell = lambda event: said.append(event.data["text"]) if event.kind == "note" else None  # noqa: E731
    loop = loop_of(night, executor, on_event=tell, measured_with=lambda settings: {"torch": "2.10"})
    if ends:
        with pytest.raises(UserError, match="does not run any more after a change"):
            loop.judge(recipe(1.5), "an idea")
    else:
        assert loop.judge(recipe(1.5), "an idea").status == "keep"
    assert f"#1 is run again: {XID}, while the card's driver ended what ran on it" in said
    assert len(executor.runs) == (3 if ends else 4)


def test_a_card_that_does_not_come_back_ends_the_run_with_what_to_do(night, monkeypatch):  # noqa: F811
    class Lost(Scripted):
        def execute(self, request, on_event, stop):
            raise cardfaults.gone("NVIDIA Test", "GPU is lost")

    monkeypatch.setattr(session, "TRIED_AGAIN", (0.0,))
    with pytest.raises(UserError) as failed:
        loop_of(night, Lost()).run(Limits(experiments=1))
    assert failed.value.fact == "NVIDIA Test does not answer any more (GPU is lost), 2 times in a row"
    assert failed.value.action == cardfaults.gone("NVIDIA Test", "GPU is lost").action
    assert (night.ledger.get(1).state, night.ledger.get(1).attempts) == ("proposed", 0)


# --- before it begins ------------------------------------------------------------------------------


ON_THE_BUS = {"/proc/driver/nvidia/gpus/0000:01:00.0": ""}


@pytest.mark.parametrize(
    ("machine", "fact", "action"),
    [
        ({}, "NVIDIA Test does not answer any more (the driver tells of no card)", "plug it in again"),
        ({"files": ON_THE_BUS}, "its driver does not answer (GPU is lost))", "plug it in again"),
        ({"gpus": [H100], "env": {"CUDA_VISIBLE_DEVICES": "-1"}}, "leaves none of 1", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_night_does_not_begin_without_its_card(monkeypatch, machine, fact, action):
    monkeypatch.setattr("core.hardware.LocalFacts", lambda: Machine(**{"gpus": "GPU is lost", **machine}))
    lost = cardfaults.missing("cuda:0", "NVIDIA Test")
    assert fact in lost.fact and action in lost.action
    assert cardfaults.missing("cpu", "") is None
    monkeypatch.setattr("core.hardware.LocalFacts", lambda: Machine(gpus=[H100]))
    assert cardfaults.missing("cuda:0", "NVIDIA Test") is None


def test_a_card_that_comes_back_is_found_again(monkeypatch):
    """A night that begins without NVML's answer looks for its card until there is one."""
    found = iter(["", "GPU-1", "no third look"])
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    monkeypatch.setattr("core.nvml.cuda_uuid", lambda index: next(found))
    source = Nvml()
    assert source.look("cuda:0", ()).error == "no card was found for cuda:0"
    assert [source.look("cuda:0", ()).error for _ in range(2)] == ["", ""]
