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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from core import locks, objections, verdict
from core.contract import Exhausted, Proposal, Researcher, Unavailable, View
from core.data import Dataset
from core.errors import Busy, LabError, UserError
from core.executor import Executor
from core.files import remove
from core.gap import Gap
from core.idle import Idle
from core.lab import Lab
from core.ledger import Experiment, Sample
from core.live import Event, Live
from core.outcome import Event as RefereeEvent
from core.outcome import Outcome, Request
from core.recipe import fingerprint
from core.recovery import ATTEMPTS, unfinished
from core.settings import Settings
from core.thinking import Thinking, Wait
from core.versions import changes, versions

PERIOD = 0.5  # seconds between two looks at what was asked while it waits
COOLS_IN = 300.0  # seconds after which a machine has cooled down, and settles again before it measures
DESCRIPTION = 500  # characters of a description that are kept


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
    """Runs a lab. `researcher` may be None where only `judge` and `judge_pending` are used; `meanwhile` proposes while
    it cannot."""

    def __init__(
        self,
        lab: Lab,
        researcher: Researcher | None,
        executor: Executor,
        on_event: Callable[[Event], None],
        measured_with: Callable[[Settings], dict[str, Any]] = versions,
        meanwhile: Researcher | None = None,
    ) -> None:
        self.lab = lab
        self.ledger = lab.ledger
        self.researcher = researcher
        self.executor = executor
        self.on_event = on_event
        self.measured_with = measured_with(lab.settings)
        self._stop = threading.Event()
        self._paused = threading.Event()
        self._live = Live(lab.record)
        self._decided: list[Experiment] = []
        self._meanwhile = meanwhile
        self._gap = Gap()
        self._idle = Idle()
        self._limits = Limits()
        self._told_wait: Wait | None = None
        self._thinking = self._thinkers()
        self._thinking.over.set()  # until a run begins

    def stop(self) -> None:
        """End soon; the experiment that runs is dropped and repeated next time. From any thread or signal handler."""
        self._stop.set()

    # --- running -----------------------------------------------------------------------------------

    def run(self, limits: Limits) -> Summary:
        """Experiments until a limit, a stop, or the researcher has no more ideas. Raises `UserError`."""
        with self._session(patient=False):
            if self.lab.is_dirty():
                raise LabError("train.py has changes that were not judged", self.lab.how_to_restore())
            self.lab.restore_recipe()
            self._limits, self._idle, self._thinking = limits, Idle(), self._thinkers()
            try:
                reason = self._until(limits)
            finally:
                self._thinking.end()
        kept = sum(e.is_kept for e in self._decided)
        return Summary(reason, len(self._decided), kept)

    def judge(
        self, source: bytes, description: str, researcher: str = "you", detail: Mapping[str, Any] | None = None
    ) -> Experiment:
        """Propose `source` and judge it. The same bytes again: the experiment that they are already."""
        same = [e for e in self.ledger.experiments() if e.source_sha256 == hashlib.sha256(source).hexdigest()]
        if same:
            return self.judge_pending(same[-1].number)
        proposal = Proposal(source, description, dict(detail or {}))
        return self.judge_pending(self._propose(proposal, researcher, self.lab.best()))

    def judge_pending(self, number: int) -> Experiment:
        """Run what waits, oldest first, until experiment `number` is decided or a stop. Waits for the device."""
        if self.ledger.get(number).status is None:
            with self._session(patient=True):
                while self.ledger.get(number).status is None and not self._stop.is_set():
                    self._experiment(self.ledger.pending()[0].number)
        return self.ledger.get(number)

    def recover(self) -> list[str]:
        """Bring ledger, git and the lab's files together after whatever happened. The lab's lock must be held."""
        says = []
        if not self.lab.git.is_whole():
            self.lab.make_repository()
            says.append("the lab's repository was damaged and is made again from the ledger")
        says += [f"removed stale {name}" for name in self.lab.clear_leftovers()]
        says += [self._take_up(action, number) for action, number in unfinished(self.ledger.experiments())]
        says += self.lab.publish()
        best = self.lab.best()
        if best is not None and self.lab.best_weights() is None:
            outcome = Outcome.from_dict(best.outcome or {})
            self.lab.products.keep(best.number, outcome.weights, outcome.caches)
        self.lab.products.clear_work()
        if not (self.lab.path / "train.py").exists():
            says.append("train.py was missing and is put back")
        self._restore_recipe()
        return says

    def _take_up(self, action: str, number: int) -> str:
        e = self.ledger.get(number)
        if action == "decide":
            self._decide(e)
            return f"#{number} was measured and is decided now"
        if action == "repeat":
            self.ledger.requeue(number, "its process was ended while it ran; it will be repeated", counts=True)
            return f"#{number} was cut off and will be repeated"
        reason = f"the process was ended {e.attempts} times while this ran; given up"
        self._record(number, {"status": "crash", "reason": reason})
        self._decide(self.ledger.get(number))
        return f"#{number}: {reason}"

    def _restore_recipe(self) -> bool:
        """The best's train.py goes back, unless something lies there that was not judged yet. Did it?"""
        if self.lab.is_dirty():
            lies_there = hashlib.sha256(self.lab.working_source()).hexdigest()
            if not self.ledger.is_decided(lies_there):
                return False
        self.lab.restore_recipe()
        return True

    @contextmanager
    def _session(self, patient: bool) -> Iterator[None]:
        """Lab and device held, everything in order, progress published. `patient`: waits for the device."""
        with _explained(self.lab), self.lab.lock():
            self.lab.take_ask()  # one from before this run is void
            self._live = Live(self.lab.record, self._look)
            with self._live, self._device(patient):
                for line in self.recover():
                    self._note(line)
                yield

    @contextmanager
    def _device(self, patient: bool) -> Iterator[None]:
        with ExitStack() as held:
            told = False
            while not self._stop.is_set():
                try:
                    held.enter_context(locks.hold_device(self.lab.settings.device))
                    break
                except Busy as busy:
                    if not patient:
                        raise
                    if not told:
                        self._live.update(state="waiting", phase=busy.fact)
                        self.on_event(Event("waiting", {"text": f"waits: {busy.fact}"}))
                    told = True
                    time.sleep(PERIOD)
            yield

    def _until(self, limits: Limits) -> str:
        """Why it ended."""
        while True:
            if self._stop.is_set():
                return "stopped"
            if limits.experiments is not None and len(self._decided) >= limits.experiments:
                done = limits.experiments
                return "1 experiment is done" if done == 1 else f"{done} experiments are done"
            if self._too_late(limits):
                return "the next experiment would not end in time"
            if self._paused.is_set():
                self._wait_while_paused(limits)
                continue
            try:
                number = self._next()
            except Exhausted as end:
                return f"{self.researcher.name if self.researcher else 'nobody'} has no more ideas: {end}"
            except Unavailable as end:
                return f"{self.researcher.name if self.researcher else 'nobody'} cannot go on: {end.reason}"
            if number is not None and not self._too_late(limits):  # else it waits for the next run
                self._experiment(number)

    def _too_late(self, limits: Limits) -> bool:
        """Whether the next experiment would outlast the deadline, which also thinking may have brought near."""
        return limits.deadline is not None and time.time() + self._seconds_each() > limits.deadline

    def _seconds_each(self) -> float:
        """How long the next experiment will take: as the last scored ones; before there are any, the budget."""
        totals = [(e.outcome or {}).get("timings", {}).get("total") for e in self.ledger.experiments() if e.val_bpb]
        known = [float(t) for t in totals[-5:] if t]
        return median(known) if known else self.lab.settings.budget

    # --- proposals ---------------------------------------------------------------------------------

    def _next(self) -> int | None:
        """The number of the next experiment: one that waits, else a proposal; None when there is something else to do.

        Raises `Exhausted` and `Unavailable` when nobody can propose anything any more."""
        waiting = self.ledger.pending()
        if waiting:
            return waiting[0].number
        best = self.lab.best()
        if best is None:
            return self._baseline_again()
        if self.researcher is None:
            raise Exhausted("nobody was asked for any")
        self._live.update(state="proposing", number=None, phase=f"{self.researcher.name} thinks")
        self._told_wait = None
        ready = self._thinking.next(self._interrupted, self._idles)
        if ready is None:
            return None
        with self.ledger.transaction():
            number = self._propose(ready.proposal, ready.by, self.lab.best())
            self._thinking.used(ready)
        return number

    def _thinkers(self) -> Thinking:
        who = (self.researcher, self._meanwhile)
        return Thinking(self.ledger, self.lab.git, *who, view=self._view, lint=self.executor.lint, stop=self._stop)

    def _interrupted(self) -> bool:
        """Is there something else to do than to wait for a proposal? A limit counts only while nobody can answer."""
        deadline = self._limits.deadline
        late = deadline is not None and time.time() > deadline
        return self._paused.is_set() or late or bool(self.ledger.pending())

    def _idles(self, what: str, seconds: float, wait: Wait | None) -> None:
        """The device waits for a proposal."""
        self._idle.add("dry build" if what == "thinking" and self._gap.used else what, seconds)
        if wait == self._told_wait:
            return
        self._told_wait = wait
        if wait is None:
            self._live.update(
                state="proposing", phase=f"{self.researcher.name if self.researcher else 'nobody'} thinks", until=None
            )
            return
        until = datetime.fromtimestamp(wait.until).astimezone()
        text = f"waits until {until:%H:%M:%S}: {wait.reason}"
        self._live.update(state="waiting", number=None, phase=text, until=wait.until)
        self.on_event(Event("waiting", {"text": text, "until": wait.until}))

    def _think_ahead(self) -> None:
        """While an experiment runs, if another one will follow."""
        limits, many = self._limits, len(self._decided) + 1
        if self.researcher is None or self._thinking.over.is_set():
            return
        if limits.experiments is not None and many >= limits.experiments:
            return
        if limits.deadline is not None and time.time() + 2 * self._seconds_each() > limits.deadline:
            return
        with suppress(Exhausted, Unavailable):  # told when its turn comes
            self._thinking.ahead()

    def _view(self) -> View:
        """What a researcher sees now, from any thread: all of it of one moment."""
        with self.ledger.transaction():
            view = self.lab.view(self._device_facts(self.lab.best()))
            running = [
                f"{e.description!r} is being measured as #{e.number}; its result is not known yet"
                for e in self.ledger.pending()
            ]
        return replace(
            view,
            notes=[*view.notes, *running],
            check=self._check,
            spend=self.ledger.spend,
            stopped=self._thinking.over.is_set,
        )

    def _check(self, source: bytes) -> str:
        """`View.check`: lint, what was tried, and a dry build once no clock runs."""
        refused = self.executor.lint(source) or objections.tried(self.ledger, source)
        if refused:
            return refused
        workdir = self.lab.products.scratch()
        with self._gap.between(self._thinking.over):
            try:
                return self.executor.dry_build(source, self.lab.settings, workdir, self._thinking.over)
            finally:
                remove(workdir)

    def _baseline_again(self) -> int:
        """Without a baseline nothing can be judged. It may have failed for a passing reason: once per run, again."""
        failed = self.ledger.experiments()[-1]
        if any(e.number == failed.number for e in self._decided):
            raise LabError(
                f"there is no baseline: experiment {failed.number} ended as {failed.status} ({failed.reason})",
                f"mend train.py and judge it: autoresearch try {self.lab.path} -m '...'",
            )
        return self.lab.propose_baseline()

    def _propose(self, proposal: Proposal, researcher: str, best: Experiment | None) -> int:
        return self.ledger.propose(
            source=proposal.source,
            program=self.lab.program(),
            fingerprint=fingerprint(proposal.source),
            description=" ".join(proposal.description.split())[:DESCRIPTION],
            researcher=researcher,
            detail=proposal.detail,
            parent=best.number if best else None,
        )

    def _device_facts(self, best: Experiment | None) -> dict[str, Any]:
        """What a researcher is told of the device: from the settings, and from how the best ran there."""
        s, outcome = self.lab.settings, (best.outcome if best else None) or {}
        facts = {"name": s.device, "backend": s.backend, "dtype": s.dtype, "memory_limit": s.memory_limit}
        told = ("peak_memory", "mfu", "steps", "training_seconds", "tokens")
        return {**facts, **({"best_run": {n: outcome[n] for n in told if n in outcome}} if best else {})}

    # --- one experiment ----------------------------------------------------------------------------

    def _experiment(self, number: int) -> None:
        """From proposed to decided; back to proposed after a stop."""
        self.lab.check_settings()
        dataset = self.lab.dataset()
        e = self.ledger.get(number)
        self._settle(e, dataset)
        if self._stop.is_set() or not self._measure_best_again(dataset):
            return
        self.ledger.start(number)
        self._live.begin(number, e.description)
        self.on_event(Event("start", {"number": number, "description": e.description}))
        try:
            outcome, idle = self._execute(self._request(e, dataset))
        except (UserError, OSError):  # not the experiment's fault
            with suppress(UserError):  # on a full disk; then the next start finds it running and repeats it
                self.ledger.requeue(number, "could not be run; it will be repeated", counts=False)
            raise
        if outcome.status == "stopped":
            self.ledger.requeue(number, "stopped; it will be repeated", counts=False)
            return
        self._record(number, {**_slim(outcome), "idle": idle})
        self._decide(self.ledger.get(number))

    def _execute(self, request: Request) -> tuple[Outcome, dict[str, float]]:
        """The outcome, and how long the device had been idle before."""
        with self._measured():
            idle = self._idle.end()
            self._think_ahead()
            try:
                return self.executor.execute(request, self._forward, self._stop), idle
            finally:
                self._idle.begin()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """No dry build beside what follows."""
        with self._idle.waits_for("dry build"):
            self._gap.close(self._stop)
        try:
            yield
        finally:
            self._gap.open()

    def _settle(self, e: Experiment, dataset: Dataset) -> None:
        """After a pause a machine is cooler, and so faster, than it was all night."""
        finished = [datetime.fromisoformat(x.finished).timestamp() for x in self.ledger.experiments() if x.finished]
        if time.time() - max(finished, default=0.0) < COOLS_IN:
            return

        def say(text: str) -> None:
            self._live.update(state="waiting", number=None, phase=text)
            self.on_event(Event("waiting", {"text": text}))

        with self._measured():
            done = self.executor.settle(self._request(self.lab.best() or e, dataset), say, self._stop)
        if done:
            self._note(done)

    def _request(self, e: Experiment, dataset: Dataset) -> Request:
        workdir = self.lab.products.workdir(e.number)
        remove(workdir)
        best = self.lab.best_samples()
        delta = self.lab.settings.min_delta
        return Request(
            source=self.ledger.source(e.source_sha256),
            settings=self.lab.settings,
            dataset=dataset,
            seed=self.lab.settings.seed,
            experiment=f"{self.lab.tag}-{e.number}",
            workdir=workdir,
            caches=self.lab.best_caches(),
            would_keep=lambda bpb: verdict.decide_simple(best, [bpb], delta).status == "keep",
        )

    def _record(self, number: int, outcome: Mapping[str, Any]) -> None:
        self.ledger.record(number, outcome, self.lab.settings.seed, self.measured_with)

    def _decide(self, e: Experiment) -> None:
        """scored or audited -> decided: objects, then refs, then the ledger, then the lab's files."""
        best, before = self.lab.best(), self.lab.best_bpb()
        status, reason = self._verdict(e)
        if status is None:
            self.ledger.requeue(e.number, reason, counts=True)
            return
        number = None if status in ("crash", "timeout", "invalid") else e.val_bpb
        parent = best.number if best else None
        commit = self.lab.commit_of(replace(e, status=status, parent=parent, val_bpb=number))
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
            best_before=before,
            val_bpb=number,
        )
        self._finish(self.ledger.get(e.number))

    def _finish(self, e: Experiment) -> None:
        """What follows a decision; the next start does it where it was cut off."""
        outcome = Outcome.from_dict(e.outcome or {})
        products = self.lab.products
        products.keep_logs(e.number)
        if e.is_kept:
            products.keep(e.number, outcome.weights, outcome.caches)
        products.clear_work({e.number})
        self.lab.publish()
        if not self._restore_recipe() and e.is_kept:
            self._note(
                f"train.py was edited meanwhile and stays; #{e.number} is the best now: autoresearch best --source"
            )
        self._decided.append(e)
        told = {"number": e.number, "status": e.status, "val_bpb": e.val_bpb, "reason": e.reason}
        self.on_event(Event("decided", told))

    def _verdict(self, e: Experiment) -> tuple[str | None, str]:
        """(status, reason); None as status: measure it again."""
        outcome = e.outcome or {}
        if outcome.get("status") != "scored":
            status, reason = str(outcome.get("status", "crash")), str(outcome.get("reason", ""))
            disturbed = self.ledger.disturbance(outcome.get("health") or {})
            if status == "timeout" and disturbed and e.attempts < ATTEMPTS:
                return None, f"{reason}, while {disturbed}"
            return status, reason
        samples = self.ledger.samples(e.number)
        if e.val_bpb is None or not samples:
            return "invalid", "the score is not a positive, finite number"
        again = self._why_again(e, samples[-1])
        if again and e.attempts < ATTEMPTS:
            return None, again
        if again:
            return "invalid", f"{again}, {e.attempts} times"
        # A card that others used made fewer steps: the score says nothing about the candidate, and decides nothing.
        if shared := str(((outcome.get("health") or {}).get("card") or {}).get("tainted") or ""):
            if e.attempts < ATTEMPTS:
                return None, f"{shared}; it will be measured again"
            return "invalid", f"measured {e.attempts} times, each time disturbed: {shared}"
        best = self.lab.best_samples()
        said = verdict.decide_simple(best, [s.val_bpb for s in samples], self.lab.settings.min_delta)
        return said.status, said.reason

    def _why_again(self, e: Experiment, sample: Sample) -> str:
        """Why a score cannot be judged as it is; "" if it can."""
        best = self.lab.best()
        if best is not None and self.ledger.samples(best.number)[-1].versions != sample.versions:
            return "the best was not measured with the same versions"
        said = verdict.decide_simple(self.lab.best_samples(), [sample.val_bpb], self.lab.settings.min_delta)
        return "would be kept and was not audited" if said.status == "keep" and e.state != "audited" else ""

    def _measure_best_again(self, dataset: Dataset) -> bool:
        """After a change of versions the incumbent's old score says nothing. False after a stop."""
        best = self.lab.best()
        before = self.ledger.samples(best.number)[-1].versions if best else {}
        if best is None or before == self.measured_with:
            return True
        why = "; ".join(changes(before, self.measured_with))
        self._note(f"measuring the best (#{best.number}) again: {why}")
        self._live.begin(best.number, f"the best again, because of a change: {why}")
        outcome, _ = self._execute(replace(self._request(best, dataset), would_keep=lambda bpb: True))
        if outcome.status == "stopped":
            return False
        if outcome.status != "scored" or outcome.val_bpb is None:
            raise UserError(
                f"the best (#{best.number}) does not run any more after a change ({why}): {outcome.reason}",
                f"undo the change, or take the best back: autoresearch undo {best.number}",
            )
        text = f"#{best.number} measured again: {outcome.val_bpb:.6f}, was {self.lab.best_bpb():.6f}; {why}"
        with self.ledger.transaction():
            tainted = bool(self.ledger.disturbance(outcome.health))
            self.ledger.add_sample(best.number, self.lab.settings.seed, outcome.val_bpb, tainted, self.measured_with)
            self.ledger.event("remeasured", text, best.number)
        self.lab.products.keep(best.number, outcome.weights, outcome.caches)
        self.lab.products.clear_work({best.number})
        self.on_event(Event("note", {"text": text}))
        return True

    # --- telling and being told --------------------------------------------------------------------

    def _forward(self, event: RefereeEvent) -> None:
        if self.lab.settings.backend == "cpu" and event.data.get("phase") == "score":
            self._gap.open()  # the clock has stopped; a device with memory of its own is left to the scorer alone
        if event.kind in ("phase", "progress"):
            self._live.update(**{k: v for k, v in event.data.items() if k != "experiment"})
        self.on_event(Event(event.kind, dict(event.data)))

    def _note(self, text: str) -> None:
        self.ledger.event("note", text)
        self.on_event(Event("note", {"text": text}))

    def _look(self) -> None:
        """Once a second, by the publishing thread: what another process asked for."""
        asked = None
        with suppress(OSError):  # a disk that fails is told by the loop itself, which writes as well
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
        with self._idle.waits_for("paused"):
            while self._paused.is_set() and not self._stop.is_set():
                if limits.deadline is not None and time.time() > limits.deadline:
                    return
                time.sleep(PERIOD)  # not Event.wait: a signal handler that sets the event could meet its lock


def _slim(outcome: Outcome) -> Mapping[str, Any]:
    """The outcome as JSON has it, so that what is stored is what will be read; NaN and infinities become null."""
    found: dict[str, Any] = json.loads(json.dumps(outcome.to_dict(), default=str), parse_constant=lambda _: None)
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
