"""The loop: a small state machine over the ledger that asks an executor to run an experiment somewhere.

    propose (intent in the ledger) -> execute -> record (run in the ledger) -> objects -> refs -> decide (ledger)
    -> the lab's files

Under the statistical rule a recorded run may ask for more before anything is decided: of the candidate, which waits as
"proposed" with its runs so far, or of the best. Each arrow is on disk before the next begins. Whatever was cut off is
found in the ledger at the next start: a run that was under way is dropped and repeated, one that was measured is
judged. Since verdict and commit are functions of the ledger's rows, deciding again what was half decided ends in the
same place.
"""

from __future__ import annotations

import errno
import hashlib
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

from core import locks, objections, rebase
from core.commands import quoted
from core.contract import Exhausted, Proposal, Researcher, Unavailable, View
from core.data import Dataset
from core.deadline import Deadline
from core.deciding import AGAIN, STATISTICAL, Deciding
from core.errors import Busy, LabError, UserError
from core.executor import Executor
from core.files import remove
from core.gap import Stopped
from core.idle import Idle
from core.lab import Lab
from core.ledger import BY_HAND, Experiment
from core.live import Event, Live
from core.measuring import Measuring, slim
from core.outcome import Outcome
from core.quoting import TAIL, unquoted
from core.recipe import fingerprint
from core.recovery import unfinished
from core.session import FINISHED, Session
from core.settings import Settings
from core.thinking import Thinking, Wait
from core.verdict import Step
from core.versions import versions

PERIOD = 0.5  # seconds between two looks at what was asked while it waits
WAITS = (AGAIN, "more", "control")  # steps after which an experiment waits for another run
DESCRIPTION = 500  # characters of a description that are kept


@dataclass(frozen=True)
class Limits:
    """When a run ends: after so many decided experiments, or when the next would outlast the deadline."""

    experiments: int | None = None
    deadline: Deadline | None = None


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
        self._session = Session(lab, executor, on_event, measured_with(lab.settings), Live(lab.record))
        self._stop = self._session.stop
        self._paused = threading.Event()
        self._finishing = threading.Event()
        self._measuring = Measuring(self._session, self._think_ahead)
        self._deciding = Deciding(self._session)
        self._decided = self._deciding.decided
        self._held = False  # are lab and device ours at the moment?
        self._tried: set[int] = set()  # what was handed in and has been tried out
        self._meanwhile = meanwhile
        self._limits = Limits()
        self._told_wait: Wait | None = None
        self._thinking = self._thinkers()
        self._thinking.over.set()  # until a run begins

    def stop(self) -> None:
        """End soon; the experiment that runs is dropped and repeated next time. From any thread or signal handler."""
        self._stop.set()

    def pause(self, wanted: bool) -> None:
        """Wait after the run under way, or go on. From any thread."""
        (self._paused.set if wanted else self._paused.clear)()

    @property
    def is_paused(self) -> bool:
        """Whether a pause is wanted; it begins after the run under way."""
        return self._paused.is_set()

    def finish(self, wanted: bool) -> None:
        """End after the run under way, or go on. An experiment that needs more runs has them in the next `run`. From
        any thread."""
        (self._finishing.set if wanted else self._finishing.clear)()

    @property
    def is_finishing(self) -> bool:
        return self._finishing.is_set()

    # --- running -----------------------------------------------------------------------------------

    def run(self, limits: Limits) -> Summary:
        """Experiments until a limit, a stop, or the researcher has no more ideas. Raises `UserError`."""
        with self._holding(patient=False):
            if self.lab.is_dirty():
                raise LabError("train.py has changes that were not judged", self.lab.how_to_restore())
            self.lab.restore_recipe()
            self._limits, self._session.idle, self._thinking = limits, Idle(), self._thinkers()
            try:
                reason = self._until(limits)
            finally:
                self._thinking.end()
        kept = sum(e.is_kept for e in self._decided)
        return Summary(reason, len(self._decided), kept)

    def judge(
        self, source: bytes, description: str, researcher: str = BY_HAND, detail: Mapping[str, Any] | None = None
    ) -> Experiment:
        """Propose `source` and judge it. The same bytes again: the experiment that they are already."""
        same = self.ledger.of_source(hashlib.sha256(source).hexdigest())
        if same:
            return self.judge_pending(same[-1].number)
        proposal = Proposal(source, description, dict(detail or {}))
        return self.judge_pending(self._propose(proposal, researcher, self.lab.best()))

    def judge_pending(self, number: int) -> Experiment:
        """Run what waits, oldest first, until experiment `number` is decided or a stop. Waits for the device."""
        if self.ledger.get(number).status is None:
            with self._holding(patient=True):
                while self.ledger.get(number).status is None and not self._stop.is_set():
                    self.wait_while_paused()
                    self._experiment(self.ledger.pending()[0].number)
        return self.ledger.get(number)

    def measure(self, number: int, seed: int, purpose: str, why: str, holdout: bool = False) -> Outcome | None:
        """Run the recipe of experiment `number` once more and record the sample: "control" counts in verdicts about
        later candidates, "confirm" in none. None after a stop; an outcome that is not "scored" leaves no sample.

        Waits for the device, unless this is called within `holding`."""
        return self._held_for(number, lambda data: self._measuring.measure(number, seed, purpose, why, data, holdout))

    def measure_without(self, winner: int, number: int, seed: int) -> Outcome | None:
        """Run experiment `winner` without the kept change of experiment `number` once, a recipe that is on the record.
        None after a stop; an outcome that is not "scored" leaves its reason there. Waits as `measure`."""
        return self._held_for(winner, lambda data: self._measuring.measure_without(winner, number, seed, data))

    def _held_for(self, number: int, run: Callable[[Dataset], Outcome | None]) -> Outcome | None:
        with ExitStack() as held:
            if not self._held:
                held.enter_context(self.holding())
            if self._stop.is_set():
                return None
            self.lab.check_settings()
            dataset = self.lab.dataset()
            self._measuring.settle(self.ledger.get(number), dataset)
            return None if self._stop.is_set() else run(dataset)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Lab and device are held for several runs of `measure`. Waits for the device."""
        with self._holding(patient=True):
            yield

    def recover(self) -> list[str]:
        """Bring ledger, git and the lab's files together after whatever happened. The lab's lock must be held."""
        says = []
        if not self.lab.git.is_whole():
            self.lab.make_repository()
            says.append("the lab's repository was damaged and is made again from the ledger")
        says += [f"removed stale {name}" for name in self.lab.clear_leftovers()]
        self.lab.git.keep_bytes()  # labs made before had nothing that does
        says += [self._take_up(action, number) for action, number in unfinished(self.ledger.experiments())]
        says += self.lab.publish()
        self._deciding.write_results()
        best = self.lab.best()
        if best is not None and self.lab.best_weights() is None:
            outcome = Outcome.from_dict(best.outcome or {})
            self.lab.products.keep(best.number, outcome.weights, outcome.caches)
        between_runs = [e.number for e in self.ledger.pending() if self.ledger.samples(e.number)]
        self.lab.products.clear_work(but=between_runs)  # their last run may be kept
        if not (self.lab.path / "train.py").exists():
            says.append("train.py was missing and is put back")
        self._deciding.restore_recipe()
        return says

    def _take_up(self, action: str, number: int) -> str:
        e = self.ledger.get(number)
        if action == "decide":
            said = self._deciding.decide(e).status
            return f"#{number} was measured and " + ("waits for another run" if said in WAITS else "is decided now")
        if action == "repeat":
            remove(self.lab.products.workdir(number))  # what was cut off there is nothing to begin the next run with
            self.ledger.requeue(number, "its process was ended while it ran; it will be repeated", counts=True)
            return f"#{number} was cut off and will be repeated"
        reason = f"the process was ended {e.attempts} times while this ran; given up"
        self._deciding.record(number, {"status": "crash", "reason": reason}, self.lab.settings.seed)
        self._deciding.decide(self.ledger.get(number))
        return f"#{number}: {reason}"

    @contextmanager
    def _holding(self, patient: bool) -> Iterator[None]:
        """Lab and device held, everything in order, progress published. `patient`: waits for the device."""
        with _explained(self.lab), self.lab.lock():
            self.lab.take_ask()  # one from before this run is void
            self._session.live = Live(self.lab.record, self._look)
            with self._session.live, self._device(patient):
                for line in self.recover():
                    self._session.note(line)
                self._held = True
                try:
                    yield
                finally:
                    self._held = False

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
                        self._session.live.update(state="waiting", phase=busy.fact)
                        self._session.on_event(Event("waiting", {"text": f"waits: {busy.fact}"}))
                    told = True
                    time.sleep(PERIOD)
            yield

    def _until(self, limits: Limits) -> str:
        """Why it ended."""
        while True:
            if self._stop.is_set():
                return "stopped"
            if self._finishing.is_set():
                return FINISHED
            if limits.experiments is not None and len(self._decided) >= limits.experiments:
                done = limits.experiments
                return "1 experiment is done" if done == 1 else f"{done} experiments are done"
            if self._too_late(limits):
                return "the next experiment would not end in time"
            if self._paused.is_set():
                self.wait_while_paused(limits.deadline)
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
        return limits.deadline is not None and self._seconds_each() > limits.deadline.left()

    def _seconds_each(self) -> float:
        """How long the next run will take: as the last ones; before there are any, the budget."""
        runs = [s.outcome or {} for s in self.ledger.all_samples()[-5:]]
        found = runs if any(runs) else [e.outcome or {} for e in self.ledger.experiments() if e.val_bpb][-5:]
        known = [float(total) for o in found if (total := o.get("timings", {}).get("total"))]
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
        self._session.live.update(state="proposing", number=None, phase=f"{self.researcher.name} thinks")
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
        return Thinking(
            self.ledger, self.lab.git, *who, view=self._view, lint=self._session.executor.lint, stop=self._stop
        )

    def _interrupted(self) -> bool:
        """Is there something else to do than to wait for a proposal? A limit counts only while nobody can answer."""
        deadline = self._limits.deadline
        late = deadline is not None and deadline.left() < 0
        return self._paused.is_set() or self._finishing.is_set() or late or bool(self.ledger.pending())

    def _idles(self, what: str, seconds: float, wait: Wait | None) -> None:
        """The device waits for a proposal."""
        self._session.idle.add("dry build" if what == "thinking" and self._session.gap.used else what, seconds)
        if wait == self._told_wait:
            return
        self._told_wait = wait
        if wait is None:
            self._session.live.update(
                state="proposing", phase=f"{self.researcher.name if self.researcher else 'nobody'} thinks", until=None
            )
            return
        until = datetime.fromtimestamp(wait.until).astimezone()
        text = f"waits until {until:%H:%M:%S}: {wait.reason}"
        self._session.live.update(state="waiting", number=None, phase=text, until=wait.until)
        self._session.on_event(Event("waiting", {"text": text, "until": wait.until}))

    def _think_ahead(self) -> None:
        """While an experiment runs, if another one will follow."""
        limits, many = self._limits, len(self._decided) + 1
        if self.researcher is None or self._thinking.over.is_set():
            return
        if limits.experiments is not None and many >= limits.experiments:
            return
        if limits.deadline is not None and 2 * self._seconds_each() > limits.deadline.left():
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
        refused = self._session.executor.lint(source) or objections.tried(self.ledger, source)
        if refused:
            return refused
        with self._session.gap.between(self._thinking.over):
            return self._session.dry_build(source, self._thinking.over)

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
        """One step of an experiment: a run of it, or of the best for its sake, or the decision."""
        self.lab.check_settings()
        e = self._on_the_best(self.ledger.get(number))
        if e.status is not None:
            return
        is_new = not self.ledger.samples(number, "verdict")
        control = self.lab.settings.verdict == STATISTICAL and is_new
        if self._try_out(None if control and self._measuring.due() else number):
            return
        dataset = self.lab.dataset()
        self._measuring.settle(e, dataset)
        if self._stop.is_set() or not self._measuring.best_again(dataset):
            return
        if control and (due := self._measuring.due()):
            self._measuring.control(*due, dataset)
            return
        step = self._deciding.next(e)
        seed = self.lab.settings.seed if step.seed is None else step.seed
        if step.status == "more":
            self._run(e, seed, dataset)
        elif step.status == "control":
            self._measuring.control(seed, step.reason, dataset)
        else:
            self._deciding.decide(e)

    def _try_out(self, first: int | None) -> bool:
        """Whoever hands something in that does not run at all is told before other runs are made: it is built once,
        without a clock. Experiment `first` is run now, and tells by itself. Was anything decided?"""
        decided = False
        for e in self.ledger.pending():
            if e.researcher != BY_HAND or e.number == first or e.number in self._tried or self._stop.is_set():
                continue
            self._tried.add(e.number)
            if self.ledger.samples(e.number, "verdict"):
                continue
            self._session.live.begin(e.number, e.description)
            self._session.live.update(phase="dry build")
            try:
                with self._session.gap.between(self._stop):
                    refused = self._session.dry_build(self.lab.source(e.number), self._stop)
            except Stopped:
                break
            if refused:
                reason, _, tail = refused.partition(TAIL)
                self._deciding.refuse(e, reason, "crash", unquoted(tail))
                decided = True
        return decided

    def _on_the_best(self, e: Experiment) -> Experiment:
        """`e`, which waits, as a change of the present best: made to it, if it was proposed on another one and waited
        while this was kept. Decided, where the two do not fit."""
        best = self.lab.best()
        if best is None or e.parent == best.number:
            return e
        found = rebase.onto(self.lab, e.parent, self.lab.source(e.number), best, self._session.executor.lint)
        if found.source is None:
            commit = f"git -C {quoted(self.lab.path)} show {self.lab.candidate_ref(e.number)}:train.py"
            self._deciding.refuse(e, f"{found.refused}; what was handed in: {commit}")
            return self.ledger.get(e.number)
        with self.ledger.transaction():
            self.ledger.rebase(e.number, found.source, fingerprint(found.source), best.number)
            made = self.ledger.get(e.number)
            if made.source_sha256 != e.source_sha256:
                to = rebase.named(e.parent)
                self._session.note(f"#{e.number} was made to {to}; its change is made to #{best.number}, the best now")
        return made

    def _run(self, e: Experiment, seed: int, dataset: Dataset) -> None:
        """From proposed to decided, or back to proposed: after a stop, or for another run."""
        number, again = e.number, bool(self.ledger.samples(e.number, "verdict"))
        self.ledger.start(number)
        self._session.live.begin(number, f"{e.description} (with seed {seed})" if again else e.description)
        told = {"number": number, "description": e.description, **({"seed": seed} if again else {})}
        self._session.on_event(Event("start", told))
        try:
            judged, probe = lambda bpb: self._deciding.could_keep(e, seed, bpb), self._deciding.probe(e, seed)
            outcome, idle = self._measuring.run(e, dataset, seed, judged, probe=probe)
        except (UserError, OSError):  # not the experiment's fault
            with suppress(UserError):  # on a full disk; then the next start finds it running and repeats it
                self.ledger.requeue(number, "could not be run; it will be repeated", counts=False)
            raise
        if outcome.status == "stopped":
            self.ledger.requeue(number, "stopped; it will be repeated", counts=False)
            return
        disturbed = self._measuring.disturbed(number, outcome)
        with self.ledger.transaction():
            self._deciding.record(number, {**slim(outcome), "idle": idle}, seed, disturbed)
            self._measuring.look_at_baseline(number, disturbed)
        step = self._deciding.decide(self.ledger.get(number))
        if step.status in WAITS:
            self._session.on_event(Event("note", {"text": f"#{number} with seed {seed}: {self._following(step)}"}))

    def _following(self, step: Step) -> str:
        return f"run again: {step.reason}" if step.status == AGAIN else step.reason

    # --- telling and being told --------------------------------------------------------------------

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
        if asked in ("pause", "resume"):
            self._session.live.update(pause_asked=asked == "pause")

    def wait_while_paused(self, deadline: Deadline | None = None) -> None:
        """Until nobody wants a pause any more, a stop, or the deadline."""
        if not self._paused.is_set():
            return
        self._session.live.update(state="paused", number=None, phase=None)
        self._session.on_event(Event("waiting", {"text": "paused; go on with: autoresearch resume", "paused": True}))
        with self._session.idle.waits_for("paused"):
            while self._paused.is_set() and not self._stop.is_set() and not self._finishing.is_set():
                if deadline is not None and deadline.left() < 0:
                    return
                time.sleep(PERIOD)  # not Event.wait: a signal handler that sets the event could meet its lock


@contextmanager
def _explained(lab: Lab) -> Iterator[None]:
    """A full or read-only disk is the user's to mend, not a traceback; the ledger has all that was decided."""
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename  # of a file that is replaced, the one beside it is gone by now
        place = Path(str(name)) if name else lab.record
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of {place} is full", "free some space, then `autoresearch run`: nothing is lost"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(
                f"{place} cannot be written ({os.strerror(error.errno)})",
                "make it writable, then `autoresearch run`: nothing is lost",
            ) from error
        if not (lab.path / ".git").is_dir():
            raise UserError(
                f"{lab.path}, or the repository in it, was moved or removed while it was in use",
                "put the folder back, or name where it lies now: `autoresearch run LAB` goes on, nothing is lost",
            ) from error
        raise
