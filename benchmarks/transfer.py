"""The best recipe of one lab under another lab's settings, on this machine: through sandbox, referee and audit.

It is a measurement of its own: no lab and no ledger is written. The lab that lends its settings is the home; its own
best runs beside the guests, with the same seeds, so that a difference is one of recipes and not of machines or days.
A recipe of another backend does not run at home: then its constants travel, into the home's own recipe.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lab_facts import LabFacts
from core import locks, paths
from core.data import Dataset
from core.errors import DataError, UserError
from core.executor import Executor, LocalExecutor
from core.outcome import Event, Outcome, Request
from core.recipe import constants
from core.recipe import replace as replace_constants

SEEDS = 2


@dataclass(frozen=True)
class Guest:
    """A recipe that is tried at home."""

    tag: str  # of the lab that it comes from
    source: bytes
    how: str  # "its own best", "the whole recipe", "18 constants; not class GPT, ..."


@dataclass(frozen=True)
class Run:
    """What came of a guest: one outcome for each seed."""

    home: str
    guest: str
    how: str
    outcomes: list[Outcome]

    @property
    def bpbs(self) -> list[float]:
        return [o.val_bpb for o in self.outcomes if o.val_bpb is not None]

    def text(self) -> str:
        """'1.2143 (1.2101 to 1.2185)', or why there is no score."""
        if not self.bpbs:
            first = self.outcomes[0]
            return f"{first.status}: {first.reason}"
        middle = statistics.fmean(self.bpbs)
        return f"{middle:.4f} ({min(self.bpbs):.4f} to {max(self.bpbs):.4f})" if len(self.bpbs) > 1 else f"{middle:.4f}"

    def to_json(self) -> dict[str, Any]:
        left_out = ("weights", "caches", "curve", "log_tail", "sandbox")
        outcomes = [{k: v for k, v in o.to_dict().items() if k not in left_out} for o in self.outcomes]
        return {"home": self.home, "guest": self.guest, "how": self.how, "val_bpb": self.bpbs, "outcomes": outcomes}


def guests(home: LabFacts, others: Sequence[LabFacts]) -> list[Guest]:
    """The home's own best first, then everybody else's."""
    found = [Guest(home.tag, home.best_source.encode(), "its own best")]
    for other in others:
        if other.settings["backend"] == home.settings["backend"]:
            found.append(Guest(other.tag, other.best_source.encode(), "the whole recipe"))
        else:
            found.append(carried(home, other))
    return found


def carried(home: LabFacts, other: LabFacts) -> Guest:
    """The home's first recipe with the constants of the other's best. What was rewritten otherwise stays behind."""
    own, its = constants(home.first_source), constants(other.best_source)
    values = {name: c.value for name, c in its.items() if name in own and type(c.value) is type(own[name].value)}
    source = replace_constants(home.first_source, values).encode()
    left = sorted({c.what for t in other.kept for c in t.changes if c.what not in values})
    behind = f"; left behind: {', '.join(left)}" if left else ""
    return Guest(other.tag, source, f"{len(values)} constants of another backend{behind}")


def transfer(
    home: LabFacts,
    others: Sequence[LabFacts],
    say: Callable[[str], None],
    on_event: Callable[[Event], None],
    stop: threading.Event,
    seeds: int = SEEDS,
    executor: Executor | None = None,
) -> list[Run]:
    """Every guest with every seed, in turns. Raises `UserError` where the home cannot be run here."""
    settings, dataset = home.locked(), data_of(home)
    invited = guests(home, others)
    outcomes: list[list[Outcome]] = [[] for _ in invited]
    runner = executor or LocalExecutor()
    with tempfile.TemporaryDirectory(prefix="transfer-") as folder, locks.hold_device(settings.device):
        for turn in range(seeds):
            for i, guest in enumerate(invited):
                if stop.is_set():
                    return []
                say(f"{guest.tag} at {home.tag}, seed {settings.seed + turn}: {guest.how}")
                request = Request(
                    guest.source, settings, dataset, settings.seed + turn, f"transfer-{i}-{turn}",
                    workdir=Path(folder) / f"{i}-{turn}", audit="always",
                )  # fmt: skip
                outcomes[i].append(runner.execute(request, on_event, stop))
    return [Run(home.tag, g.tag, g.how, found) for g, found in zip(invited, outcomes, strict=True)]


def data_of(home: LabFacts) -> Dataset:
    """The home's data set, which has to be here. Raises `UserError`."""
    settings = home.locked()
    if Path(settings.data).name != settings.data:
        raise UserError(f"{settings.data!r} cannot name a data set", f"export {home.tag} again")
    try:
        dataset = Dataset.open(paths.data_root() / settings.data, verify="quick")
    except DataError as error:
        action = f"autoresearch prepare {home.data} --vocab {settings.vocab_size}"
        raise UserError(f"the data of {home.tag} ({settings.data}) is not here: {error.fact}", action) from None
    if dataset.sha256 != settings.data_sha256:
        raise UserError(f"the data set {settings.data} here is not the one of {home.tag}", "prepare it from that text")
    return dataset


def compare(own: Run, guest: Run, min_delta: float) -> str:
    """Guest against own, in words. Below `min_delta`, by which a candidate must be better to be kept, or within the
    spread of the seeds, it is noise."""
    if not own.bpbs or not guest.bpbs:
        return "no score to compare"
    difference = statistics.fmean(guest.bpbs) - statistics.fmean(own.bpbs)
    spread = max(max(r.bpbs) - min(r.bpbs) for r in (own, guest))
    if abs(difference) <= max(min_delta, spread):
        return f"{difference:+.4f}: within the noise ({max(min_delta, spread):.4f})"
    verdict = "it transfers, and is better here" if difference < 0 else "worse than what was found here"
    return f"{difference:+.4f}: {verdict}"
