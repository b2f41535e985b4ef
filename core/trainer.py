"""The trainer's part of an experiment: warm-up, training on the referee's clock, the handover of the weights."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from core import caches, health
from core import weights as weight_files
from core.child import Ended, Worker
from core.clock import Limit, Stopwatch
from core.health import Watch
from core.outcome import Event, Outcome, Request, printable
from core.pausing import Prober
from core.settings import Settings
from core.weights import WeightsError
from core.wire import Message, ProtocolError

WEIGHTS_BYTES = 64 * 2**30  # the most that a recipe may hand over
FREE_WARMUP = 3.0  # seconds of work before the clock that cost nothing, compilers apart


class Run(Protocol):
    """The experiment that a trainer belongs to, as far as it looks at it (core/referee.py)."""

    request: Request
    settings: Settings
    outcome: Outcome
    compiled: Path | None
    peak_flops: float
    mark: float

    def phase(self, name: str) -> None: ...
    def lap(self, name: str) -> None: ...
    def keep_caches(self, worker: Worker) -> None: ...
    def tell(self, event: Event) -> None: ...


class Trainer:
    """The trainer's part of an experiment, and what comes before it."""

    def __init__(self, run: Run, worker: Worker, rehearsal: Worker | None, prober: Prober | None) -> None:
        """`rehearsal`: the process of the warm-up, where that is not the trainer itself. `prober`: looks on the way."""
        self.run = run
        self.worker = worker
        self.rehearsal = rehearsal
        self.prober = prober
        self.outcome = run.outcome
        self.limit = Limit(run.request.seconds())
        self.weights_file = worker.scratch / "weights.safetensors"
        self._clock = Stopwatch(0.0)  # of the training
        self._charged = 0.0  # seconds of the budget that were used up before it
        self._declared = 0  # bytes of weights
        self._untrained = ""  # digest of the weights of the first build
        self._last = (0.0, 0)  # seconds and tokens at the last progress

    def warm_up(self) -> None:
        """Everything up to the start of the clock, under the cap of its own."""
        cap = self.run.settings.warmup_cap
        worker = self.rehearsal or self.worker
        self.run.phase("warm-up")
        request = self.run.request
        worker.begin(request.source, request.seed, self.run.compiled, measure_peak=True, rehearsed=False)
        began = time.monotonic()
        deadline = began + cap
        built = worker.expect("built", cap, "import and build")
        self.run.lap("startup")
        warm = worker.expect("warm", max(0.1, deadline - time.monotonic()), "warm-up (import, build, compile)")
        try:
            self.outcome.params = built.integer("params")
            self._declared = built.integer("weights_bytes")
            self._untrained = built.text("weights", 64)
            self.worker.require_disk(self._declared)
            if self.prober is not None:
                self.prober.weights_bytes = self._declared
            self.outcome.describe = {
                **plain(built),
                "compiled": warm.flag("compiled"),
                "dtype": warm.text("dtype", 20),
            }
            if "peak_flops" in warm.fields:
                self.run.peak_flops = warm.number("peak_flops", 0.0, 1e20)
                self.outcome.describe["peak"] = warm.text("peak_source", 400)
        except ProtocolError as error:
            raise worker.broke(error) from None
        self.outcome.flops_per_token = _flops(self.outcome.describe)
        self._charge(self._work(time.monotonic() - began))
        if self.outcome.describe["compiled"]:
            self.run.keep_caches(worker)
        if self.rehearsal is not None:
            self.rehearsal.kill()
            self._get_set()

    def _work(self, seconds: float) -> float:
        """Of the `seconds` before the clock, those in which the recipe may have trained: all where nothing is compiled.

        MLX on a CPU compiles by processes that have ended by now, so what the living ones computed is the recipe's
        work. On a Mac compiling takes about what is free. In-process compilers cannot be told from other work.
        """
        if not self.outcome.describe["compiled"]:
            return seconds
        if self.rehearsal is None or (self.run.settings.device != "cpu" and sys.platform == "linux"):
            return 0.0
        return health.own_seconds(self.rehearsal.child.pid) if sys.platform == "linux" else seconds

    def _charge(self, seconds: float) -> None:
        """A first build that computes for long, and keeps the result for the second, would train for free: so what
        is beyond FREE_WARMUP counts as training."""
        self._charged = max(0.0, seconds - FREE_WARMUP)
        self.outcome.timings["charged"] = round(self._charged, 3)
        if self._charged >= self.limit.budget:
            raise Ended(
                "timeout",
                f"{seconds:.1f} s of work before the clock; {FREE_WARMUP:g} s are free, compilers apart, "
                f"and the rest is more than the budget of {self.limit.budget:g} s",
            )

    def _get_set(self) -> None:
        """All that the trainer needs before the recipe's bytes, so that nothing but the recipe is on the clock."""
        self.worker.get_ready()
        if self.run.compiled is not None:
            caches.copy(self.run.compiled, self.worker.caches)

    def train(self) -> None:
        """From the start of the clock to `trained`; timed here, whatever the trainer says."""
        self.run.phase("train")
        self.worker.on_progress = self._progress
        self._send_start()
        try:
            message = self._wait_for_end()
        finally:
            seconds = self._clock.elapsed()
            self.outcome.health |= self._watch.report()
        self.outcome.training_seconds = round(seconds, 3)
        self._take_facts(message)
        try:
            allowed = self.limit.overrun(message.number("median_step", 0.0, 1e9))
        except ProtocolError as error:
            raise self.worker.broke(error) from None
        over = seconds - self.limit.budget
        if over > allowed:
            raise Ended(
                "timeout", f"trained {seconds:.2f} s of {self.limit.budget:g} s; {allowed:.2f} s over is allowed"
            )
        self.run.lap("training")

    def _wait_for_end(self) -> Message:
        """Until `trained`; looks on the way take no time of the budget."""
        doing, prober = f"training ({self.limit.budget:g} s budget)", self.prober
        kinds = ("trained",) if prober is None else ("trained", "look")
        while True:
            elapsed, longest = self._clock.elapsed(), self.limit.longest()
            left = longest - elapsed
            if left <= 0:  # a try to stop it that failed is on its clock
                raise Ended("timeout", f"{doing} took {elapsed:.2f} s already, and {longest:.2f} s at most are allowed")
            message = self.worker.expect_any(kinds, left, doing)
            if message.kind == "trained" or prober is None:
                return message
            before = self._clock.paused
            prober.look(self.worker, message, self._clock, self._watch)
            self.run.mark += self._clock.paused - before
            doing = f"training ({self.limit.budget:g} s budget, from a look at {self._clock.elapsed():.3g} s on)"

    def hand_over(self) -> int:
        """The trainer's weights as a checked, read-only descriptor; its process tree is gone then."""
        self.worker.on_progress = None
        began = time.monotonic()
        allowed = self.limit.handover(self._declared)
        message = self.worker.expect(
            "handed", allowed, f"weights() of {self._declared / 1e6:.1f} MB after the training"
        )
        took = time.monotonic() - began
        self.worker.kill()
        if self.prober is not None:
            self.prober.close()
        known = {k: v for k, v in self.outcome.describe.items() if k in ("compiled", "dtype", "peak")}
        self.outcome.describe |= plain(message) | known
        peak = message.fields.get("peak_memory")
        reported = peak if isinstance(peak, int) and not isinstance(peak, bool) and 0 < peak < 2**50 else 0
        # A card's memory is its own: what the process took of the computer's says nothing of it.
        on_card = reported > 0 and self.run.settings.device.startswith("cuda")
        self.outcome.peak_memory = reported if on_card else max(reported, self.worker.child.peak_memory())
        try:
            return self._open(took)
        except WeightsError as error:
            raise Ended("invalid", str(error)) from None

    def _open(self, took: float) -> int:
        fd = weight_files.open_untrusted(self.weights_file, WEIGHTS_BYTES)
        try:
            size = os.fstat(fd).st_size
            allowed = self.limit.handover(size)
            if took > allowed:
                raise Ended(
                    "timeout", f"weights() took {took:.2f} s for {size / 1e6:.1f} MB; {allowed:.2f} s are allowed"
                )
            arrays = weight_files.read(fd)
            weight_files.check(arrays)
            self.outcome.params = weight_files.count(arrays)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _send_start(self) -> None:
        dataset = self.run.request.dataset
        fds = dataset.open_files("train")
        self._watch = Watch(self.worker.child.pid, self.run.settings.device)
        try:
            self._clock = Stopwatch(time.monotonic() - self._charged)
            fields = {
                "budget": self.limit.budget,
                "started": self._clock.started,
                "looks": list(self.prober.shares) if self.prober else [],
                "token_dtype": dataset.token_dtype.str,
            }
            if self.rehearsal is not None:
                request = self.run.request
                self.worker.begin(request.source, request.seed, None, rehearsed=True, weights=self._untrained)
            self.worker.send("start", fields, fds=fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _progress(self, message: Message) -> None:
        try:
            step, tokens = message.integer("step", 1), message.integer("tokens")
            loss = message.number("loss", -1e9, 1e9)
        except ProtocolError as error:
            raise self.worker.broke(error) from None
        seconds = self._clock.elapsed()
        self.outcome.add_to_curve(seconds, step, tokens, loss)
        self.outcome.steps, self.outcome.tokens, self.outcome.final_loss = step, tokens, loss
        before, served = self._last
        rate = max(0, tokens - served) / max(1e-3, seconds - before)
        self._last = (seconds, tokens)
        self.run.tell(
            Event(
                "progress",
                {
                    "step": step,
                    "loss": loss,
                    "tokens_per_second": rate,
                    "mfu": self._mfu(rate),
                    "remaining": max(0.0, self.limit.budget - seconds),
                    "fraction": min(1.0, seconds / self.limit.budget),
                },
            )
        )

    def _take_facts(self, message: Message) -> None:
        try:
            self.outcome.steps = message.integer("steps")
            if not self.outcome.steps:
                raise Ended(
                    "timeout",
                    f"no step was made: the {self.limit.budget:g} s of the budget had gone by when build() was done "
                    f"({self.outcome.training_seconds:.2f} s)",
                )
            self.outcome.tokens = message.integer("tokens")
            self.outcome.passes = round(message.number("passes", 0.0, 1e12), 4)
            self.outcome.final_loss = message.number("loss", -1e9, 1e9)
        except ProtocolError as error:
            raise self.worker.broke(error) from None
        self.outcome.add_to_curve(
            self.outcome.training_seconds, self.outcome.steps, self.outcome.tokens, self.outcome.final_loss
        )
        self.outcome.mfu = self._mfu(self.outcome.tokens / max(1e-3, self.outcome.training_seconds))

    def _mfu(self, tokens_per_second: float) -> float | None:
        if not self.run.peak_flops or not self.outcome.flops_per_token:
            return None
        return round(tokens_per_second * self.outcome.flops_per_token / self.run.peak_flops, 4)


def plain(message: Message) -> dict[str, Any]:
    """The `describe` of a message: display only, so what is not plain is left out."""
    given = message.fields.get("describe")
    if not isinstance(given, dict):
        return {}
    kept = list(given.items())[:64]
    return {
        printable(str(k)[:80]): printable(v[:400]) if isinstance(v, str) else v
        for k, v in kept
        if isinstance(v, (str, int, float, bool))
    }


def _flops(describe: dict[str, Any]) -> float:
    value = describe.get("flops_per_token")
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1e15 else 0.0
