"""What a night found: everything that the report says, as figures taken from the ledger. Pages only spell them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from console import ablations
from console.machine import Machine, machine
from console.places import look
from console.rows import KEPT, Row, Scale, Tally, disturbed, doubt, tally
from console.themes import Theme, themes, untried
from console.timeuse import TimeUse, time_use, uses
from core import ablation, confirming, effects
from core.ablation import Known, Without
from core.effects import Effect, Estimate, Replication, Spread
from core.ledger import Ablation, LedgerEvent, Sample, Spent

if TYPE_CHECKING:
    from core.lab import Lab
    from core.noise import Noise

NEAR = 5  # near misses that are told


@dataclass(frozen=True)
class Kept:
    """A change that was kept, and what it gave when it was measured again."""

    row: Row
    before: Row  # what it was kept over
    again: Effect | None  # on fresh seeds; None: not measured again
    state: Replication
    seconds: float  # that `confirm` of it would still take
    without: Without | None  # the winner without it; None: nobody has left it out

    @property
    def disturbed(self) -> str:
        return disturbed(self.before, self.row)


@dataclass(frozen=True)
class Near:
    """A discard that came close to the best of its moment, or that somebody has measured again."""

    row: Row
    close: bool
    again: Effect | None  # on fresh seeds, against what it started from; None: not measured again
    state: Replication  # as a gain


@dataclass(frozen=True)
class Gain:
    """From the baseline to the winner."""

    baseline: Row
    winner: Row
    recorded: float  # bpb, as the decisions saw it: with the winner's curse
    validation: Effect | None
    holdout: Effect | None
    simpler: bool  # nothing but simplifications was kept: no gain was claimed
    state: Replication
    seconds: float  # that confirming both would still take; 0: done

    @property
    def doubt(self) -> str:
        """ ", but both runs were disturbed", behind what was recorded."""
        return doubt(self.baseline, self.winner)


@dataclass(frozen=True)
class Rules:
    """What each rule kept or would have kept, of the experiments that both judged."""

    used: str  # "simple" or "statistical": the lab's own
    simple: int  # by the first run of each, against what this rule would have kept before it
    statistical: int | None  # None where it was not asked
    both: int
    earlier: int = (
        0  # of an earlier version's, in which the simple rule was given the first run of the lab's best instead
    )


@dataclass(frozen=True)
class Level:
    """The best over a stretch of experiments: one step of the picture's line."""

    first: int  # experiment from which on it holds
    number: int  # of the best
    estimate: Estimate
    fresh: bool  # from fresh runs; else from those that it was kept for


@dataclass(frozen=True)
class Record:
    """What is read of a lab at one moment."""

    tag: str
    rows: Sequence[Row]
    best: int | None
    scale: Scale
    samples: Mapping[int, Sequence[Sample]]  # by experiment
    events: Sequence[LedgerEvent]
    spent: Spent
    seed: int
    worth: float  # the smallest change that is worth keeping, bpb
    rule: str  # "simple" or "statistical"
    source: Callable[[int], bytes]  # of an experiment
    diffs: Mapping[int, str]  # from what each started from
    known: Known = field(default_factory=lambda: Known({}, {}, {}))
    ablations: Sequence[Ablation] = ()


@dataclass(frozen=True)
class Findings:
    """All of a report."""

    record: Record
    total: Tally
    spread: Spread
    noise: Noise  # as verdicts know it, from all runs that were not disturbed
    gain: Gain | None
    kept: Sequence[Kept]
    levels: Sequence[Level]
    themes: Sequence[Theme]
    time: TimeUse
    rules: Rules
    machine: Machine
    near: Sequence[Near]  # discards: those that came closest, and all that were measured again
    untried: Sequence[str]  # constants with a range that nothing has changed
    seconds_each: float  # that one more run takes

    @property
    def rows(self) -> Sequence[Row]:
        return self.record.rows

    @property
    def drift(self) -> list[LedgerEvent]:
        """Where a new epoch began: the best had moved, or what measures had changed."""
        return [e for e in self.record.events if e.kind == "epoch"]

    @property
    def seconds_without(self) -> float:
        """That leaving out what nobody has left out of the winner yet would take, one change at a time, at
        most; 0 where there is but one change, whose answer is the gain."""
        if self.gain is None or len(self.kept) < 2:
            return 0.0
        new = [k for k in self.kept if k.without is None or not k.without.stands]
        record, winner = self.record, self.gain.winner.number
        left = confirming.plan(record.samples, record.seed, self.seconds_each, [winner])
        return len(new) * confirming.SEEDS * self.seconds_each + left.seconds if new else 0.0

    @property
    def idle(self) -> list[Kept]:
        """Changes that the winner was measured to do without."""
        return [k for k in self.kept if k.without and ablations.idle(k.without)]

    @property
    def unsettled(self) -> list[Kept]:
        return [k for k in self.kept if k.state in ("open", "unconfirmed")]


def read(lab: Lab) -> Record:
    with lab.ledger.transaction():
        view = look(lab)
        known = Known.of(lab.ledger.experiments(), lab.ledger.all_samples())
        events, spent, left_out = lab.ledger.events(), lab.ledger.spent(), lab.ledger.ablations()
    return Record(
        tag=lab.tag,
        rows=view.rows,
        best=view.best.number if view.best else None,
        scale=view.scale,
        samples={r.number: known.samples.get(r.number, []) for r in view.rows},
        events=events,
        spent=spent,
        seed=lab.settings.seed,
        worth=lab.settings.min_delta,
        rule=lab.settings.verdict,
        source=lab.source,
        diffs={r.number: lab.diff(r.number) for r in view.rows if r.number > view.rows[0].number},
        known=known,
        ablations=left_out,
    )


def findings(record: Record) -> Findings:
    """Nothing is trained, and nothing is read but the record."""
    from core.runs import Runs  # here, as it loads what only statistics need

    rows, samples = record.rows, record.samples
    extra = [s for a in record.ablations for s in a.runs]
    total = tally(rows, record.best, uses(rows, samples, extra))
    baseline = total.baseline.number if total.baseline else None
    spread = effects.spread_of(samples, baseline, ablations=record.ablations)
    each = confirming.seconds_each([r.outcome for r in rows], record.scale.budget)
    return Findings(
        record=record,
        total=total,
        spread=spread,
        noise=Runs([s for of_one in samples.values() for s in of_one], epoch=0).noise(),
        gain=_gain(record, total, spread, each),
        kept=_kept(record, spread, each),
        levels=levels(rows, samples, spread),
        themes=themes(rows, record.source),
        time=time_use(rows, samples, extra),
        rules=rules(rows, record.rule),
        machine=machine(rows, samples, record.events, extra),
        near=near_misses(rows, samples, record.worth, spread),
        untried=untried(rows, record.source, record.best) if record.best is not None else [],
        seconds_each=each,
    )


# --- the gain, and what it is made of --------------------------------------------------------------


def _gain(record: Record, total: Tally, spread: Spread, each: float) -> Gain | None:
    standing = {r.number: r for r in record.rows if r.kept}
    pair = confirming.pair(list(standing))
    if len(pair) < 2 or total.baseline is None:
        return None
    baseline, winner = (standing[number] for number in pair)
    before, after = effects.together(record.samples[pair[0]], record.samples[pair[1]])
    again = effects.effect(effects.scores(before), effects.scores(after), spread)
    on_holdout = effects.spread_of(record.samples, baseline.number, "holdout")
    simpler = all(r.status == "simplify" for r in list(standing.values())[1:])
    return Gain(
        baseline=baseline,
        winner=winner,
        recorded=total.gain or 0.0,
        validation=again,
        holdout=effects.effect(effects.scores(before, "holdout"), effects.scores(after, "holdout"), on_holdout),
        simpler=simpler,
        state=effects.settled("simplify" if simpler else "keep", again, record.worth, spread),
        seconds=confirming.plan(record.samples, record.seed, each, pair, holdout=pair).seconds,
    )


def _kept(record: Record, spread: Spread, each: float) -> list[Kept]:
    chain = [r for r in record.rows if r.kept]
    found = []
    for before, r in pairwise(chain):
        again = effects.remeasured(record.samples, before.number, r.number, spread)
        state = effects.settled(r.status, again, record.worth, spread)
        left = confirming.plan(record.samples, record.seed, each, [before.number, r.number])
        newest = ablation.newest(r.number, record.ablations, record.known)
        without = ablation.judge(newest, record.known, spread, record.worth) if newest else None
        found.append(Kept(r, before, again, state, left.seconds, without))
    return found


def levels(rows: Sequence[Row], samples: Mapping[int, Sequence[Sample]], spread: Spread) -> list[Level]:
    """The best so far, experiment by experiment; from runs made after it was kept, where there are any. After a drift
    the same best has another level."""
    found: list[Level] = []
    for r in rows:
        if not r.kept or r.val_bpb is None:
            continue
        own = samples.get(r.number, ())
        fresh = {g[-1].epoch: g for g in effects.groups(own, effects.FRESH).values()}
        began = min((s.epoch for s in own), default=0)
        if began in fresh:
            found.append(Level(r.number, r.number, effects.estimate(effects.scores(fresh[began]), spread), True))
        else:
            runs = max(1, sum(s.purpose == "verdict" and not s.tainted for s in own))
            found.append(Level(r.number, r.number, effects.around(r.val_bpb, runs, spread), False))
        for epoch, group in fresh.items():
            controls = [s.created for s in group if s.purpose == "control"]
            later = [x.number for x in rows if controls and x.started and x.started >= min(controls)]
            if epoch > began and later:
                found.append(Level(later[0], r.number, effects.estimate(effects.scores(group), spread), True))
    latest = {level.first: level for level in found}  # of two epochs that began there the newer one
    return sorted(latest.values(), key=lambda level: level.first)


# --- the rules, and what nearly was ------------------------------------------------------------------


def rules(rows: Sequence[Row], used: str) -> Rules:
    """By the record that each verdict left; the baseline is nobody's keep."""
    judged = [r for r in rows if r.decided and not r.failed and r.best_before is not None]
    asked = [r for r in judged if r.simple]
    if not asked and used == "simple":
        simple = sum(r.status in KEPT for r in judged)
        return Rules(used, simple, None, simple)
    by_simple = [r for r in asked if r.simple == "keep"]
    by_other = [r for r in asked if r.status in KEPT]
    earlier = sum("first" not in r.verdict for r in asked if r.val_bpb is not None)
    return Rules(used, len(by_simple), len(by_other), sum(r in by_other for r in by_simple), earlier)


def near_misses(
    rows: Sequence[Row], samples: Mapping[int, Sequence[Sample]], worth: float, spread: Spread
) -> list[Near]:
    """Discards that were better than the best by too little, or worse by less than noise explains, the best first, and
    those that were measured again; before all others what proved to be better."""
    margin = max(worth, (spread.sd or 0.0) * 2**0.5)  # the standard deviation of a difference of two runs
    discards = sorted((r for r in rows if r.status == "discard"), key=lambda r: r.delta or 0.0)
    close = [r.number for r in discards if not r.tainted and r.delta is not None and r.delta < margin][:NEAR]
    found = []
    for r in discards:
        again = effects.remeasured(samples, r.parent, r.number, spread) if r.parent is not None else None
        if again or r.number in close:
            state = effects.settled(r.status, again, worth, spread)
            found.append(Near(r, r.number in close, again, state))
    return sorted(found, key=lambda near: near.state != "replicated")
