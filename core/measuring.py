"""One run of a recipe on this lab's device: what it is asked with, what surrounds it, and the runs that are no
candidate's: the best again after a change, and any experiment on another seed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

from core.data import Dataset
from core.errors import UserError
from core.files import remove
from core.ledger import Experiment
from core.live import Event
from core.outcome import Outcome, Request, always
from core.session import Session
from core.versions import changes

COOLS_IN = 300.0  # seconds after which a machine has cooled down, and settles again before it measures


class Measuring:
    """`think_ahead` is called when a run begins: the next proposal may be made meanwhile."""

    def __init__(self, session: Session, think_ahead: Callable[[], None]) -> None:
        self._session = session
        self._think_ahead = think_ahead

    def run(
        self,
        e: Experiment,
        dataset: Dataset,
        seed: int,
        would_keep: Callable[[float], bool] = always,
        holdout: bool = False,
    ) -> tuple[Outcome, dict[str, float]]:
        """One run, not recorded: its outcome, and how long the device had been idle before. The number of each run
        that `would_keep` is audited."""
        request = replace(self._request(e, dataset, seed), would_keep=would_keep, holdout=holdout)
        session = self._session
        with self._measured():
            idle = session.idle.end()
            self._think_ahead()
            try:
                return session.executor.execute(request, session.forward, session.stop), idle
            finally:
                session.idle.begin()

    def measure(
        self, number: int, seed: int, purpose: str, why: str, dataset: Dataset, holdout: bool = False
    ) -> Outcome | None:
        """Run experiment `number` once and record its sample, if it has one. None after a stop."""
        e = self._session.ledger.get(number)
        self._session.note(f"measuring #{number} again with seed {seed}: {why}")
        self._session.live.begin(number, f"#{number} again, with seed {seed}: {why}")
        outcome, _ = self.run(e, dataset, seed, holdout=holdout)
        if outcome.status == "stopped":
            return None
        self._take(e, seed, purpose, outcome)
        self._session.lab.products.clear_work({number})
        return outcome

    def _take(self, e: Experiment, seed: int, purpose: str, outcome: Outcome) -> None:
        ledger = self._session.ledger
        if outcome.status != "scored" or outcome.val_bpb is None:
            ledger.event("remeasured", f"#{e.number} with seed {seed}: {outcome.status} ({outcome.reason})", e.number)
            return
        with ledger.transaction():
            tainted = bool(ledger.disturbance(outcome.health))
            versions = self._session.measured_with
            ledger.add_sample(e.number, seed, outcome.val_bpb, tainted, versions, purpose, slim(outcome))
            ledger.event("remeasured", f"#{e.number} with seed {seed}: {outcome.val_bpb:.6f} ({purpose})", e.number)

    def best_again(self, dataset: Dataset) -> bool:
        """After a change of versions the incumbent's old score says nothing. False after a stop."""
        session, lab, ledger = self._session, self._session.lab, self._session.ledger
        best = lab.best()
        before = ledger.samples(best.number)[-1].versions if best else {}
        if best is None or before == session.measured_with:
            return True
        why = "; ".join(changes(before, session.measured_with))
        session.note(f"measuring the best (#{best.number}) again: {why}")
        session.live.begin(best.number, f"the best again, because of a change: {why}")
        outcome, _ = self.run(best, dataset, lab.settings.seed)
        if outcome.status == "stopped":
            return False
        if outcome.status != "scored" or outcome.val_bpb is None:
            raise UserError(
                f"the best (#{best.number}) does not run any more after a change ({why}): {outcome.reason}",
                f"undo the change, or take the best back: autoresearch undo {best.number}",
            )
        text = f"#{best.number} measured again: {outcome.val_bpb:.6f}, was {lab.best_bpb():.6f}; {why}"
        with ledger.transaction():
            ledger.begin_epoch(f"a change of what measures: {why}", best.number)
            tainted = bool(ledger.disturbance(outcome.health))
            seed, versions = lab.settings.seed, session.measured_with
            ledger.add_sample(best.number, seed, outcome.val_bpb, tainted, versions, "control", slim(outcome))
            ledger.event("remeasured", text, best.number)
        lab.products.keep(best.number, outcome.weights, outcome.caches)
        lab.products.clear_work({best.number})
        session.on_event(Event("note", {"text": text}))
        return True

    def settle(self, e: Experiment, dataset: Dataset) -> None:
        """After a pause a machine is cooler, and so faster, than it was all night."""
        session = self._session
        finished = [datetime.fromisoformat(x.finished).timestamp() for x in session.ledger.experiments() if x.finished]
        if time.time() - max(finished, default=0.0) < COOLS_IN:
            return
        request = self._request(session.lab.best() or e, dataset, session.lab.settings.seed)
        with self._measured():
            done = session.executor.settle(request, session.waiting, session.stop)
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
        remove(workdir)
        return Request(
            source=lab.ledger.source(e.source_sha256),
            settings=lab.settings,
            dataset=dataset,
            seed=seed,
            experiment=f"{lab.tag}-{e.number}",
            workdir=workdir,
            caches=lab.best_caches(),
        )


def slim(outcome: Outcome) -> Mapping[str, Any]:
    """The outcome as JSON has it, so that what is stored is what will be read; NaN and infinities become null."""
    found: dict[str, Any] = json.loads(json.dumps(outcome.to_dict(), default=str), parse_constant=lambda _: None)
    return found
