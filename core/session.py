"""What the parts of the loop share while it runs: the lab, who runs experiments, and who is told what happens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from core.executor import Executor
from core.files import remove
from core.gap import Gap
from core.idle import Idle
from core.lab import Lab
from core.ledger import Ledger
from core.live import Event, Live
from core.outcome import Event as RefereeEvent

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
            return self.executor.dry_build(source, lab.settings, workdir, stop, caches)
        finally:
            remove(workdir)

    def forward(self, event: RefereeEvent) -> None:
        """What the referee tells while it runs an experiment."""
        if self.lab.settings.backend == "cpu" and event.data.get("phase") == "score":
            self.gap.open()  # the clock has stopped; a card is left to the scorer alone, which takes most of its memory
        if event.kind in ("phase", "progress"):
            self.live.progress(event.kind, {k: v for k, v in event.data.items() if k != "experiment"})
        self.on_event(Event(event.kind, dict(event.data)))
