"""What the parts of the loop share while it runs: the lab, who runs experiments, and who is told what happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from core.errors import Transient, UserError
from core.executor import Executor
from core.files import remove
from core.gap import Gap, Stopped
from core.idle import Idle
from core.lab import Lab
from core.ledger import Ledger
from core.live import Event, Live
from core.outcome import Event as RefereeEvent

T = TypeVar("T")
TRIED_AGAIN = (15.0, 60.0, 240.0)  # seconds after which what the machine could not do is tried again
SLICE = 0.2  # seconds between two looks at the stop
FINISHED = "asked to end after the run that was under way"


@dataclass
class Session:
    lab: Lab
    executor: Executor
    on_event: Callable[[Event], None]
    measured_with: dict[str, Any]  # versions of everything that a score depends on
    live: Live
    stop: threading.Event = field(default_factory=threading.Event)
    gap: Gap = field(default_factory=Gap)
    idle: Idle = field(default_factory=Idle)

    @property
    def ledger(self) -> Ledger:
        return self.lab.ledger

    def note(self, text: str) -> None:
        """Said now, and on the record."""
        self.ledger.event("note", text)
        self.on_event(Event("note", {"text": text}))

    def waiting(self, text: str, **fields: Any) -> None:
        """Why nothing is measured at the moment."""
        self.live.update(state="waiting", number=None, phase=text, **fields)
        self.on_event(Event("waiting", {"text": text, **fields}))

    def patiently(self, call: Callable[[], T], stop: threading.Event) -> T:
        """The result of `call`, which is made again a few times, with waits between, while it raises `Transient`. At
        last raises `UserError`; `Stopped` after a stop."""
        for times, seconds in enumerate(TRIED_AGAIN, 1):
            try:
                return call()
            except Transient as failed:
                text = f"{failed.fact}: tried again in {seconds:.0f} s ({times} of {len(TRIED_AGAIN)})"
                self.ledger.event("note", text)
                self.live.update(phase=text)
                self.on_event(Event("waiting", {"text": text}))
            until = time.monotonic() + seconds
            while (left := until - time.monotonic()) > 0 and not stop.is_set():
                time.sleep(min(SLICE, left))
            if stop.is_set():
                raise Stopped
        try:
            return call()
        except Transient as failed:
            raise UserError(f"{failed.fact}, {1 + len(TRIED_AGAIN)} times in a row", failed.at_last()) from failed

    def again(self, number: int, seed: int, text: str) -> None:
        """Another run of what was measured before, or of what is made from it."""
        self.live.begin(number, text)
        self.on_event(Event("again", {"number": number, "seed": seed, "description": text}))

    def dry_build(self, source: bytes, stop: threading.Event) -> str:
        """Why a recipe does not run at all, "" if it does. Raises `Stopped`.

        It starts from a copy of the best's compile caches, and what it compiles itself goes with its folder."""
        lab, workdir = self.lab, self.lab.products.scratch()
        try:
            best = lab.best()
            caches = lab.products.copy_caches(best.number, workdir / "caches") if best else None
            return self.patiently(lambda: self.executor.dry_build(source, lab.settings, workdir, stop, caches), stop)
        finally:
            remove(workdir)

    def forward(self, event: RefereeEvent) -> None:
        """What the referee tells while it runs an experiment."""
        if self.lab.settings.backend == "cpu" and event.data.get("phase") == "score":
            self.gap.open()  # the clock has stopped; a card is left to the scorer alone, which takes most of its memory
        if event.kind in ("phase", "progress"):
            self.live.progress(event.kind, {k: v for k, v in event.data.items() if k != "experiment"})
        self.on_event(Event(event.kind, dict(event.data)))
