"""From a measured run to a decision on disk: verdict, objects, refs, ledger, the lab's files, in this order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from core import verdict
from core.ledger import FAILED, Experiment, Sample
from core.live import Event
from core.outcome import Outcome
from core.recovery import ATTEMPTS
from core.session import Session


class Deciding:
    def __init__(self, session: Session) -> None:
        self._session = session
        self.decided: list[Experiment] = []  # in this run

    def would_keep(self, bpb: float) -> bool:
        """Whether a score would be kept, and so must be audited."""
        lab = self._session.lab
        return verdict.decide(lab.best_samples(), [bpb], lab.settings.min_delta).status == "keep"

    def record(self, number: int, outcome: Mapping[str, Any], seed: int) -> None:
        self._session.ledger.record(number, outcome, seed, self._session.measured_with)

    def decide(self, e: Experiment) -> None:
        """scored or audited -> decided: objects, then refs, then the ledger, then the lab's files."""
        lab, ledger = self._session.lab, self._session.ledger
        best, before = lab.best(), lab.best_bpb()
        status, reason = self._verdict(e)
        if status is None:
            ledger.requeue(e.number, reason, counts=True)
            return
        number = None if status in FAILED else e.val_bpb
        parent = best.number if best else None
        commit = lab.commit_of(replace(e, status=status, parent=parent, val_bpb=number))
        refs = {lab.candidate_ref(e.number): commit}
        if status == "keep":
            refs[lab.branch_ref] = commit
        lab.git.update_refs(refs)
        ledger.advance(
            e.number,
            "decided",
            status=status,
            reason=reason,
            parent=parent,
            commit=commit,
            best_before=before,
            val_bpb=number,
        )
        self._finish(ledger.get(e.number))

    def _finish(self, e: Experiment) -> None:
        """What follows a decision; the next start does it where it was cut off."""
        session, products = self._session, self._session.lab.products
        outcome = Outcome.from_dict(e.outcome or {})
        products.keep_logs(e.number)
        if e.is_kept:
            products.keep(e.number, outcome.weights, outcome.caches)
        products.clear_work({e.number})
        session.lab.publish()
        if not self.restore_recipe() and e.is_kept:
            session.note(
                f"train.py was edited meanwhile and stays; #{e.number} is the best now: autoresearch best --source"
            )
        self.decided.append(e)
        told = {"number": e.number, "status": e.status, "val_bpb": e.val_bpb, "reason": e.reason}
        session.on_event(Event("decided", told))

    def restore_recipe(self) -> bool:
        """The best's train.py goes back, unless something lies there that was not judged yet. Did it?"""
        lab = self._session.lab
        if lab.is_dirty():
            lies_there = hashlib.sha256(lab.working_source()).hexdigest()
            if not lab.ledger.is_decided(lies_there):
                return False
        lab.restore_recipe()
        return True

    def _verdict(self, e: Experiment) -> tuple[str | None, str]:
        """(status, reason); None as status: measure it again."""
        lab, ledger, outcome = self._session.lab, self._session.ledger, e.outcome or {}
        if outcome.get("status") != "scored":
            status, reason = str(outcome.get("status", "crash")), str(outcome.get("reason", ""))
            disturbed = ledger.disturbance(outcome.get("health") or {})
            if status == "timeout" and disturbed and e.attempts < ATTEMPTS:
                return None, f"{reason}, while {disturbed}"
            return status, reason
        samples = ledger.samples(e.number)
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
        said = verdict.decide(lab.best_samples(), [s.val_bpb for s in samples], lab.settings.min_delta)
        return said.status, said.reason

    def _why_again(self, e: Experiment, sample: Sample) -> str:
        """Why a score cannot be judged as it is; "" if it can."""
        lab = self._session.lab
        best = lab.best()
        if best is not None and lab.ledger.samples(best.number)[-1].versions != sample.versions:
            return "the best was not measured with the same versions"
        keeps = self.would_keep(sample.val_bpb)
        return "would be kept and was not audited" if keeps and e.state != "audited" else ""
