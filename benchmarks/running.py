"""`autoresearch bench`: parity, then speed, then scores, of every backend in turn.

Repeats go through the backends in one order and then in the other (ABBA), each in a process of its own, so that a
machine that grows warm or busy hits all alike. What is measured is kept at once: a backend that ends in the middle, or
a Ctrl-C, costs nothing that was there before it.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import backends
from backends.reference import LIBRARIES
from benchmarks import parity, sides, upstream
from benchmarks.machine import anonymous
from benchmarks.results import BackendResult, Energy, Fixed, Machine, Parity, Peak, Result, Score, Speed, Work
from benchmarks.scoring import Scoring, score
from benchmarks.side import Order
from benchmarks.work import BenchProfile, initial, shapes, write_batches
from core import hardware as machines
from core.data import Dataset
from core.errors import UserError
from core.hardware import Hardware

UPSTREAM = "upstream"
SAME_LOSS = 0.02  # share by which losses after equal steps from equal weights may differ between backends
LAST_SHARE = 10  # the fixed loss is the mean of the last tenth of the steps

Keep = Callable[[Result], None]


@dataclass(frozen=True)
class Contender:
    """Who takes part."""

    name: str  # a backend's, or "upstream"
    recipe: Path  # upstream: its folder
    shipped: bool = True
    obstacle: str = ""  # why it cannot run here


@dataclass(frozen=True)
class Plan:
    """What is run, and how often."""

    profile: BenchProfile
    contenders: Sequence[Contender]
    repeats: int
    seeds: Sequence[int]
    quick: bool


@dataclass
class Progress:
    """Whom a run tells how far it is. The default tells nobody."""

    stage: Callable[[str], None] = lambda text: None
    step: Callable[[float], None] = lambda share: None  # of the stage
    done: Callable[[str], None] = lambda text: None  # a stage ended; what came of it


@dataclass
class _Taken:
    """What was measured of one contender so far."""

    contender: Contender
    facts: dict[str, Any] = field(default_factory=dict)  # device, dtype, dtype_reason
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # dtype -> of the reference checkpoint
    parity: list[Parity] = field(default_factory=list)
    departs: list[str] = field(default_factory=list)
    failed: str = ""
    answers: list[dict[str, Any]] = field(default_factory=list)  # of the repeats
    places: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        return not (self.contender.obstacle or self.failed or self.departs)


# --- who takes part ----------------------------------------------------------------------------


def contenders(
    hardware: Hardware, wanted: Sequence[str], recipes: Mapping[str, Path], peer: Path | None
) -> list[Contender]:
    """The backends asked for, else all that this machine offers. One that was asked for must be able to run."""
    for name in (*wanted, *recipes):
        backends.load(name)  # UserError with the known names
    names = list(dict.fromkeys(wanted)) or [n for n in backends.names() if machines.suits(hardware, n)[0]]
    found = []
    for name in dict.fromkeys([*names, *recipes]):
        if wanted:
            machines.choose(hardware, name)
        recipe = recipes.get(name, backends.load(name).recipe_path)
        if not recipe.is_file():
            raise UserError(f"there is no file {recipe}", "give --recipe BACKEND=FILE")
        library = LIBRARIES[name].split(".")[0]
        missing = f"{library} is not installed: pip install {library}" if find_spec(library) is None else ""
        if missing and wanted:
            raise UserError(f"the backend {name} cannot run here: {missing}", "or leave it out")
        found.append(Contender(name, recipe.absolute(), name not in recipes, missing))
    if peer is not None:
        upstream.definitions(peer)  # UserError where it is no clone
        found.append(Contender(UPSTREAM, peer.absolute()))
    return found


# --- the run -----------------------------------------------------------------------------------


class Run:
    """One bench on this machine. `go()` returns the result, and `keep` gets what there is after every stage."""

    def __init__(
        self, plan: Plan, dataset: Dataset, work: Work, machine: Machine, folder: Path, keep: Keep, progress: Progress
    ) -> None:
        self.plan, self.dataset, self.work, self.machine = plan, dataset, work, machine
        self.folder, self.keep, self.progress = folder, keep, progress
        self.taken = [_Taken(c) for c in plan.contenders]
        self.began = time.monotonic()
        self.ran = 0  # repeats of all contenders
        self.weights, self.batches = folder / "weights.npz", folder / "batches.npy"

    def go(self) -> Result:
        arrays: dict[str, Any] = {**initial(shapes(self.plan.profile))}
        np.savez(self.weights, **arrays)
        write_batches(self.plan.profile, self.dataset, self.batches)
        for taken in self.taken:
            if taken.runs and taken.contender.name != UPSTREAM:
                self._parity(taken)
        self._against_each_other()
        for repeat in range(self.plan.repeats):
            for taken in self.taken if repeat % 2 == 0 else self.taken[::-1]:
                if taken.runs:
                    self._repeat(taken, repeat)
        self._same_loss()
        for number, seed in enumerate(self.plan.seeds):
            for taken in self.taken if number % 2 == 0 else self.taken[::-1]:
                if taken.runs and taken.contender.name != UPSTREAM:
                    self._score(taken, seed)
        return self.result()

    def result(self) -> Result:
        return Result(
            work=self.work,
            work_id=self.work.id(),
            machine=self.machine,
            created=datetime.now(timezone.utc).date().isoformat(),
            quick=self.plan.quick,
            seconds=round(time.monotonic() - self.began, 1),
            backends=[assembled(taken, self.plan.profile) for taken in self.taken],
        )

    # --- stages --------------------------------------------------------------------------------

    def _parity(self, taken: _Taken) -> None:
        self.progress.stage(f"{taken.contender.name}: the same work?")
        answer = self._ask(taken, "parity")
        if answer is None:
            return
        taken.arrays = {dtype: parity.load(Path(file)) for dtype, file in answer["files"].items()}
        taken.parity, taken.departs = parity.verdict(taken.arrays)
        worst = max((p.difference or 0.0 for p in taken.parity if p.dtype == "float32"), default=0.0)
        said = "; ".join(taken.departs) or f"computes the reference (float32: {worst:.0e} at most)"
        self._ended(f"{taken.contender.name}: {said}")

    def _against_each_other(self) -> None:
        """Each backend against the first that computes the reference, in float32."""
        proven = [t for t in self.taken if t.arrays and t.runs]
        for taken in proven[1:]:
            first = proven[0]
            taken.parity += parity.against(
                taken.arrays["float32"], first.arrays["float32"], "float32", first.contender.name
            )
        for taken in self.taken:
            taken.arrays = {}

    def _repeat(self, taken: _Taken, repeat: int) -> None:
        self.progress.stage(f"{taken.contender.name}: speed, repeat {repeat + 1} of {self.plan.repeats}")
        answer = self._ask(taken, "steps")
        if answer is None:
            return
        taken.answers.append(answer)
        taken.places.append(self.ran)
        self.ran += 1
        rate = self.plan.profile.batch_tokens / np.median(self._timed(answer))
        self._ended(f"{taken.contender.name}: {rate:,.0f} tokens/s")

    def _timed(self, answer: Mapping[str, Any]) -> list[float]:
        seconds: list[float] = answer["seconds"][self.plan.profile.warm_steps :]
        return seconds

    def _same_loss(self) -> None:
        """The loss after equal steps from equal weights shows what one step cannot, such as a wrong momentum."""
        first = next((t for t in self.taken if t.answers and t.contender.name != UPSTREAM), None)
        for taken in self.taken:
            if first is None or taken is first or not taken.answers or not taken.runs:
                continue
            own, wanted = (_last_loss(t.answers[0]["losses"]) for t in (taken, first))
            away = abs(own - wanted) / wanted
            steps, name = self.plan.profile.fixed_steps, first.contender.name
            row = Parity(
                "loss", str(taken.facts.get("dtype", "")), name, 1, f"loss after {steps} steps",
                away if np.isfinite(away) else None, SAME_LOSS, bool(away <= SAME_LOSS),
            )  # fmt: skip
            taken.parity.append(row)
            if not row.passed:
                taken.departs = [f"after {steps} equal steps its loss is {own:.4f}, that of {name} {wanted:.4f}"]

    def _score(self, taken: _Taken, seed: int) -> None:
        name = taken.contender.name
        self.progress.stage(f"{name}: an experiment of {self.plan.profile.budget:g} s, seed {seed}")
        asked = Scoring(
            backend=name,
            recipe=taken.contender.recipe,
            profile=self.plan.profile,
            dataset=self.dataset,
            device=taken.facts["device"],
            dtype=taken.facts["dtype"],
            seed=seed,
            workdir=self.folder / f"score-{name}-{seed}",
            caches=sides.compiled(self._caches(taken), self.folder / f"compiled-{name}"),
        )
        found = score(asked, self.progress.step)
        taken.scores.append(found)
        said = f"val_bpb {found.val_bpb:.4f}" if found.val_bpb is not None else f"no score: {found.reason}"
        self._ended(f"{name}: {said}")

    def _ask(self, taken: _Taken, task: str) -> dict[str, Any] | None:
        """A side's answer; None where it ended without one, which is noted."""
        order = self._order(taken, task)
        # Compiling is timed with the steps, from nothing on; for parity the usual places serve.
        caches = self._caches(taken)

        def told(event: Mapping[str, Any]) -> None:
            if event["kind"] == "step":
                self.progress.step(event["step"] / event["of"])

        try:
            if taken.contender.name == UPSTREAM:
                answer = upstream.ask(order, caches, told)
            else:
                answer = sides.ask(order, caches if task == "steps" else None, told)
        except sides.SideFailed as failure:
            doing = "proving parity" if task == "parity" else f"repeat {len(taken.answers) + 1}"
            taken.failed = f"in {doing}: {failure}"
            self._ended(f"{taken.contender.name}: {taken.failed}")
            return None
        taken.facts = {name: answer[name] for name in ("device", "dtype", "dtype_reason")}
        return answer

    def _caches(self, taken: _Taken) -> Path:
        return self.folder / f"caches-{taken.contender.name}"

    def _order(self, taken: _Taken, task: str) -> Order:
        profile = self.plan.profile
        return Order(
            task=task,  # type: ignore[arg-type]  # "parity" or "steps"
            name=taken.contender.name,
            backend=taken.contender.name,
            recipe=str(taken.contender.recipe),
            folder=str(self.folder),
            began=time.time(),
            constants=profile.constants(),
            vocab_size=profile.vocab_size,
            context=profile.context,
            weights=str(self.weights),
            batches=str(self.batches),
            warm_steps=profile.warm_steps,
        )

    def _ended(self, text: str) -> None:
        self.progress.done(anonymous(text))
        self.keep(self.result())


# --- from measurements to the result -----------------------------------------------------------


def assembled(taken: _Taken, profile: BenchProfile) -> BackendResult:
    contender, answers = taken.contender, taken.answers
    base = BackendResult(
        name=contender.name,
        status="measured",
        recipe=_recipe(contender),
        parity=list(taken.parity),
        **taken.facts,
    )
    if contender.obstacle:
        return replace(base, status="unavailable", reason=contender.obstacle)
    if taken.departs:
        departs = [anonymous(d) for d in taken.departs]
        return replace(base, status="different", reason="it does not compute the reference model", departs=departs)
    if answers:
        base = replace(
            base,
            flops_per_token=answers[0]["flops_per_token"],
            peak=best_peak(answers),
            speed=speed(answers, taken.places, profile),
            fixed=fixed(answers[0], profile),
            energy=energy(answers, profile),
            scores=list(taken.scores),
        )
    if taken.failed:
        return replace(base, status="crashed", reason=taken.failed)
    return base if answers else replace(base, status="crashed", reason="it was not measured: the bench ended before")


def _recipe(contender: Contender) -> str:
    if contender.name == UPSTREAM:
        return "its own"
    return "shipped" if contender.shipped else hashlib.sha256(contender.recipe.read_bytes()).hexdigest()[:12]


def speed(answers: Sequence[Mapping[str, Any]], places: Sequence[int], profile: BenchProfile) -> Speed:
    timed = [np.array(a["seconds"][profile.warm_steps :]) for a in answers]
    low, middle, high = (np.array([np.quantile(t, q) for t in timed]) for q in (0.25, 0.5, 0.75))
    return Speed(
        step_seconds=middle.tolist(),
        step_low=low.tolist(),
        step_high=high.tolist(),
        steps=len(timed[0]),
        batch_tokens=profile.batch_tokens,
        startup_seconds=[a["startup"] for a in answers],
        build_seconds=[a["build"] for a in answers],
        compile_seconds=[a["compile"] for a in answers],
        peak_memory=[float(a["peak_memory"]) for a in answers],
        places=list(places),
    )


def best_peak(answers: Sequence[Mapping[str, Any]]) -> Peak | None:
    """What the device reached in the best repeat: a peak that noise has lowered is none."""
    found = [Peak(**a["peak"]) for a in answers if a.get("peak")]
    if not found:
        return None
    flops, width = max(found, key=lambda p: p.flops), max(found, key=lambda p: p.bandwidth)
    return replace(flops, bandwidth=width.bandwidth, bandwidth_source=width.bandwidth_source)


def _last_loss(losses: Sequence[float]) -> float:
    return statistics.fmean(losses[-max(1, len(losses) // LAST_SHARE) :])


def fixed(answer: Mapping[str, Any], profile: BenchProfile) -> Fixed:
    """Of the first repeat; the others compute the same."""
    seconds, losses = np.cumsum(answer["seconds"]), answer["losses"]
    curve = [
        (float(s), i + 1, (i + 1) * profile.batch_tokens, float(x)) for i, (s, x) in enumerate(zip(seconds, losses))
    ]
    return Fixed(len(losses), _last_loss(losses), curve)


def energy(answers: Sequence[Mapping[str, Any]], profile: BenchProfile) -> Energy:
    found = [a["energy"] for a in answers]
    told = [e for e in found if e["joules"] is not None]
    if not told:
        return Energy(None, None, anonymous(found[0]["source"]))
    tokens = (len(answers[0]["seconds"]) - profile.warm_steps) * profile.batch_tokens
    joules = statistics.median(e["joules"] for e in told)
    return Energy(joules / tokens, statistics.median(e["watts"] for e in told), told[0]["source"])
