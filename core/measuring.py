"""One run of a recipe on this lab's device: what it is asked with, what surrounds it, and the runs that are no
candidate's: the best again to be compared with, and any experiment on another seed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

from core import noise, steady
from core.data import Dataset
from core.errors import UserError
from core.files import remove
from core.gap import Stopped
from core.ledger import Ablation, Experiment, Sample
from core.live import Event
from core.outcome import Outcome, Request, always
from core.probing import Probe
from core.runs import DECIDED, Runs, night
from core.session import Session
from core.versions import changes

COOLS_IN = 300.0  # seconds after which a machine has cooled down, and settles again before it measures
CONTROL_EVERY = 20  # candidates after which the best is run again, whatever the verdicts need
DISTURBED = 3  # runs of the best in a row, all disturbed alike, after which this is how the machine is now
STRANGER = 0  # the number of a recipe that is no experiment: none of its runs says how fast it usually is
FAILS = 3  # runs of the best in a row that may fail before it counts as broken


class Measuring:
    """`think_ahead` is called when a run begins: the next proposal may be made meanwhile."""

    def __init__(self, session: Session, think_ahead: Callable[[], None]) -> None:
        self._session = session
        self._think_ahead = think_ahead
        self._failed = 0  # runs of the best in a row
        self._ended = 0.0  # Unix time at which the last run did

    # --- one run -----------------------------------------------------------------------------------

    def run(
        self,
        e: Experiment,
        dataset: Dataset,
        seed: int,
        would_keep: Callable[[float], bool] = always,
        holdout: bool = False,
        probe: Probe | None = None,
    ) -> tuple[Outcome, dict[str, float]]:
        """One run, not recorded: its outcome, and how long the device had been idle before. A score that `would_keep`
        is audited. `probe`: how the training is looked at, in a lab that looks; by default without stopping it."""
        session = self._session
        looked_at = (probe or Probe()) if session.lab.settings.probe else None  # all runs of a lab pay the same
        request = self._request(e, dataset, seed)
        request = replace(request, would_keep=would_keep, holdout=holdout, probe=looked_at)
        with self._measured():
            idle = session.idle.end()
            self._think_ahead()
            try:
                return session.patiently(lambda: self._execute(request), session.stop), idle
            except Stopped:
                return Outcome("stopped", "stopped on request"), idle
            finally:
                session.idle.begin()
                self._ended = time.time()

    def _execute(self, request: Request) -> Outcome:
        remove(request.workdir)  # what a run before this one left that did not come to an outcome
        return self._session.executor.execute(request, self._session.forward, self._session.stop)

    def disturbed(self, number: int, outcome: Outcome) -> str:
        """Why this run of experiment `number` is to be taken again, "" if it is not."""
        return steady.departure(slim(outcome), self._runs().steady(number))

    def measure(
        self, number: int, seed: int, purpose: str, why: str, dataset: Dataset, holdout: bool = False
    ) -> Outcome | None:
        """Run experiment `number` once more and record its sample, if it has one. None after a stop."""
        session, e = self._session, self._session.ledger.get(number)
        session.note(f"running #{number} again, with seed {seed}: {why}")
        session.again(number, seed, f"#{number} again, with seed {seed}: {why}")
        outcome, idle = self.run(e, dataset, seed, holdout=holdout)
        if outcome.status == "stopped":
            return None
        if outcome.status == "scored" and outcome.val_bpb is not None:
            self._take(e, seed, purpose, outcome, idle)
        else:
            said = f"#{number} with seed {seed}: {outcome.status} ({outcome.reason})"
            session.ledger.event("remeasured", said, number)
        session.lab.products.clear_work({number})
        return outcome

    def measure_without(self, winner: int, number: int, seed: int, dataset: Dataset) -> Outcome | None:
        """Run what is left of a best without one kept change, once, and record the run, or why there is none. None
        after a stop."""
        session, what = self._session, f"#{winner} without #{number}"
        a = session.ledger.ablation(number, winner)
        if a is None or a.source_sha256 is None:
            raise ValueError(f"there is no recipe that is {what}")
        session.note(f"running {what}, with seed {seed}: is the change still needed?")
        session.again(winner, seed, f"{what}, with seed {seed}")
        e = replace(session.ledger.get(number), source_sha256=a.source_sha256)
        try:
            refused = "" if a.runs else self._refused(session.ledger.source(a.source_sha256))
        except Stopped:
            return None
        outcome, idle = (Outcome("crash", refused), {}) if refused else self.run(e, dataset, seed)
        if outcome.status == "stopped":
            return None
        if outcome.status == "scored" and outcome.val_bpb is not None:
            said = self._take_without(a, seed, outcome, idle)
        else:
            said = refused or f"{outcome.status}: {outcome.reason}"
            session.ledger.ablate(number, winner, session.ledger.source(a.source_sha256), said)
        session.ledger.event("ablation", f"{what}, with seed {seed}: {said}", number)
        session.lab.products.clear_work({number})
        return outcome

    def _refused(self, source: bytes) -> str:
        """Why a recipe of which no run has a score yet does not run at all, found out in seconds; "" if it does. Raises
        `Stopped`."""
        lint = self._session.executor.lint(source)
        return lint or next(iter(self._session.dry_build(source, self._session.stop).splitlines()), "")

    def _take_without(self, a: Ablation, seed: int, outcome: Outcome, idle: Mapping[str, float]) -> str:
        why, taken = self._taken(STRANGER, outcome, idle)
        self._session.ledger.add_ablation_run(a, seed, bool(why), self._session.measured_with, taken)
        return f"{outcome.val_bpb:.6f}{f', disturbed: {why}' if why else ''}"

    def _taken(self, number: int, outcome: Outcome, idle: Mapping[str, float]) -> tuple[str, dict[str, Any]]:
        """Why the run is to be taken again ("": it is not), and its outcome as it is recorded."""
        why = self.disturbed(number, outcome)
        health = {**outcome.health, **({"disturbed": why} if why else {})}
        return why, {**slim(outcome), "health": health, "idle": dict(idle)}

    def _take(self, e: Experiment, seed: int, purpose: str, outcome: Outcome, idle: Mapping[str, float]) -> None:
        """The sample, and with it, in one transaction, what it says of the machine."""
        ledger, lab = self._session.ledger, self._session.lab
        why, taken = self._taken(e.number, outcome, idle)
        taken |= self._decided() if purpose == "control" else {}
        with ledger.transaction():
            said = f"#{e.number} with seed {seed}: {outcome.val_bpb:.6f}{f', disturbed: {why}' if why else ''}"
            versions = self._session.measured_with
            ledger.add_sample(e.number, seed, float(outcome.val_bpb or 0.0), bool(why), versions, purpose, taken)
            ledger.event("remeasured", said, e.number)
            if purpose == "control":
                self._look_for_change(e.number, why)
        best = lab.best()
        if best is not None and best.number == e.number and lab.best_weights() is None:
            lab.products.keep(e.number, outcome.weights, outcome.caches)

    def _decided(self) -> dict[str, int]:
        """What a run of the best notes of the moment that it is made at."""
        return {DECIDED: max((e.number for e in self._session.ledger.experiments() if e.status), default=0)}

    def _runs(self) -> Runs:
        return Runs.of(self._session.ledger, self._session.measured_with)

    # --- the best again ----------------------------------------------------------------------------

    def control(self, seed: int, why: str, dataset: Dataset) -> None:
        """A run of the best, for verdicts to compare with; a failed one is a note, and some in a row the end."""
        best = self._session.lab.best()
        if best is None:
            raise ValueError("there is no best to run again")
        outcome = self.measure(best.number, seed + self._failed, "control", why, dataset)
        if outcome is None:
            return
        self._failed = 0 if outcome.status == "scored" else self._failed + 1
        if self._failed == FAILS:
            raise UserError(
                f"the best (#{best.number}) failed {FAILS} times in a row on other seeds, at last with "
                f"{outcome.status}: {outcome.reason}",
                f"take it back: autoresearch undo {best.number}",
            )

    def due(self) -> tuple[int, str] | None:
        """Seed and reason of a run of the best that is due before the next candidate; None where none is."""
        best, runs = self._session.lab.best(), self._runs()
        if best is None or not (mine := runs.scores(best.number)):
            return None
        seed, since = 1 + max(run.seed for run in mine), runs.since(best.number, self._session.ledger.experiments())
        if any(since.values()):
            return seed, "a run was disturbed, and it shows whether the machine is what it was"
        if len(since) < CONTROL_EVERY:
            return None
        why = f"{CONTROL_EVERY} candidates since its last run, and it shows whether the machine has moved"
        if (again := runs.to_repeat(best.number, is_baseline=best.parent is None)) is not None:
            return again, f"{why}, and how far two runs of one seed lie apart"
        return seed, why

    def look_at_baseline(self, number: int, disturbed: str) -> None:
        """After a run that is on the record. A baseline that began well and is disturbed ever after would be repeated
        without end; one whose every run is disturbed is measured as it is."""
        if disturbed and self._session.lab.best() is None and any(not s.tainted for s in self._runs().of_now(number)):
            self._look_for_change(number, disturbed)

    def _look_for_change(self, number: int, disturbed: str) -> None:
        """After a run of the best, or of what will be the first: does a new epoch begin?"""
        made = self._runs().of_now(number)
        if disturbed:
            if len(made) >= DISTURBED and all(s.tainted for s in made[-DISTURBED:]):
                self._begin_epoch(number, made[-1:], f"the machine is not what it was: {disturbed}")
            return
        runs, good = self._runs(), [s for s in made if not s.tainted]
        usual = runs.noise(leave_out=good[-noise.CHANGE_POINTS :])  # what may have moved does not say what is usual
        fair = night(self._session.ledger.experiments()).fair(runs.scores(number))
        if moved := noise.drift(fair, usual):
            self._begin_epoch(number, good[-moved.runs :], moved.reason)

    def _begin_epoch(self, number: int, carry: Sequence[Sample], why: str) -> None:
        """`carry`: the runs of the best that later candidates are compared with; they are the new steady state."""
        ledger = self._session.ledger
        ledger.begin_epoch(f"{why}; later candidates are compared with its last {len(carry)} of now", number, carry)
        self._session.on_event(Event("note", {"text": f"{why}: later candidates are compared with its new runs"}))

    def best_again(self, dataset: Dataset) -> bool:
        """After a change of versions, or where the best is one of an earlier epoch, its old score says nothing. False
        after a stop."""
        session, lab, ledger = self._session, self._session.lab, self._session.ledger
        best = lab.best()
        last = lab.last_run(best) if best else None
        changed = changes(last.versions, session.measured_with) if last else []
        if best is None or last is None or (not changed and last.epoch == ledger.epoch()):
            return True
        why = "; ".join(changed) or "it was run before the machine changed"
        session.note(f"measuring the best (#{best.number}) again: {why}")
        session.again(best.number, lab.settings.seed, f"the best again, because of a change: {why}")
        outcome, idle = self._run_patiently(best, dataset)
        if outcome.status == "stopped":
            return False
        if outcome.status != "scored" or outcome.val_bpb is None:
            raise UserError(
                f"the best (#{best.number}) does not run any more after a change ({why}): {outcome.reason}",
                f"undo the change, or take the best back: autoresearch undo {best.number}",
            )
        text = f"#{best.number} measured again: {outcome.val_bpb:.6f}, was {lab.best_bpb():.6f}; {why}"
        with ledger.transaction():
            if changed:
                ledger.begin_epoch(f"what measures has changed: {why}", best.number)
            disturbed, taken = self._taken(best.number, outcome, idle)
            seed, found, versions = lab.settings.seed, outcome.val_bpb, session.measured_with
            taken |= self._decided()
            ledger.add_sample(best.number, seed, found, bool(disturbed), versions, "control", taken)
            ledger.event("remeasured", text, best.number)
        lab.products.keep(best.number, outcome.weights, outcome.caches)
        lab.products.clear_work({best.number})
        session.on_event(Event("note", {"text": text}))
        return True

    def _run_patiently(self, best: Experiment, dataset: Dataset) -> tuple[Outcome, dict[str, float]]:
        """A run of the best on the lab's seed, again where it has no score by the fault of others."""
        session = self._session
        for left in range(FAILS - 1, -1, -1):
            outcome, idle = self.run(best, dataset, session.lab.settings.seed)
            why = self.disturbed(best.number, outcome)
            if outcome.status == "stopped" or not (why and left and steady.can_be_others(outcome.to_dict())):
                break
            session.note(f"#{best.number} is run again: {outcome.reason}, while {why}")
        return outcome, idle

    # --- what surrounds a run ----------------------------------------------------------------------

    def settle(self, e: Experiment, dataset: Dataset) -> None:
        """After a pause a machine is cooler, and so faster, than it was all night."""
        session = self._session
        finished = [datetime.fromisoformat(x.finished).timestamp() for x in session.ledger.experiments() if x.finished]
        last = datetime.fromisoformat(samples[-1].created).timestamp() if (samples := self._runs().samples) else 0.0
        if time.time() - max([last, self._ended, *finished]) < COOLS_IN:
            return
        request = self._request(session.lab.best() or e, dataset, session.lab.settings.seed)
        with self._measured():
            settle = lambda: session.executor.settle(request, session.waiting, session.stop)  # noqa: E731
            try:
                done = session.patiently(settle, session.stop)
            except Stopped:
                return
        if done:
            session.note(done)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """No dry build beside what follows."""
        with self._session.idle.waits_for("dry build"):
            self._session.gap.close(self._session.stop)
        try:
            yield
        finally:
            self._session.gap.open()

    def _request(self, e: Experiment, dataset: Dataset, seed: int) -> Request:
        lab = self._session.lab
        workdir = lab.products.workdir(e.number)
        compiled = lab.products.compiled_before(e.number, Outcome.from_dict(e.outcome or {}).caches)
        remove(workdir)
        return Request(
            source=lab.ledger.source(e.source_sha256),
            settings=lab.settings,
            dataset=dataset,
            seed=seed,
            experiment=f"{lab.tag}-{e.number}",
            workdir=workdir,
            # Of the same recipe, where it was run before: it compiles nothing. Of a baseline what its fitting compiled.
            caches=compiled or lab.best_caches() or lab.products.caches(e.number),
            card_bytes=self._card_bytes(e),
        )

    def _card_bytes(self, e: Experiment) -> int:
        """What the best's runs took of a graphics card (before there is a best, this one's), never more than was free
        for them; 0 where none is known."""
        best = self._session.lab.best()
        return max((_of_card(s.outcome or {}) for s in self._session.ledger.samples((best or e).number)), default=0)


def _of_card(outcome: Mapping[str, Any]) -> int:
    free = ((outcome.get("health") or {}).get("card") or {}).get("free_before")
    return min(int(outcome.get("peak_memory") or 0), int(free or 0))


def slim(outcome: Outcome) -> Mapping[str, Any]:
    """The outcome as JSON has it, so that what is stored is what will be read; NaN and infinities become null."""
    found: dict[str, Any] = json.loads(json.dumps(outcome.to_dict(), default=str), parse_constant=lambda _: None)
    return found
