"""Measuring again what was kept, on seeds that no decision has seen: what is left to run, what it costs, running it.

Seeds `settings.seed + 1000 + k` belong to confirmations alone. A run that is in the ledger is not run again, so
whatever was cut off goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from core.deadline import Deadline
from core.ledger import Ablation, Sample
from core.session import FINISHED

if TYPE_CHECKING:
    from core.loop import Loop

FIRST_SEED = 1000  # after the lab's own seed
SEEDS = 4  # fresh seeds of each recipe, unless something else is asked for
RESERVED = 0.1  # of a run's time, kept for confirming at its end
AUDIT = "audit"  # of an outcome's timings
ON_VALIDATION, ON_HOLDOUT = ("scoring", AUDIT), ("holdout scoring", "holdout audit")  # likewise: all of a measurement
LATEST = 5  # runs by whose duration the next ones are estimated
ATTEMPTS = 3  # runs of one seed that may be disturbed before it ends, or at the end of a night is passed by


@dataclass(frozen=True)
class Run:
    """One training and score on a fresh seed."""

    number: int  # of the experiment
    seed: int
    holdout: bool  # whether the holdout is scored too
    without: int | None = None  # the experiment whose change is left out (core.ablation)

    def __str__(self) -> str:
        return f"#{self.number}" if self.without is None else f"#{self.number} without #{self.without}"


@dataclass(frozen=True)
class Plan:
    """What is left to run, in order, and about how long each takes, and the holdout's measurement beside it."""

    runs: tuple[Run, ...]
    seconds_each: float
    holdout_seconds: float = 0.0

    def takes(self, run: Run) -> float:
        """Seconds."""
        return self.seconds_each + self.holdout_seconds * run.holdout

    @property
    def seconds(self) -> float:
        return sum(map(self.takes, self.runs))


@dataclass(frozen=True)
class Done:
    """How a confirmation ended."""

    measured: int
    left: int
    reason: str  # "" when all was measured


def pair(kept: Sequence[int]) -> list[int]:
    """Of all that stands, oldest first: baseline and winner; fewer where nothing was kept beyond the baseline."""
    return [*kept[:1], *kept[1:][-1:]]


def plan(
    samples: Mapping[int, Sequence[Sample]],
    seed: int,
    seconds_each: float,
    numbers: Sequence[int],
    seeds: int = SEEDS,
    holdout: Collection[int] = (),
    versions: Mapping[str, Any] | None = None,
    epoch: int | None = None,
    holdout_seconds: float = 0.0,
) -> Plan:
    """The runs that are missing until each of `numbers` has `seeds` fresh ones, seed after seed, so that what ends
    early can still be compared.

    `samples`: of all experiments; `seed`: the lab's; `holdout`: for whom the holdout is scored too; `versions` and
    `epoch`: what is measured with now (None: what was measured with last), as other runs cannot be compared.
    """
    everything = [s for of_one in samples.values() for s in of_one]
    if epoch is None:
        epoch = max((s.epoch for s in everything), default=0)
    if versions is None:
        versions = max(everything, key=lambda s: s.created).versions if everything else {}
    recipes = [(Run(number, seed, number in holdout), samples.get(number, ())) for number in numbers]
    return replace(missing(recipes, seconds_each, seeds, versions, epoch), holdout_seconds=holdout_seconds)


def missing(
    recipes: Sequence[tuple[Run, Sequence[Sample]]],
    seconds_each: float,
    seeds: int,
    versions: Mapping[str, Any],
    epoch: int,
) -> Plan:
    """`recipes`: of each a run with the lab's seed, and the runs that there are."""
    runs = []
    for k in range(seeds):
        for run, present in recipes:
            wanted = replace(run, seed=run.seed + FIRST_SEED + k)
            if not any(_counts(s, wanted, epoch, versions) for s in present):
                runs.append(wanted)
    return Plan(tuple(runs), seconds_each)


def _counts(sample: Sample, wanted: Run, epoch: int, versions: Mapping[str, Any]) -> bool:
    same = sample.purpose == "confirm" and sample.seed == wanted.seed and sample.epoch == epoch
    scored = sample.holdout_bpb is not None or not wanted.holdout
    return same and scored and not sample.tainted and sample.versions == dict(versions)


def seconds_each(outcomes: Sequence[Mapping[str, Any] | None], budget: float) -> float:
    """How long one run takes that is audited, as all of these are: as the last scored ones of `outcomes`; before there
    are any, the budget."""
    scored = [o for o in outcomes if o and o.get("status") == "scored" and o.get("val_bpb")]
    known = [(o, t) for o in scored[-LATEST:] if (t := _taken(o, ("total",)))]
    audit = _typical([_taken(o, (AUDIT,)) for o in scored])
    return median([t if _taken(o, (AUDIT,)) else t + audit for o, t in known]) if known else budget


def holdout_seconds(outcomes: Sequence[Mapping[str, Any] | None], share: float = 1.0) -> float:
    """How long the holdout's measurement takes: as the last ones of `outcomes`; before there are any, as the validation
    text's, of which the holdout is this `share`. 0 where nothing was measured."""
    made = [o for o in outcomes if o]
    known = _typical([_taken(o, ON_HOLDOUT) for o in made])
    return known or share * sum(_typical([_taken(o, (name,)) for o in made]) for name in ON_VALIDATION)


def _taken(outcome: Mapping[str, Any], names: Sequence[str]) -> float:
    """Seconds of an outcome's timings, 0 where one of them is not there."""
    found = [float((outcome.get("timings") or {}).get(name) or 0.0) for name in names]
    return sum(found) if all(found) else 0.0


def _typical(seconds: Sequence[float]) -> float:
    """The median of the last ones that are known, 0 where none is."""
    known = [s for s in seconds if s][-LATEST:]
    return median(known) if known else 0.0


def reserved(left: float | None, rule: str, each: float) -> float:
    """Of the seconds `left` until its deadline, those that a run keeps for confirming. None where a lab decides by the
    simple rule, which asks for no evidence, and where they would not do for one run each of baseline and winner."""
    share = 0.0 if left is None or rule == "simple" else RESERVED * max(0.0, left)
    return share if share >= 2 * each else 0.0


def confirm(
    loop: Loop, wanted: Plan, deadline: Deadline | None = None, say: Callable[[str], None] = lambda _: None
) -> Done:
    """Run what is planned, until all is measured, the deadline is too near for another run, or a stop.
    While somebody wants a pause no run begins.

    A run that was disturbed is repeated, ATTEMPTS runs in all at most: by then this machine is not what it was, and it
    ends. With a deadline it goes on, as that time is kept for nothing else. A run that fails has no sample, which the
    record tells; it is passed by, and tried again when somebody asks again. A recipe with a change left out that fails
    is not run on further seeds: that it does not run is what was asked.
    """
    measured, many, failed = 0, len(wanted.runs), set[int]()
    with loop.holding():
        for at, run in enumerate(wanted.runs):
            if run.without in failed:
                continue
            score = _measured(loop, run, None if deadline is None else deadline.earlier(wanted.takes(run)))
            if isinstance(score, str):
                return Done(measured, many - at, score)
            measured += bool(score)
            said = f"{score:.6f}" if score else "no score that counts"
            say(f"{at + 1} of {many}: {run} on seed {run.seed}: {said}")
            if run.without is not None and _left_out(loop, run).reason:
                failed.add(run.without)
    return Done(measured, many - measured, "")


def _measured(loop: Loop, run: Run, latest: Deadline | None) -> float | str:
    """The undisturbed score of a run, 0.0 where it came to none; or why it all ends. `latest`: when the last run
    begins."""
    for _ in range(ATTEMPTS):
        loop.wait_while_paused(latest)
        if loop.is_finishing:
            return FINISHED
        if latest is not None and latest.left() < 0:
            return "the next run would not end in time"
        if run.without is None:
            outcome = loop.measure(run.number, run.seed, "confirm", "is it as good on a fresh seed?", run.holdout)
        else:
            outcome = loop.measure_without(run.number, run.without, run.seed)
        if outcome is None:
            return "stopped"
        if outcome.status != "scored":
            return 0.0
        if not (last := _last(loop, run)).tainted:
            return last.val_bpb
    return 0.0 if latest is not None else _disturbed(last)


def _disturbed(last: Sample) -> str:
    why = ((last.outcome or {}).get("health") or {}).get("disturbed") or "they depart from this lab's steady state"
    return f"{ATTEMPTS} runs in a row were disturbed: {why}; let the machine be as it was while the lab ran"


def _last(loop: Loop, run: Run) -> Sample:
    """The sample that a run with a score has left."""
    if run.without is None:
        return loop.ledger.samples(run.number, "confirm")[-1]
    return _left_out(loop, run).runs[-1]


def _left_out(loop: Loop, run: Run) -> Ablation:
    made = loop.ledger.ablation(run.without or 0, run.number)
    if made is None:
        raise ValueError(f"{run} is run and is not on the record")
    return made
