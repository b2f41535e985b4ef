"""`autoresearch bench`: first steps and parity, then rounds in which every backend takes a turn, and scores.

In a round all take one turn of two seconds at most (of one in a quick bench, which needs many), in one order and in the
next round in the other (ABBA); between their turns they stay alive and wait. So a ratio of one round is of one state of
the machine. One half of the rounds comes before the scored experiments, in the processes that took the first steps; the
other half after them, in new ones, since where a process's memory happens to lie costs it a few per cent too. What is
measured is kept at once: a backend that ends in the middle, or a Ctrl-C, costs nothing that was there before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import backends
from backends.reference import LIBRARIES
from benchmarks import agreeing, kept_code, parity, sides, upstream
from benchmarks.assembling import UPSTREAM, Contender, Taken, assembled, last_loss
from benchmarks.bystanders import Bystanders
from benchmarks.machine import anonymous
from benchmarks.results import Machine, Parity, Result, Work
from benchmarks.scoring import Scoring, score
from benchmarks.side import GROUPS, Order
from benchmarks.work import BenchProfile, initial, shapes, write_batches
from console.words import plural
from core import caches
from core import hardware as machines
from core.commands import pip_install
from core.data import Dataset
from core.errors import UserError
from core.hardware import Hardware

SAME_LOSS = 0.02  # share by which losses after equal steps from equal weights may differ between backends
QUICK_TURN, TURN = (0.3, 1), (0.7, 2)  # seconds of timed steps in a turn; steps at least
MOST_STEPS = 64  # of a turn
START_SECONDS = 0.5  # of starts in a turn, at least one: a start of a few hundredths of a second needs several
STARTS = 3  # such turns before the experiments, each with a round, and as many after
KNOWN = 0.03  # a ratio whose 95 % interval reaches no further than this needs no more rounds
QUICK_ROUNDS = (6, 3, 60)  # before the experiments; after them at least, at most
ROUNDS = (6, 6, 30)
QUICK_SECONDS = 109.0  # of the bench: later than this a quick one begins no round that it need not
ROUNDS_SECONDS = 240.0  # of the rounds after the experiments

Keep = Callable[[Result], None]


@dataclass(frozen=True)
class Plan:
    """What is run, and how often."""

    profile: BenchProfile
    contenders: Sequence[Contender]
    rounds: int | None  # None: until the ratios are known
    seeds: Sequence[int]
    quick: bool
    together: bool  # all sides may be alive at once
    fresh: bool = True  # compile from nothing, whatever an earlier bench has kept

    def steps(self, seconds: float) -> int:
        """Timed in a turn, where one takes so many seconds."""
        turn, least = QUICK_TURN if self.quick else TURN
        return whole_groups(min(MOST_STEPS, max(least, round(turn / seconds))))

    def before(self) -> int:
        """Rounds before the experiments."""
        return (self.rounds + 1) // 2 if self.rounds else (QUICK_ROUNDS if self.quick else ROUNDS)[0]

    def after(self) -> tuple[int, int]:
        """The fewest rounds after them, and the most."""
        if self.rounds:
            return self.rounds // 2, self.rounds // 2
        return (QUICK_ROUNDS if self.quick else ROUNDS)[1:]


@dataclass
class Progress:
    """Whom a run tells how far it is. The default tells nobody."""

    stage: Callable[[str], None] = lambda text: None
    step: Callable[[float], None] = lambda share: None  # of the stage
    done: Callable[[str], None] = lambda text: None  # a stage ended; what came of it


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
        missing = f"{library} is not installed: {pip_install(library)}" if find_spec(library) is None else ""
        if missing and wanted:
            raise UserError(f"the backend {name} cannot run here: {missing}", "or leave it out")
        found.append(Contender(name, recipe.absolute(), name not in recipes, missing))
    if peer is not None:
        upstream.definitions(peer)  # UserError where it is no clone
        found.append(Contender(UPSTREAM, peer.absolute()))
    return found


def together(contenders: Sequence[Contender], hardware: Hardware) -> bool:
    """Whether all may be alive at once: not where two would share the memory of one accelerator."""
    ours = [backends.device_name(c.name, hardware) for c in contenders if c.name != UPSTREAM]
    peers = ["cuda:0" if hardware.gpus else "cpu" for c in contenders if c.name == UPSTREAM]
    cards = [device for device in (*ours, *peers) if device != "cpu"]
    return len(cards) == len(set(cards))


def whole_groups(steps: int) -> int:
    """So many that they can be timed in equal groups."""
    return steps if steps <= GROUPS else steps - steps % GROUPS


# --- the run -----------------------------------------------------------------------------------


class Run:
    """One bench on this machine. `go()` returns the result, and `keep` gets what there is after every stage."""

    def __init__(
        self,
        plan: Plan,
        dataset: Dataset,
        work: Work,
        machine: Machine,
        folder: Path,
        keep: Keep,
        progress: Progress,
        bystanders: Bystanders,
    ) -> None:
        self.bystanders = bystanders
        self.plan, self.dataset, self.work, self.machine = plan, dataset, work, machine
        self.folder, self.keep, self.progress = folder, keep, progress
        self.taken = [Taken(c) for c in plan.contenders]
        self.alive: dict[str, sides.Side] = {}  # name -> who waits for a turn
        self.began = time.monotonic()
        self.rounds = 0
        self.weights, self.batches = folder / "weights.npz", folder / "batches.npy"

    def go(self) -> Result:
        arrays: dict[str, Any] = {**initial(shapes(self.plan.profile))}
        np.savez(self.weights, **arrays)
        write_batches(self.plan.profile, self.dataset, self.batches)
        try:
            self._open_all(first=True)
            self._prove_all()
            self._rounds(self.plan.before(), self.plan.before())
            self._end_all()
            self._experiments()
            least, most = self.plan.after()
            if most:
                self._open_all(first=False)
                self._rounds(least, most)
        finally:
            self._end_all()
        self._keep_compiled()
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

    def running(self) -> list[Taken]:
        return [t for t in self.taken if t.runs]

    def ours(self) -> list[Taken]:
        return [t for t in self.taken if t.runs and t.contender.name != UPSTREAM]

    # --- first steps and parity ------------------------------------------------------------------

    def _open_all(self, first: bool) -> None:
        """First steps of all. Those that may be alive together wait for their turns then."""
        for taken in self.running() if first or self.plan.together else ():
            name = taken.contender.name
            self.progress.stage(f"{name}: {'first steps, which compile' if first else 'a new process'}")
            with self._noted(taken, "its first steps"):
                kept = self._found_again(taken) if first and not self.plan.fresh else None
                side = self._opened(taken, first)
                if kept is not None and taken.opened[0]["compile"] < kept.seconds / 2:
                    taken.opened[0]["compile"], taken.compiled_on = kept.seconds, kept.day
                if self.plan.together:
                    self.alive[name] = side
                else:
                    side.close()
            if first and taken.runs:
                seconds, day = taken.opened[0]["compile"], taken.compiled_on
                when = f" on {day}, and kept" if day else ""
                said = f"{name}: compiled in {seconds:.1f} s{when}" if seconds > 1 else f"{name}: first steps done"
                self._ended(said)

    def _opened(self, taken: Taken, first: bool) -> sides.Side:
        """A process that has taken its first steps: all fixed ones in the first process, a few in later ones."""
        name, profile = taken.contender.name, self.plan.profile
        few = min(profile.fixed_steps, 2 * profile.warm_steps)
        order = self._order(taken, "turns", profile.fixed_steps if first else few)
        start = upstream.start if name == UPSTREAM else sides.start
        side = start(order, self._caches(taken), self._told)
        try:
            found = side.hear("opened")
        except BaseException:
            side.close()
            raise
        taken.facts = dict(side.facts)
        taken.opened.append(found)
        if not taken.steps:
            taken.steps = self.plan.steps(statistics.median(found["seconds"][profile.warm_steps :]))
        return side

    def _prove_all(self) -> None:
        """Before anything is compared. What the first steps have compiled is used again here."""
        for taken in self.ours():
            name = taken.contender.name
            self.progress.stage(f"{name}: the same work?")
            with self._noted(taken, "proving parity"):
                answer = sides.ask(self._order(taken, "parity"), self._caches(taken), self._told)
                taken.arrays = {dtype: parity.load(Path(file)) for dtype, file in answer["files"].items()}
                taken.parity, taken.departs = parity.verdict(taken.arrays)
                worst = max((p.difference or 0.0 for p in taken.parity if p.dtype == "float32"), default=0.0)
                said = "; ".join(taken.departs) or f"computes the reference (float32: {worst:.0e} at most)"
                self._ended(f"{name}: {said}")
        self._against_each_other()
        self._same_loss()
        for taken in self.taken:
            if not taken.runs:
                self._end(taken.contender.name)

    def _against_each_other(self) -> None:
        """Each backend against the first that computes the reference, in float32."""
        proven = [t for t in self.ours() if t.arrays]
        for taken in proven[1:]:
            first = proven[0]
            taken.parity += parity.against(
                taken.arrays["float32"], first.arrays["float32"], "float32", first.contender.name
            )
        for taken in self.taken:
            taken.arrays = {}

    def _same_loss(self) -> None:
        """The loss after equal steps from equal weights shows what one step cannot, such as a wrong momentum."""
        first = next(iter(self.ours()), None)
        for taken in self.running():
            if first is None or taken is first:
                continue
            own, wanted = (last_loss(t.opened[0]["losses"]) for t in (taken, first))
            away = abs(own - wanted) / wanted
            steps, name = self.plan.profile.fixed_steps, first.contender.name
            row = Parity(
                "loss", str(taken.facts.get("dtype", "")), name, 1, f"loss after {steps} steps",
                away if np.isfinite(away) else None, SAME_LOSS, bool(away <= SAME_LOSS),
            )  # fmt: skip
            taken.parity.append(row)
            if not row.passed:
                taken.departs = [f"after {steps} equal steps its loss is {own:.4f}, that of {name} {wanted:.4f}"]

    # --- rounds ----------------------------------------------------------------------------------

    def _starts(self) -> None:
        """How long each takes from its start to a device that can be used; in turns."""
        for taken in self.running():
            with self._noted(taken, "its start"):
                taken.starts.append(self._started(taken))

    def _started(self, taken: Taken) -> float:
        """The median of as many starts as fit into a turn."""
        found: list[float] = []
        while sum(found) < START_SECONDS:
            order = self._order(taken, "start")
            if taken.contender.name == UPSTREAM:
                found.append(upstream.ask(order, self._caches(taken), self._told)["startup"])
            else:
                found.append(sides.ask(order, None, self._told)["startup"])
        return statistics.median(found)

    def _rounds(self, least: int, most: int) -> None:
        """At least so many rounds, and then until the ratios are known or the time is up."""
        now = time.monotonic()
        until = self.began + QUICK_SECONDS if self.plan.quick else now + ROUNDS_SECONDS
        for done in range(most):
            if not self.running() or (done >= least and (time.monotonic() > until or self.known())):
                break
            self.progress.stage(f"round {self.rounds + 1}")
            if done < STARTS:
                self._starts()
            for taken in self.taken if self.rounds % 2 == 0 else self.taken[::-1]:
                if taken.runs:
                    with self._noted(taken, f"round {self.rounds + 1}"):
                        taken.turns[self.rounds] = self._turn(taken)
            self.rounds += 1
            self.progress.step((done + 1) / most)
            self.keep(self.result())
        self._ended(f"{plural(self.rounds, 'round')}: {'; '.join(self._rates()) or 'nobody is left'}")

    def _turn(self, taken: Taken) -> dict[str, Any]:
        waiting = self.alive.get(taken.contender.name)
        if waiting is not None:
            return waiting.turn(taken.steps)
        side = self._opened(taken, first=False)
        try:
            return side.turn(taken.steps)
        finally:
            side.close()

    def _rates(self) -> Iterator[str]:
        for taken in self.running():
            step = statistics.median(t["seconds"] for t in taken.turns.values())
            yield f"{taken.contender.name} {self.plan.profile.batch_tokens / step:,.0f} tokens/s"

    def known(self) -> bool:
        """Whether every ratio to the first side's is, of steps and of scoring; of a single side its own figures."""
        return all(share <= KNOWN for figure in ("seconds", "scored") for _, share in self.unsure(figure))

    def unsure(self, figure: str = "seconds") -> list[tuple[str, float]]:
        """By default of step times: (name, how far the interval of its ratio reaches) of every side but the first."""
        return agreeing.unsure_sides({t.contender.name: t.turns for t in self.running()}, figure)

    def kept(self) -> Iterator[str]:
        """What was not measured in this bench."""
        for taken in self.ours():
            if taken.compiled_on:
                name, seconds = taken.contender.name, taken.opened[0]["compile"]
                yield f"{name} compiled in {seconds:.1f} s on {taken.compiled_on}; --fresh compiles anew"

    # --- experiments -----------------------------------------------------------------------------

    def _experiments(self) -> None:
        for number, seed in enumerate(self.plan.seeds):
            for taken in self.ours() if number % 2 == 0 else self.ours()[::-1]:
                self._score(taken, seed)

    def _score(self, taken: Taken, seed: int) -> None:
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
        found = score(asked, self.progress.step, self.bystanders)
        taken.scores.append(found)
        said = f"val_bpb {found.val_bpb:.4f}" if found.val_bpb is not None else f"no score: {found.reason}"
        self._ended(f"{name}: {said}")

    # --- sides -----------------------------------------------------------------------------------

    @contextmanager
    def _noted(self, taken: Taken, doing: str) -> Iterator[None]:
        """A side that ends in here has failed; the others go on."""
        try:
            yield
        except sides.SideFailed as failure:
            taken.failed = f"in {doing}: {failure}"
            self._end(taken.contender.name)
            self._ended(f"{taken.contender.name}: {taken.failed}")

    def _told(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "step":
            self.progress.step(event["step"] / event["of"])

    def _end(self, name: str) -> None:
        side = self.alive.pop(name, None)
        if side is not None:
            side.close()

    def _end_all(self) -> None:
        for name in list(self.alive):
            self._end(name)

    def _found_again(self, taken: Taken) -> kept_code.Kept | None:
        """What an earlier bench has compiled for this, copied to where this one looks for it."""
        if (folder := self._place(taken)) is None or (kept := kept_code.find(folder)) is None:
            return None
        caches.copy(kept.code, self._caches(taken))
        return kept

    def _keep_compiled(self) -> None:
        for taken in self.ours():
            if not taken.compiled_on and (folder := self._place(taken)) is not None:
                today = date.today().isoformat()
                kept_code.keep(folder, self._caches(taken), taken.opened[0]["compile"], today)

    def _place(self, taken: Taken) -> Path | None:
        if taken.contender.name == UPSTREAM:
            return None
        try:
            return kept_code.place(taken.contender.name, taken.contender.recipe, self.plan.profile, self.machine)
        except UserError:  # a recipe without the profile's constants: its side says so
            return None

    def _caches(self, taken: Taken) -> Path:
        """Empty at first, so that compiling is timed from nothing on; but see `kept_code`."""
        return self.folder / f"caches-{taken.contender.name}"

    def _order(self, taken: Taken, task: str, first_steps: int = 0) -> Order:
        profile = self.plan.profile
        return Order(
            task=task,  # type: ignore[arg-type]  # one of an Order's
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
            first_steps=first_steps,
            micro_rows=profile.micro_rows,
            brief=self.plan.quick,
        )

    def _ended(self, text: str) -> None:
        self.progress.done(anonymous(text))
        self.keep(self.result())
