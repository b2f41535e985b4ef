"""From a measured run to a decision on disk: verdict, objects, refs, ledger, the lab's files, in this order.

What follows after a run is a function of the ledger's rows alone: another run of the candidate, a run of the best, or
the decision. So whatever was cut off is taken up by asking again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from core import probing, steady, verdict
from core.eras import eras
from core.ledger import FAILED, KEPT, Experiment, Sample, now
from core.live import Event
from core.noise import by_seed
from core.outcome import Outcome
from core.probing import Probe
from core.recovery import ATTEMPTS
from core.runs import Runs, night
from core.session import Session
from core.size import syntax_tokens
from core.verdict import Rule, Step

DISTURBED = 3  # times that one seed is run, each time disturbed, before the candidate is passed by
AGAIN = "again"  # status of a step: the run that was made does not count, and is repeated
STATISTICAL = "statistical"


class Deciding:
    def __init__(self, session: Session) -> None:
        self._session = session
        self.decided: list[Experiment] = []  # in this run
        self._late = ""  # why results.tsv is older than the ledger

    def rule(self) -> Rule:
        return Rule(min_effect=self._session.lab.settings.min_delta)

    def next(self, e: Experiment) -> Step:
        """What experiment `e`, which waits, needs: "more" (a run of it with `seed`), "control" (a run of the best), or
        its end."""
        if self._session.lab.settings.verdict == STATISTICAL:
            return self._by_noise(e, self._runs())
        return Step("more", "", self._session.lab.settings.seed)

    def could_keep(self, e: Experiment, seed: int, bpb: float) -> bool:
        """Whether a run with this score would end in anything but a discard, now or after further runs: then it has to
        be audited. So whatever is kept was audited in each run that it is kept for."""
        lab = self._session.lab
        if lab.settings.verdict == STATISTICAL:
            return self._by_noise(e, self._runs().with_run(e.number, seed, bpb)).status != "discard"
        return verdict.decide_simple(lab.best_samples(), [bpb], lab.settings.min_delta).status == "keep"

    def probe(self, e: Experiment, seed: int) -> Probe | None:
        """How the next run of a candidate is looked at: only its first may be stopped early, one in ten never is."""
        lab, ledger = self._session.lab, self._session.ledger
        if not lab.settings.probe:
            return None
        best, runs = lab.best(), self._runs()
        if best is None or runs.of_now(e.number) or probing.exempt(e.number):
            return Probe()
        rule, simplifies = self.rule(), self._smaller_by(e, best) >= self.rule().min_tokens
        needed = max(rule.margin * runs.noise().sd, rule.min_effect) if simplifies else 0.0
        needed += self._before(e).luck_of(runs.scores(best.number))  # the best's score is too good by that
        known = eras(ledger.experiments(), runs.samples, best.number, runs.epoch)
        return Probe(judge=probing.judge(known, needed=needed, seed=seed))

    def record(self, number: int, outcome: Mapping[str, Any], seed: int, disturbed: str = "") -> None:
        """running -> scored. `disturbed`: why the run should be taken again."""
        health = {**(outcome.get("health") or {}), **({"disturbed": disturbed} if disturbed else {})}
        ledger, versions = self._session.ledger, self._session.measured_with
        ledger.record(number, {**outcome, "health": health}, seed, versions, bool(disturbed))

    def decide(self, e: Experiment) -> Step:
        """What follows for experiment `e`, done: decided, or back among those that wait. Returns what it was."""
        step = Step(AGAIN, "another best stands since its run") if self._is_outdated(e) else self._answer(e)
        if step.status in KEPT and (unheard := self._unaudited(e)):
            step = Step(AGAIN, f"{len(unheard)} of its runs were not audited")
            self._session.ledger.requeue(e.number, step.reason, counts=True, drop=unheard)
        elif step.status == AGAIN:
            self._session.ledger.requeue(e.number, step.reason, counts=True)
        elif step.status not in ("more", "control"):
            self._conclude(e, step)
        elif e.state != "proposed":
            self._session.ledger.next_run(e.number)
        return step

    def refuse(self, e: Experiment, reason: str, status: str = "invalid", log_tail: str = "") -> None:
        """What waits ends as it is, without a run."""
        record = {"rule": self._session.lab.settings.verdict, "simple": status}
        outcome = {"status": status, "reason": reason, "log_tail": log_tail}
        self._conclude(e, Step(status, reason, record=record), outcome=json.dumps(outcome))

    def _is_outdated(self, e: Experiment) -> bool:
        """Was its last run made from a best that was taken back meanwhile?"""
        best = self._session.lab.best()
        return e.val_bpb is not None and best is not None and e.parent not in (None, best.number)

    def _conclude(self, e: Experiment, step: Step, **columns: Any) -> None:
        """Objects, then refs, then the ledger, with these `columns` too, then the lab's files."""
        lab, ledger = self._session.lab, self._session.ledger
        before = lab.best_bpb()
        samples = ledger.samples(e.number, "verdict")
        bpb = None if step.status in FAILED else self._score(e, samples)
        finished = e.finished or now()
        decided = replace(e, status=step.status, val_bpb=bpb, finished=finished)
        commit = lab.commit_of(decided)
        refs = {lab.candidate_ref(e.number): commit}
        if step.status in KEPT:
            refs[lab.branch_ref] = commit
        lab.git.update_refs(refs)
        ledger.advance(
            e.number,
            "decided",
            status=step.status,
            reason=step.reason,
            commit=commit,
            best_before=before,
            val_bpb=bpb,
            finished=finished,
            tainted=int(bool(step.record.get("disturbed", e.tainted))),
            verdict=json.dumps({**step.record, "all_runs": [s.told() for s in samples]}),
            **columns,
        )
        self.finish(ledger.get(e.number))

    def _score(self, e: Experiment, samples: Sequence[Sample]) -> float | None:
        """The mean of what the verdict rests on; of a candidate that was passed by, of all there is."""
        found = [run.bpb for run in self._runs().scores(e.number)] or [s.val_bpb for s in samples]
        return math.fsum(found) / len(found) if found else None

    def finish(self, e: Experiment) -> None:
        """What follows a decision; the next start does it where it was cut off."""
        session, products = self._session, self._session.lab.products
        outcome = Outcome.from_dict(e.outcome or {})
        products.keep_logs(e.number)
        if e.is_kept:
            products.keep(e.number, outcome.weights, outcome.caches)
        products.clear_work({e.number})
        session.lab.publish()
        self.write_results()
        if not self.restore_recipe() and e.is_kept:
            session.note(
                f"train.py was edited meanwhile and stays; #{e.number} is the best now: autoresearch best --source"
            )
        self.decided.append(e)
        told = {"number": e.number, "status": e.status, "val_bpb": e.val_bpb, "reason": e.reason}
        session.on_event(Event("decided", told))

    def write_results(self) -> None:
        """results.tsv; that it has to wait is told once."""
        late = self._session.lab.write_results_tsv()
        if late and not self._late:
            self._session.note(late)
        self._late = late

    def restore_recipe(self) -> bool:
        """The best's train.py goes back, unless something lies there that was not judged yet. Did it?"""
        lab = self._session.lab
        if lab.is_dirty():
            lies_there = hashlib.sha256(lab.working_source()).hexdigest()
            if not lab.ledger.is_decided(lies_there):
                return False
        lab.restore_recipe()
        return True

    # --- what follows ------------------------------------------------------------------------------

    def _answer(self, e: Experiment) -> Step:
        if e.state in ("scored", "audited") and (fault := self._fault(e)):
            return fault
        if self._session.lab.settings.verdict == STATISTICAL:
            return self._by_noise(e, self._runs())
        return self._by_one_run(e)

    def _fault(self, e: Experiment) -> Step | None:
        """What follows of the run that was just made where it has no score that could be judged."""
        outcome = e.outcome or {}
        status, reason = str(outcome.get("status", "crash")), str(outcome.get("reason", ""))
        rule = {"rule": self._session.lab.settings.verdict, "simple": status}
        disturbed = (outcome.get("health") or {}).get("disturbed")
        if steady.can_be_others(outcome) and disturbed and e.attempts < ATTEMPTS:
            return Step(AGAIN, f"{reason}, while {disturbed}")
        if status == "hopeless":  # what upstream's rule would have said after the rest of the run is as good as sure
            record = {**rule, "simple": "discard", "stopped_early": outcome.get("stopped_early") or {}}
            return Step("discard", f"stopped early: {reason}", record=record)
        if status != "scored":
            return Step(status, reason, record=rule)
        samples = self._session.ledger.samples(e.number, "verdict")
        if e.val_bpb is None or not samples:
            return Step("invalid", "the score is not a positive, finite number", record={**rule, "simple": "invalid"})
        again = self._why_again(e, samples[-1])
        if again and e.attempts < ATTEMPTS:
            return Step(AGAIN, again)
        return Step("invalid", f"{again}, {e.attempts} times", record=rule) if again else None

    def _why_again(self, e: Experiment, sample: Sample) -> str:
        """Why a score cannot be judged as it is; "" if it can."""
        lab, best = self._session.lab, self._session.lab.best()
        if best is not None and lab.last_run(best).versions != sample.versions:
            return "the best was not measured with the same versions"
        if e.state == "audited":
            return ""
        if lab.settings.verdict == STATISTICAL:  # a disturbed run is kept for nothing
            keeps = not sample.tainted and self._by_noise(e, self._runs()).status != "discard"
        else:
            keeps = self.could_keep(e, sample.seed, sample.val_bpb)
        return "would be kept and was not audited" if keeps else ""

    def _unaudited(self, e: Experiment) -> list[Sample]:
        """Runs that count and were not audited, as they could lead to nothing when they were made: since then another
        has become the best."""
        if self._session.lab.settings.verdict != STATISTICAL:
            return []
        return [s for s in self._runs().of_now(e.number) if not s.tainted and not (s.outcome or {}).get("audited")]

    # --- upstream's rule ---------------------------------------------------------------------------

    def _by_one_run(self, e: Experiment) -> Step:
        lab, samples = self._session.lab, self._session.ledger.samples(e.number, "verdict")
        health = (e.outcome or {}).get("health") or {}
        # A card that others used made fewer steps, and so may have a machine that slept: such a score says nothing
        # about the candidate, and decides nothing.
        if cut := str((health.get("card") or {}).get("tainted") or "") or steady.slept(health):
            if e.attempts < ATTEMPTS:
                return Step(AGAIN, f"{cut}; it will be measured again")
            reason = f"measured {e.attempts} times, each time disturbed: {cut}"
            return Step("invalid", reason, record={"rule": "simple", "simple": "invalid"})
        said = verdict.decide_simple(lab.best_samples(), [s.val_bpb for s in samples], lab.settings.min_delta)
        return Step(said.status, said.reason, record={"rule": "simple", "simple": said.status})

    # --- the statistical rule ----------------------------------------------------------------------

    def _runs(self) -> Runs:
        return Runs.of(self._session.ledger, self._session.measured_with)

    def _by_noise(self, e: Experiment, runs: Runs) -> Step:
        """Unlike upstream's, the answer may be that another run is needed first."""
        best, made = self._session.lab.best(), runs.of_now(e.number)
        first = self._session.lab.settings.seed
        if not made:
            return Step("more", "", first)
        if made[-1].tainted and (step := self._disturbed(e, made, best)):
            return step
        mine = runs.scores(e.number)
        if best is None:
            wanted = verdict.first_runs(self.rule())
            if len(mine) < wanted:
                reason = f"run {len(mine)} of {wanted} of the baseline, which show the noise"
                return Step("more", reason, _unused(mine, first))
            mean = math.fsum(r.bpb for r in mine) / len(mine)
            spread = f"whose standard deviation is {runs.noise().sd:.6f}"
            reason = f"the baseline: {mean:.6f} over {len(mine)} seeds, {spread}"
            first_run = min(mine, key=lambda r: r.order).bpb
            record = {"rule": STATISTICAL, "simple": "keep", "first": first_run, "runs": len(mine)}
            return Step("keep", reason, record=record)
        incumbent = by_seed(runs.scores(best.number))
        if not incumbent:
            return Step("control", "the best has no run that these could be compared with", first)
        before, smaller_by = self._before(e), self._smaller_by(e, best)
        anchor = self._anchor(runs)
        step = verdict.decide(incumbent, mine, runs.noise(), before, self.rule(), smaller_by, anchor)
        if step.status in KEPT and max(r.order for r in incumbent) < min(r.order for r in mine):
            reason = f"{step.reason}; before it is kept the best is run beside it, as the machine may have moved"
            return Step("control", reason, 1 + max(r.seed for r in incumbent), step.record)
        return step

    def _disturbed(self, e: Experiment, made: Sequence[Sample], best: Experiment | None) -> Step | None:
        """The last run was disturbed: once more with its seed, at most twice, and then it is passed by. A baseline is
        not: without it there is no lab, and a machine that is always disturbed is measured as it is."""
        last = made[-1]
        why = str(((last.outcome or {}).get("health") or {}).get("disturbed") or "it was disturbed")
        times = sum(s.tainted and s.seed == last.seed for s in made)
        if times < DISTURBED:
            return Step("more", f"disturbed, and so run again: {why}", last.seed)
        if best is None:
            return None
        recorded = self._session.lab.best_samples()
        simple = self._before(e).simple(recorded, made[0].val_bpb)
        record = {"rule": STATISTICAL, **simple, "disturbed": why, "runs": len(made)}
        reason = f"passed by: run {times} times, each time disturbed, at last because {why}"
        return Step("discard", reason, record=record)

    def _anchor(self, runs: Runs) -> list[verdict.Run]:
        """The runs of what simplifications began from: the last keep, or, where the machine has moved since, the first
        of them that has run since. None where that is the best itself."""
        kept = [x for x in self._session.ledger.experiments() if x.is_kept]
        last = max((at for at, x in enumerate(kept) if x.status == "keep"), default=0)
        chain = (runs.scores(x.number) for x in kept[last:-1])
        return next((found for found in chain if found), [])

    def _before(self, e: Experiment) -> verdict.Night:
        return night([x for x in self._session.ledger.experiments() if x.number < e.number])

    def _smaller_by(self, e: Experiment, best: Experiment) -> int:
        """Syntax-tree tokens that the candidate has less than the best."""
        old, new = (self._session.ledger.source(x.source_sha256) for x in (best, e))
        try:
            return syntax_tokens(old) - syntax_tokens(new)
        except (SyntaxError, ValueError, RecursionError):  # what torch accepts all the same is no simplification
            return 0


def _unused(made: Sequence[verdict.Run], first: int) -> int:
    used = {run.seed for run in made}
    return next(seed for seed in range(first, first + len(used) + 1) if seed not in used)
