"""What else a graphics card is doing: a game started in the middle of an experiment makes its score worthless.

The card is looked at through NVML while the trainer runs. Where the driver tells processes apart (Linux), other ones'
share of the card is read from it; under Windows' driver model (WDDM) and WSL2 it does not, so there only memory that
grew without us, the card's heat, its power limit and its clock speak. Everything comes through `Source`, so that tests
can present a card. Imports no torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

EVERY = 2.0  # seconds between two looks during a training
BUSY = 0.20  # share of the card that others may use on average before a score is worthless
TAKEN = 512 * 2**20  # bytes that others may take or give back during a training
SLOWED = 0.25  # share of the looks at which the card was held back by heat or a power brake
HOT = 90  # degrees Celsius
WAIT_EVERY = 15.0  # seconds between two looks at a card that is waited for
QUIET_LOOKS = 2  # in a row, before it counts as free
WAIT_MOST = 6 * 3600.0  # seconds


@dataclass(frozen=True)
class Look:
    """The card at one moment. None: the driver does not tell."""

    busy: float | None = None  # share of the time in which any kernel ran, ours included, 0..1
    others_busy: float | None = None  # the same of processes that are not ours
    used: int | None = None  # bytes taken on the card, by everybody
    ours: int | None = None  # bytes taken by our processes
    free: int | None = None
    clock: int | None = None  # MHz of the processors
    temperature: int | None = None  # degrees Celsius
    power_limit: float | None = None  # watts
    slowed: bool = False  # held back by heat or a power brake
    error: str = ""  # why nothing is known


class Source(Protocol):
    def look(self, device: str, ours: Sequence[int]) -> Look:
        """The card that `device` ("cuda:0") names; `ours`: process ids that are not others."""


class Watch:
    """From its making to `report()`: looks at the card every few seconds, in a thread of its own."""

    def __init__(self, device: str, ours: Callable[[], Sequence[int]], source: Source, every: float = EVERY) -> None:
        """`ours`: the process ids of the training, asked at each look."""
        self._device, self._ours, self._source, self._every = device, ours, source, every
        self._looks = [source.look(device, ours())]
        self._end = threading.Event()
        self._paused = False
        self._thread = threading.Thread(target=self._keep_looking, name="gpu-watch", daemon=True)
        self._thread.start()

    def _keep_looking(self) -> None:
        while not self._end.wait(self._every):
            seen = self._source.look(self._device, self._ours())
            if not self._paused:
                self._looks.append(seen)

    def pause(self) -> None:
        """Looks from now on do not count."""
        self._paused = True

    def go_on(self) -> None:
        self._paused = False

    def report(self) -> dict[str, Any]:
        """JSON: means and extremes of what was seen, and `tainted`, the reason why the score is worthless, or ""."""
        self._end.set()
        self._thread.join()
        return summary(self._looks)


def summary(looks: Sequence[Look]) -> dict[str, Any]:
    """What the looks of one training say."""
    first, known = looks[0], [look for look in looks if not look.error]
    if not known:
        return {"looks": 0, "error": first.error, "tainted": ""}
    others = [look.others_busy for look in known if look.others_busy is not None]
    hot = [look.temperature for look in known if look.temperature is not None]
    clocks = [look.clock for look in known if look.clock is not None]
    limits = [look.power_limit for look in known if look.power_limit is not None]
    theirs = [look.used - look.ours for look in known if look.used is not None and look.ours is not None]
    found = {
        "looks": len(known),
        "others_busy": round(fmean(others), 3) if others else None,
        "others_bytes": [theirs[0], min(theirs), max(theirs)] if theirs else None,
        "free": min((look.free for look in known if look.free is not None), default=None),
        "clock_mhz": [min(clocks), max(clocks)] if clocks else None,
        "temperature_c": max(hot, default=None),
        "power_limit_w": [min(limits), max(limits)] if limits else None,
        "slowed": round(sum(look.slowed for look in known) / len(known), 3),
    }
    return found | {"tainted": _why(found)}


def _why(found: dict[str, Any]) -> str:
    """Why a score beside this cannot be trusted, "" if it can."""
    if (found["others_busy"] or 0) > BUSY:
        return f"other programs kept the card {found['others_busy']:.0%} busy"
    if found["others_bytes"]:
        start, least, most = found["others_bytes"]
        if max(most - start, start - least) > TAKEN:
            return f"other programs' memory on the card went from {start >> 20} to {least >> 20}..{most >> 20} MiB"
    if found["power_limit_w"]:
        least, most = found["power_limit_w"]
        if least < 0.95 * most:
            return f"the card's power limit changed from {most:.0f} to {least:.0f} W"
    if found["slowed"] > SLOWED:
        heat = f" at {found['temperature_c']} °C" if found["temperature_c"] else ""
        return f"the card was held back by heat or its power supply{heat} for {found['slowed']:.0%} of the time"
    return ""


def wait_until_free(
    device: str,
    source: Source,
    say: Callable[[str], None],
    stop: threading.Event,
    most: float = WAIT_MOST,
    every: float = WAIT_EVERY,
) -> bool:
    """Wait until nothing but the desktop uses the card. False when it was still in use after `most` seconds.

    Nothing of ours runs meanwhile, so that here all that is busy is others', on every system.
    """
    began, told, quiet = time.monotonic(), "", 0
    while not stop.is_set():
        look = source.look(device, ())
        share = look.others_busy if look.others_busy is not None else look.busy
        busy = bool(share and share > BUSY)
        if look.error or not busy:
            quiet += 1
            if quiet >= (QUIET_LOOKS if told else 1) or look.error:
                return True
        else:
            quiet = 0
            text = f"the card is {share:.0%} busy with other programs: waits until it is free"
            if not told:
                say(text)
            told = text
            if time.monotonic() - began >= most:
                return False
        stop.wait(every)
    return True
