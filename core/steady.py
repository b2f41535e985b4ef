"""Was a run disturbed? It was if it departs from the lab's own steady state: what its first good run was measured in.

A machine that always has something else to do is comparable with itself; one that slept, or that is slower than it was,
is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

from core.apple import departure as apple_departure
from core.verdict import TAINTING_SHARE, crowded, taint

SLEPT = 1.0  # seconds
CLOCK_SET = 2.0  # seconds by which the time of day may be corrected meanwhile
STALLED = 0.05  # of the time that some process waits for memory, more than in the steady state
STARVED = 0.6  # of the cores that we had in the steady state, on a machine without an idle one
FULL = 0.9  # of all cores busy: none is idle
SLOWER = 0.05  # of the steps per second of the same recipe
QUARTILE = 2.2219  # standard deviation of a normal distribution over that quartile
POWER = 0.9  # of the power limit that a laptop's card ends with in the steady state
SPREADS = 4.0  # the same in relative standard deviations of step rates, where those are wider


@dataclass(frozen=True)
class Steady:
    """What a run is compared with. `health`: of the lab's first good run in this epoch, before there is one of its last
    run, None before there is any. `is_good`: whether that run was. `most_cores`: before there is a good run, the most
    cores that a run of ours had on average, as it is the best's run that others are judged by. `rates`: steps per
    second of the same recipe's good runs; `spread`: relative sd of such rates between runs of one recipe."""

    health: Mapping[str, Any] | None = None
    is_good: bool = False
    most_cores: float = 0.0
    rates: Sequence[float] = ()
    spread: float = 0.0


def departure(outcome: Mapping[str, Any], steady: Steady) -> str:
    """Why the run with this outcome is to be taken again, "" if it is not."""
    health: Mapping[str, Any] = outcome.get("health") or {}
    return _interrupted(health) or _unlike(health, steady) or _rate(rate(outcome), steady)


def can_be_others(outcome: Mapping[str, Any]) -> bool:
    """Whether a run without a score may be one by the fault of others, if it was disturbed: they make a recipe slow and
    take the memory that it needs, a driver fails, and a sleep may lose what a card had in its memory. What is broken by
    itself is not run again."""
    status, health = str(outcome.get("status", "crash")), outcome.get("health") or {}
    if status == "scored":
        return False
    not_its = bool(outcome.get("out_of_memory") or (health.get("card") or {}).get("fault"))
    return status in ("timeout", "hopeless") or (status == "crash" and not_its) or bool(slept(health))


def slept(health: Mapping[str, Any]) -> str:
    """That the machine slept in the run with this health, "" if it did not."""
    seconds = float(health.get("slept_seconds") or 0.0)
    return f"the machine slept for {seconds:.0f} s meanwhile" if seconds > SLEPT else ""


def rate(outcome: Mapping[str, Any]) -> float | None:
    """Steps per second; None where nothing was trained."""
    steps, seconds = float(outcome.get("steps") or 0), float(outcome.get("training_seconds") or 0.0)
    return steps / seconds if steps > 0 and seconds > 0 else None


def spread(groups: Sequence[Sequence[float]]) -> float:
    """The relative standard deviation of step rates within groups of one recipe each; 0 where nothing is known.

    From the first quartile of the differences of pairs (Q_n of Rousseeuw and Croux, JASA 1993, pooled over groups):
    disturbed runs among the others do not make it wide."""
    pairs = sorted(abs(math.log(a / b)) for group in groups for a, b in combinations(group, 2))
    return QUARTILE * pairs[(len(pairs) - 1) // 4] if pairs else 0.0


def _interrupted(health: Mapping[str, Any]) -> str:
    """What no steady state can contain."""
    if told := slept(health):
        return told
    moved = float(health.get("clock_set_seconds") or 0.0)
    if abs(moved) > CLOCK_SET:
        return f"the clock was set {'forward' if moved > 0 else 'back'} by {abs(moved):.0f} s meanwhile"
    return str((health.get("card") or {}).get("tainted") or "")


def _unlike(health: Mapping[str, Any], steady: Steady) -> str:
    """Before there is a good run a quiet machine is one, and so is one that is as busy as it was the last time."""
    disturbed = taint(health)
    if steady.health is None or (not steady.is_good and not disturbed):
        return disturbed
    return _changed(health, steady.health) or _starved(health, steady)


def _starved(now: Mapping[str, Any], steady: Steady) -> str:
    """Others that take all they get cannot be told by their cores: where we had half of one, and have a quarter now,
    they have hardly more. Nor is it told where a core idles: then a recipe that needs fewer has fewer. Beside a card
    the processor's share says little."""
    ours, others, cores = (float(now.get(name) or 0.0) for name in ("our_cores", "others_cores", "cores"))
    usual = max(float((steady.health or {}).get("our_cores") or 0.0), steady.most_cores)
    taken = others >= usual - ours and (not cores or ours + others >= FULL * cores)
    if now.get("card") or ours >= STARVED * usual or not taken:
        return ""
    before = "in this lab's steady state" if steady.is_good else "in an earlier run"
    return f"other processes kept {others:.1f} cores busy and left us {ours:.2f}, after {usual:.2f} {before}"


def _changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    ours = max(1.0, float(now.get("our_cores") or 0.0))
    others, usual = (float(h.get("others_cores") or 0.0) for h in (now, before))
    if abs(others - usual) > TAINTING_SHARE * ours and (crowded(now) or crowded(before)):
        loop = float(now.get("loop_cores") or 0.0)
        own = f" ({loop:.1f} of them the researcher and the loop)" if loop >= 0.1 else ""
        return f"other processes kept {others:.1f} cores busy{own}, and {usual:.1f} in this lab's steady state"
    stalled, usually = (float(h.get("memory_stalled") or 0.0) for h in (now, before))
    if stalled > usually + STALLED:
        return f"processes waited for memory {stalled:.0%} of the time, and {usually:.0%} in this lab's steady state"
    if now.get("on_battery") and before.get("on_battery") is False:
        return "the machine runs on its battery, unlike in this lab's steady state"
    return _power(now.get("card") or {}, before.get("card") or {}) or apple_departure(
        now.get("conditions") or {}, before.get("conditions") or {}
    )


def _power(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """A laptop's card: its limit swings within every run, and what it ends with is compared."""
    found, usual = (float(card.get("power_limit_late_w") or 0.0) for card in (now, before))
    if not now.get("laptop") or not found or found >= POWER * usual:
        return ""
    return f"the card's power limit was {found:.0f} W at the end, and {usual:.0f} W in this lab's steady state"


def _rate(found: float | None, steady: Steady) -> str:
    if found is None or not steady.rates:
        return ""
    usual = median(steady.rates)
    off = found / usual - 1
    if abs(off) <= max(SLOWER, SPREADS * steady.spread):
        return ""
    way = "slower" if off < 0 else "faster"
    return f"it trained {abs(off):.0%} {way} than the same recipe before ({found:.4g} steps/s, {usual:.4g} before)"
