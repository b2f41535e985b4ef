"""The built-in researcher: offline, without a key. It varies constants within their `# search:` ranges.

A night has about a hundred experiments, each with a little noise, and a start that somebody already tuned. So:

- Most proposals are **moves** from the best: one to three constants, a step each. Which constants, and which way,
  comes from a Bayesian linear model of the gains that past changes brought, sampled (Thompson), so that what helped
  is tried again, what hurt is left alone, and what was never tried gets its turn. After a loss the steps of that
  constant shrink, after a win they grow. Far jumps in ten dimensions almost always lose; near ones win often.
- Every third proposal comes from **TPE** (Optuna) over one to three constants with the others held at the best,
  once enough has been scored for its densities to mean something: it sees the curvature that a line cannot.
- Every fifth is a **structural edit** (researchers/structural.py): several constants that only make sense together.

It holds no state: everything is worked out again from the past experiments, whoever proposed them, and the same past
and seed give the same proposal. A crash, a timeout and an invalid score count as a large loss. Where the code around
the constants, or the set of them, has changed, older scores are shifted by what that change alone brought, if it is
known, and a new study is seeded with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.contract import Exhausted, Past, Proposal, View
from core.recipe import Constant, constants, replace
from researchers.reading import Read, Reader
from researchers.space import Dim, dims
from researchers.structural import RATES, Edit, edits
from researchers.study import Study, Trial, aligned

STEP = 0.15  # of a range: the first step of a move
SMALLEST_STEP = 0.04  # below this a change drowns in the noise between two runs
SHRINK, GROW = 0.7, 1.3  # of the step after a loss and after a win
MEMORY = 0.97  # weight of a gain per experiment of age: the best has moved since
ENOUGH_FOR_TPE = 12  # scored experiments
ATTEMPTS = 60  # draws in search of a file that was never tried, before the rest is enumerated
FAILED = ("crash", "timeout", "invalid")


@dataclass(frozen=True)
class Idea:
    values: Mapping[str, Any]
    reason: str
    kind: str  # "move", "tpe", "structural", "rest"


@dataclass
class Search:
    """Researcher `search`. `seed` makes its proposals repeatable."""

    seed: int = 42
    name: str = field(default="search", init=False)
    _reader: Reader = field(default_factory=Reader, init=False, repr=False, compare=False)  # a cache

    def propose(self, view: View) -> Proposal:
        source = view.best_source.decode("utf-8")
        found = constants(source)
        space = dims(found)
        here = self._reader.read(view.best_source)
        past = self._past(view.past)
        seen = {here.key, *(self._reader.read(p.source).key for p in view.past)}
        rng = np.random.default_rng([self.seed, len(view.past)])
        length = int(view.settings.get("sequence_len", 0) or 1)
        state = State(found, space, here, past, rng, edits(found, length))
        for idea in state.ideas():
            text = replace(source, idea.values).encode("utf-8")
            if self._reader.read(text).key not in seen:
                return _proposal(text, found, idea)
        tried = len(view.past)
        if not space and not state.structural:
            raise Exhausted("train.py has no constant with a `# search:` range, so there is nothing to vary")
        raise Exhausted(f"all values within the `# search:` ranges of {len(space)} constants were tried ({tried} runs)")

    def _past(self, past: Sequence[Past]) -> list[Trial]:
        """Oldest first, each with its gain over the best of its time.

        Left out is what says nothing: what ended otherwise (undecided), and losses of a disturbed measurement.
        """
        best: Read | None = None
        best_bpb = math.inf
        trials = []
        for p in past:
            read = self._reader.read(p.source)
            failed, kept = p.status in FAILED, p.status in ("keep", "simplify")
            if p.tainted and best and not kept:
                continue
            score = None if failed or p.val_bpb is None or not math.isfinite(p.val_bpb) else p.val_bpb
            if best and (early := p.facts.get("stopped_early")):
                score = best_bpb + early["expected"]  # where it would have ended, by what was known when it was stopped
            if score is None and not (failed and best):
                continue
            base = best or read
            gain = None if score is None else best_bpb - score if best else 0.0
            trials.append(Trial(p.number, read.values, read.skeleton, score, gain, base.values, base.skeleton))
            if score is not None and (best is None or kept):
                best, best_bpb = read, score
        return trials


def _proposal(text: bytes, found: Mapping[str, Constant], idea: Idea) -> Proposal:
    changed = {n: (found[n].value, v) for n, v in idea.values.items() if repr(v) != repr(found[n].value)}
    what = ", ".join(f"{name} {_show(old)} -> {_show(new)}" for name, (old, new) in changed.items())
    detail = {"kind": idea.kind, "changed": {n: list(pair) for n, pair in changed.items()}}
    return Proposal(text, f"{what}: {idea.reason}", detail)


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1024 and value & (value - 1) == 0:
        return f"2**{value.bit_length() - 1}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- one proposal ------------------------------------------------------------------------------


@dataclass
class State:
    """All that one proposal is made from."""

    found: Mapping[str, Constant]
    space: Sequence[Dim]
    here: Read
    past: Sequence[Trial]
    rng: np.random.Generator
    structural: Sequence[Edit]

    def ideas(self) -> Iterator[Idea]:
        """Ideas in order of preference; the first that gives a new file is taken."""
        turn = len(self.past)
        if turn % 5 == 4 or not self.space:
            yield from self._structural()
        if self.space:
            if turn % 3 == 2 and sum(t.score is not None for t in self.past) >= ENOUGH_FOR_TPE:
                yield from self._tpe()
            yield from self._moves()
            yield from self._structural()
            yield from self._rest()

    # --- moves

    def _moves(self) -> Iterator[Idea]:
        model = _Gains(self.space, self.past, self.found)
        for attempt in range(ATTEMPTS):
            ranked = model.sample(self.rng, widen=1.0 + attempt / ATTEMPTS)
            if not ranked:
                return
            many = 1 + int(self.rng.choice(3, p=(0.5, 0.35, 0.15)))
            chosen = ranked[:1] + [move for move in ranked[1:many] if move.hope > 0]
            values = {move.name: move.value for move in chosen}
            reasons = [f"{m.name} {m.reason}" if len(chosen) > 1 else m.reason for m in chosen]
            yield Idea(values, "; ".join(reasons), "move")

    # --- structural

    def _structural(self) -> Iterator[Idea]:
        """Shapes that no experiment had yet, in the order of the list."""
        for edit in self.structural:
            shape = {n: v for n, v in edit.values.items() if n not in RATES}
            if not any(all(repr(t.values.get(n)) == repr(v) for n, v in shape.items()) for t in self.past):
                yield Idea(edit.values, edit.reason, "structural")

    # --- TPE

    def _tpe(self) -> Iterator[Idea]:
        many = 1 + int(self.rng.choice(3, p=(0.3, 0.4, 0.3)))
        picks = self.rng.choice(len(self.space), size=min(many, len(self.space)), replace=False)
        free = [self.space[i] for i in sorted(picks)]
        present = {d.name: self.found[d.name].value for d in self.space}
        study = Study(self.space, present, aligned(self.past, self.here.skeleton))
        for values in study.ask(free, int(self.rng.integers(2**31)), attempts=5):
            names = " and ".join(d.name for d in free)
            yield Idea(values, f"TPE over {names}, from {len(study.trials)} experiments", "tpe")

    # --- what is left

    def _rest(self) -> Iterator[Idea]:
        """Anything in the space that was not tried: one constant anywhere, then any combination."""
        base = {d.name: self.found[d.name].value for d in self.space}
        for d in self.rng.permutation(len(self.space)):
            dim = self.space[d]
            values = dim.grid() if dim.size() else [dim.value(u) for u in self.rng.random(20)]
            for i in self.rng.permutation(len(values)):
                yield Idea({dim.name: values[i]}, "not tried yet", "rest")
        sizes = [d.size() for d in self.space]
        if all(sizes) and math.prod(sizes) <= 20_000:
            for index in self.rng.permutation(math.prod(sizes)):
                values = dict(base)
                for dim, i in zip(self.space, np.unravel_index(index, sizes), strict=True):
                    values[dim.name] = dim.grid()[int(i)]
                yield Idea(values, "a combination not tried yet", "rest")
            return
        for _ in range(1000):
            yield Idea({d.name: _anywhere(d, self.rng) for d in self.space}, "a combination not tried yet", "rest")


def _anywhere(dim: Dim, rng: np.random.Generator) -> Any:
    return dim.value(rng.random()) if dim.ordered else dim.value(int(rng.integers(dim.size())))


# --- what past changes brought -----------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    name: str
    value: Any
    hope: float  # sampled gain, in units of the typical one
    reason: str


class _Gains:
    """gain = sum over the changed constants of (coefficient of constant and direction) * size of its step.

    Ridge regression in its Bayesian form: coefficients ~ N(0, 1), noise ~ N(0, 1), gains in units of their typical
    size, so that one experiment neither proves nor rules out a direction.
    """

    def __init__(self, space: Sequence[Dim], past: Sequence[Trial], found: Mapping[str, Constant]) -> None:
        self.moves: list[tuple[Dim, Any]] = []  # (constant, +1 / -1, or the choice)
        for dim in space:
            options = (1, -1) if dim.ordered else dim.grid()
            self.moves += [(dim, option) for option in options]
        self.found = found
        self.steps = {d.name: STEP for d in space}
        self.wins = dict.fromkeys(range(len(self.moves)), 0)
        self.losses = dict.fromkeys(range(len(self.moves)), 0)
        self.barred: dict[tuple[str, int], float] = {}  # unit coordinate at which a single change failed
        self._learn(past)

    def _learn(self, past: Sequence[Trial]) -> None:
        gains = [t.gain for t in past if t.gain is not None and t.changed()]
        scale = float(np.median(np.abs(gains))) if gains else 0.0
        scale = max(scale, 1e-4)
        n = len(self.moves)
        precision, pull = np.eye(n), np.zeros(n)
        for age, trial in enumerate(reversed(past)):
            row = self._row(trial)
            if not row.any():
                continue
            gain = -3.0 if trial.gain is None else float(np.clip(trial.gain / scale, -3.0, 3.0))
            weight = MEMORY**age
            precision += weight * np.outer(row, row)
            pull += weight * row * gain
        for trial in past:
            self._step_sizes(trial)
        self.covariance = np.linalg.inv(precision)
        self.mean = self.covariance @ pull

    def _row(self, trial: Trial) -> np.ndarray:
        """(moves,) sizes of this trial's changes in units of STEP."""
        row = np.zeros(len(self.moves))
        changed = trial.changed()
        for i, (dim, option) in enumerate(self.moves):
            if dim.name not in changed:
                continue
            new, old = trial.values[dim.name], trial.base[dim.name]
            if dim.ordered:
                moved = _difference(dim, new, old)
                if moved * option > 0:
                    row[i] = min(abs(moved) / STEP, 2.0)
            elif repr(new) == repr(option):
                row[i] = 1.0
        return row

    def _step_sizes(self, trial: Trial) -> None:
        changed = trial.changed() & set(self.steps)
        won = trial.gain is not None and trial.gain > 0
        for i, share in enumerate(self._row(trial)):
            if share:
                (self.wins if won else self.losses)[i] += 1
        for name in changed:
            factor = GROW if won else SHRINK ** (1 / len(changed))
            self.steps[name] = float(np.clip(self.steps[name] * factor, SMALLEST_STEP, 2 * STEP))
        if trial.score is None and len(changed) == 1 and len(trial.changed()) == 1:
            self._bar(trial, changed.pop())

    def _bar(self, trial: Trial, name: str) -> None:
        """A single change that crashed or timed out: no further that way."""
        dim = next(d for d, _ in self.moves if d.name == name)
        if dim.ordered:
            moved = _difference(dim, trial.values[name], trial.base[name])
            if moved:
                self.barred[name, 1 if moved > 0 else -1] = dim.unit(trial.values[name])

    def _allowed(self, dim: Dim, sign: int, value: Any) -> bool:
        limit = self.barred.get((dim.name, sign))
        return limit is None or (dim.unit(value) - limit) * sign < 0

    def sample(self, rng: np.random.Generator, widen: float) -> list[Move]:
        """Possible moves, the most hopeful first, at most one for each constant."""
        drawn = rng.multivariate_normal(self.mean, self.covariance, method="cholesky")
        best: dict[str, Move] = {}
        for i, (dim, option) in enumerate(self.moves):
            present = self.found[dim.name].value
            if dim.ordered:
                step = self.steps[dim.name] * widen * rng.uniform(0.6, 1.4)
                value = dim.moved(present, step * option)
                if value is None or not self._allowed(dim, option, value):
                    continue
            elif repr(option) == repr(present):
                continue
            else:
                value = option
            if dim.name not in best or drawn[i] > best[dim.name].hope:
                best[dim.name] = Move(dim.name, value, float(drawn[i]), self._why(i))
        return sorted(best.values(), key=lambda m: -m.hope)

    def _why(self, i: int) -> str:
        dim, option = self.moves[i]
        way = {1: "higher", -1: "lower"}[option] if dim.ordered else str(option)
        wins, losses = self.wins[i], self.losses[i]
        if wins and wins >= losses:
            return f"{way} won {_times(wins)}" + (f", lost {_times(losses)}" if losses else "")
        if wins or losses:
            return f"{way} lost {_times(losses)}" + (f", won {_times(wins)}" if wins else "") + ", other step"
        opposite = sum(self.losses[j] for j, (d, _) in enumerate(self.moves) if d.name == dim.name and j != i)
        if dim.ordered and opposite:
            return f"{'lower' if option == 1 else 'higher'} lost {_times(opposite)}, so the other way"
        return f"{way} not tried yet"


def _difference(dim: Dim, new: Any, old: Any) -> float:
    """Step from old to new in units of the range; 0 where one of them is no number."""
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (new, old))
    return dim.unit(new) - dim.unit(old) if numbers else 0.0


def _times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")
