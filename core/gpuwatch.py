"""What else a graphics card is doing: a game started in the middle of an experiment makes its score worthless.

The card is looked at through NVML while the trainer runs. Where the driver tells processes apart (Linux), other ones'
share of the card is read from it. Under Windows' driver model (WDDM) it does not: there Windows' own counters tell who
keeps the card busy (core/wddm.py). Under WSL2 and in some containers nobody does. Whose the memory is stays unknown in
all three, so there all that is taken may not grow by more than our own training could. Heat, a power brake and the
power limit speak everywhere. Everything comes through `Source`, so that tests can present a card. Imports no torch.

A laptop's power limit moves with its load (Dynamic Boost), so there a lower one is none of others' doing unless the
lab's steady state was better (core/steady.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Protocol

from core.errors import UserError

EVERY = 2.0  # seconds between two looks during a training
BUSY = 0.20  # share of the card that others may use on average before a score is worthless
MUCH = 0.50  # share of the card that others may use for as much of the time as the next line says: a game near the end
MUCH_OF_TIME = 0.10  # half of the card for a tenth of the time is a twentieth of the steps, as core/steady.py has it
BLIPS = 1  # looks that find more than MUCH and say nothing: a desktop draws for a moment
TAKEN = 512 * 2**20  # bytes that others may take or give back during a training
OUR_GROWTH = 1 / 8  # of what is taken after the warm-up: our allocator's gaps may grow by that
SLOWED = 0.25  # share of the looks at which the card was held back by heat or a power brake
FELL = 0.95  # of the power limit that there was: what lasts to the end below that counts
WAIT_EVERY = 15.0  # seconds between two looks at a card that is waited for
LINGERS = 1.5  # seconds after which a driver's figure, of the last second at most, no longer contains what has ended
SLICE = 0.2  # seconds: on Windows a longer wait of the main thread would hold Ctrl-C up
QUIET_LOOKS = 2  # in a row, before it counts as free
WAIT_MOST = 6 * 3600.0  # seconds
CLEARLY = 0.9  # of the memory that is needed: what an allocator keeps is not all in use
NAMED_ALIKE = ("rtx 20", "gtx 16")  # generations whose laptop cards may have a desktop card's name
# PCI's device ids of these laptop cards: "Mobile" in pci.ids (pciutils/pciids, August 2026). NVIDIA's own list of chips
# (README of open-gpu-kernel-modules 595.45) has most of them by a desktop card's name: 1F11 is an RTX 2060 as 1F08 is.
TURING_MOBILE = frozenset(
    {
        *(0x1E90, 0x1E91, 0x1E93, 0x1ED0, 0x1ED1, 0x1ED3),
        *(0x1F10, 0x1F11, 0x1F12, 0x1F14, 0x1F15, 0x1F50, 0x1F51, 0x1F54, 0x1F55),
        *(0x1F91, 0x1F92, 0x1F94, 0x1F95, 0x1F96, 0x1F99, 0x1F9D, 0x1FD9, 0x1FDD, 0x2191, 0x2192, 0x21D1),
    }
)
TOLD_LAPTOP = "AUTORESEARCH_CARD_LAPTOP"  # "1" in a child's environment: its card is a laptop's
LAPTOP = ("laptop", "max-q", "mobile", "notebook")  # in the names of cards
GIB = 2**30


@dataclass(frozen=True)
class Look:
    """The card at one moment. None: the driver does not tell."""

    busy: float | None = None  # share of the time in which any kernel ran, ours included, 0..1
    others_busy: float | None = None  # the same of processes that are not ours
    used: int | None = None  # bytes taken on the card, by everybody
    ours: int | None = None  # bytes taken by our processes
    free: int | None = None
    clock: int | None = None  # MHz of the processors
    clock_most: int | None = None  # MHz that they could have
    temperature: int | None = None  # degrees Celsius
    power_limit: float | None = None  # watts
    laptop: bool = False
    slowed: bool = False  # held back by heat or a power brake
    untold: str = ""  # why others' share is not known, where there is a way to know it
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
            began_paused = self._paused
            seen = self._source.look(self._device, self._ours())
            if not began_paused and not self._paused:
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
        "others_much": _much(others),
        "others_bytes": [theirs[0], min(theirs), max(theirs)] if theirs else None,
        "all_bytes": None if theirs else _all_bytes(known),
        "free": min((look.free for look in known if look.free is not None), default=None),
        "clock_mhz": [min(clocks), max(clocks)] if clocks else None,
        "temperature_c": max(hot, default=None),
        "power_limit_w": [min(limits), max(limits)] if limits else None,
        "power_limit_late_w": max(_late(limits), default=None),
        "power_fell": _fell(limits),
        "laptop": any(look.laptop for look in known),
        "slowed": round(sum(look.slowed for look in known) / len(known), 3),
    }
    untold = next((look.untold for look in known if look.untold), "")
    return found | ({"untold": untold} if untold else {}) | {"tainted": _why(found)}


def _much(others: Sequence[float]) -> float | None:
    """Share of the looks at which others used more than MUCH of the card."""
    much = sum(share > MUCH for share in others)
    return (round(much / len(others), 3) if much > BLIPS else 0.0) if others else None


def _late(values: Sequence[float]) -> Sequence[float]:
    """The last quarter, the last one at least."""
    return values[-max(1, len(values) // 4) :] if values else []


def _fell(limits: Sequence[float]) -> list[float] | None:
    """[before, after] of a power limit that was lowered and stayed so: what swings with the load comes up again."""
    if len(limits) < 2:
        return None
    before, after = median(limits[: len(limits) // 2]), max(_late(limits))
    return [before, after] if after < FELL * before else None


def _all_bytes(looks: Sequence[Look]) -> list[int] | None:
    """What everybody had taken at the first look, the most since, and how far that may grow by our training alone.

    The watch begins after the warm-up, when our allocator has what its largest step takes and keeps it. Later it grows
    by gaps between blocks only. On a card that is nearly full others cannot take much: half of what was free counts.
    """
    used = [look.used for look in looks if look.used is not None]
    if not used:
        return None
    free = next((look.free for look in looks if look.free is not None), used[0])
    return [used[0], max(used), max(TAKEN, min(int(OUR_GROWTH * used[0]), free // 2))]


def _why(found: dict[str, Any]) -> str:
    """Why a score beside this cannot be trusted, "" if it can."""
    if (found["others_busy"] or 0) > BUSY:
        return f"other programs kept the card {found['others_busy']:.0%} busy"
    if (found["others_much"] or 0) > MUCH_OF_TIME:
        return f"other programs kept the card more than {MUCH:.0%} busy for {found['others_much']:.0%} of the time"
    if found["others_bytes"]:
        start, least, most = found["others_bytes"]
        if max(most - start, start - least) > TAKEN:
            return f"other programs' memory on the card went from {start >> 20} to {least >> 20}..{most >> 20} MiB"
    if found["all_bytes"]:
        start, most, growth = found["all_bytes"]
        if most - start > growth:
            grown = f"{start >> 20} to {most >> 20} MiB"
            return f"memory taken on the card went from {grown}, more than this training's own could grow"
    if found["power_fell"] and not found["laptop"]:
        return "the card's power limit changed from {:.0f} to {:.0f} W".format(*found["power_fell"])
    if found["slowed"] > SLOWED:
        heat = f" at {found['temperature_c']} °C" if found["temperature_c"] else ""
        return f"the card was held back by heat or its power supply{heat} for {found['slowed']:.0%} of the time"
    return ""


def require_free(
    device: str,
    source: Source,
    say: Callable[[str], None],
    stop: threading.Event,
    most: float = WAIT_MOST,
    every: float = WAIT_EVERY,
    needed: int = 0,
) -> None:
    """`wait_until_free`, and `UserError` where that was in vain."""
    if not wait_until_free(device, source, say, stop, most, every, needed=needed):
        why = in_use(source.look(device, ()), needed)
        raise UserError(
            f"other programs have kept the card busy or full for {most / 3600:.1f} h" + (f": {why}" if why else ""),
            "end them (nvidia-smi lists them), then `autoresearch run`: nothing is lost",
        )


def wait_until_free(
    device: str,
    source: Source,
    say: Callable[[str], None],
    stop: threading.Event,
    most: float = WAIT_MOST,
    every: float = WAIT_EVERY,
    lingers: float = LINGERS,
    needed: int = 0,
) -> bool:
    """Wait until nothing but the desktop uses the card, and `needed` bytes of it are as good as free (0: not known).
    False when it was still in use after `most` seconds."""
    began, told, quiet = time.monotonic(), "", 0
    why = in_use_now(device, source, stop, lingers, needed)
    while not stop.is_set():
        if not why:
            quiet += 1
            if quiet >= (QUIET_LOOKS if told else 1):
                return True
        else:
            quiet = 0
            if not told:
                told = f"{why}: waits until it is free"
                say(told)
            if time.monotonic() - began >= most:
                return False
        wait(stop, every)
        why = in_use(source.look(device, ()), needed)
    return True


def in_use_now(
    device: str,
    source: Source,
    stop: threading.Event,
    lingers: float = LINGERS,
    needed: int = 0,
    before: Look | None = None,
) -> str:
    """Why the card is not free, "" if it is; for a moment at which nothing of ours runs. `before`: an earlier such
    moment, since which others may have taken memory.

    So here all that is busy is others', on every system. But our last child may have ended just now, and its work is in
    the driver's figure for a second more: a card in use is looked at twice.
    """

    def look() -> str:
        now = source.look(device, ())
        return in_use(now, needed) or (taken_since(before, now) if before else "")

    if look():
        wait(stop, lingers)
        return look()
    return ""


def taken_since(before: Look, now: Look) -> str:
    """What others have taken of the card's memory between two looks beside which nothing of ours runs, "" for little:
    what is left may do for a run and did not when it ran beside what they took."""
    if before.free is None or now.free is None or before.free - now.free <= TAKEN:
        return ""
    return f"other programs took {(before.free - now.free) >> 20} MiB of the card meanwhile"


def in_use(look: Look, needed: int = 0) -> str:
    """What others do with the card that is seen at this moment, "" where they leave it alone or nothing is known."""
    if (share := used_by_others(look)) > BUSY:
        return f"the card is {share:.0%} busy with other programs"
    if not look.error and look.free is not None and look.free < CLEARLY * needed:
        return f"other programs leave {look.free / GIB:.1f} GiB of the card, and {needed / GIB:.1f} GiB are needed"
    return ""


def is_laptop(card: str, product: int = 0, battery: bool = False) -> bool:
    """By the card's name: "NVIDIA GeForce RTX 4060 Laptop GPU", "NVIDIA GeForce RTX 2080 with Max-Q Design". Others of
    that generation have a desktop card's name in a laptop too: PCI's device id tells of these (0: not known), else a
    battery in the machine, which may be a mouse's or a UPS's and says nothing of other generations."""
    name = card.lower()
    alike = any(word in name for word in NAMED_ALIKE)
    return any(word in name for word in LAPTOP) or (alike and (product in TURING_MOBILE if product else battery))


def used_by_others(look: Look) -> float:
    """The share of what the card can do that others use, while nothing of ours runs; 0 where nothing is known.

    Kernels of a desktop or a film run most of the time on a card that has slowed its clock down for them: 40 % of the
    time at a sixth of its clock is 7 % of the card. A game is at full clock.
    """
    share = look.others_busy if look.others_busy is not None else look.busy
    if look.error or share is None:
        return 0.0
    slow = look.clock / look.clock_most if look.clock and look.clock_most else 1.0
    return share * min(1.0, slow)


def wait(stop: threading.Event, seconds: float) -> None:
    """Until a stop, for so many seconds at most, and never for long at once: Ctrl-C has to get through."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not stop.wait(min(SLICE, left)):
        pass
