"""The budget: how far it is used, whether one more step fits into it, and what overrun is still allowed.

All times are seconds of `time.monotonic()`, which has one origin for all processes of a machine: the referee
starts the clock and tells the trainer when that was. The trainer's own view only steers its loop. What counts
is `Limit`, which the referee applies from outside.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

SCHEDULING_SLACK = 0.5  # seconds that a loaded machine may take to wake the trainer, and the referee
OVERRUN_SHARE = 0.01  # of the budget
LONG_STEP_SHARE = 0.02  # of the budget: the most that "one median step" may add
HANDOVER_BASE = 0.5  # seconds for weights() whatever their size
HANDOVER_RATE = 200e6  # bytes per second, device to file
HANDOVER_SHARE = 0.02  # of the budget: the most that size may add, so that padding the weights buys no training


class Budget:
    """The trainer's view of the clock."""

    def __init__(self, seconds: float, started: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.started = started
        self._now = now

    def elapsed(self) -> float:
        return self._now() - self.started

    def pause(self, seconds: float) -> None:
        """The clock stood still for so long, says the referee."""
        self.started += seconds

    def progress(self) -> float:
        """The used share of the budget, 0..1: what schedules are functions of."""
        return min(1.0, max(0.0, self.elapsed() / self.seconds))

    def left(self) -> float:
        return self.seconds - self.elapsed()


class StepTimes:
    """How long a step takes, and so whether one more would end within the budget."""

    RECENT = 20

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.RECENT)

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)

    def median(self) -> float:
        return statistics.median(self._recent) if self._recent else 0.0

    def expected(self) -> float:
        """The second longest of the recent steps: a recipe whose every tenth step is heavy is seen for what it
        is, and one hiccup of the machine does not end the training early. 0 before the first step."""
        ordered = sorted(self._recent)
        return ordered[-2] if len(ordered) >= 3 else (ordered[-1] if ordered else 0.0)

    def fits(self, left: float, steps: int = 1) -> bool:
        """Whether so many more steps would end within `left` seconds. The first step is always tried."""
        return left > 0 and (not self._recent or steps * self.expected() <= left)


class Stopwatch:
    """The referee's clock of a training. It stands still only while the trainer is known to."""

    def __init__(self, started: float, now: Callable[[], float] = time.monotonic) -> None:
        self.started = started
        self.paused = 0.0  # seconds in which it stood still so far
        self._now = now
        self._stopped: float | None = None

    def elapsed(self) -> float:
        now = self._now() if self._stopped is None else self._stopped
        return now - self.started - self.paused

    def stop(self) -> None:
        if self._stopped is None:
            self._stopped = self._now()

    def never_mind(self) -> None:
        """As if it had not been stopped."""
        self._stopped = None

    def go_on(self) -> float:
        """The seconds for which it stood still just now."""
        if self._stopped is None:
            return 0.0
        seconds, self._stopped = self._now() - self._stopped, None
        self.paused += seconds
        return seconds


@dataclass(frozen=True)
class Limit:
    """What the referee allows a trainer beyond its budget (seconds)."""

    budget: float

    def overrun(self, median_step: float) -> float:
        """1 % of the budget or one median step, whichever is more.

        The median is the trainer's claim, so it counts for 2 % of the budget at most: with two steps of 0.49 and
        0.99 budgets a recipe would otherwise train for half as long again.
        """
        step = min(max(0.0, median_step), LONG_STEP_SHARE * self.budget)
        return max(OVERRUN_SHARE * self.budget, step, SCHEDULING_SLACK)

    def longest(self) -> float:
        """After so many seconds nothing that the trainer could say would make it a score."""
        return self.budget + self.overrun(self.budget)

    def handover(self, nbytes: int) -> float:
        """Time for weights() and writing them; training on in there must not pay."""
        return HANDOVER_BASE + min(nbytes / HANDOVER_RATE, HANDOVER_SHARE * self.budget)
