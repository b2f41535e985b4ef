"""Who proposes next, and the next proposal made ready while an experiment still trains.

A researcher is asked in its own thread, so that stops, pauses and stand-ins do not wait for it. Who thinks ahead is
asked against the best of that moment; once checked, its proposal lies in the ledger until it becomes an experiment, in
one transaction, so that a kill then neither loses what was paid for nor counts it twice. If the best has changed
meanwhile the edit is made to the new one where it still fits, and asked again where not.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.contract import Exhausted, Proposal, Researcher, Team, Unavailable, View
from core.deadline import running
from core.errors import UserError
from core.gap import Stopped
from core.gitstore import GitStore
from core.ledger import Ledger
from core.objections import objection
from core.reapply import reapply
from core.waiting import Patience, lower_priority

REFUSALS = 20  # proposals in a row that were tried before, after which the researcher counts as exhausted
FAULTS = 3  # errors in a row that no researcher should raise, after which it counts as broken
SLICE = 0.1  # seconds between two looks at stops and stand-ins
PATIENCE = 3.0  # seconds that a researcher has, at the end of a run, to end what it has started
READY = "ready"  # in the ledger: researcher -> the proposal that waits for its turn


@dataclass(frozen=True)
class Ready:
    """A proposal that may become an experiment."""

    by: str
    proposal: Proposal
    base: bytes  # the best that it changes
    number: int | None  # of that best


@dataclass(frozen=True)
class Wait:
    """A researcher cannot answer before `until` (Unix time)."""

    reason: str
    until: float


class _Job:
    """One researcher at work."""

    def __init__(self, who: Researcher) -> None:
        self.who = who
        self.thread: threading.Thread | None = None
        self.wait: Wait | None = None
        self.found: Ready | None = None
        self.error: Exception | None = None


class Thinking:
    """The researchers of a run: one, or a team; `meanwhile` proposes while none of these can.

    `view` is what they see now; `lint` says why an edit that was made to a newer best would be refused.
    """

    def __init__(
        self,
        ledger: Ledger,
        git: GitStore,
        researcher: Researcher | None,
        meanwhile: Researcher | None,
        *,
        view: Callable[[], View],
        lint: Callable[[bytes], str],
        stop: threading.Event,
    ) -> None:
        self._ledger, self._git, self._stop = ledger, git, stop
        self.over = threading.Event()  # no answer is of use any more
        self._view, self._lint = view, lint
        self._researcher = researcher
        self._members: list[Researcher] = _members(researcher)
        self._meanwhile: list[Researcher] = [meanwhile] if meanwhile else []
        self._jobs: dict[str, _Job] = {}
        self._out: dict[str, Exception] = {}  # who has no more to say in this run, and why
        self._next: Researcher | None = None  # whose turn it is
        self._again: dict[str, str] = {}  # who is asked again, and why

    # --- for the loop ------------------------------------------------------------------------------

    def ahead(self) -> None:
        """An experiment begins: whose turn is next may begin to think, if it does not need the result."""
        who = self._turn()
        if who is not None and _thinks_ahead(who) and who.name not in self._ledger.meta(READY, {}):
            self._job(who)

    def next(self, interrupted: Callable[[], bool], idle: Callable[[str, float, Wait | None], None]) -> Ready | None:
        """The next proposal; None when `interrupted`. `idle` is told, again and again, that the device waits: for
        what ("thinking" or "waiting"), for how many seconds more, and until when.

        Raises `Exhausted` or `Unavailable` when nobody can propose anything in this run, and `UserError`."""
        while not self._stop.is_set() and not interrupted():
            who, began = self._turn(), time.monotonic()
            if who is None:
                wait = self._all_wait()
                time.sleep(SLICE)
                idle("waiting", time.monotonic() - began, wait)
                continue
            job = self._stored(who) or self._job(who)
            if job.thread is not None:
                job.thread.join(SLICE)
                idle("thinking", time.monotonic() - began, None)
            ready = self._harvest(job)
            if ready is not None:
                return ready
        return None

    def used(self, ready: Ready) -> None:
        """It is an experiment now. To be called in the transaction that makes it one."""
        self._drop(ready.by)
        self._next = None
        self._again.pop(ready.by, None)
        for who in (*self._members, *self._meanwhile):  # after another's edit there may be ideas again
            if isinstance(self._out.get(who.name), Exhausted) and not _thinks_ahead(who):
                del self._out[who.name]

    def end(self) -> None:
        """At the end of a run: researchers have a moment to end what they started."""
        self.over.set()
        until = time.monotonic() + PATIENCE
        for job in self._jobs.values():
            if job.thread is not None:
                job.thread.join(max(0.0, until - time.monotonic()))

    # --- whose turn --------------------------------------------------------------------------------

    def _turn(self) -> Researcher | None:
        """Who proposes next; None when all who could have to be waited for. Raises when nobody ever can."""
        if self._next is not None and self._is_able(self._next):
            return self._next
        able = [who for who in self._members if self._is_able(who)]
        if isinstance(self._researcher, Team) and able:
            self._next = self._researcher.turn(self._view(), able)
        elif not able:
            able = [who for who in self._meanwhile if self._is_able(who)]
            if not able:
                self._check_somebody()
            return able[0] if able else None
        else:
            self._next = able[0]
        return self._next

    def _is_able(self, who: Researcher) -> bool:
        job = self._jobs.get(who.name)
        return who.name not in self._out and (job is None or job.wait is None)

    def _check_somebody(self) -> None:
        """Raises what the first of them said when all have no more to say."""
        everybody = (*self._members, *self._meanwhile)
        if not everybody:
            raise Exhausted("nobody was asked for any")
        if all(who.name in self._out for who in everybody):
            raise self._out[everybody[0].name]

    def _all_wait(self) -> Wait | None:
        """The wait that ends first."""
        waits = [wait for job in self._jobs.values() if (wait := job.wait) is not None]
        return min(waits, key=lambda wait: wait.until, default=None)

    # --- asking ------------------------------------------------------------------------------------

    def _job(self, who: Researcher) -> _Job:
        job = self._jobs.get(who.name)
        if job is None:
            job = self._jobs[who.name] = _Job(who)
            job.thread = threading.Thread(target=self._think, args=(job,), name=f"{who.name} thinks", daemon=True)
            job.thread.start()
        return job

    def _think(self, job: _Job) -> None:
        """The thread of one proposal. Whatever goes wrong in it is told in the loop's thread."""
        try:
            if _thinks_ahead(job.who):
                lower_priority()
            job.found = self._accepted(job)
            if _thinks_ahead(job.who):
                self._store(job.found)
        except Exception as error:  # noqa: BLE001 - raised again in the loop's thread
            job.error = error
        finally:
            job.wait = None

    def _accepted(self, job: _Job) -> Ready:
        patience, faults, refused = Patience(), 0, ""
        left = REFUSALS
        while left and not self.over.is_set():
            view = self._view()
            best = self._number_of(view.best_source)
            answer = _answer(job.who, view)
            if isinstance(answer, Unavailable):
                if answer.final:
                    raise answer
                self._ledger.event("unavailable", f"{job.who.name}: {answer.reason}")
                self._sit_out(job, answer.reason, patience.seconds(answer.retry_after))
                continue
            if isinstance(answer, BaseException):
                faults += 1
                told = _told(answer)
                self._ledger.event("fault", f"{job.who.name} failed: {told}")
                if faults == FAULTS:
                    raise Unavailable(f"it failed {FAULTS} times in a row, the last time with {told}", final=True)
                self._sit_out(job, f"it failed: {told}", patience.seconds(None))
                continue
            refused = objection(self._ledger, answer)
            if not refused:
                return Ready(job.who.name, answer, view.best_source, best)
            left -= 1
            self._ledger.event("refused", refused)
        if self.over.is_set():
            raise Stopped
        raise Exhausted(f"{REFUSALS} proposals in a row were refused, the last one because {refused}")

    def _number_of(self, source: bytes) -> int | None:
        sha256 = hashlib.sha256(source).hexdigest()
        kept = [e.number for e in self._ledger.experiments() if e.is_kept and e.source_sha256 == sha256]
        return kept[-1] if kept else None

    def _sit_out(self, job: _Job, reason: str, seconds: float) -> None:
        job.wait = Wait(reason, time.time() + seconds)
        until = running() + seconds  # a limit of use is over at its time, whether this machine slept or not
        while (left := until - running()) > 0 and not self.over.is_set():
            time.sleep(min(SLICE, left))
        job.wait = None

    # --- what is ready -----------------------------------------------------------------------------

    def _harvest(self, job: _Job) -> Ready | None:
        """What came of it, fitted to the present best; None if nothing yet, or nothing that can be run."""
        if job.thread is not None and job.thread.is_alive():
            return None
        self._jobs.pop(job.who.name, None)
        if isinstance(job.error, Exhausted | Unavailable):
            self._out[job.who.name] = job.error
            if isinstance(job.error, Unavailable):
                self._ledger.event("unavailable", f"{job.who.name}, for the rest of this run: {job.error.reason}")
            self._next = None
            return None
        if job.error is not None and not isinstance(job.error, Stopped):
            raise job.error
        if job.found is None and job.error is None:
            raise RuntimeError(f"the thread of {job.who.name} ended without an answer")
        return self._fitted(job.found) if job.found is not None else None

    def _fitted(self, ready: Ready) -> Ready | None:
        """`ready` as a change of the present best."""
        best = self._ledger.best()
        now = self._ledger.source(best.source_sha256) if best else ready.base
        detail: dict[str, Any] = dict(ready.proposal.detail)
        if len(self._members) + len(self._meanwhile) > 1:
            detail["by"] = ready.by
        if again := self._again.get(ready.by):
            detail["asked_again"] = again
        source = ready.proposal.source
        if now != ready.base and best is not None:
            merged = reapply(self._git, ready.base, source, now)
            if merged is None or self._lint(merged):
                self._outdated(ready, best.number)
                return None
            source = merged
            detail["reapplied"] = {"from": ready.number, "to": best.number}
        fitted = replace(ready, proposal=Proposal(source, ready.proposal.description, detail), base=now)
        refused = objection(self._ledger, fitted.proposal)
        if refused:
            self._ledger.event("refused", refused)
            self._drop(ready.by)
            return None
        return fitted

    def _outdated(self, ready: Ready, best: int) -> None:
        of = f"#{ready.number}" if ready.number else "an earlier best"
        text = f"{ready.proposal.description!r} was made for {of} and does not fit #{best}, which was kept meanwhile"
        self._ledger.event("refused", text)
        self._again[ready.by] = text
        self._drop(ready.by)

    # --- in the ledger -----------------------------------------------------------------------------

    def _store(self, ready: Ready) -> None:
        with self._ledger.transaction():
            row = {
                "source": self._ledger.add_source(ready.proposal.source),
                "description": ready.proposal.description,
                "detail": ready.proposal.detail,
                "base": self._ledger.add_source(ready.base),
                "number": ready.number,
            }
            self._ledger.set_meta(READY, {**self._ledger.meta(READY, {}), ready.by: row})

    def _stored(self, who: Researcher) -> _Job | None:
        """What this researcher has ready, maybe since an earlier run."""
        row = self._ledger.meta(READY, {}).get(who.name)
        if row is None or who.name in self._jobs:
            return None
        proposal = Proposal(self._ledger.source(row["source"]), row["description"], row["detail"])
        job = _Job(who)
        job.found = Ready(who.name, proposal, self._ledger.source(row["base"]), row["number"])
        return job

    def _drop(self, by: str) -> None:
        with self._ledger.transaction():
            left = {name: row for name, row in self._ledger.meta(READY, {}).items() if name != by}
            if left != self._ledger.meta(READY, {}):
                self._ledger.set_meta(READY, left)


def _answer(who: Researcher, view: View) -> Proposal | BaseException:
    """A proposal, or what went wrong. Raises what ends the asking: `Exhausted`, `UserError`, `Stopped`."""
    try:
        found = who.propose(view)
        # What goes into the ledger can go there.
        json.dumps(found.detail), found.source.decode("utf-8", "replace"), found.description.split()
        return found
    except (Exhausted, UserError, Stopped):
        raise
    except BaseException as error:  # noqa: BLE001 - somebody else's code may fail in any way, and ends no night
        return error


def _members(researcher: Researcher | None) -> list[Researcher]:
    members: Sequence[Researcher] = (
        researcher.members if isinstance(researcher, Team) else [researcher] if researcher else []
    )
    return list(members)


def _thinks_ahead(who: Researcher) -> bool:
    return bool(getattr(who, "thinks_ahead", False))


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"[:500]
