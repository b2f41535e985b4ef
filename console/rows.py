"""One experiment as screens, reports and JSON show it, and what its number means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from core.ledger import earlier

KEPT = ("keep", "simplify")
FAILED = ("crash", "timeout", "invalid")
STARTED = ("running", "scored", "audited")  # states that only a process that holds the lab leaves
TAINTED = "something else used the machine meanwhile"  # what is said where the record has no reason
MARKS = {"keep": "*", "simplify": "*", "discard": " ", "crash": "x", "timeout": "x", "invalid": "!"}


@dataclass(frozen=True)
class Scale:
    """What a val_bpb of this lab was measured on: no number is shown without it."""

    data: str
    context: int  # tokens
    budget: float  # seconds of training
    backend: str = ""
    device: str = ""

    @property
    def conditions(self) -> str:
        from console.words import duration

        return f"{self.data}, {self.context} tokens of context, {duration(self.budget)} of training"

    def __str__(self) -> str:
        return f"val_bpb on {self.conditions}"

    def to_json(self) -> dict[str, Any]:
        return {"data": self.data, "context": self.context, "budget_seconds": self.budget, "backend": self.backend,
                "device": self.device}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """An experiment of the ledger, flattened."""

    number: int
    status: str  # keep, simplify, discard, crash, timeout, invalid; while undecided: proposed, running, scored, audited
    val_bpb: float | None
    best_before: float | None
    description: str
    researcher: str = ""
    reason: str = ""
    tainted: bool = False
    undone: bool = False  # was kept, and taken back later
    commit: str = ""
    parent: int | None = None
    created: str = ""
    started: str = ""
    finished: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)  # what the decision was made from
    cut_off: bool = False  # the process that ran it was ended; the next start goes on with it
    numbered: Sequence[Mapping[str, Any]] = ()  # seed, bpb, seconds, … of its own runs that have a number, oldest first

    @property
    def earlier(self) -> Sequence[Mapping[str, Any]]:
        """Its runs before the last one, which `outcome` is of. The last has no number where it failed."""
        return earlier(self.numbered, self.outcome)

    @property
    def runs(self) -> int:
        """How often it has been run, one that failed in the end included; 1 where nobody counted."""
        return len(self.earlier) + 1

    @property
    def interval(self) -> tuple[float, float] | None:
        """In which its gain lies with 95 %, in bits per byte; below zero is a loss. None where one run had to do."""
        found = self.verdict.get("interval")
        return (float(found[0]), float(found[1])) if found else None

    @property
    def simple(self) -> str:
        """What upstream's rule would have made of its first run, where another rule decided; else ""."""
        return str(self.verdict.get("simple") or "") if self.verdict.get("rule") != "simple" else ""

    @property
    def delta(self) -> float | None:
        """Against the best of the moment of the verdict; below zero is better."""
        if self.val_bpb is None or self.best_before is None:
            return None
        return self.val_bpb - self.best_before

    @property
    def epoch(self) -> int:
        """In which it was decided: scores of two epochs do not compare."""
        return int(self.numbered[-1].get("epoch") or 0) if self.numbered else 0

    @property
    def device_seconds(self) -> float | None:
        """What all of its runs took."""
        known = [float(run["seconds"]) for run in self.earlier if run.get("seconds")]
        known += [] if self.seconds is None else [self.seconds]
        return sum(known) if known else None

    @property
    def seconds(self) -> float | None:
        """What its last run took."""
        total = (self.outcome.get("timings") or {}).get("total")
        return float(total) if isinstance(total, int | float) else None

    @property
    def idle(self) -> dict[str, float]:
        """Seconds that the device did nothing before its runs, and those that it waited for what; {} when nobody took
        them down."""
        found: dict[str, float] = {}
        for idle in [*(run.get("idle") or {} for run in self.earlier), self.outcome.get("idle") or {}]:
            for what, seconds in idle.items():
                found[what] = found.get(what, 0.0) + seconds
        return found

    @property
    def disturbed(self) -> str:
        """Why it is tainted; "" where it is not."""
        told = self.verdict.get("disturbed") or (self.outcome.get("health") or {}).get("disturbed")
        return str(told or TAINTED) if self.tainted else ""

    @property
    def kept(self) -> bool:
        return self.status in KEPT and not self.undone

    @property
    def failed(self) -> bool:
        return self.status in FAILED

    @property
    def decided(self) -> bool:
        return self.status in (*KEPT, *FAILED, "discard")

    @property
    def shown_status(self) -> str:
        if self.cut_off:
            return "interrupted"
        return f"{self.status}, undone" if self.undone else f"{self.status}, tainted" if self.tainted else self.status

    def to_json(self, full: bool = False) -> dict[str, Any]:
        short = {
            "number": self.number, "status": self.status, "val_bpb": self.val_bpb, "best_before": self.best_before,
            "delta": self.delta, "description": self.description, "researcher": self.researcher, "reason": self.reason,
            "tainted": self.tainted, "undone": self.undone, "commit": self.commit or None, "seconds": self.seconds,
            "started": self.started or None, "finished": self.finished or None, "idle": self.idle,
            "runs": self.runs, "device_seconds": self.device_seconds, "interval": self.interval,
            "simple": self.simple or None, "cut_off": self.cut_off,
        }  # fmt: skip
        more = {"parent": self.parent, "detail": self.detail, "outcome": self.outcome, "verdict": self.verdict}
        return {**short, **more} if full else short


def disturbed(before: Row, after: Row) -> str:
    """Which of the two scores that a change was recorded between are of disturbed runs: "both runs were disturbed",
    "the run of #1 was disturbed"; "" where neither is."""
    found = [f"#{r.number}" for r in (before, after) if r.tainted]
    return "both runs were disturbed" if len(found) == 2 else f"the run of {found[0]} was disturbed" if found else ""


def doubt(before: Row, after: Row) -> str:
    """`disturbed` as the end of a sentence: ", but both runs were disturbed"."""
    found = disturbed(before, after)
    return f", but {found}" if found else ""


def row(experiment: Any, samples: Iterable[Any] = (), runs: bool = True) -> Row:
    """A `core.ledger.Experiment` -> `Row`. `samples`: of it; what was decided has its runs on record all the same.
    `runs`: whether a process holds the lab."""
    verdict = dict(experiment.verdict or {})
    made = [s.told() for s in samples if s.purpose == "verdict"]
    return Row(
        number=experiment.number,
        status=experiment.status or experiment.state,
        val_bpb=experiment.val_bpb,
        best_before=experiment.best_before,
        description=experiment.description or "",
        researcher=experiment.researcher or "",
        reason=experiment.reason or "",
        tainted=bool(experiment.tainted),
        undone=bool(experiment.undone),
        commit=experiment.commit or "",
        parent=experiment.parent,
        created=experiment.created or "",
        started=experiment.started or "",
        finished=experiment.finished or "",
        detail=dict(experiment.detail or {}),
        outcome=dict(experiment.outcome or {}),
        verdict=verdict,
        cut_off=not runs and experiment.state in STARTED,
        numbered=tuple(verdict.get("all_runs") or made),
    )


def rows(
    experiments: Iterable[Any], samples: Mapping[int, Sequence[Any]] | None = None, runs: bool = True
) -> list[Row]:
    """`samples`: by experiment; `runs`: whether a process holds the lab."""
    return [row(experiment, (samples or {}).get(experiment.number, ()), runs) for experiment in experiments]


def by_number(samples: Iterable[Any]) -> dict[int, list[Any]]:
    """`core.ledger.Sample`s by their experiment, oldest first."""
    found: dict[int, list[Any]] = {}
    for sample in samples:
        found.setdefault(sample.number, []).append(sample)
    return found


@dataclass(frozen=True)
class Uses:
    """What the device did, in seconds. Busy is an experiment from its start to its outcome, scoring included; idle is
    all between two of them but for pauses that somebody asked for."""

    busy: float
    idle: float
    waits: dict[str, float]  # of the idle ones: thinking, dry build, waiting, other

    @property
    def idle_share(self) -> float:
        return self.idle / (self.busy + self.idle) if self.idle else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"busy_seconds": round(self.busy, 3), "idle_seconds": round(self.idle, 3),
                "idle_share": round(self.idle_share, 5), "waits": self.waits}  # fmt: skip


NO_USE = Uses(0.0, 0.0, {})


@dataclass(frozen=True)
class Tally:
    """A run in numbers."""

    experiments: int
    kept: int  # the baseline not counted
    discarded: int
    failed: int
    undone: int  # kept, and taken back later
    baseline: Row | None
    best: Row | None
    gain: float | None  # bpb below the baseline, as `recorded_gain` has it
    uses: Uses

    def to_json(self) -> dict[str, Any]:
        return {
            "experiments": self.experiments, "kept": self.kept, "discarded": self.discarded, "failed": self.failed,
            "undone": self.undone,
            "baseline": self.baseline and self.baseline.to_json(), "best": self.best and self.best.to_json(),
            "gain": self.gain, "device": self.uses.to_json(),
        }  # fmt: skip


def tally(all_rows: Sequence[Row], best: int | None, uses: Uses = NO_USE) -> Tally:
    """`best` is the number of the lab's best experiment: after an `undo` it is not the lowest of all kept. `uses`: of
    the device (console/timeuse.py)."""
    decided = [r for r in all_rows if r.decided]
    kept = [r for r in decided if r.kept]
    found = next((r for r in all_rows if r.number == best), None)
    return Tally(
        experiments=len(decided),
        kept=max(len(kept) - 1, 0),
        discarded=sum(r.status == "discard" for r in decided),
        failed=sum(r.failed for r in decided),
        undone=sum(r.status in KEPT and r.undone for r in decided),
        baseline=kept[0] if kept else None,
        best=found,
        gain=recorded_gain([r for r in kept if found and r.number <= found.number]) if found else None,
        uses=uses,
    )


def recorded_gain(kept: Sequence[Row]) -> float | None:
    """By how much (bpb) the last of these lies below the first, as recorded. `kept`: what stands, oldest first. Scores
    from before and after a drift do not compare: there a step is what the later one was better than the best of its
    moment, which was measured again for that."""
    steps = [_step(before, after) for before, after in pairwise(kept)]
    return math.fsum(s for s in steps if s is not None) if kept and None not in steps else None


def _step(before: Row, after: Row) -> float | None:
    if before.epoch != after.epoch and after.delta is not None:
        return -after.delta
    return None if before.val_bpb is None or after.val_bpb is None else before.val_bpb - after.val_bpb
