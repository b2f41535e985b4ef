"""Looks at a training, with real processes: what they find, what they cost, and what a recipe can make of the pause."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from edits import HANDED, LOGITS, OS, STEP, Edit, before, changed, check_clean, forged
from test_gpuwatch import Card

from core import pausing, probing, weights
from core.child import Place
from core.clock import Stopwatch
from core.data import Dataset
from core.errors import DeviceFull
from core.gpuwatch import Look
from core.outcome import Outcome, Request
from core.probing import Curve, Era, Forecast, Probe
from core.settings import Settings

pytestmark = pytest.mark.slow

Run = Callable[..., Outcome]
SHARES = (0.3, 0.6)
TOKENS = 2048
BUDGET = 3.0
PROBE = Probe(SHARES, TOKENS)


@pytest.fixture
def looked_at(run_recipe: Run, tiny_recipe: str, settings: Settings) -> Run:
    """`looked_at(*edits, **fields)`: the tiny recipe with these edits, looked at on its way, without lint or audit."""

    def run(*edits: Edit, **given: object) -> Outcome:
        fields = {"settings": dataclasses.replace(settings, budget=BUDGET), "probe": PROBE, "lint": False, **given}
        return run_recipe(changed(tiny_recipe, *edits), audit="never", **fields)

    return run


def test_a_look_is_the_score_of_the_weights_and_takes_no_time(
    looked_at: Run, settings: Settings, dataset: Dataset, tmp_path: Path
) -> None:
    """The recipe learns for ten steps only, so what was looked at at 60 % is what it hands over. It notes the longest
    time between two steps, and the largest step of progress."""
    noted = """now = time.monotonic()
if self.steps > 2:
    self.gap, self.jump = max(self.gap, now - self.last), max(self.jump, progress - self.before)
self.last, self.before = now, progress"""
    outcome = looked_at(
        OS,
        ("        self.steps = 0\n", "        self.steps = 0\n        self.gap = self.jump = 0.0\n"),
        before(STEP, noted),
        ("p -= LR", "p -= LR * (self.steps <= 10)"),
        ('{"depth": 1, ', '{"depth": 1, "gap": self.gap, "jump": self.jump, '),
    )
    assert outcome.status == "scored", outcome.reason
    assert outcome.unprobed == [] and [p[0] for p in outcome.probes] == list(SHARES)
    assert outcome.probes[1][2] == pytest.approx(on_the_probe_text(outcome, settings, dataset), abs=1e-5)
    for share, seconds, _ in outcome.probes:
        assert share * BUDGET <= seconds < share * BUDGET + 0.6
    pauses = outcome.timings["probing"]
    assert pauses >= 2 * pausing.SHORTEST
    assert outcome.training_seconds == pytest.approx(BUDGET, abs=0.5), "the pauses are not in it"
    assert outcome.timings["total"] > BUDGET + pauses
    assert outcome.describe["gap"] >= pausing.SHORTEST, "the recipe stood still"
    assert outcome.describe["jump"] < 0.15, "and its clock with it"
    assert outcome.curve[-1][0] == outcome.training_seconds
    check_clean(tmp_path / "work")


def on_the_probe_text(outcome: Outcome, settings: Settings, dataset: Dataset) -> float:
    """Bits per byte of the handed-over weights on the probe rows, in numpy, with nothing of the worker."""
    assert outcome.weights is not None
    with outcome.weights.open("rb") as file:
        w = {name: array.astype(np.float64) for name, array in weights.read(file.fileno()).items()}
    rows = dataset.rows("train", settings.sequence_len, TOKENS).astype(np.int64)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    earlier = np.concatenate([np.full((len(rows), 1), settings.bos_id), tokens[:, :-1]], 1)
    logits = np.tanh(w["embed"][tokens] + w["before"][earlier]) @ w["head"].T + w["bias"]
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    sizes = dataset.token_bytes[targets]
    return float(nats[sizes > 0].sum() / sizes.sum() / np.log(2))


# --- recipes that want something of the pause -----------------------------------------------------------

HELPERS = """if self.steps == 4:
    import threading
    def watch(name):
        file, last, longest = os.open(name, os.O_CREAT | os.O_WRONLY), time.monotonic(), 0.0
        until = last + 8
        while time.monotonic() < until:
            time.sleep(0.002)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            os.pwrite(file, b"%12.6f" % longest, 0)
    threading.Thread(target=watch, args=("thread", ), daemon=True).start()
    if os.fork() == 0:
        os.setsid()
        os.fork() and os._exit(0)
        watch("orphan")"""
SEEN = '{"depth": 1, **{n: float(open(n).read()) for n in ("thread", "orphan") if os.path.exists(n)}, '


def test_neither_thread_nor_orphan_runs_in_a_pause(looked_at: Run) -> None:
    outcome = looked_at(OS, before(STEP, HELPERS), ('{"depth": 1, ', SEEN))
    assert outcome.status == "scored" and len(outcome.probes) == 2, (outcome.reason, outcome.unprobed)
    assert outcome.describe["thread"] >= pausing.SHORTEST and outcome.describe["orphan"] >= pausing.SHORTEST


ALARM = """if self.steps > 4:
    import ctypes, signal
    signal.signal(signal.SIGCONT, lambda *_: None)
    class Event(ctypes.Structure):
        _fields_ = [("value", ctypes.c_long), ("signal", ctypes.c_int), ("how", ctypes.c_int), ("x", ctypes.c_long * 8)]
    timer, libc = ctypes.c_void_p(), ctypes.CDLL(None)
    libc.timer_create(1, ctypes.byref(Event(0, signal.SIGCONT, 0)), ctypes.byref(timer))
    libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 0, 0, 400_000_000), None)"""


def test_a_recipe_that_wakes_itself_is_invalid(looked_at: Run, tmp_path: Path) -> None:
    """A timer of the kernel sends SIGCONT 0.4 s after the weights were asked for: in the middle of the pause."""
    outcome = looked_at(before(HANDED, ALARM))
    assert outcome.status == "invalid" and "ran while its clock stood still" in outcome.reason
    assert outcome.val_bpb is None
    check_clean(tmp_path / "work")


def test_weights_that_train_or_lie_change_no_score(looked_at: Run) -> None:
    """At a look it takes its time, which is on the clock, and shows weights that know nothing."""
    lying = """if 4 < self.steps and not getattr(self, "late", False):
    time.sleep(0.1)
    return {n: np.zeros(p.shape, np.float32) for n, p in self.params.items()}"""
    late = before(STEP, "self.late = progress > 0.7")
    outcome = looked_at(OS, before(HANDED, lying), late)
    assert outcome.status == "scored", outcome.reason
    nothing = np.log2(512)  # bits per token
    bits = [bpb for _, _, bpb in outcome.probes]
    assert len(bits) == 2 and bits[0] == pytest.approx(bits[1], abs=1e-6) and bits[0] > nothing / 8
    assert outcome.val_bpb is not None and outcome.val_bpb < bits[0] - 0.3
    assert outcome.training_seconds == pytest.approx(BUDGET, abs=0.5)


def test_a_look_before_its_time_is_a_lie(looked_at: Run) -> None:
    outcome = looked_at(OS, forged("look", '{"index": 0}'))
    assert outcome.status == "invalid" and "before its time" in outcome.reason


def test_a_look_that_nobody_asked_for_is_a_lie(looked_at: Run) -> None:
    outcome = looked_at(OS, forged("look", '{"index": 0}'), probe=None)
    assert outcome.status == "invalid" and "`look` came instead of `trained`" in outcome.reason
    assert outcome.probes == [] and "probing" not in outcome.timings


# --- how it goes on -------------------------------------------------------------------------------------


def test_a_hopeless_run_ends_there(looked_at: Run, tmp_path: Path) -> None:
    """By the real rule: the best was far better at 30 %, and what was behind there stayed behind."""
    rng = np.random.default_rng(0)
    gaps = [(x, 0.8 * x + 0.005 * rng.standard_normal()) for x in rng.uniform(0, 1, 20)]
    best = [Curve({0.3: 0.5, 0.6: 0.4}, 0.3)] * 3
    eras = [Era(best, [Curve({0.3: 0.5 + x, 0.6: 0.4 + x}, 0.3 + y) for x, y in gaps])]
    outcome = looked_at(probe=Probe(SHARES, TOKENS, probing.judge(eras, SHARES)))
    assert outcome.status == "hopeless" and outcome.val_bpb is None and outcome.weights is None
    record = outcome.stopped_early
    assert record["share"] == 0.3 and record["probe"] == outcome.probes[0][2] and record["runs"] == 20
    assert record["reason"] == outcome.reason and "at 30% of the budget" in outcome.reason
    assert record["saved_seconds"] == pytest.approx(BUDGET - outcome.training_seconds, abs=1e-3)
    assert record["saved_seconds"] > 0.5 * BUDGET and outcome.steps > 0
    check_clean(tmp_path / "work")


def test_a_prober_that_fails_leaves_the_training_alone(looked_at: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one hangs, the second one raises; both are told, and the score is a score."""
    monkeypatch.setattr(pausing, "PROBER_SECONDS", 3.0)
    failing = """if "prober-1" in os.getcwd():
    time.sleep(60)
if "prober-2" in os.getcwd():
    raise ValueError("not here")"""
    outcome = looked_at(OS, before(LOGITS, failing))
    assert outcome.status == "scored", outcome.reason
    assert outcome.probes == [] and len(outcome.unprobed) == 2
    assert "no look at 30% of the budget: logits()" in outcome.unprobed[0] and "took more than" in outcome.unprobed[0]
    assert "ValueError: not here" in outcome.unprobed[1]
    assert outcome.training_seconds == pytest.approx(BUDGET, abs=0.5)


def test_a_stop_in_the_pause_ends_it(looked_at: Run, tmp_path: Path) -> None:
    stop = threading.Event()

    def stopping(index: int, bpb: float) -> Forecast | None:
        stop.set()
        return None

    outcome = looked_at(probe=Probe(SHARES, TOKENS, stopping), stop=stop)
    assert outcome.status == "stopped"
    check_clean(tmp_path / "work")


# --- the pause itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("busy", "why"),
    [
        ((1.0, 0.5, 0.0, 0.0), ""),  # what was queued comes to its end
        ((0.1, 1.0, 1.0, 1.0), "the card was still 100% busy"),  # it had only just begun
        ((1.0, 1.0), "the card was still 100% busy"),  # a kernel that does not end
        ((None,), "does not tell"),
    ],
)
def test_a_clock_stands_still_only_while_the_card_rests(
    busy: tuple[float | None, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REST_SEEN", "REST_EVERY"):
        monkeypatch.setattr(pausing, name, 0.0)
    now = iter(range(100))
    clock = Stopwatch(0.0, lambda: float(next(now)))
    card = Card(*(Look(busy=share) for share in busy))
    said = pausing.at_rest("cuda:1", card, clock, threading.Event(), patience=0.05)
    assert why in said and bool(said) == bool(why)
    assert all(asked == ("cuda:1", ()) for asked in card.asked), "the training counts as everybody does"
    first, second = clock.elapsed(), clock.elapsed()
    assert (first == second) == (not why)


def test_two_looks_in_vain_leave_most_of_a_short_budget() -> None:
    """What a card takes to come to rest counts as training."""
    assert [pausing.patience(budget) for budget in (2.0, 20.0, 300.0)] == [0.1, 1.0, 2.0]


@pytest.mark.parametrize(("took", "length"), [(0.0, 0.5), (0.5, 0.5), (0.51, 1.0), (3.0, 4.0), (33.0, 64.0)])
def test_a_pause_has_one_of_a_few_lengths(took: float, length: float) -> None:
    """What a prober could tell a trainer by its own slowness is one of these."""
    assert pausing.pause_length(took) == length


def test_a_prober_has_to_fit_beside_the_trainer() -> None:
    assert pausing.lacks_memory(3 * 2**30, 2**31) == ""
    said = pausing.lacks_memory(2**30, 2**31)
    assert "2.0 GiB" in said and "1.0 GiB are free" in said


def test_a_card_without_room_for_a_prober_leaves_the_training_alone(
    settings: Settings, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may have taken it since the training began."""

    def full(*given: object) -> float:
        raise DeviceFull("only 0.2 of 8.0 GiB of the card are free", "close what else uses it", 2**30)

    worker = SimpleNamespace(scratch=tmp_path, close=lambda: None, child=SimpleNamespace(peak_memory=lambda: 0))
    monkeypatch.setattr(pausing, "Worker", lambda *given: worker)
    monkeypatch.setattr(pausing.Prober, "_ask", full)
    weights.write(tmp_path / "look-0.safetensors", {"w": np.ones(4, np.float32)})
    request = Request(b"", settings, dataset, 1, "1", tmp_path, probe=Probe((0.4,), TOKENS))
    outcome = Outcome()
    prober = pausing.Prober(request, Place(settings, tmp_path), outcome, lambda: None)
    assert prober._score(worker, 0) is None
    assert outcome.unprobed == ["no look at 40% of the budget: only 0.2 of 8.0 GiB of the card are free"]
