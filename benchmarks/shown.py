"""What tables, pages and plots show of results: the series to be compared, their figures as text, and what is noise.

A series is one backend on one machine. Every figure that was measured several times is shown as its median with the
lowest and the highest. What is noise is `benchmarks.comparing`'s to say.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import comparing
from benchmarks.results import BackendResult, Result
from console.words import count, duration, size

NONE = "-"


@dataclass(frozen=True)
class Series:
    """One backend on one machine that did the work."""

    name: str  # "mlx", or "B mlx" where there are several machines
    place: str  # the machine's line: "A: AMD EPYC, 2 cores, 24 GiB"
    result: Result
    backend: BackendResult


def places(results: Sequence[Result]) -> list[str]:
    """The machines' lines, with a letter before each where there are several."""
    if len(results) == 1:
        return [results[0].machine.label]
    return [f"{comparing.letter(i)}: {r.machine.label}" for i, r in enumerate(results)]


def series(results: Sequence[Result], every: bool = False) -> list[Series]:
    """Those that did the same work; with `every` also those that did not, crashed or are not there."""
    found = []
    for i, (result, place) in enumerate(zip(results, places(results), strict=True)):
        for backend in result.backends if every else result.measured():
            prefix = f"{comparing.letter(i)} " if len(results) > 1 else ""
            found.append(Series(prefix + shown_name(backend), place, result, backend))
    return found


def shown_name(backend: BackendResult) -> str:
    usual = backend.recipe in ("shipped", "its own")  # upstream runs its own
    return backend.name if usual else f"{backend.name} ({backend.recipe})"


def works(results: Sequence[Result]) -> list[list[Result]]:
    """Results of the same work together, in the order in which they came."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.work_id, []).append(result)
    return list(groups.values())


# --- figures --------------------------------------------------------------------------------------


def spread(values: Sequence[float], spell: Callable[[float], str]) -> str:
    """'31.2k (30.9k to 31.5k)'; a single one without a range, none as '-'."""
    if not values:
        return NONE
    middle = spell(statistics.median(values))
    low, high = spell(min(values)), spell(max(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def speeds(one: Series) -> list[float]:
    """Tokens per second of each repeat."""
    return one.backend.speed.tokens_per_second() if one.backend.speed else []


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else duration(value)


def figure(value: float) -> str:
    return f"{value:.4f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def joules(value: float) -> str:
    """Of a thousand tokens."""
    return f"{1e3 * value:.3g} J"


@dataclass(frozen=True)
class Column:
    """What it is called, the text of a series, and whether it is a number (set to the right)."""

    head: str
    text: Callable[[Series], str]
    number: bool = True


def _of_speed(name: str, spell: Callable[[float], str]) -> Callable[[Series], str]:
    return lambda s: spread(getattr(s.backend.speed, name), spell) if s.backend.speed else NONE


def _compiling(s: Series) -> str:
    """The first process compiles, later ones find what it has left."""
    if s.backend.speed is None:
        return NONE
    first, *later = s.backend.speed.compile_seconds
    return f"{seconds(first)}, then {seconds(statistics.median(later))}" if later else seconds(first)


def _fixed(s: Series) -> str:
    return f"{s.backend.fixed.loss:.4f}" if s.backend.fixed else NONE


def _scoring(s: Series) -> str:
    found = s.backend.scoring_seconds()
    return seconds(found) if found is not None else NONE


def _mfu(s: Series) -> str:
    share = s.backend.mfu()
    return percent(share) if share is not None else NONE


SPEED = [
    Column("tokens/s", lambda s: spread(speeds(s), count)),
    Column("step", _of_speed("step_seconds", milliseconds)),
    Column("of the matmul peak", _mfu),
    Column("peak memory", _of_speed("peak_memory", size)),
]
LEARNT = [
    Column("val_bpb", lambda s: spread(s.backend.bpbs(), figure)),
    Column("seeds", lambda s: str(len(s.backend.bpbs())) if s.backend.scores else NONE),
    Column("loss after the fixed steps", _fixed),
]
WAITS = [
    Column("start", _of_speed("startup_seconds", seconds)),
    Column("build", _of_speed("build_seconds", seconds)),
    Column("compile", _compiling),
    Column("scoring", _scoring),
    Column("tokens/s in scoring", lambda s: spread(s.backend.speed.scoring_rates if s.backend.speed else [], count)),
]


def _night(s: Series) -> str:
    found = s.backend.experiments_per_night()
    return f"{found:.0f}" if found is not None else NONE


def _energy(s: Series) -> str:
    energy = s.backend.energy
    return joules(energy.joules_per_token) if energy and energy.joules_per_token is not None else "not told"


def _watts(s: Series) -> str:
    energy = s.backend.energy
    return f"{energy.watts:.0f} W" if energy and energy.watts is not None else NONE


def _trained_on(s: Series) -> str:
    found = s.backend.experiments_per_night()
    return count(found * 300 * statistics.median(speeds(s))) if found and speeds(s) else NONE


NIGHT = [
    Column("runs in 8 h", _night),
    Column("tokens in 8 h", _trained_on),
    Column("tokens/s", lambda s: spread(speeds(s), count)),
    Column("energy per 1000 tokens", _energy),
    Column("power", _watts),
]


def named(results: Sequence[Result]) -> list[Column]:
    """The columns that say which series a line is."""
    several = len(results) > 1
    machine = [Column("machine", lambda s: s.place, number=False)] if several else []
    kind = Column("backend", lambda s: shown_name(s.backend), number=False)
    return [*machine, kind, Column("dtype", _dtype, number=False)]


def _dtype(s: Series) -> str:
    elsewhere = s.backend.device and not s.backend.device.startswith(s.backend.name)
    return f"{s.backend.dtype} on {s.backend.device}" if elsewhere else s.backend.dtype or NONE


def grid(found: Sequence[Series], columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of a table, all text."""
    return [c.head for c in columns], [[c.text(one) for c in columns] for one in found]


# --- against the first ------------------------------------------------------------------------------

VERDICTS = {"better": "better", "worse": "worse", "within noise": "within noise", "not told": "too few repeats to tell"}


TOLD = ("tokens/s", "peak memory", "loss after equal steps", "val_bpb in the budget", "experiments a night",
        "energy per 1,000 tokens")  # fmt: skip


def against(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: what matters most of every other series, as multiples of the first, and whether it is noise."""
    found = comparing.columns(results)
    if len(found) < 2:
        return [], []
    lines = []
    for column in found[1:]:
        differences = {d.metric: d for d in comparing.compare(found[0], column)}
        lines.append([column.label, *(_difference(differences[name]) or NONE for name in TOLD)])
    return [f"against {found[0].label}", *TOLD], lines


def _difference(found: comparing.Difference) -> str:
    """'0.40x (0.37 to 0.42), worse'; empty where one of the two was not measured."""
    if found.ratio is None:
        return ""
    digits = 3 if abs(found.ratio - 1) < 0.1 else 2
    known = found.low is not None and found.high is not None
    reach = f" ({found.low:.{digits}f} to {found.high:.{digits}f})" if known else ""
    return f"{found.ratio:.{digits}f}x{reach}, {VERDICTS[found.verdict]}"


def troubles(results: Sequence[Result]) -> list[tuple[str, str, str]]:
    """(series, status, why) of everything that is not compared."""
    found: list[tuple[str, str, str]] = []
    for one in series(results, every=True):
        if one.backend.status != "measured":
            why = "; ".join([*one.backend.departs, one.backend.reason]).strip("; ")
            found.append((one.name, one.backend.status, why or "no reason was given"))
    return found


def attentions(results: Sequence[Result]) -> list[str]:
    """Of each upstream what its attention was, and what was timed for it: one line each."""
    return [f"{s.name}, attention: {s.backend.attention}" for s in series(results, every=True) if s.backend.attention]


def checked(one: Series) -> str:
    """What parity found, in one line."""
    held = one.backend.parity
    if not held:
        return "not checked"
    worst = max(held, key=lambda p: (p.difference or 0.0) / p.tolerance if p.tolerance else 0.0)
    away = "not finite" if worst.difference is None else f"{worst.difference:.1e}"
    nearest = f"nearest to its limit: {worst.worst}, {away} of {worst.tolerance:.0e}"
    return f"{sum(p.passed for p in held)} of {len(held)} agree; {nearest}"
