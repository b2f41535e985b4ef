"""Where experiments run. The loop asks an executor; this machine is the only one so far."""

from __future__ import annotations

import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Protocol

from core import cardfaults, gpuwatch
from core.errors import DeviceFull
from core.facts import Facts
from core.files import remove
from core.outcome import Event, Outcome, Request
from core.settings import Settings
from core.sharing import SharedCard

SETTLE_SECONDS = 20.0  # of training whose step rate is one reading
SETTLE_READINGS = 3  # whose mean is compared with that of as many before, as single readings are noisy
SETTLED_WITHIN = 0.01
SETTLE_MOST = 45  # readings; a quarter of an hour


class Executor(Protocol):
    """Runs one experiment somewhere. Both raise `UserError` when the experiment is not to blame."""

    def execute(self, request: Request, on_event: Callable[[Event], None], stop: threading.Event) -> Outcome: ...

    def settle(self, request: Request, say: Callable[[str], None], stop: threading.Event) -> str:
        """Bring the machine into the state that it will have all night. What was done, "" if nothing was needed."""
        ...

    def lint(self, source: bytes) -> str:
        """Why `source` would be refused before anything runs, "" if it would not. Milliseconds."""
        ...

    def dry_build(
        self, source: bytes, settings: Settings, workdir: Path, stop: threading.Event, caches: Path | None
    ) -> str:
        """Why `source` does not run at all, "" if it does. Takes seconds, on the device. Raises `Stopped`. `caches`: of
        the best, to start from; a copy is made."""
        ...


class LocalExecutor:
    """This machine. `facts`: where its hardware is looked up; `card`: through what a graphics card is looked at."""

    def __init__(
        self,
        facts: Facts | None = None,
        settle_seconds: float = SETTLE_SECONDS,
        card: gpuwatch.Source | None = None,
        card_wait: float = gpuwatch.WAIT_MOST,
        card_every: float = gpuwatch.WAIT_EVERY,
    ) -> None:
        self._facts = facts
        self._settle_seconds = settle_seconds
        self._card, self._card_wait, self._card_every = card, card_wait, card_every
        self._needed = 0  # bytes of a card that the latest experiment was expected to take; 0: not known yet

    def execute(self, request: Request, on_event: Callable[[Event], None], stop: threading.Event) -> Outcome:
        from core import referee  # here, because it loads what only an experiment needs

        if request.settings.device.startswith("cuda"):
            return self._on_card(request, on_event, stop)
        return referee.execute(request, on_event, stop)

    def lint(self, source: bytes) -> str:
        from core import guard

        return "; ".join(str(finding) for finding in guard.check(source)[:5])

    def dry_build(
        self, source: bytes, settings: Settings, workdir: Path, stop: threading.Event, caches: Path | None
    ) -> str:
        from core import dryrun

        def short() -> str:
            on_card = settings.device.startswith("cuda")
            return gpuwatch.in_use_now(settings.device, self._source(), stop, needed=self._needed) if on_card else ""

        # Of a card that others have filled nothing is learnt: the experiment, which waits for the card, will tell.
        try:
            return dryrun.dry_build(source, settings, workdir, stop=stop, caches=caches, short=short)
        except DeviceFull:
            return ""

    def _on_card(self, request: Request, on_event: Callable[[Event], None], stop: threading.Event) -> Outcome:
        """A shared card is waited for: what is measured beside a game is worth nothing, or does not fit. What has been
        trained before others took it is not trained again (`Sharing`)."""
        from core import referee
        from core.child import BackendFailed

        device, source = request.settings.device, self._source()
        self._needed = request.card_bytes

        def say(text: str) -> None:
            on_event(Event("phase", {"phase": text, "experiment": request.experiment}))
            on_event(Event("waiting", {"text": text}))  # for hours, maybe: where nothing is redrawn, a line that stays

        card = SharedCard(device, source, say, stop, self._card_wait, self._card_every, request.card_bytes)
        while True:
            card.begin()
            try:
                outcome = referee.execute(request, on_event, stop, card)
                break
            except DeviceFull as full:  # it was taken between the look and the opening
                card.refused(full)
                remove(request.workdir)
            except BackendFailed as failed:
                self._require_card(device)
                if said := cardfaults.fault(failed.fact, failed.action):
                    raise cardfaults.failing(said) from None
                raise
        if outcome.status in ("crash", "timeout") and not card.before.error:
            self._require_card(device)  # else the recipe had none to run on
        outcome.timings |= {"waiting": round(card.waited, 3)} if card.waited >= 1.0 else {}
        self._tell_card(outcome, device, card.before, stop, card.needed)
        return outcome

    def _require_card(self, device: str) -> None:
        """Raises `CardGone` where the driver does not tell of the card."""
        if said := self._source().look(device, ()).error:
            raise cardfaults.lost(device, said) from None

    def _tell_card(
        self, outcome: Outcome, device: str, before: gpuwatch.Look, stop: threading.Event, needed: int
    ) -> None:
        """Into the record: what was free before the run, whether others have the card after one that ran out of
        memory, which may have ended before it was watched, and what the driver said where it ended the run."""
        card = {**(outcome.health.get("card") or {}), "free_before": before.free}
        if outcome.status == "crash" and (said := cardfaults.fault(outcome.reason, outcome.log_tail)):
            card["fault"] = said
            card["tainted"] = card.get("tainted") or "the card's driver ended what ran on it"
        elif outcome.out_of_memory and not card.get("tainted"):
            card["tainted"] = gpuwatch.in_use_now(device, self._source(), stop, needed=needed, before=before)
        outcome.health |= {"tainted": card["tainted"]} if card.get("tainted") else {}
        outcome.health["card"] = card

    def _source(self) -> gpuwatch.Source:
        if self._card is None:
            from core.nvml import Nvml

            self._card = Nvml()
        return self._card

    def settle(self, request: Request, say: Callable[[str], None], stop: threading.Event) -> str:
        """A Mac without a fan slows down for minutes under load: it trains until its step rate stays the same."""
        from core import hardware, referee

        if not hardware.probe(self._facts).apple.fanless:
            return ""
        say("this machine has no fan: it trains until its speed stays the same, 15 min at most")
        workdir = request.workdir.with_name(f"{request.workdir.name}-settle")

        def rate() -> float:
            with tempfile.TemporaryDirectory(prefix="settle-", dir=workdir, ignore_cleanup_errors=True) as folder:
                facts = referee.measure(
                    request.source, request.settings, Path(folder), seconds=self._settle_seconds, stop=stop
                )
            return 1.0 / float(facts["seconds_per_step"])

        workdir.mkdir(parents=True, exist_ok=True)
        try:
            return settled(rate, say, stop)
        except referee.RecipeFailed:
            return ""  # the experiment that follows will tell why
        finally:
            workdir.rmdir()


def settled(rate: Callable[[], float], say: Callable[[str], None], stop: threading.Event) -> str:
    """Take readings of `rate` (steps per second) until they no longer fall or rise. Says how it ended."""
    last: deque[float] = deque(maxlen=2 * SETTLE_READINGS)
    first = 0.0
    for number in range(1, SETTLE_MOST + 1):
        if stop.is_set():
            return ""
        last.append(rate())
        first = first or last[0]
        say(f"{last[-1]:.3g} steps/s at reading {number}")
        before, now = fmean(list(last)[:-SETTLE_READINGS] or [0.0]), fmean(list(last)[-SETTLE_READINGS:])
        if len(last) == last.maxlen and abs(now - before) <= SETTLED_WITHIN * before:
            return f"settled at {last[-1]:.3g} steps/s, {last[-1] / first:.0%} of the first of {number} readings"
    return f"the speed did not settle in {SETTLE_MOST} readings; the last was {last[-1]:.3g} steps/s"
