"""Keep, simplify, discard, or run it again: pure functions of the scores. docs/verdict.md tells the method in plain
words.

`decide` is the statistical verdict, `decide_simple` upstream's rule; `taint` says when a measurement counts as
disturbed. Scores are validation bits per byte: lower is better, and a gain is positive.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from core.apple import departure
from core.discovery import Tested, expected_effect, level
from core.evidence import Evidence, Prior, compare, looks
from core.noise import Noise, Run
from core.sequential import Design, Look, bounds, luck

TAINTING_SHARE = 0.25  # of our own cores' time, taken by other processes: steps and so the score suffer
LARGEST = 4.0  # sds: no test looks for a larger gain, which two runs show
LEAST_GAINS = 2  # keeps before their gains tell of the next one's
AWAY = 2.0  # standard errors by which a gain may lie beside the mean of those before it and still be one of them
LEAST_DF = 2  # degrees of freedom below which an estimated noise is none


@dataclass(frozen=True)
class Rule:
    """What a lab's verdicts go by. The defaults were chosen with `python -m benchmarks.nights`; sds are noise sds."""

    alpha: float = 0.05  # false keeps among all keeps, at most
    min_effect: float = 0.001  # bpb below which a gain is not worth keeping
    baseline_runs: int = 5  # seeds of the baseline at the start of a lab
    cap: int = 36  # runs of one candidate, at most
    control_cap: int = 50  # runs of the incumbent up to which a candidate may ask for more
    # Information (1/sds²) at which the test for a gain of one sd ends, looking for `effect` and for `most_effect`; for
    # one of d sds it is divided by d².
    reach: tuple[float, float] = (33.0, 29.0)
    simplify_reach: float = 12.0  # the same for a simplification
    sharing: float = 1.4  # verdicts that a run of the incumbent serves; it gets sqrt(sharing) as many (Dunnett)
    effect: float = 1.0  # sds: the gain that is looked for before anything is known of gains
    most_effect: float = 2.0  # sds: what is looked for after large gains, at most
    spread: float = 0.25  # sds: by how much gains differ at least, where earlier ones tell of the next; 0: they do not
    shrink: float = 0.84  # of the mean of what was kept: such estimates are too high
    patience: tuple[float, float] = (1.38, 1.95)  # log of Wald's lower ratio, for `effect` and `most_effect`
    first_patience: tuple[float, float] = (0.72, 1.1)  # the same at the first look
    spending: float = 0.75  # power of the information's share that is the share of error spent
    wealth: float = 0.8  # of alpha: the most that a night of pure noise keeps anything with
    decay: float = 1.6  # of SAFFRON's charges
    lambda_: float = 0.15  # of SAFFRON
    min_tokens: int = 5  # syntax-tree tokens that a simplification must save
    margin: float = 1.5  # sds that a simplification may lose at most (min_effect, where that is more)

    def information(self, effect: float, reach: float) -> float:
        """At which the test for a gain of `effect` sds ends."""
        return min(reach / effect**2, 1 / (1 / self.cap + 1 / self.control_cap))


@dataclass(frozen=True)
class Night:
    """The candidates that were tested before this one, oldest first, since the lab began: for being better, and for
    being no worse (the simplifications). `luck` (bpb): by how much the runs with the orders `lucky` are too good on
    average: those that the last keep was kept for. `prior`: what was known of it before it ran. `upstream` (bpb):
    what upstream's rule would have as its best by now, had it seen one run of each of these candidates; None before it
    has kept anything that is known."""

    tested: Sequence[Tested] = ()
    simplified: Sequence[Tested] = ()
    luck: float = 0.0
    lucky: frozenset[int] = frozenset()
    prior: Prior | None = None
    upstream: float | None = None

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]]) -> Night:
        """From each earlier experiment's `Step.record`, oldest first. What has none (a crash, a run that was stopped
        early, the baseline) was not tested and does not count."""
        return reduce(cls.after, records, cls())

    def after(self, record: Mapping[str, Any]) -> Night:
        """With one more."""
        tested, simplified, kept = (record.get(name) for name in ("tested", "simplified", "kept"))
        return Night(
            (*self.tested, Tested(**tested)) if tested else self.tested,
            (*self.simplified, Tested(**simplified)) if simplified else self.simplified,
            float(kept["luck"]) if kept else self.luck,
            frozenset(kept["orders"]) if kept else self.lucky,
            (Prior(**kept["prior"]) if kept.get("prior") else None) if kept else self.prior,
            record.get("first", self.upstream) if record.get("simple") == "keep" else self.upstream,
        )

    def simple(self, incumbent: Sequence[float], first: float) -> dict[str, Any]:
        """For the record: upstream's verdict on the `first` run (bpb) of a candidate, kept if it is lower than that
        rule's own best; than the `incumbent`'s first where that is not known."""
        best = list(incumbent[:1]) if self.upstream is None else [self.upstream]
        return {"simple": decide_simple(best, [first], 0.0).status, "first": first}

    def fair(self, incumbent: Sequence[Run]) -> list[Run]:
        """The incumbent's runs without the luck that it was kept for: what candidates and drift are judged against."""
        return [Run(r.seed, r.bpb + self.luck, r.order) if r.order in self.lucky else r for r in incumbent]

    def before(self, incumbent: Sequence[Run]) -> Prior | None:
        """What was known of it before it ran: nothing where it is a simplification, or the machine has moved since."""
        return self.prior if self.lucky <= {run.order for run in incumbent} else None

    def luck_of(self, incumbent: Sequence[Run]) -> float:
        """By how much (bpb) the mean of these runs is too good."""
        return self.luck * sum(r.order in self.lucky for r in incumbent) / max(1, len(incumbent))


@dataclass(frozen=True)
class Step:
    """What follows. `status`: "keep", "simplify", "discard"; or a run that is needed first, of the candidate ("more")
    or of the incumbent ("control"), with `seed`. `reason`: for people, with the figures. `record`: JSON, to be stored
    with the decided experiment; `Night.from_records` reads it."""

    status: str
    reason: str
    seed: int | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    status: str  # "keep" or "discard"
    reason: str  # with the figures, for people


@dataclass(frozen=True)
class _Question:
    """One sequential test: is the gain above -`shift` (bpb)? `level`: given that the first look is passed."""

    design: Design
    level: float
    shift: float = 0.0

    def error(self, seen: Sequence[Evidence]) -> float:
        """How likely this test as a whole concludes for something that is not so."""
        return self.level * self.design.passes(seen[0].information)

    def answer(self, seen: Sequence[Evidence]) -> tuple[str, Look]:
        """At the last of these looks: "shown", "futile", "spent" (the test is at its end) or "open"; and its bounds."""
        look = bounds([one.information for one in seen], self.error(seen), self.design)
        score = seen[-1].score(self.shift)
        if score >= look.upper:
            return "shown", look
        if score < look.lower:
            return "futile", look
        return "spent" if seen[-1].information >= self.design.information else "open", look

    def tested(self, seen: Sequence[Evidence], answer: str, lambda_: float) -> dict[str, Any]:
        """What later candidates' levels depend on: the fields of `Tested`."""
        informations = [one.information for one in seen]
        lasted = len(seen) - (answer == "futile")  # looks at which it was not futile
        survival = bounds(informations[:lasted], self.error(seen), self.design).survival if lasted else 1.0
        effect = (seen[-1].gain + self.shift) / seen[-1].sd
        promising = answer == "shown" or survival <= lambda_
        return {"passed": lasted > 0, "promising": promising, "found": answer == "shown", "effect": effect}

    def luck(self, seen: Sequence[Evidence]) -> float:
        """By how much (bpb) the gain is too high on average, having been concluded."""
        now = seen[-1]
        informations = [one.information for one in seen]
        return now.sd * luck(informations, self.error(seen), self.design, now.score() / now.information)


def first_runs(rule: Rule) -> int:
    """How many seeds the baseline runs at the start of a lab, to learn the noise from."""
    return rule.baseline_runs


def decide(
    incumbent: Sequence[Run],
    candidate: Sequence[Run],
    noise: Noise,
    night: Night,
    rule: Rule,
    smaller_by: int = 0,
    anchor: Sequence[Run] = (),
) -> Step:
    """What to do with a candidate after the runs that there are: of one drift epoch, untainted.

    `incumbent` is empty for the first recipe that finished, the baseline. `smaller_by`: syntax-tree tokens saved.
    `anchor`: the runs of what the incumbent is a simplification of, empty where it is none: of the last keep, or of
    the first best since the machine has moved. The runs may come in any order; their `order` says which were there at
    which look. Raises `ValueError` without a run of the candidate."""
    if not candidate:
        raise ValueError("a verdict needs a score of the candidate")
    if not incumbent:
        return Step("keep", f"the baseline: {_mean(candidate):.6f}", record={"rule": "baseline"})
    if noise.df < LEAST_DF:
        reason = f"the noise is not known yet: {noise.df:g} degrees of freedom, {LEAST_DF} are needed"
        return Step("control", reason, _unused_seed(incumbent, candidate))
    fair, kept = tuple(night.fair(incumbent)), tuple(night.fair(anchor))
    return _Case(fair, tuple(candidate), noise, night, rule, smaller_by, kept, night.before(incumbent)).step()


@dataclass(frozen=True)
class _Case:
    """The arguments of `decide`, and what follows from them."""

    incumbent: tuple[Run, ...]
    candidate: tuple[Run, ...]
    noise: Noise
    night: Night
    rule: Rule
    smaller_by: int
    anchor: tuple[Run, ...]
    prior: Prior | None

    def step(self) -> Step:
        seen = looks(self.incumbent, self.candidate, self.noise, self.prior)
        better = self._better(seen[-1].sd)
        answer, look = better.answer(seen)
        simplifies = self.smaller_by >= self.rule.min_tokens
        if simplifies and any(better.answer(seen[:k])[0] == "futile" for k in range(1, len(seen))):
            answer = "futile"  # it went on only because it is smaller
        record = self._record(better, look, seen, answer)
        if answer == "shown" and simplifies and seen[-1].gain < self.rule.min_effect:
            record["tested"]["found"] = False  # it is kept for being smaller, if at all
        elif answer == "shown":
            return self._shown(seen, better, record)
        if answer == "open" and (ask := self._ask(seen[-1], record)):
            return ask
        if simplifies:
            return self._simplify(seen, record)
        return Step("discard", self._why_not(seen[-1], answer, better), record=record)

    def _better(self, sd: float) -> _Question:
        rule, tested = self.rule, self.night.tested
        worth = rule.min_effect / sd
        least, most = (min(max(effect, worth), LARGEST) for effect in (rule.effect, rule.most_effect))
        effect = expected_effect(tested, least, most, rule.shrink)
        share = (effect - least) / (most - least) if most > least else 0.0
        patience, first, reach = (
            low + share * (high - low) for low, high in (rule.patience, rule.first_patience, rule.reach)
        )
        design = Design(effect, patience, first, rule.information(effect, reach), rule.spending)
        return _Question(design, self._level(tested))

    def _level(self, tested: Sequence[Tested]) -> float:
        return level(tested, self.rule.alpha, self.rule.wealth, self.rule.decay, self.rule.lambda_)

    def _shown(self, seen: Sequence[Evidence], better: _Question, record: dict[str, Any]) -> Step:
        rule, now, what = self.rule, seen[-1], self._compared(seen[-1])
        if now.gain < rule.min_effect:
            record["tested"]["found"] = False
            return Step("discard", f"{what}: real, but less than the {rule.min_effect:g} worth keeping", record=record)
        if max(r.order for r in self.incumbent) < min(r.order for r in self.candidate):  # the machine may have moved
            reason = f"{what}; the best has not been run since, and is run again before this is kept"
            return Step("control", reason, _unused_seed(self.incumbent, self.candidate), record)
        orders = sorted(run.order for run in self.candidate)
        record["kept"] = {"luck": better.luck(seen) * now.share, "orders": orders, "prior": self._foreseen(now)}
        return Step("keep", f"{what}, more than noise", record=record)

    def _foreseen(self, now: Evidence) -> dict[str, float] | None:
        """What the best and the gains of earlier keeps say of the candidate without its own runs: the best's score less
        the mean gain, as uncertain as that score and as gains are wide (empirical Bayes: Efron and Morris 1975). Next
        to nothing where this gain is like no other: it would be drawn to them, and what equals it be kept."""
        gains = [one.effect for one in self.night.tested if one.found]
        if len(gains) < LEAST_GAINS or not self.rule.spread:
            return None
        m, best = self._known_runs(), math.fsum(run.bpb for run in self.incumbent)
        best = (best + (self.prior.runs * self.prior.bpb if self.prior else 0.0)) / m
        mean = self.rule.shrink * math.fsum(gains) / len(gains)
        away = (now.gain / now.sd - mean) ** 2 - AWAY**2 / now.information
        spread = math.sqrt(max(self.rule.spread**2, statistics.variance(gains), away))
        return {"bpb": best - mean * now.sd, "runs": 1 / (1 / m + spread**2)}

    def _known_runs(self) -> float:
        """As many as the incumbent's own and what was known of it before are worth."""
        return len(self.incumbent) + (self.prior.runs if self.prior else 0.0)

    def _simplify(self, seen: Sequence[Evidence], record: dict[str, Any]) -> Step:
        """Not better, or not seen to be; but it is smaller, so no worse than by the margin is enough."""
        rule, now = self.rule, seen[-1]
        margin = max(rule.margin, rule.min_effect / now.sd)
        patience = rule.patience[-1]
        information = rule.information(min(margin, LARGEST), rule.simplify_reach)
        design = Design(min(margin, LARGEST), patience, patience, information, rule.spending)
        question = _Question(design, self._level(self.night.simplified), margin * now.sd)
        # The first look at which it is decided counts, also where the runs went on to tell whether there is a gain.
        answers = [question.answer(seen[:k])[0] for k in range(1, len(seen) + 1)]
        at, answer = next(((k, a) for k, a in enumerate(answers, 1) if a != "open"), (len(seen), "open"))
        if answer == "open" and (ask := self._ask(now, record)):
            return ask
        record["simplified"] = question.tested(seen[:at], answer, rule.lambda_)
        less, compared = f"{self.smaller_by} tokens less", self._compared(now)
        if answer != "shown" or now.gain <= -rule.min_effect:
            reason = f"{less}, but {compared}: a loss of {question.shift:.6f} cannot be ruled out"
            return Step("discard", reason, record=record)
        if problem := self._too_far_behind():
            return Step("discard", f"{less}, and {compared}, but {problem}", record=record)
        record["kept"] = {"luck": self.night.luck, "orders": sorted(self.night.lucky)}  # still those of the last keep
        return Step("simplify", f"{less}, and {compared}: a loss of {question.shift:.6f} is ruled out", record=record)

    def _too_far_behind(self) -> str:
        """Why what is no worse than the best, a simplification itself, is worse than the first; "" if it is not.
        What each of a chain loses is too little to be seen; what all of them lose is not. (Trials of medicines know
        it as bio-creep.)"""
        if not self.anchor or (gain := compare(self.anchor, self.candidate, self.noise).gain) > -self.rule.min_effect:
            return ""
        return (
            f"{-gain:.6f} worse than what simplifications began from, over its {len(self.anchor)} runs: together they "
            f"may lose no more than one, {self.rule.min_effect:g}"
        )

    def _ask(self, now: Evidence, record: dict[str, Any]) -> Step | None:
        """The run that helps most, None when no more are allowed. One of the incumbent serves later verdicts too."""
        n, rule = len(self.candidate), self.rule
        m, may_control = self._known_runs(), len(self.incumbent) < rule.control_cap
        if n >= rule.cap and not may_control:
            return None
        reason = f"{self._compared(now)}: not yet to be told from noise"
        if may_control and (n >= rule.cap or rule.sharing / (m * (m + 1)) > 1 / (n * (n + 1))):
            return Step("control", reason, _unused_seed(self.incumbent, self.candidate), record)
        return Step("more", reason, _unused_seed(self.candidate, self.incumbent), record)

    def _why_not(self, now: Evidence, answer: str, question: _Question) -> str:
        what = self._compared(now)
        if answer == "futile" and now.gain > 0:
            return f"{what}: the {question.design.effect * now.sd:.6f} looked for is not likely any more"
        return what if answer == "futile" else f"{what}: not to be told from noise, and no more runs are allowed"

    def _compared(self, now: Evidence) -> str:
        """ "1.234567 is 0.001234 ± 0.000456 better than the best, 1.235801 (3 runs against 5)"."""
        new, n, m = _mean(self.candidate), len(self.candidate), len(self.incumbent)
        way = "better" if now.gain >= 0 else "worse"
        runs = f"{n} run{'s' if n > 1 else ''} against {m}"
        return f"{new:.6f} is {abs(now.gain):.6f} ± {now.error:.6f} {way} than the best, {new + now.gain:.6f} ({runs})"

    def _record(self, question: _Question, look: Look, seen: Sequence[Evidence], answer: str) -> dict[str, Any]:
        now, root = seen[-1], math.sqrt(seen[-1].information)
        recorded, single = (min(arm, key=_order).bpb for arm in (self.incumbent, self.candidate))
        return {
            "rule": "statistical",
            "gain": now.gain,
            "error": now.error,
            "interval": list(now.interval()),
            "runs": len(self.candidate),
            "control_runs": len(self.incumbent),
            "z": now.z(),
            "needed_z": look.upper / root if math.isfinite(look.upper) else None,
            "hopeless_z": look.lower / root,
            "level": question.error(seen),
            "looked_for": question.design.effect * now.sd,
            "noise": dict(vars(self.noise)),
            "correlation_used": self.noise.trusted_correlation(),
            **self.night.simple([recorded], single),
            "tested": question.tested(seen, answer, self.rule.lambda_),
        }


def _order(run: Run) -> int:
    return run.order


def _mean(runs: Sequence[Run]) -> float:
    return math.fsum(run.bpb for run in runs) / len(runs)


def _unused_seed(mine: Sequence[Run], others: Sequence[Run]) -> int:
    """The next seed of one arm: the first that only the other has, so that pairs come about; else the one after all."""
    used = {run.seed for run in mine}
    return min({run.seed for run in others} - used, default=max(used) + 1)


def decide_simple(best: Sequence[float], candidate: Sequence[float], min_delta: float) -> Verdict:
    """Is the candidate better than the incumbent by more than `min_delta`? With 0 it is upstream's rule.

    `best` holds the incumbent's samples and is empty for the first experiment that finished: the baseline.
    Raises `ValueError` on a sample that is not a positive, finite number and on a candidate without samples.
    """
    if not candidate:
        raise ValueError("a verdict needs a score of the candidate")
    for value in (*best, *candidate):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{value} is not a score: bits per byte are positive and finite")
    new = math.fsum(candidate) / len(candidate)
    if not best:
        return Verdict("keep", f"the baseline: {new:.6f}")
    old = math.fsum(best) / len(best)
    gain = old - new
    if gain > min_delta:
        return Verdict("keep", f"{new:.6f} is {gain:.6f} better than the best, {old:.6f}")
    if gain > 0:
        return Verdict(
            "discard",
            f"{new:.6f} is only {gain:.6f} better than the best, {old:.6f} (more than {min_delta:g} is asked)",
        )
    if gain == 0:
        return Verdict("discard", f"{new:.6f} equals the best")
    return Verdict("discard", f"{new:.6f} is {-gain:.6f} worse than the best, {old:.6f}")


def crowded(health: Mapping[str, Any]) -> bool:
    """Whether others can hold a training up by the processor time that they take. One on a card needs about one core
    and leaves the rest idle: others may have all but those and one more. Where it is slower all the same, its step rate
    tells."""
    others, ours = float(health.get("others_cores") or 0.0), float(health.get("our_cores") or 0.0)
    return not health.get("card") or others + max(1.0, ours) + 1.0 > float(health.get("cores") or 0.0)


def taint(health: Mapping[str, Any], steady: Mapping[str, Any] | None = None) -> str:
    """Why a measurement is to be taken again, "" if it is not. `health`: what the referee saw beside the training;
    `steady`: the same of the lab's baseline, from which a Mac's conditions may not depart."""
    others, ours = float(health.get("others_cores") or 0.0), float(health.get("our_cores") or 0.0)
    if others > TAINTING_SHARE * max(1.0, ours) and crowded(health):
        loop = float(health.get("loop_cores") or 0.0)
        own = f" ({loop:.1f} of them the researcher and the loop)" if loop >= 0.1 else ""
        return f"other processes kept {others:.1f} cores busy{own} beside our {ours:.1f}"
    changed = departure(health.get("conditions") or {}, steady.get("conditions") or {}) if steady else ""
    return changed or str(health.get("tainted") or "")
