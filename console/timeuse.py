"""Where a night's time went, and whether its clock can be believed. Pure functions of what the ledger holds.

How long a run took is the referee's own count, by a clock that nobody sets. Moments (started, finished) are the
machine's time of day: it may be set, and it runs on while the machine sleeps. What does not agree is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from typing import Any

from console.rows import Row, Uses
from console.words import moment
from core.ledger import Sample

SLEPT = 120.0  # seconds, beside half the run: a time of day that ran ahead by more is told
SET_BACK = 5.0  # seconds by which a clock may seem to run backwards: moments are whole seconds


@dataclass(frozen=True)
class Oddity:
    """The time of day and the time that passed disagree."""

    number: int
    seconds: float  # above zero: the machine slept, or its clock was set forward; below: it was set back


@dataclass(frozen=True)
class TimeUse:
    """Seconds. Nothing counts twice, apart from `repeats`, which is a part of the first three."""

    training: float = 0.0  # of runs with a score that counts
    scoring: float = 0.0  # with the audit
    starting: float = 0.0  # start, warm-up and compiling, handing over weights
    wasted: dict[str, float] = field(default_factory=dict)  # crash, timeout, invalid, tainted: whole runs
    idle: dict[str, float] = field(default_factory=dict)  # thinking, dry build, waiting, other
    paused: float = 0.0
    watched: float = 0.0  # whole runs before which the idle time was taken down
    repeats: dict[str, float] = field(default_factory=dict)  # further seeds, re-runs of the best, …
    stopped_early: int = 0  # hopeless runs that were ended
    saved: float = 0.0  # by that
    wall: float | None = None  # from the first start to the last end; None where the clock cannot be believed
    oddities: tuple[Oddity, ...] = ()

    @property
    def busy(self) -> float:
        return self.training + self.scoring + self.starting + sum(self.wasted.values())

    @property
    def idle_share(self) -> float | None:
        """Of the time that runs and the idling before them took; None where nobody took that down."""
        idle = sum(self.idle.values())
        return idle / (self.watched + idle) if self.watched else None

    @property
    def accounted(self) -> float:
        return self.busy + sum(self.idle.values()) + self.paused

    @property
    def away(self) -> float | None:
        """Of the wall clock, what nothing is known of: no run was going on, or what it did was dropped."""
        return None if self.wall is None else max(0.0, self.wall - self.accounted)


def time_use(rows: Sequence[Row], samples: Mapping[int, Sequence[Sample]], ablations: Sequence[Sample] = ()) -> TimeUse:
    """`samples` by experiment; `ablations`: runs of what is no experiment. Ledgers of earlier versions have the outcome
    of an experiment's run there alone."""
    training = scoring = starting = saved = 0.0
    wasted: dict[str, float] = {}
    repeats: dict[str, float] = {}
    stopped = 0
    recorded = list(runs(rows, samples, ablations))
    for kind, again, outcome in recorded:
        timings = outcome.get("timings") or {}
        total = _seconds(timings.get("total"))
        if kind:
            wasted[kind] = wasted.get(kind, 0.0) + total
            continue
        trained = min(total, _seconds(outcome.get("training_seconds")) or _seconds(timings.get("training")))
        scored = min(total - trained, sum(_seconds(timings.get(name)) for name in JUDGING))
        training, scoring, starting = training + trained, scoring + scored, starting + total - trained - scored
        if again:
            repeats[again] = repeats.get(again, 0.0) + total
        early = outcome.get("stopped_early") or {}
        stopped, saved = stopped + bool(early), saved + _seconds(early.get("saved_seconds"))
    idle, paused, watched = _idle([outcome for _, _, outcome in recorded])
    oddities = tuple(odd_clocks(rows))
    return TimeUse(
        training, scoring, starting, wasted, idle, paused, watched, repeats, stopped, saved,
        _wall(rows, oddities, [*chain(*samples.values()), *ablations]), oddities,
    )  # fmt: skip


def runs(
    rows: Sequence[Row], samples: Mapping[int, Sequence[Sample]], ablations: Sequence[Sample] = ()
) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """(why it was wasted or "", which kind of repeat it is or "", its outcome) of every run that is recorded."""
    for r in rows:
        recorded = [s for s in samples.get(r.number, ()) if s.outcome]
        for run in r.earlier if r.failed else ():  # a failure leaves no samples, but what they had cost
            yield _waste(r, False), "", {"timings": {"total": run.get("seconds")}, "idle": run.get("idle")}
        if not recorded and r.outcome:
            yield _waste(r, r.tainted), "", r.outcome
        elif r.outcome.get("status") not in (None, "scored"):  # the run that failed has no sample
            yield _waste(r, False), "", r.outcome
        first = True
        for s in recorded:
            again = "" if first and s.purpose == "verdict" else AGAIN.get(s.purpose, s.purpose)
            first = False
            yield _run(s, again)
    yield from (_run(s, ABLATION) for s in ablations if s.outcome)


def _run(s: Sample, again: str) -> tuple[str, str, dict[str, Any]]:
    return ("tainted" if s.tainted else ""), again, dict(s.outcome or {})


def uses(rows: Sequence[Row], samples: Mapping[int, Sequence[Sample]], ablations: Sequence[Sample] = ()) -> Uses:
    """What the device did, of all runs before which the idle time was taken down, whatever they were made for."""
    idle, _, busy = _idle([outcome for _, _, outcome in runs(rows, samples, ablations)])
    told = {what: round(seconds, 3) for what, seconds in idle.items()}
    return Uses(busy, sum(idle.values()), {**told, "other": told.get("other", 0.0)})


JUDGING = ("scoring", "audit", "holdout scoring", "holdout audit")
AGAIN = {"verdict": "further seeds", "control": "the best again", "confirm": "confirming"}
ABLATION = "leaving changes out"


def _waste(r: Row, tainted: bool) -> str:
    status = str(r.outcome.get("status") or "")
    if status in ("crash", "timeout", "invalid"):
        return status
    return r.status if r.failed else "tainted" if tainted else ""


def _idle(outcomes: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], float, float]:
    """(seconds by what the device waited for, seconds paused, seconds of the runs that were waited for)."""
    known = [(dict(o["idle"]), _seconds((o.get("timings") or {}).get("total"))) for o in outcomes if o.get("idle")]
    paused = sum(_seconds(idle.get("paused")) for idle, _ in known)
    total = max(0.0, sum(_seconds(idle.get("seconds")) for idle, _ in known) - paused)
    waits = {w: sum(_seconds(idle.get(w)) for idle, _ in known) for w in ("thinking", "dry build", "waiting")}
    waits["other"] = max(0.0, total - sum(waits.values()))
    return {what: seconds for what, seconds in waits.items() if seconds}, paused, sum(total for _, total in known)


def odd_clocks(rows: Sequence[Row]) -> Iterable[Oddity]:
    """Experiments whose last run took another time by the time of day than by its own clock, and those that began
    before the one ahead of them had ended."""
    before: Row | None = None
    for r in rows:
        began, ended = moment(r.started), moment(r.finished)
        if began is None or ended is None:
            continue
        ahead = (ended - began).total_seconds() - (r.seconds or 0.0)
        if ahead < -SET_BACK or (r.seconds and ahead > max(SLEPT, 0.5 * r.seconds)):
            yield Oddity(r.number, ahead)
        last = moment(before.finished) if before else None
        if last is not None and (began - last).total_seconds() < -SET_BACK:
            yield Oddity(r.number, (began - last).total_seconds())
        before = r


def _wall(rows: Sequence[Row], oddities: Sequence[Oddity], samples: Iterable[Sample]) -> float | None:
    began = [m for r in rows if (m := moment(r.started))]
    ended = [m for r in rows if (m := moment(r.finished))]
    for s in samples:
        if (at := moment(s.created)) is not None:
            ended.append(at)
            began.append(at - timedelta(seconds=_seconds(((s.outcome or {}).get("timings") or {}).get("total"))))
    if not began or not ended or any(o.seconds < 0 for o in oddities):
        return None
    return max(0.0, (max(ended) - min(began)).total_seconds())


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and value >= 0 else 0.0
