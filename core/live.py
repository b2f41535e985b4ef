"""What the running experiment does now, for other processes to read: one small file, replaced atomically.

Within the process the same is told by events. The loop's own kinds, beside the referee's: "start" (number,
description), "again" (number, seed, description: another run of what was measured before), "decided" (number, status,
val_bpb, reason), "note" (text), "waiting" (text).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.files import replace_open
from core.outcome import Event

__all__ = ["Event", "Live", "read"]

PERIOD = 1.0  # seconds between two versions of the file
FILE = "live.json"
PROGRESS = ("step", "loss", "tokens_per_second", "mfu", "remaining", "fraction")  # of one phase


def read(record: Path) -> dict[str, Any]:
    """The last state that was published, {} if there is none. `updated` (Unix time) tells how old it is."""
    try:
        found = json.loads((record / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Live:
    """Publishes while it is entered. `on_tick` is called once a period by the publishing thread."""

    def __init__(self, record: Path, on_tick: Callable[[], None] = lambda: None) -> None:
        self._path = record / FILE
        self._on_tick = on_tick
        self._state: dict[str, Any] = {"pid": os.getpid(), "since": time.time(), "state": "starting"}
        self._lock = threading.Lock()  # of the state
        self._writing = threading.Lock()  # of the file
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._publish, name="live", daemon=True)

    def __enter__(self) -> Live:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.update(state="ended", number=None, phase=None)

    def update(self, **fields: Any) -> None:
        """Progress waits for the next version of the file; another `state` is published at once."""
        with self._lock:
            self._state.update(fields)
        if "state" in fields:
            self._write()

    def progress(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Of an event of the referee's. What was said of the phase before says nothing of a new one."""
        with self._lock:
            if kind == "phase":
                self._state = {name: said for name, said in self._state.items() if name not in PROGRESS}
            self._state.update(fields)

    def begin(self, number: int, description: str) -> None:
        """A new experiment: what was said of the one before is gone."""
        keep: dict[str, Any] = {k: self._state[k] for k in ("pid", "since", "pause_asked") if k in self._state}
        with self._lock:
            self._state = {
                **keep,
                "state": "running",
                "number": number,
                "description": description,
                "started": time.time(),
            }
        self._write()

    def _publish(self) -> None:
        while not self._ended.wait(PERIOD):
            self._on_tick()
            self._write()

    def _write(self) -> None:
        beside = self._path.with_suffix(".tmp")
        with self._writing:
            with self._lock:
                text = json.dumps({**self._state, "updated": time.time()}, default=str)
            try:
                beside.write_text(text, "utf-8")
                replace_open(beside, self._path)
            except OSError:  # a full disk must not end an experiment because of its progress line
                with suppress(OSError):
                    beside.unlink(missing_ok=True)
