"""Looks at a training on its way: the trainer is stopped, its weights so far are scored, and it goes on.

The trainer writes its weights when a share of the budget is used, on its clock, and says so. Then, in this order:

    1. the trainer's whole tree is stopped, and known to be (core/freezing.py), and so is what it had sent to a graphics
       card (`at_rest`); only now the clock stands still
    2. a prober, a sandboxed process that waited with its libraries loaded, gets recipe, weights and probe text;
       trusted code scores it there as in the scorer; the prober is ended and its folder removed
    3. the tree is looked at again: if any of it ran meanwhile, the experiment is invalid
    4. the clock goes on, then the tree

A prober computes off the clock, and what could come back from it to the trainer is how long it took. So a pause has
one of a few lengths: SHORTEST, doubled as often as needed. (What it could leave in the page cache: core/seccomp.py.)
Whatever else goes wrong with a look is noted, and the training goes on.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import psutil

from core import apple, gpuwatch, probing, scoring
from core import weights as weight_files
from core.child import BackendFailed, Ended, Place, Worker
from core.clock import SCHEDULING_SLACK, Stopwatch
from core.errors import DeviceFull
from core.facts import LocalFacts
from core.freezing import RAN_AT_MOST, FreezeError, Frozen
from core.health import Watch
from core.nvml import Nvml
from core.outcome import Outcome, Request
from core.sandbox import GIB
from core.weights import WeightsError
from core.wire import Message, ProtocolError

REST_SEEN = 1.1  # seconds; a driver's figure is about the last second at most
REST_EVERY = 0.05  # seconds between two looks at a card that comes to rest
REST_WITHIN = 2.0  # seconds in which it has to, but not more than
REST_SHARE = 0.05  # of the budget
SHORTEST = 0.5  # seconds; a pause lasts this, or twice, four times, ... as long
PROBER_SECONDS = 30.0  # in which a prober has to import, build, load and score
DEATH_SHOWS = 1.0  # seconds in which the end of a trainer is told, for want of memory say
EARLY = 0.05  # seconds by which two views of one clock may differ
SPARE_BYTES = 2**24  # by which a file of weights may be larger than those of the untrained build: its header, counters


class Prober:
    """The looks at one training. `compiled`: tells where compile caches lie now."""

    def __init__(self, request: Request, place: Place, outcome: Outcome, compiled: Callable[[], Path | None]) -> None:
        self._request = request
        self._place = place
        self._outcome = outcome
        self._compiled = compiled
        self.weights_bytes = 0  # of the untrained build; what is much larger is not read, as the pause would grow by it
        self._probe = request.probe or probing.Probe(shares=())
        self._next = 0
        self._card = card(place.settings.device)
        self._rng = np.random.default_rng()
        self.workers: dict[str, Worker] = {}
        with ExitStack() as undo:
            for name in (f"prober-{n + 1}" for n in range(len(self.shares))):
                self.workers[name] = Worker("prober", place, name)
                undo.callback(self.workers[name].close)
            undo.pop_all()

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(self._probe.shares)

    def look(self, trainer: Worker, message: Message, clock: Stopwatch, watch: Watch) -> None:
        """Answer the trainer's word that its weights lie there. `Ended` where it is hopeless, or ran in the pause."""
        index = self._accept(trainer, message, clock.elapsed())
        frozen = self._stop(trainer, index, clock)
        if frozen is None:
            trainer.send("go on", {"paused": 0.0})
        else:
            self._look(trainer, index, frozen, clock, watch)

    def _look(self, trainer: Worker, index: int, frozen: Frozen, clock: Stopwatch, watch: Watch) -> None:
        watch.pause()
        began = time.monotonic()
        bpb = self._score(trainer, index)
        if bpb is not None:
            share = self.shares[index]
            self._outcome.probes.append([share, round(clock.elapsed(), 3), bpb])
            forecast = self._probe.judge(index, bpb)
            if forecast is not None and forecast.hopeless:
                self._give_up(forecast, bpb, clock, watch)
        self._fill(time.monotonic() - began)
        if (ran := frozen.ran()) > RAN_AT_MOST and trainer.child.wait(DEATH_SHOWS) is None:
            raise Ended("invalid", f"the recipe ran while its clock stood still: {_how(ran)}")
        trainer.send("go on", {"paused": self._go_on(clock, watch)})
        frozen.thaw()

    def close(self) -> None:
        """End what is left of the probers: a look that was never asked for is noted."""
        for index in range(self._next, len(self.shares)):
            self._leave_out(index, "the training ended before it")
        for worker in self.workers.values():
            worker.close()

    # --- parts -------------------------------------------------------------------------------------

    def _accept(self, trainer: Worker, message: Message, seconds: float) -> int:
        """The number of the look; looks that were passed by are noted."""
        try:
            index = message.integer("index", self._next, len(self.shares) - 1)
        except ProtocolError as error:
            raise trainer.broke(error) from None
        if seconds < self.shares[index] * self._request.seconds() - EARLY:
            raise trainer.broke(f"a look after {seconds:.2f} s, before its time")
        for missed in range(self._next, index):
            self._leave_out(missed, "one step took longer than the time to the next look")
        self._next = index + 1
        return index

    def _stop(self, trainer: Worker, index: int, clock: Stopwatch) -> Frozen | None:
        """Trainer and clock stand still; None, with the reason noted, where the training goes on at once."""
        budget, seconds = self._request.seconds(), clock.elapsed()
        late = seconds - self.shares[index] * budget
        if late > max(probing.LATE * budget, SCHEDULING_SLACK):
            self._leave_out(index, f"it came {late:.2f} s late, at {seconds / budget:.0%}, and compares with nothing")
            return None
        try:
            frozen = trainer.child.freeze()
        except FreezeError as error:
            self._leave_out(index, f"the training could not be stopped: {error}")
            return None
        if self._card is None:
            clock.stop()
        elif reason := at_rest(self._place.settings.device, self._card, clock, self._place.stop, patience(budget)):
            frozen.thaw()
            self._leave_out(index, reason)
            return None
        return frozen

    def _go_on(self, clock: Stopwatch, watch: Watch) -> float:
        """The seconds that the pause took; from now on time counts."""
        watch.go_on()
        paused, timings = clock.go_on(), self._outcome.timings
        timings["probing"] = round(timings.get("probing", 0.0) + paused, 3)
        return paused

    def _leave_out(self, index: int, reason: str) -> None:
        self._outcome.unprobed.append(f"no look at {self.shares[index]:.0%} of the budget: {reason}")

    def _score(self, trainer: Worker, index: int) -> float | None:
        """Bits per byte of the weights so far on the probe text; None, with the reason noted, when there are none."""
        worker = self.workers[f"prober-{index + 1}"]
        file = trainer.scratch / f"look-{index}.safetensors"
        fd = -1
        try:
            if reason := lacks_memory(psutil.virtual_memory().available, trainer.child.peak_memory()):
                self._leave_out(index, reason)
                return None
            fd = weight_files.open_untrusted(file, self.weights_bytes + SPARE_BYTES)
            weight_files.check(weight_files.read(fd))
            return self._ask(worker, fd)
        except WeightsError as error:
            self._leave_out(index, str(error))
        except (BackendFailed, DeviceFull) as error:
            self._leave_out(index, error.fact)
        except Ended as end:
            if end.status == "stopped":
                raise
            self._leave_out(index, end.reason)
        finally:
            if fd >= 0:
                os.close(fd)
            with suppress(OSError):  # a folder of that name: it counts as what the recipe wrote
                file.unlink(missing_ok=True)
            worker.close()
        return None

    def _ask(self, worker: Worker, fd: int) -> float:
        worker.until = time.monotonic() + PROBER_SECONDS
        request, text = self._request, self._text
        worker.begin(request.source, request.seed, self._compiled(), warm=False, rows=text.size)
        scoring.prepare(worker, "prober")
        scoring.give_weights(worker, fd)
        return scoring.score(worker, text, PROBER_SECONDS, self._rng).bpb

    @cached_property
    def _text(self) -> scoring.Text:
        """Rows at equal distances in the training part: the same in every run of a lab."""
        return scoring.Text.of(self._request.dataset, self._place, "train", self._probe.tokens)

    def _give_up(self, forecast: probing.Forecast, bpb: float, clock: Stopwatch, watch: Watch) -> None:
        self._go_on(clock, watch)
        seconds = clock.elapsed()
        self._outcome.training_seconds = self._outcome.timings["training"] = round(seconds, 3)
        saved = self._request.seconds() - seconds
        self._outcome.stopped_early = probing.as_record(forecast, bpb, saved)
        raise Ended("hopeless", forecast.sentence())

    def _fill(self, took: float) -> None:
        """Wait until the pause has one of its lengths."""
        if self._place.stop.wait(pause_length(took) - took):
            raise Ended("stopped", "stopped on request")


def card(device: str) -> gpuwatch.Source | None:
    """Through what is seen that the device has come to rest; None for a CPU, which rests when its processes do."""
    if device == "cpu":
        return None
    return Nvml() if device.startswith("cuda") else apple.GpuLoad(LocalFacts())


def patience(budget: float) -> float:
    """Seconds that a card may take to come to rest. They count as training in which none is done: of a budget of a few
    seconds two looks in vain would leave nothing, and every run would end late."""
    return min(REST_WITHIN, REST_SHARE * budget)


def at_rest(
    device: str, source: gpuwatch.Source, clock: Stopwatch, stop: threading.Event, patience: float = REST_WITHIN
) -> str:
    """Stop `clock` at the moment from which on the card has been idle; "" then, else why it was not stopped.

    For a training whose processes stand still: what they had sent to the card before goes on there. A driver tells how
    much of the last second or less was spent in kernels, so the clock stays stopped only when a second look, more
    than a second later, finds the card idle too: no kernel can have run all the time in between.
    """
    deadline = time.monotonic() + patience
    while True:
        if (busy := source.look(device, ()).busy) is None:
            return "the system does not tell whether the card is idle"
        if busy <= gpuwatch.BUSY:
            clock.stop()
            stop.wait(REST_SEEN)
            again = source.look(device, ()).busy
            if again is not None and again <= gpuwatch.BUSY:
                return ""
            clock.never_mind()
        if time.monotonic() > deadline or stop.is_set():
            return f"the card was still {busy:.0%} busy {patience:g} s after the training's processes had stopped"
        stop.wait(REST_EVERY)


def lacks_memory(free: int, trainer: int) -> str:
    """Why no second copy of a recipe should be started beside one that has taken so many bytes; "" if it may.

    A prober takes less than a trainer, which has gradients and an optimizer; but what it takes from a machine that has
    no memory to spare could end the trainer.
    """
    if free >= trainer:
        return ""
    return f"a second copy of the recipe could take {trainer / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB are free"


def pause_length(took: float) -> float:
    """How long a pause lasts, in seconds, whose look took so long."""
    length = SHORTEST
    while length < took:
        length *= 2
    return length


def _how(ran: float) -> str:
    return "one of its threads was awake, new or gone" if math.isinf(ran) else f"{ran:.3f} s on a processor"
