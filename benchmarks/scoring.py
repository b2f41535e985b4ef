"""val_bpb of a bench profile: one budgeted experiment through the referee's sandboxed trainer and scorer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bystanders import Bystanders
from benchmarks.machine import anonymous
from benchmarks.results import Score
from benchmarks.work import BenchProfile
from core.data import Dataset
from core.outcome import Event, Outcome, Request
from core.recipe import replace
from core.referee import execute
from core.settings import Settings

WARMUP_CAP = 300.0  # seconds: a first compilation with empty caches
BEFORE = 0.3  # share of an experiment's progress that start and warm-up take, and scoring after it


@dataclass(frozen=True)
class Scoring:
    """Which experiment."""

    backend: str
    recipe: Path
    profile: BenchProfile
    dataset: Dataset
    device: str
    dtype: str
    seed: int
    workdir: Path
    caches: Path | None = None  # what was compiled before, as in a night's later experiments


def score(asked: Scoring, step: Callable[[float], None], bystanders: Bystanders) -> Score:
    """`step` gets the share that is done. An experiment without a score is a `Score` with the reason."""

    def told(event: Event) -> None:
        if event.kind == "progress":
            step(BEFORE + (1 - 2 * BEFORE) * float(event.data["fraction"]))

    with bystanders.experiment():
        outcome = execute(request(asked), told)
    bystanders.saw(outcome.training_seconds, float(outcome.health.get("others_cores", 0.0)))
    shutil.rmtree(asked.workdir, ignore_errors=True)
    return taken(outcome, asked.seed)


def request(asked: Scoring) -> Request:
    profile, dataset = asked.profile, asked.dataset
    source = replace(asked.recipe.read_text(encoding="utf-8"), profile.constants())
    settings = Settings(
        backend=asked.backend,
        profile=f"bench-{profile.name}",
        data=dataset.path.name,
        data_sha256=dataset.sha256,
        vocab_size=dataset.vocab_size,
        sequence_len=profile.context,
        bos_id=dataset.bos_id,
        budget=profile.budget,
        eval_tokens=profile.scored_tokens,
        dtype=asked.dtype,
        device=asked.device,
        seed=asked.seed,
        warmup_cap=WARMUP_CAP,
    )
    name = f"bench-{asked.backend}-{asked.seed}"
    return Request(
        source.encode(), settings, dataset, asked.seed, name, workdir=asked.workdir, caches=asked.caches, audit="never"
    )


def taken(outcome: Outcome, seed: int) -> Score:
    return Score(
        seed=seed,
        val_bpb=outcome.val_bpb if outcome.status == "scored" else None,
        reason="" if outcome.status == "scored" else anonymous(f"{outcome.status}: {outcome.reason}"),
        steps=outcome.steps,
        tokens=outcome.tokens,
        training_seconds=outcome.training_seconds,
        scoring_seconds=outcome.timings.get("scoring", 0.0),
        total_seconds=outcome.timings.get("total", 0.0),
        scored_tokens=outcome.scored_tokens,
        curve=[(s, int(n), int(t), loss) for s, n, t, loss in outcome.curve],
    )
