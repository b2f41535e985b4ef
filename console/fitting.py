"""How a batch goes through a small card: the plan whose measured step is fastest, remembered for this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from core.errors import UserError
from core.files import replace_file
from core.hardware import Hardware
from core.paths import home
from core.verdict import taint

TRIED = 3  # plans that are timed; the likeliest to be fast come first
REMEMBERED = 64  # choices
NEAR = 2  # layers: what is free differs by their memory from day to day
SECONDS = "seconds_per_step"  # as a timing calls it

Constants = Mapping[str, Any]


def key(hardware: Hardware, versions: Mapping[str, Any], shape: Mapping[str, Any]) -> str:
    """Changes with the card, its driver, torch, and everything that decides about memory and speed."""
    gpu = hardware.gpus[0] if hardware.gpus else None
    card = [gpu.uuid, gpu.name, gpu.driver, gpu.memory] if gpu else []
    text = json.dumps([card, hardware.os, dict(versions), dict(shape)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def choose(
    plans: Sequence[Constants],
    measure: Callable[[Constants], Mapping[str, Any]],
    say: Callable[[str], None],
    known_as: str,
) -> tuple[dict[str, Any], float | None]:
    """The constants of the fastest of the first plans, and seconds of its step (None: remembered by an older version,
    without them). `measure`: what a trial with these constants found.

    A plan under which the recipe ran out of memory and went on with fewer rows counts as what it went on with. Nothing
    is remembered of a choice for which a trial was disturbed.
    """
    found = _remembered().get(known_as)
    if isinstance(found, dict):
        seconds = found.pop(SECONDS, None)
        if any(_still(found, plan) for plan in plans):
            say(f"  {told(found)}, as measured on this card before")
            return found, seconds
    times: dict[str, float] = {}
    real: dict[str, dict[str, Any]] = {}
    failed: UserError | None = None
    disturbed = False
    for plan in plans[:TRIED]:
        try:
            facts = measure(plan)
        except UserError as error:
            failed = error
            say(f"  {told(plan)} does not run: {error.fact[:120]}")
            continue
        disturbed = disturbed or bool(taint(facts.get("health") or {}))
        went = _went_on_with(plan, facts.get("describe") or {})
        if went != dict(plan):
            say(f"  out of memory with {told(plan)}; it went on with {told(went)}")
        name = json.dumps(went, sort_keys=True)
        times[name] = min(times.get(name, float("inf")), float(facts[SECONDS]))
        real[name] = went
    if failed and not times:
        raise failed
    best = min(times, key=times.__getitem__)
    others = ", ".join(f"{t * 1e3:.0f} ms with {told(real[n])}" for n, t in times.items() if n != best)
    say(f"  {told(real[best])}: {times[best] * 1e3:.0f} ms a step" + (f"; {others}" if others else ""))
    if not disturbed:
        _remember(known_as, {**real[best], SECONDS: times[best]})
    return real[best], times[best]


def shared(facts: Mapping[str, Any]) -> str:
    """Why a timing says nothing of this machine, as others used its card; "" where none did."""
    return str(((facts.get("health") or {}).get("card") or {}).get("tainted") or "")


def told(plan: Constants) -> str:
    rows, how, more = plan["DEVICE_BATCH_SIZE"], plan["RECOMPUTE"], plan["RECOMPUTE_MORE"]
    again = {"nothing": "nothing", "hidden": "all MLPs", "layer": "all layers"}[how]
    if more and how == "nothing":
        again = f"{more} MLP{'s' if more > 1 else ''}"
    elif more and how == "hidden":
        again = f"{more} layer{'s' if more > 1 else ''} and the other MLPs"
    return f"{rows} row{'s' if rows > 1 else ''} at once, {again} made again"


def _still(found: Constants, plan: Constants) -> bool:
    """Whether what was the fastest fits now: then as much is made again as has to be now, or a little more."""
    if found.keys() != plan.keys():  # of an older version
        return False
    alike = all(found[name] == plan[name] for name in ("DEVICE_BATCH_SIZE", "RECOMPUTE"))
    return alike and 0 <= found["RECOMPUTE_MORE"] - plan["RECOMPUTE_MORE"] <= NEAR


def _went_on_with(plan: Constants, describe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "DEVICE_BATCH_SIZE": describe.get("rows_at_once", plan["DEVICE_BATCH_SIZE"]),
        "RECOMPUTE": describe.get("recompute", plan["RECOMPUTE"]),
        "RECOMPUTE_MORE": describe.get("recompute_more", plan["RECOMPUTE_MORE"]),
    }


def _place() -> Any:
    return home() / "fits.json"


def _remembered() -> dict[str, Any]:
    try:
        found = json.loads(_place().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or one that was cut off
        return {}
    return found if isinstance(found, dict) else {}


def _remember(known_as: str, plan: Constants) -> None:
    remembered = {**dict(list(_remembered().items())[-REMEMBERED + 1 :]), known_as: dict(plan)}
    replace_file(_place(), json.dumps(remembered, indent=1).encode())
