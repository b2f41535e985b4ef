"""Nights that tests make in a second: real labs, real git, the real loop; only trainings are made up, and the clock.

A recipe here is a few constants and a function. What it scores follows from them (`World.true`), with noise by seed; so
every effect on a report has a truth to be compared with.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import random
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from scripted import Limits, Loop, Scripted, make_lab

from core import ablation
from core import ledger as ledger_module
from core.confirming import Done, confirm, plan
from core.contract import Exhausted, Proposal, View
from core.lab import Lab
from core.outcome import Event, Outcome, Request
from core.settings import Settings
from prepare import prepare

FIRST = '''\
"""A recipe of a made-up world."""

DEPTH = 4  # search: 1..12; layers

HEAD_DIM = 64  # search: 32 | 64 | 128

MATRIX_LR = 0.04  # search: 0.005..0.2 log

EMBEDDING_LR = 0.6  # search: 0.05..4 log

WEIGHT_DECAY = 0.2  # search: 0..0.5

WARMUP_RATIO = 0.0  # search: 0..0.2

TOTAL_BATCH_SIZE = 4096  # search: 2**9..2**16 pow2


def block(x):
    return x


def norm(x):
    return x
'''


def edit(source: str, **values: Any) -> str:
    """Constants set to other values, functions given another body (`block="x + x"`)."""
    for name, value in values.items():
        if name.isupper():
            source, many = re.subn(rf"(?m)^{name} = [^#\n]*?(?=  #|$)", f"{name} = {value}", source)
        else:
            source, many = re.subn(rf"(?m)(^def {name}\(x\):\n    return ).*$", rf"\g<1>{value}", source)
        assert many == 1, name
    return source


class World(Scripted):
    """An executor: scores by `true` and noise of `sd` between seeds, durations in a clock of its own."""

    def __init__(self, clock: Clock, sd: float = 0.0015, budget: float = 300.0) -> None:
        super().__init__()
        self.clock, self.sd, self.budget = clock, sd, budget
        self.shift = 0.0  # what drift adds to everything
        self.healths: dict[int, dict[str, Any]] = {}  # by run, from 0
        self.slept: dict[int, float] = {}  # seconds that the time of day ran ahead in a run
        self.requests: list[Request] = []

    def execute(self, request: Request, on_event: Callable[[Event], None], stop: threading.Event) -> Outcome:
        at = len(self.requests)
        self.requests.append(request)
        request.workdir.mkdir(parents=True, exist_ok=True)
        on_event(Event("phase", {"phase": "train"}))
        if stop.is_set():
            return Outcome(status="stopped")
        outcome = Outcome(status="scored", log_tail="the last line", health=self.healths.get(at, _health(at)))
        values = constants(request.source)
        failed = self.fails(values)
        share = 0.3 if failed else 1.0
        trained = round(self.budget * share, 3)
        outcome.timings = {
            "startup": 6.1, "training": trained, "scoring": 0.0 if failed else 9.4, "audit": 0.0 if failed else 4.2,
            "total": trained + 6.1 + (0.0 if failed else 13.6),
        }  # fmt: skip
        outcome.training_seconds, outcome.steps, outcome.tokens = trained, 1200, 1200 * 4096
        outcome.curve = [[t, t * 4, t * 4 * 4096, 9 * 0.9**t + 3] for t in range(1, 40)]
        if request.holdout and not failed:
            outcome.timings |= {"holdout scoring": 9.0, "holdout audit": 6.0}
            outcome.timings["total"] += 15.0
        self.clock.forward(outcome.timings["total"] + self.slept.get(at, 0.0))
        if failed:
            outcome.status, outcome.reason = failed
            return outcome
        noise = random.Random(f"{hashlib.sha256(request.source).hexdigest()} {request.seed} {at}").gauss(0, self.sd)
        outcome.val_bpb = self.true(request.source) + noise + self.shift
        if request.holdout:
            outcome.holdout_bpb = self.true(request.source, 0.8) + 0.9 * noise + self.shift + 0.02
        outcome.audited = request.would_keep(outcome.val_bpb)
        outcome.peak_memory, outcome.params, outcome.passes = 2**30, 3_400_000, 1.3
        outcome.weights = request.workdir / "weights.safetensors"
        outcome.weights.write_bytes(request.source)
        return outcome

    def true(self, source: bytes, share: float = 1.0) -> float:
        """val_bpb without noise."""
        v, text = constants(source), source.decode()
        lost = 0.02 * math.log(v["MATRIX_LR"] / 0.06) ** 2 + 0.01 * math.log(v["EMBEDDING_LR"] / 0.9) ** 2
        lost += 0.004 * abs(v["DEPTH"] - 6) + 0.02 * v["WEIGHT_DECAY"] + 0.1 * v["WARMUP_RATIO"]
        lost += 0.003 * abs(math.log2(v["TOTAL_BATCH_SIZE"] / 4096)) + 0.00002 * abs(v["HEAD_DIM"] - 64)
        lost -= 0.006 if "x * x" in text else 0.0
        return 1.19 + share * lost

    def fails(self, values: dict[str, Any]) -> tuple[Any, str] | None:
        if values["DEPTH"] > 9:
            return "crash", "out of memory at 9.6 of 10.0 GiB; lower DEVICE_BATCH_SIZE (now 16)"
        if values["TOTAL_BATCH_SIZE"] > 2**15:
            return "timeout", "trained 304.10 s of 300 s; 3.00 s over is allowed"
        return None


def constants(source: bytes) -> dict[str, Any]:
    body = ast.parse(source).body
    return {n.targets[0].id: ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign)}  # type: ignore[attr-defined]


def _health(at: int) -> dict[str, Any]:
    dice = random.Random(at)
    return {"others_cores": round(0.05 + 0.1 * dice.random(), 3), "our_cores": 2.0, "cpu_mhz_after": 3400.0 + at % 7,
            "temperature_c": 58.0 + at % 9}  # fmt: skip


class Clock:
    """The ledger's time of day."""

    def __init__(self, patch: pytest.MonkeyPatch, start: str = "2026-11-23T22:00:00+00:00") -> None:
        self.now = datetime.fromisoformat(start)
        patch.setattr(ledger_module, "now", self.stamp)

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def stamp(self) -> str:
        return self.now.astimezone(timezone.utc).isoformat(timespec="seconds")


class Story:
    """A researcher that makes these edits to the best of the moment, one after another."""

    name = "story"

    def __init__(self, *edits: tuple[str, dict[str, Any]]) -> None:
        self.edits = edits

    def propose(self, view: View) -> Proposal:
        at = len(view.past) - 1
        if at >= len(self.edits):
            raise Exhausted(f"{len(self.edits)} edits")
        description, values = self.edits[at]
        source = edit(view.best_source.decode(), **values)
        if at % 3:
            return Proposal(source.encode(), description)
        usd = None if at % 9 == 0 else 0.02  # of some models no price is known
        view.spend({"model": "made up", "input_tokens": 9000, "output_tokens": 700, "cache_read_tokens": 5, "usd": usd})
        return Proposal(source.encode(), description, {"usage": {"usd": usd}})


def tell(**values: Any) -> tuple[str, dict[str, Any]]:
    return ", ".join(f"{name} -> {value}" for name, value in values.items()), values


NIGHT: tuple[tuple[str, dict[str, Any]], ...] = (
    tell(HEAD_DIM=32), tell(MATRIX_LR=0.055), tell(MATRIX_LR=0.08), tell(DEPTH=5), tell(DEPTH=12),
    tell(WEIGHT_DECAY=0.1), tell(WARMUP_RATIO=0.05), tell(EMBEDDING_LR=0.9), tell(TOTAL_BATCH_SIZE=8192),
    ("square the block's output: more capacity <b>per</b> parameter & no more memory", {"block": "x * x"}),
    tell(HEAD_DIM=128), tell(TOTAL_BATCH_SIZE=65536), tell(DEPTH=6), tell(WEIGHT_DECAY=0.05), tell(HEAD_DIM=72),
    tell(WARMUP_RATIO=0.02), tell(DEPTH=7), tell(MATRIX_LR=0.06), tell(EMBEDDING_LR=1.1), tell(DEPTH=11),
    ("norm twice", {"norm": "x + 0"}), tell(WEIGHT_DECAY=0.02, DEPTH=8), tell(TOTAL_BATCH_SIZE=2048),
    ("norm and block", {"norm": "x - 0", "block": "x * x + 0"}), tell(WEIGHT_DECAY=0.0), tell(MATRIX_LR=0.065),
)  # fmt: skip


def small(folder: Path) -> Settings:
    """Settings with a data set that is prepared in a moment: nothing is trained on it."""
    dice = random.Random(1)
    words = ("the", "lord", "said", "unto", "him", "and", "a", "house", "of", "day")
    file = folder / "words.jsonl"
    texts = (" ".join(dice.choice(words) for _ in range(60)) for _ in range(300))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = prepare(text=file, vocab_size=270)
    return Settings(
        backend="cpu", profile="test", data=data.path.name, data_sha256=data.sha256, vocab_size=data.vocab_size,
        sequence_len=64, bos_id=data.bos_id, budget=300.0, eval_tokens=4096, dtype="float32", device="cpu",
    )  # fmt: skip


def confirmed(lab: Lab, loop: Loop, numbers: Sequence[int], holdout: Sequence[int] = (), seeds: int = 4) -> Done:
    """Measure these on fresh seeds."""
    samples = {e.number: lab.ledger.samples(e.number) for e in lab.ledger.experiments()}
    wanted = plan(samples, lab.settings.seed, 320.0, numbers, seeds, holdout)
    return confirm(loop, wanted)


def left_out(lab: Lab, loop: Loop, numbers: Sequence[int], seeds: int = 4) -> Done:
    """Measure the best without each of these."""
    lefts = [ablation.leave_out(lab, n) for n in numbers]
    for left in lefts:
        lab.ledger.ablate(left.number, left.winner, left.source, left.reason)
    known = ablation.Known.of(lab.ledger.experiments(), lab.ledger.all_samples())
    versions = lab.ledger.all_samples()[-1].versions
    epoch, seed = lab.ledger.epoch(), lab.settings.seed
    return confirm(loop, ablation.plan(lefts, lab.ledger.ablations(), known, seed, 320.0, seeds, versions, epoch))


def kept(lab: Lab) -> list[int]:
    return [e.number for e in lab.ledger.experiments() if e.is_kept]


def night(
    path: Path,
    settings: Settings,
    patch: pytest.MonkeyPatch,
    edits: Sequence[tuple[str, dict[str, Any]]] = NIGHT,
    sd: float = 0.0015,
    **locked: Any,
) -> tuple[Lab, Loop, World]:
    """A lab in which every edit was judged; its loop, which can measure more; the world that it measures."""
    clock = Clock(patch)
    world = World(clock, sd)
    lab = make_lab(path, replace(settings, **locked), FIRST.encode())
    loop = Loop(lab, Story(*edits), world, lambda event: None)
    loop.run(Limits(experiments=len(edits) + 1))
    return lab, loop, world
