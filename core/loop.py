"""The loop: a small state machine over the ledger that asks an executor to run an experiment somewhere.

    propose (intent in the ledger) -> execute -> record (outcome in the ledger) -> objects -> refs -> decide (ledger)
    -> the lab's files

Each arrow is on disk before the next begins. Whatever was cut off is found in the ledger at the next start: an
experiment that ran is dropped and repeated under its number, one that was measured is decided. Since verdict and commit
are functions of the ledger's rows, deciding again what was half decided ends in the same place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from core import locks, verdict
from core.contract import Exhausted, Researcher
from core.errors import LabError, UserError
from core.files import remove
from core.lab import Lab
from core.ledger import Experiment
from core.live import Event, Live
from core.outcome import Event as RefereeEvent
from core.outcome import Outcome, Request
from core.recipe import fingerprint
from core.versions import changes, versions

ATTEMPTS = 3  # starts of one experiment that may end without an outcome (a dying machine) before it is given up
REFUSALS = 20  # proposals in a row that were tried before, after which the researcher counts as exhausted
PERIOD = 0.5  # seconds between two looks at what was asked while it waits


class Executor(Protocol):
    """Runs one experiment somewhere. Raises `UserError` when the experiment is not to blame."""

    def execute(self, request: Request, on_event: Callable[[RefereeEvent], None], stop: threading.Event) -> Outcome: ...


class LocalExecutor:
    """This machine."""

    def execute(self, request: Request, on_event: Callable[[RefereeEvent], None], stop: threading.Event) -> Outcome:
        from core import referee  # here, because it loads what only an experiment needs

        return referee.execute(request, on_event, stop)


@dataclass(frozen=True)
class Limits:
    """When a run ends: after so many decided experiments, or when the next would outlast the deadline (Unix time)."""

    experiments: int | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    reason: str
    decided: int
    kept: int


class Loop:
    """Runs a lab. `researcher` may be None where only `judge_pending` is used."""

    def __init__(
        self, lab: Lab, researcher: Researcher | None, executor: Executor, on_event: Callable[[Event], None]
    ) -> None:
        self.lab = lab
        self.ledger = lab.ledger
        self.researcher = researcher
        self.executor = executor
        self.on_event = on_event
        self.measured_with = versions(lab.settings)
        self._stop = threading.Event()
        self._paused = threading.Event()
        self._live = Live(lab.record, self._look)
        self._decided: list[Experiment] = []
        self._exhausted = ""

    def stop(self) -> None:
        """End soon; the experiment that runs is dropped and repeated next time. From any thread or signal handler."""
        self._stop.set()

    # --- running -----------------------------------------------------------------------------------

    def run(self, limits: Limits) -> Summary:
        """Experiments until a limit, a stop, or the researcher has no more ideas. Raises `UserError`."""
        with self._session():
            if self.lab.is_dirty():
                raise LabError("train.py has changes that were not judged", self.lab.how_to_restore())
            self.lab.restore_recipe()
            reason = self._until(limits)
        kept = sum(e.is_kept for e in self._decided)
        return Summary(reason, len(self._decided), kept)

    def judge_pending(self, number: int) -> Experiment:
        """Run what waits, oldest first, until experiment `number` is decided or a stop."""
        with self._session():
            while self.ledger.get(number).status is None and not self._stop.is_set():
                self._experiment(self.ledger.pending()[0].number)
        return self.ledger.get(number)

    def recover(self) -> list[str]:
        """Bring ledger, git and the lab's files together after whatever happened. The lab's lock must be held."""
        says = [f"removed stale {name}" for name in self.lab.git.clear_stale_locks([self.lab.branch_ref])]
        for e in self.ledger.pending():
            if e.state == "running":
                says.append(self._interrupted(e))
            elif e.state in ("scored", "audited"):
                self._decide(e)
                says.append(f"#{e.number} was measured and is decided now")
        says += self.lab.publish()
        if not (self.lab.path / "train.py").exists():
            self.lab.restore_recipe()
            says.append("train.py was missing and is put back")
        elif self.lab.is_dirty() and self._is_decided(self.lab.working_source()):
            self.lab.restore_recipe()
        return says

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Lab and device held, everything in order, progress published."""
        with self.lab.lock(), locks.hold_device(self.lab.settings.device), _explained(self.lab), self._live:
            self.lab.take_ask()  # one from before this run is void
            for line in self.recover():
                self._note(line)
            yield

    def _until(self, limits: Limits) -> str:
        while True:
            if self._stop.is_set():
                return "stopped"
            if limits.experiments is not None and len(self._decided) >= limits.experiments:
                return f"{limits.experiments} experiments are done"
            if limits.deadline is not None and time.time() + self.lab.settings.budget > limits.deadline:
                return "the next experiment would not end in time"
            if self._paused.is_set():
                self._wait_while_paused(limits)
                continue
            number = self._next()
            if number is None:
                return self._exhausted
            self._experiment(number)

    def _next(self) -> int | None:
        """The number of the next experiment: one that waits, else a proposal; None when there is no more idea."""
        waiting = self.ledger.pending()
        if waiting:
            return waiting[0].number
        best = self.lab.best()
        if best is None:
            failed = self.ledger.experiments()[-1]
            raise LabError(
                f"there is no baseline: experiment {failed.number} ended as {failed.status} ({failed.reason})",
                f"mend train.py and judge it: autoresearch try {self.lab.path} -m '...'",
            )
        assert self.researcher is not None, "a loop that runs has a researcher"
        self._live.update(state="proposing", number=None, phase=f"{self.researcher.name} thinks")
        for _ in range(REFUSALS):
            try:
                proposal = self.researcher.propose(self.lab.view({"name": self.lab.settings.device}))
            except Exhausted as end:
                self._exhausted = f"{self.researcher.name} has no more ideas: {end}"
                return None
            mark = fingerprint(proposal.source)
            twin = next((e for e in self.ledger.experiments() if e.fingerprint == mark), None)
            if twin is None:
                return self.ledger.propose(
                    source=proposal.source,
                    program=self.lab.program(),
                    fingerprint=mark,
                    description=" ".join(proposal.description.split()),
                    researcher=self.researcher.name,
                    detail=proposal.detail,
                    parent=best.number,
                )
            self.ledger.event("refused", f"proposed again: {proposal.description} is #{twin.number}", twin.number)
        self._exhausted = f"{self.researcher.name} proposed {REFUSALS} times in a row what was tried before"
        return None

    # --- one experiment ----------------------------------------------------------------------------

    def _experiment(self, number: int) -> None:
        """From proposed to decided; back to proposed after a stop."""
        self.lab.check_settings()
        dataset = self.lab.dataset()
        if not self._measure_best_again(dataset):
            return
        e = self.ledger.get(number)
        self.ledger.start(number)
        self._live.begin(number, e.description)
        self.on_event(Event("start", {"number": number, "description": e.description}))
        outcome = self._execute(self._request(e, dataset))
        if outcome is None:
            self.ledger.requeue(number, "stopped; it will be repeated", counts=False)
            return
        self.ledger.record(number, _slim(outcome), self.lab.settings.seed, self.measured_with)
        self._decide(self.ledger.get(number))

    def _request(self, e: Experiment, dataset: Any) -> Request:
        workdir = self.lab.record / "work" / str(e.number)
        remove(workdir)
        best = self._best_samples()
        delta = self.lab.settings.min_delta
        return Request(
            source=self.ledger.source(e.source_sha256),
            settings=self.lab.settings,
            dataset=dataset,
            seed=self.lab.settings.seed,
            experiment=f"{self.lab.tag}-{e.number}",
            workdir=workdir,
            caches=self.lab.best_caches(),
            would_keep=lambda bpb: verdict.decide(best, [bpb], delta).status == "keep",
        )

    def _execute(self, request: Request) -> Outcome | None:
        """None after a stop. An error that is not the experiment's fault leaves it waiting."""
        try:
            outcome = self.executor.execute(request, self._forward, self._stop)
        except (UserError, OSError):
            number = int(request.workdir.name)
            if self.ledger.get(number).state == "running":
                self.ledger.requeue(number, "could not be run; it will be repeated", counts=False)
            raise
        return None if outcome.status == "stopped" else outcome

    def _decide(self, e: Experiment) -> None:
        """scored or audited -> decided: objects, then refs, then the ledger, then the lab's files."""
        best = self.lab.best()
        status, reason = self._verdict(e, best)
        if status is None:
            self.ledger.requeue(e.number, reason, counts=True)
            return
        outcome = Outcome.from_dict(e.outcome or {})
        parent = best.number if best else None
        decided = replace(e, status=status, parent=parent)
        commit = self.lab.commit_of(decided)
        refs = {self.lab.candidate_ref(e.number): commit}
        if status == "keep":
            refs[self.lab.branch_ref] = commit
        self.lab.git.update_refs(refs)
        self.ledger.advance(
            e.number,
            "decided",
            status=status,
            reason=reason,
            parent=parent,
            commit=commit,
            best_before=best.val_bpb if best else None,
            val_bpb=e.val_bpb if status in ("keep", "discard") else None,
        )
        self._finish(self.ledger.get(e.number), outcome)

    def _finish(self, e: Experiment, outcome: Outcome) -> None:
        """What follows a decision; all of it can be made again from the ledger."""
        workdir = self.lab.record / "work" / str(e.number)
        if workdir.is_dir():
            self.lab.keep_logs(e.number, workdir)
        if e.is_kept:
            self.lab.keep_products(e.number, outcome.weights, outcome.caches)
        remove(workdir)
        self.lab.publish()
        if not self.lab.is_dirty() or self._is_decided(self.lab.working_source()):
            self.lab.restore_recipe()
        self._decided.append(e)
        self.on_event(
            Event("decided", {"number": e.number, "status": e.status, "val_bpb": e.val_bpb, "reason": e.reason})
        )

    def _verdict(self, e: Experiment, best: Experiment | None) -> tuple[str | None, str]:
        """(status, reason); None as status: measure it again."""
        outcome = e.outcome or {}
        if outcome.get("status") != "scored":
            return str(outcome.get("status", "crash")), str(outcome.get("reason", ""))
        samples = self.ledger.samples(e.number)
        if e.val_bpb is None or not samples:
            return "invalid", "the score is not a positive, finite number"
        same = (
            [s.val_bpb for s in self.ledger.samples(best.number) if s.versions == samples[-1].versions] if best else []
        )
        if best and not same:
            return None, "the best was not measured with the same versions"
        said = verdict.decide(same, [s.val_bpb for s in samples], self.lab.settings.min_delta)
        if said.status == "keep" and not outcome.get("audited"):
            return None, "would be kept and was not audited"
        return said.status, said.reason

    def _best_samples(self) -> list[float]:
        """Scores of the incumbent that were measured with what measures now."""
        best = self.lab.best()
        return [s.val_bpb for s in self.ledger.samples(best.number) if s.versions == self.measured_with] if best else []

    def _measure_best_again(self, dataset: Any) -> bool:
        """After a change of versions the incumbent's old score says nothing. False after a stop."""
        best = self.lab.best()
        if best is None or self._best_samples():
            return True
        before = self.ledger.samples(best.number)[-1].versions
        why = "; ".join(changes(before, self.measured_with))
        self._note(f"measuring the best (#{best.number}) again: {why}")
        self._live.begin(best.number, f"the best again, because of a change: {why}")
        request = self._request(best, dataset)
        outcome = self.executor.execute(request, self._forward, self._stop)
        if outcome.status == "stopped":
            return False
        remove(request.workdir)
        if outcome.status != "scored" or outcome.val_bpb is None:
            raise UserError(
                f"the best (#{best.number}) does not run any more after a change ({why}): {outcome.reason}",
                f"undo the change, or take the best back: autoresearch undo {best.number}",
            )
        with self.ledger.transaction():
            tainted = bool(outcome.health.get("tainted"))
            seed = self.lab.settings.seed
            self.ledger.add_sample(best.number, seed, outcome.val_bpb, tainted, self.measured_with)
            text = f"#{best.number} measured again: {outcome.val_bpb:.6f}, was {best.val_bpb:.6f}; {why}"
            self.ledger.event("remeasured", text, best.number)
        self._note(text)
        return True

    def _interrupted(self, e: Experiment) -> str:
        """An experiment that ran when its process died: repeat it, but not for ever."""
        remove(self.lab.record / "work" / str(e.number))
        if e.attempts < ATTEMPTS:
            self.ledger.requeue(e.number, "its process was ended while it ran; it will be repeated", counts=True)
            return f"#{e.number} was cut off and will be repeated"
        reason = f"the process was ended {e.attempts} times while this ran; given up"
        self.ledger.record(e.number, {"status": "crash", "reason": reason}, self.lab.settings.seed, self.measured_with)
        self._decide(self.ledger.get(e.number))
        return f"#{e.number}: {reason}"

    def _is_decided(self, source: bytes) -> bool:
        """Was exactly this file judged? Then the ledger has it, and it may be overwritten."""
        sha256 = hashlib.sha256(source).hexdigest()
        return any(e.source_sha256 == sha256 and e.status is not None for e in self.ledger.experiments())

    # --- telling and being told --------------------------------------------------------------------

    def _forward(self, event: RefereeEvent) -> None:
        if event.kind in ("phase", "progress"):
            self._live.update(**{k: v for k, v in event.data.items() if k != "experiment"})
        self.on_event(Event(event.kind, dict(event.data)))

    def _note(self, text: str) -> None:
        self.ledger.event("note", text)
        self.on_event(Event("note", {"text": text}))

    def _look(self) -> None:
        """Once a second, by the publishing thread: what another process asked for."""
        asked = self.lab.take_ask()
        if asked == "stop":
            self._stop.set()
        elif asked == "pause":
            self._paused.set()
        elif asked == "resume":
            self._paused.clear()

    def _wait_while_paused(self, limits: Limits) -> None:
        self._live.update(state="paused", number=None, phase=None)
        self.on_event(Event("waiting", {"text": "paused; go on with: autoresearch resume"}))
        while self._paused.is_set() and not self._stop.wait(PERIOD):
            if limits.deadline is not None and time.time() > limits.deadline:
                return


def _slim(outcome: Outcome) -> Mapping[str, Any]:
    """The outcome as JSON has it, so that what is stored is what will be read."""
    found: dict[str, Any] = json.loads(json.dumps(outcome.to_dict(), default=str))
    return found


@contextmanager
def _explained(lab: Lab) -> Iterator[None]:
    """A full or read-only disk is the user's to mend, not a traceback; the ledger has all that was decided."""
    try:
        yield
    except OSError as error:
        place = Path(str(error.filename)) if error.filename else lab.record
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of {place} is full", "free some space, then `autoresearch run`: nothing is lost"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(
                f"{place} cannot be written ({os.strerror(error.errno)})",
                "make it writable, then `autoresearch run`: nothing is lost",
            ) from error
        raise
