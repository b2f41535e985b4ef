"""How the machine was while it measured, from the health that is kept with every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from console.rows import Row
from core.ledger import LedgerEvent, Sample


@dataclass(frozen=True)
class Reading:
    """One quantity over a night's runs."""

    name: str
    unit: str
    low: float
    middle: float
    high: float
    runs: int


@dataclass(frozen=True)
class Machine:
    devices: Sequence[str]  # that were measured on, each once: cards with driver and torch, processors with the system
    runs: int  # with any health at all
    tainted: int  # runs that were disturbed, all those on the record
    experiments: int  # to which these belong; runs with a change left out belong to none
    again: int  # how often a run was dropped and repeated: none of these is on the record
    reasons: Sequence[str]  # why runs were disturbed or dropped, each once
    readings: Sequence[Reading]
    speed: tuple[float, float] | None  # tokens/s of the best's first and last run, where it ran again


# (name, unit, where it stands in a run's health; a number is a place in a list)
QUANTITIES: tuple[tuple[str, str, tuple[str | int, ...]], ...] = (
    ("cores kept busy by others", "", ("others_cores",)),
    ("processor temperature", "°C", ("temperature_c",)),
    ("processor clock", "MHz", ("cpu_mhz_after",)),
    ("card kept busy by others", "", ("card", "others_busy")),
    ("card temperature, highest", "°C", ("card", "temperature_c")),
    ("card clock, lowest", "MHz", ("card", "clock_mhz", 0)),
    ("thermal pressure, 0 is none", "", ("conditions", "thermal")),
    ("memory pressure, 0 is none", "", ("conditions", "memory_pressure")),
)


def machine(
    rows: Sequence[Row],
    samples: Mapping[int, Sequence[Sample]],
    events: Sequence[LedgerEvent],
    ablations: Sequence[Sample] = (),
) -> Machine:
    """`samples` by experiment; `ablations`: runs of what is no experiment."""
    outcomes = [o for r in rows for o in _outcomes(r, samples.get(r.number, ()))]
    outcomes += [dict(s.outcome) for s in ablations if s.outcome]
    healths = [dict(o.get("health") or {}) for o in outcomes if o.get("health")]
    readings = [r for name, unit, path in QUANTITIES if (r := _reading(name, unit, path, healths))]
    disturbed = [s for r in rows for s in samples.get(r.number, ()) if s.tainted]
    bare = [r for r in rows if r.tainted and not samples.get(r.number)]  # failed, or of an early ledger
    left_out = [s for s in ablations if s.tainted]
    return Machine(
        devices=_devices([*(s for r in rows for s in samples.get(r.number, ())), *ablations]),
        runs=len(healths),
        tainted=len(disturbed) + len(bare) + len(left_out),
        experiments=len({s.number for s in disturbed}) + len(bare),
        again=sum(e.kind == "requeued" for e in events),
        reasons=_reasons([*(s.outcome or {} for s in [*disturbed, *left_out]), *(r.outcome for r in bare)], events),
        readings=readings,
        speed=_speed(rows, samples),
    )


def _devices(runs: Sequence[Sample]) -> list[str]:
    """Those that the runs' versions name, oldest first."""
    named = [_device(s.versions) for s in sorted(runs, key=lambda s: s.id)]
    return list(dict.fromkeys(name for name in named if name))


def _device(versions: Mapping[str, Any]) -> str:
    """ "" for versions of an early ledger, which name neither."""
    if card := versions.get("card"):
        return f"{card}, driver {versions.get('driver')}, torch {versions.get('torch')}"
    processor = versions.get("processor")
    return f"{processor}, {versions.get('os')}" if processor else ""


def _outcomes(r: Row, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    found = [dict(s.outcome) for s in samples if s.outcome]
    return found or ([r.outcome] if r.outcome else [])


def _reading(name: str, unit: str, path: tuple[str | int, ...], healths: Sequence[Mapping[str, Any]]) -> Reading | None:
    values = [v for h in healths if (v := _at(h, path)) is not None]
    return Reading(name, unit, min(values), median(values), max(values), len(values)) if values else None


def _at(health: Any, path: tuple[str | int, ...]) -> float | None:
    for key in path:
        if isinstance(key, int):
            health = health[key] if isinstance(health, Sequence) and len(health) > key else None
        else:
            health = health.get(key) if isinstance(health, Mapping) else None
    return float(health) if isinstance(health, int | float) and not isinstance(health, bool) else None


def _reasons(disturbed: Sequence[Mapping[str, Any]], events: Sequence[LedgerEvent]) -> list[str]:
    """`disturbed`: outcomes, each with its reason as the loop wrote it down."""
    found = [str((outcome.get("health") or {}).get("disturbed") or "") for outcome in disturbed]
    found += [e.text for e in events if e.kind == "requeued"]
    return list(dict.fromkeys(text for text in found if text))


def _speed(rows: Sequence[Row], samples: Mapping[int, Sequence[Sample]]) -> tuple[float, float] | None:
    """Of the recipe that ran most often: the same work, so another speed is another machine."""
    many = max(samples.values(), key=lambda of_one: sum(bool(s.outcome) for s in of_one), default=())
    rates = [_rate(s.outcome) for s in many if s.outcome]
    known = [r for r in rates if r]
    return (known[0], known[-1]) if len(known) > 1 else None


def _rate(outcome: Mapping[str, Any] | None) -> float:
    tokens, seconds = (outcome or {}).get("tokens") or 0, (outcome or {}).get("training_seconds") or 0.0
    return tokens / seconds if seconds else 0.0
