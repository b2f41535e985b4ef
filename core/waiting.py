"""How long to wait for a researcher that cannot answer now; the lowest priority for one that thinks beside a clock."""

from __future__ import annotations

import os
import random
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

SHORTEST = 1.0  # seconds of a wait that nobody told us the length of
FIRST, MOST = 5.0, 600.0  # seconds: the first of these is at most so long, and none is longer
LONGEST = 6 * 3600.0  # seconds that are waited at once, whatever was told; then it is asked again
LOWEST = 19  # of the priorities that nice knows


@dataclass
class Patience:
    """As long as told, with a little on top; not told: exponential backoff with full jitter (Brooker, "Exponential
    Backoff and Jitter", AWS Architecture Blog, 2015), never under SHORTEST. Told less than that is not told."""

    _dice: random.Random = field(default_factory=random.Random)
    _in_a_row: int = 0

    def seconds(self, told: float | None) -> float:
        if told is not None and told >= SHORTEST:
            return min(told, LONGEST) + self._dice.uniform(0.0, 1.0)
        most = min(MOST, FIRST * 2**self._in_a_row)
        self._in_a_row = min(self._in_a_row + 1, 16)
        return self._dice.uniform(SHORTEST, most)


def lower_priority() -> None:
    """The lowest for processor and disk, for this thread and what it starts from now on.

    Linux keeps both per thread. On macOS the thread counts as background work; on Windows likewise, and there, as on
    macOS, a process that is started has to be lowered by whoever starts it.
    """
    with suppress(OSError, psutil.Error, AttributeError):  # a system that refuses lets it think at its own priority
        if sys.platform == "linux":
            here = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, here, LOWEST)
            psutil.Process(here).ionice(psutil.IOPRIO_CLASS_IDLE)
        elif sys.platform == "darwin":
            os.setpriority(3, 0, 0x1000)  # PRIO_DARWIN_THREAD, PRIO_DARWIN_BG of <sys/resource.h>
        elif sys.platform == "win32":
            import ctypes

            kernel = ctypes.windll.kernel32
            kernel.SetThreadPriority(kernel.GetCurrentThread(), 0x10000)  # THREAD_MODE_BACKGROUND_BEGIN
