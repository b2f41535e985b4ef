"""The first Ctrl-C, SIGTERM or SIGHUP asks for an end; a second Ctrl-C ends at once, whatever is going on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Asked:
    """Which signal asked for the end; 0: none."""

    def __init__(self) -> None:
        self.signal = 0

    @property
    def status(self) -> int:
        """Exit status as shells count it: 128 + signal; 0 where none came."""
        return 128 + self.signal if self.signal else 0

    @property
    def name(self) -> str:
        if not self.signal:
            return ""
        return "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name


@contextmanager
def ends(stop: Callable[[], None]) -> Iterator[Asked]:
    """Inside the block, signals call `stop` instead of ending the process. Main thread only."""
    asked = Asked()

    def on_signal(number: int, _: FrameType | None) -> None:
        if asked.signal:
            raise KeyboardInterrupt
        asked.signal = number
        stop()

    wanted = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` has it ignored
        wanted.append(signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in wanted}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
