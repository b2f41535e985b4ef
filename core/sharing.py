"""A graphics card that others take before an experiment or in the middle of it, or that is lost when what was trained
is to be scored: it is waited for, up to one limit each."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core import cardfaults, gpuwatch
from core.errors import DeviceFull

COMES_BACK = 300.0  # seconds that are waited for a card whose driver fails, all waits of one experiment together


class SharedCard:
    """See `core.outcome.Sharing`. `waited`: seconds so far, all waits of one experiment together."""

    def __init__(
        self,
        device: str,
        source: gpuwatch.Source,
        say: Callable[[str], None],
        stop: threading.Event,
        most: float = gpuwatch.WAIT_MOST,
        every: float = gpuwatch.WAIT_EVERY,
        needed: int = 0,
        comes_back: float = COMES_BACK,
    ) -> None:
        """`device`: "cuda:0"; `most`: seconds that are waited at most; `every`: seconds between two looks; `needed`:
        bytes that the experiment is expected to take, 0: not known; `comes_back`: as `most`, for a lost card."""
        self._device, self._source, self._say, self._stop = device, source, say, stop
        self._most, self._every = most, every
        self.needed = needed
        self.waited = 0.0
        self._comes_back = comes_back  # what is left of it
        self.before = gpuwatch.Look()  # the card when the run began, with nothing of ours on it

    def left(self) -> float:
        """Seconds that may still be waited."""
        return max(0.0, self._most - self.waited)

    def begin(self) -> None:
        """Wait until the card is free for a run. `UserError` where that was in vain."""
        with self._timed():
            gpuwatch.require_free(
                self._device, self._source, self._say, self._stop, self.left(), self._every, self.needed
            )
        self.look()

    def look(self) -> None:
        """The run begins now: what others take from now on is told by this look."""
        self.before = self._source.look(self._device, ())

    def refused(self, full: DeviceFull) -> None:
        """A run found the card full before it had trained: wait a moment; `begin` waits for the rest. Raises `full`
        where there is no time left for it."""
        if not self.left():
            raise full
        self.needed = max(self.needed, full.needed)
        self._say(f"{full.fact}: waits until it is free")
        with self._timed():
            gpuwatch.wait(self._stop, self._every)

    def taken(self, took: int) -> str:
        needed = self.needed or min(took, self.before.free or 0)
        return gpuwatch.in_use_now(self._device, self._source, self._stop, needed=needed, before=self.before)

    def wait(self, why: str, needed: int = 0) -> bool:
        if not self.left():
            return False
        self.needed = max(self.needed, needed)
        self._say(f"{why}: the training is done and kept, its score waits until the card is free")
        with self._timed():
            gpuwatch.wait(self._stop, self._every)
            return gpuwatch.wait_until_free(
                self._device, self._source, _silent, self._stop, self.left(), self._every, needed=self.needed
            )

    def lost(self, said: str = "") -> str:
        if self.before.error:  # where nothing was ever told, nothing is known of it now
            return ""
        if error := self._source.look(self._device, ()).error:
            return cardfaults.lost(self._device, error).fact
        return cardfaults.failing(words).fact if (words := cardfaults.fault(said, "")) else ""

    def wait_for_answer(self, why: str) -> bool:
        if self._comes_back <= 0:
            return False
        limit = f"{math.ceil(self._comes_back / 60)} min at most"
        self._say(f"{why}: the training is done and kept, its score waits until the card answers, {limit}")
        began, answers = time.monotonic(), False
        with self._timed():
            while not answers and not self._stop.is_set() and time.monotonic() - began < self._comes_back:
                gpuwatch.wait(self._stop, self._every)
                answers = not self._source.look(self._device, ()).error
        self._comes_back -= time.monotonic() - began
        return answers

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - began


def _silent(text: str) -> None:
    """It has been said why is waited."""
