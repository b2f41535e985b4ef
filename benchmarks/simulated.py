"""Nights of the loop on a machine that is only a random number generator: what `benchmarks.nights` counts.

All verdicts come from the real functions of core. Effects are in noise sds, device time in budgets (full runs).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from core.ledger import KEPT
from core.measuring import CONTROL_EVERY
from core.noise import CHANGE_POINTS, Noise, NoisePool, Run, drift
from core.verdict import Night, Rule, Step, decide, decide_simple, first_runs

SD = 0.01  # bpb: the noise of one run
START = 5.0  # bpb of the baseline, far enough from 0 for any night's gains
CONFIRMATION = 5  # fresh seeds of the baseline and of the winner, at the end
FRESH_SEED = 100_000


@dataclass(frozen=True)
class World:
    """What the candidates and the machine are like. A gain is relative to the incumbent of the moment."""

    name: str
    better: float = 0.0  # share of candidates with a true gain
    gain: float = 2.0  # sds, of those
    gains: tuple[float, ...] = ()  # the same where they differ, each as likely
    worse: float = 0.0  # share of the others that is worse, by |N(0, spread)| sds; the rest of them changes nothing
    spread: float = 3.0
    loses: tuple[float, ...] = (0.0,)  # sds, of the others that are not worse by `spread`: each as likely
    shorter: int = 0  # syntax-tree tokens that every candidate has less than the best
    worth: float = 0.0  # sds below which a gain is not worth keeping (`Rule.min_effect`)
    correlation: float = 0.0  # of two recipes at one seed
    candidate_noise: float = 1.0  # sds of a candidate's run
    creep: float = 0.0  # sds by which every score rises from the night's first candidate to its last
    step: float = 0.0  # sds by which every score rises once, after a random candidate
    candidates: int = 100
    # Early stopping: of those worse by `hopeless` sds or more `caught` are stopped after `share` of the budget, and of
    # the others `false_stops`.
    hopeless: float = 4.0
    caught: float = 0.8
    share: float = 0.5
    false_stops: float = 0.01


@dataclass
class Recipe:
    level: float  # true bpb, without drift
    noise: float = 1.0
    runs: list[Run] = field(default_factory=list)  # of this epoch
    group: int = 0  # the name of these runs in the noise's pool


class Machine:
    """Runs recipes and counts the time."""

    def __init__(self, world: World, random: np.random.Generator) -> None:
        self.world = world
        self.random = random
        self.time = 0.0  # budgets
        self.order = 0
        self.candidate = 0
        self._seeds: dict[int, float] = {}  # what a seed does to every recipe, sds
        self._step_at = int(random.integers(world.candidates // 5, 4 * world.candidates // 5 + 1))

    def run(self, recipe: Recipe, seed: int) -> Run:
        """One run; it is added to the recipe's."""
        run = Run(seed, self.score(recipe, seed), self.order)
        self.time += 1
        self.order += 1
        recipe.runs.append(run)
        return run

    def score(self, recipe: Recipe, seed: int) -> float:
        shared = self.world.correlation
        common = self._seeds.setdefault(seed, float(self.random.normal())) if shared else 0.0
        own = float(self.random.normal())
        noise = recipe.noise * (math.sqrt(shared) * common + math.sqrt(1 - shared) * own)
        return recipe.level + SD * (noise + self._moved())

    def _moved(self) -> float:
        """Sds by which the machine has drifted."""
        creep = self.world.creep * self.candidate / self.world.candidates
        return creep + (self.world.step if self.candidate > self._step_at else 0.0)

    def draw(self, incumbent: Recipe) -> tuple[float, Recipe]:
        """The next candidate: (true gain in sds, recipe)."""
        self.candidate += 1
        world, dice = self.world, self.random
        gain = self._gain() if dice.random() < world.better else 0.0
        if not gain:
            worse = dice.random() < world.worse
            gain = -abs(float(dice.normal(0, world.spread))) if worse else 0.0 - self._loss()
        return gain, Recipe(incumbent.level - SD * gain, world.candidate_noise)

    def _gain(self) -> float:
        gains = self.world.gains
        return gains[int(self.random.integers(len(gains)))] if gains else self.world.gain

    def _loss(self) -> float:
        losses = self.world.loses
        return losses[int(self.random.integers(len(losses)))] if len(losses) > 1 else losses[0]

    def stops(self, gain: float) -> bool:
        """Is the candidate's first run stopped early? Then its share of the time is counted."""
        world = self.world
        stopped = self.random.random() < (world.caught if gain <= -world.hopeless else world.false_stops)
        self.time += world.share if stopped else 0.0
        return bool(stopped)


@dataclass
class Result:
    """One night. Gains in sds."""

    better: int = 0  # candidates with a true gain
    found: int = 0  # of those, kept
    false: int = 0  # kept without a true gain
    simplified: int = 0  # kept for being shorter
    simplified_worse: int = 0  # of those, with a true loss
    time: float = 0.0
    controls: int = 0
    epochs: int = 0  # drifts that were seen
    true_gain: float = 0.0  # from the baseline to the winner
    claimed_gain: float = 0.0  # by the scores that the verdicts were made from
    confirmed_gain: float = 0.0  # re-measured on fresh seeds

    def count(self, gain: float, kept: bool) -> None:
        self.better += gain > 0
        self.found += kept and gain > 0
        self.false += kept and gain <= 0


Strategy = Callable[[World, np.random.Generator], Result]


class Statistical:
    """The loop under `core.verdict.decide`. `anchored`: simplifications are held against the last keep too, as the loop
    does; without it each is held against the one before alone."""

    def __init__(self, rule: Rule, anchored: bool = True) -> None:
        self.rule = rule
        self.anchored = anchored

    def __call__(self, world: World, random: np.random.Generator) -> Result:
        rule = replace(self.rule, min_effect=world.worth * SD)
        return _Played(world, random, rule, self.anchored).night()


class _Played:
    """One night of `Statistical`."""

    def __init__(self, world: World, random: np.random.Generator, rule: Rule, anchored: bool) -> None:
        self.world, self.rule, self.anchored = world, rule, anchored
        self.machine = Machine(world, random)
        self.result = Result()
        self.baseline = self.incumbent = self.anchor = Recipe(START)
        self.pool, self.groups = NoisePool(), 1  # a group: the runs of one recipe and epoch
        self.before = Night()
        self.since = 0  # candidates since the incumbent ran last

    def night(self) -> Result:
        for seed in range(first_runs(self.rule)):
            self.machine.run(self.baseline, seed)
        for _ in range(self.world.candidates):
            gain, candidate = self.machine.draw(self.incumbent)
            step = None if self.machine.stops(gain) else self._judge(candidate)
            self.result.count(gain, step is not None and step.status == "keep")
            if step is not None:
                self._decided(gain, candidate, step)
        return _ended(self.machine, self.result, self.baseline, self.incumbent)

    def _decided(self, gain: float, candidate: Recipe, step: Step) -> None:
        self.before = self.before.after(step.record)
        if step.status in KEPT:
            self.result.claimed_gain += float(step.record["gain"]) / SD
            self.incumbent, self.since = candidate, 0
        if step.status == "keep":
            self.anchor = candidate
        self.result.simplified += step.status == "simplify"
        self.result.simplified_worse += step.status == "simplify" and gain < 0

    def _judge(self, candidate: Recipe) -> Step:
        candidate.group = self._new_group()
        if self.since >= CONTROL_EVERY:
            self._control(candidate, self._next_seed())
        self.since += 1
        self.machine.run(candidate, 0)
        while True:
            step = self._decide(candidate)
            if step.seed is None:
                return step
            if step.status == "more":
                self.machine.run(candidate, step.seed)
            else:
                self._control(candidate, step.seed)
            if not candidate.runs:  # they were made before the machine moved
                self.machine.run(candidate, 0)

    def _decide(self, candidate: Recipe) -> Step:
        """As `core.deciding` asks: nothing is kept before the best has run since the candidate began."""
        best, mine = self.incumbent.runs, candidate.runs
        anchor = self.anchor.runs if self.anchored and self.anchor is not self.incumbent else []
        shorter = self.world.shorter
        step = decide(best, mine, self._noise(candidate), self.before, self.rule, shorter, anchor)
        if step.status in KEPT and max(run.order for run in best) < min(run.order for run in mine):
            return Step("control", step.reason, self._next_seed(), step.record)
        return step

    def _next_seed(self) -> int:
        return 1 + max(run.seed for run in self.incumbent.runs)

    def _control(self, candidate: Recipe, seed: int) -> None:
        """Run the incumbent again, and begin a new epoch if it has moved. As in `core.measuring`, its last runs alone
        are carried over: the candidate begins again, and simplifications are counted from this incumbent on."""
        self.machine.run(self.incumbent, seed)
        self.result.controls += 1
        self.since = 0
        self.pool.put(self.incumbent.group, self.incumbent.runs[:-CHANGE_POINTS])  # what may have moved is not usual
        moved = drift(self.before.fair(self.incumbent.runs), self.pool.noise())
        if moved:
            self.result.epochs += 1
            self._begin_epoch(candidate, moved.runs)

    def _begin_epoch(self, candidate: Recipe, carried: int) -> None:
        best = self.incumbent
        self.pool.put(best.group, best.runs[:-carried])
        best.runs, best.group = best.runs[-carried:], self._new_group()
        self.pool.put(candidate.group, candidate.runs)
        candidate.runs, candidate.group = [], self._new_group()
        self.anchor = best

    def _noise(self, candidate: Recipe) -> Noise:
        for recipe in (self.incumbent, candidate):
            self.pool.put(recipe.group, recipe.runs)
        return self.pool.noise()

    def _new_group(self) -> int:
        self.groups += 1
        return self.groups - 1


class Clairvoyant:
    """What no loop can beat: a rule that knows the noise, the best's true score without running it, and the world that
    candidates are drawn from. It runs a candidate until the posterior odds of a true gain say `keep` or `drop`, which
    for two hypotheses is the quickest of all tests (Wald and Wolfowitz, "Optimum character of the sequential
    probability ratio test", 1948). `keep`, `drop`: the posterior probability of a true gain from which on, and up to
    which, it decides."""

    def __init__(self, keep: float, drop: float) -> None:
        self.keep = keep
        self.drop = drop

    def __call__(self, world: World, random: np.random.Generator) -> Result:
        machine, result = Machine(world, random), Result()
        baseline = incumbent = Recipe(START)
        for _ in range(world.candidates):
            gain, candidate = machine.draw(incumbent)
            kept = not machine.stops(gain) and self._judge(machine, incumbent, candidate)
            result.count(gain, kept)
            if kept:
                seen = [incumbent.level - run.bpb for run in candidate.runs]
                result.claimed_gain += math.fsum(seen) / len(seen) / SD
                incumbent = candidate
        return _ended(machine, result, baseline, incumbent)

    def _judge(self, machine: Machine, incumbent: Recipe, candidate: Recipe) -> bool:
        gains, shares = _prior(machine.world)
        while True:
            machine.run(candidate, len(candidate.runs))
            seen = (incumbent.level - np.array([run.bpb for run in candidate.runs])) / SD  # (runs,), sds
            likelihood = shares * np.exp(gains * seen.sum() - len(seen) * gains**2 / 2)
            better = float(likelihood[gains > 0].sum() / likelihood.sum())
            if better >= self.keep or better <= self.drop:
                return better >= self.keep


@lru_cache(maxsize=32)
def _prior(world: World) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gains (sds) that a candidate can have, and their shares: (64,) each, the worse ones at equally likely values."""
    worse = -world.spread * ndtri(0.5 + (np.arange(62) + 0.5) / 124)
    rest = 1 - world.better
    shares = np.array([world.better, rest * (1 - world.worse), *[rest * world.worse / len(worse)] * len(worse)])
    return np.array([world.gain, 0.0, *worse]), shares


class Simple:
    """Upstream's rule: keep what scores lower than the best's recorded score. `seeds`: runs whose mean is recorded.
    `margin` (sds): by how much lower. A loop without early stopping and without re-runs."""

    def __init__(self, seeds: int = 1, margin: float = 0.0) -> None:
        self.seeds = seeds
        self.margin = margin

    def __call__(self, world: World, random: np.random.Generator) -> Result:
        machine, result = Machine(world, random), Result()
        baseline = incumbent = Recipe(START)
        recorded = self._measure(machine, baseline)
        for _ in range(world.candidates):
            gain, candidate = machine.draw(incumbent)
            scores = self._measure(machine, candidate)
            kept = decide_simple(recorded, scores, self.margin * SD).status == "keep"
            result.count(gain, kept)
            if kept:
                result.claimed_gain += (math.fsum(recorded) - math.fsum(scores)) / self.seeds / SD
                incumbent, recorded = candidate, scores
        return _ended(machine, result, baseline, incumbent)

    def _measure(self, machine: Machine, recipe: Recipe) -> list[float]:
        return [machine.run(recipe, seed).bpb for seed in range(self.seeds)]


def _ended(machine: Machine, result: Result, baseline: Recipe, winner: Recipe) -> Result:
    """With the gain confirmed on fresh seeds, in pairs, both at the night's end. Its time is not the search's."""
    result.time = machine.time
    result.true_gain = (baseline.level - winner.level) / SD
    seeds = range(FRESH_SEED, FRESH_SEED + CONFIRMATION)
    lost, won = ([machine.score(recipe, seed) for seed in seeds] for recipe in (baseline, winner))
    result.confirmed_gain = (math.fsum(lost) - math.fsum(won)) / CONFIRMATION / SD
    return result


def nights(world: World, strategy: Strategy, seeds: list[np.random.SeedSequence]) -> list[dict[str, float]]:
    """One night for each seed."""
    return [asdict(strategy(world, np.random.default_rng(seed))) for seed in seeds]
