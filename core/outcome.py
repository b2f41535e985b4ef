"""What the referee is asked, what it tells on the way, and what it answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from core.data import Dataset
from core.probing import Probe
from core.settings import Settings

Status = Literal["scored", "crash", "timeout", "invalid", "stopped", "hopeless"]
CURVE_POINTS = 200


@dataclass(frozen=True)
class Event:
    """Something to show. `kind`: "phase" (data: phase), "progress" (step, loss, tokens_per_second, mfu, remaining,
    fraction), "waiting" (text: why nothing goes on) or "log" (text)."""

    kind: str
    data: Mapping[str, Any]


def ignore(event: Event) -> None:
    """For callers that show nothing."""


def always(bpb: float) -> bool:
    """Audit whatever the score is."""
    return True


class Sharing(Protocol):
    """What others do with a device that is not ours alone, as the referee asks when the training is done."""

    waited: float  # seconds, all waits together

    def taken(self, took: int) -> str:
        """Why it may be others' doing that something failed on the device just now, "" where it is not. Nothing of ours
        may compute there meanwhile. `took`: bytes that the training says it took."""

    def wait(self, why: str, needed: int = 0) -> bool:
        """Until others have left the device, with `needed` free bytes at least. False: not within the limit."""

    def lost(self, said: str = "") -> str:
        """Why a failure just now is the device's own or its driver's, "" where it is not known to be. Nothing of ours
        may compute there meanwhile. `said`: what trusted code alone heard of the driver; what a recipe says is none."""

    def wait_for_answer(self, why: str) -> bool:
        """A moment, and until the device answers. False: not within the limit."""


@dataclass(frozen=True)
class Request:
    """One experiment. `workdir` is made if missing; what is to be kept of the experiment lies there afterwards."""

    source: bytes  # of train.py
    settings: Settings
    dataset: Dataset
    seed: int
    experiment: str  # an id, for messages and file names
    workdir: Path
    caches: Path | None = None  # the incumbent's compile caches; copied, never written
    lint: bool = True
    would_keep: Callable[[float], bool] = always  # whether a score would be kept, and so must be audited
    budget: float | None = None  # seconds; None: the settings'
    audit: Literal["auto", "always", "never"] = "auto"
    holdout: bool = False  # whether the part of the data that decisions never see is scored as well
    probe: Probe | None = None  # looks at the training on its way; None: none
    card_bytes: int = 0  # of a graphics card's memory that runs like this one take; 0: not known yet

    def seconds(self) -> float:
        return self.settings.budget if self.budget is None else self.budget


@dataclass
class Outcome:
    """How one experiment ended. Only `scored` has a `val_bpb`. JSON through `to_dict` and `from_dict`."""

    status: Status = "stopped"
    reason: str = ""
    out_of_memory: bool = (
        False  # a crash for want of memory that others may have taken: the lab's own limit is not meant
    )
    val_bpb: float | None = None
    holdout_bpb: float | None = None
    audited: bool = False
    steps: int = 0
    tokens: int = 0  # targets trained on
    training_seconds: float = 0.0  # by the referee's clock
    params: int = 0
    peak_memory: int = 0  # bytes, of the trainer
    flops_per_token: float = 0.0  # as the recipe describes itself
    mfu: float | None = None  # share of the device's peak
    passes: float = 0.0  # over the training text
    final_loss: float | None = None
    curve: list[list[float]] = field(default_factory=list)  # [seconds, step, tokens, loss]
    timings: dict[str, float] = field(
        default_factory=dict
    )  # seconds: startup, warmup, training, handover, scoring, ...
    source_sha256: str = ""
    weights: Path | None = None  # safetensors
    caches: Path | None = None  # compile caches as they were before any training token was seen
    log_tail: str = ""
    sandbox: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    describe: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    scored_tokens: int = 0
    total_nats: float = 0.0
    total_bytes: int = 0
    probes: list[list[float]] = field(default_factory=list)  # [share of the budget, seconds, bpb on the probe text]
    unprobed: list[str] = field(default_factory=list)  # which looks were left out, and why
    stopped_early: dict[str, Any] = field(default_factory=dict)  # of status "hopeless": core.probing.as_record

    def add_to_curve(self, seconds: float, step: int, tokens: int, loss: float) -> None:
        """Every second point goes when the curve is full: even spacing, bounded size."""
        if len(self.curve) >= CURVE_POINTS:
            self.curve = self.curve[1::2]
        self.curve.append([round(seconds, 3), step, tokens, round(loss, 5)])

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        return {**found, "weights": _text(self.weights), "caches": _text(self.caches)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Outcome:
        """Inverse of `to_dict`; fields of later versions are left out."""
        known = {f.name for f in fields(cls)}
        found = cls(**{k: v for k, v in given.items() if k in known})
        found.weights = Path(found.weights) if found.weights else None
        found.caches = Path(found.caches) if found.caches else None
        return found


def printable(text: str) -> str:
    """Text of a recipe, safe to show: control characters could rewrite what a terminal shows, so they are marked."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def source_sha256(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
