"""Past experiments as an Optuna study, and scores of different code brought on one scale."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.recipe import Choices
from researchers.space import Dim


@dataclass(frozen=True)
class Trial:
    """A past experiment as a point and a gain over the best of its time (bpb, positive is better; failures: None)."""

    number: int
    values: Mapping[str, Any]
    skeleton: str
    score: float | None
    gain: float | None
    base: Mapping[str, Any]  # values of the best of its time
    base_skeleton: str

    def changed(self) -> set[str]:
        return {n for n in self.values if n in self.base and repr(self.values[n]) != repr(self.base[n])}


def aligned(past: Sequence[Trial], skeleton: str) -> list[tuple[Mapping[str, Any], float]]:
    """(values, bpb) of the past as it would score with the present code.

    Between two versions of the code the offset is what a change of the code alone brought; where no such pair was
    measured the scores are taken as they are. Failures get a score worse than every real one, so that a sampler
    stays away from them instead of forgetting them.
    """
    offsets = {skeleton: 0.0}
    for _ in range(len(past)):
        known = len(offsets)
        for t in past:
            if t.gain is None or t.skeleton == t.base_skeleton or t.changed():
                continue  # not a change of the code alone
            if t.skeleton in offsets and t.base_skeleton not in offsets:
                offsets[t.base_skeleton] = offsets[t.skeleton] - t.gain
            elif t.base_skeleton in offsets and t.skeleton not in offsets:
                offsets[t.skeleton] = offsets[t.base_skeleton] + t.gain
        if len(offsets) == known:
            break
    scores = [t.score + offsets.get(t.skeleton, 0.0) for t in past if t.score is not None]
    if not scores:
        return []
    worst = max(scores) + 0.5 * (max(scores) - min(scores)) + 0.01
    return [(t.values, worst if t.score is None else t.score + offsets.get(t.skeleton, 0.0)) for t in past]


class Study:
    """An in-memory study that holds the past; it is asked for a few constants with the others at the best."""

    def __init__(
        self, space: Sequence[Dim], present: Mapping[str, Any], known: Sequence[tuple[Mapping[str, Any], float]]
    ) -> None:
        self.space = space
        self.present = present
        self.trials = []
        for values, score in known:
            # A constant that did not exist yet counts with its present value: the nearest to what its code did.
            point = {d.name: values.get(d.name, present[d.name]) for d in space}
            if all(d.search.contains(point[d.name]) for d in space):
                self.trials.append((point, score))

    def ask(self, free: Sequence[Dim], seed: int, attempts: int) -> Iterator[dict[str, Any]]:
        """Values for the free constants, a few times, the same for the same past and seed."""
        if not self.trials:
            return
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        fixed = {d.name: _encode(d, self.present[d.name]) for d in self.space if d not in free}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate TPE is marked as experimental
            tpe = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=0, n_ei_candidates=32)
            study = optuna.create_study(sampler=optuna.samplers.PartialFixedSampler(fixed, tpe))
        spread = {d.name: _distribution(optuna, d) for d in self.space}
        for point, score in self.trials:
            params = {d.name: _encode(d, point[d.name]) for d in self.space}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=spread, value=score))
        for _ in range(attempts):  # again only if it gave no new file
            trial = study.ask(spread)
            yield {d.name: _decode(d, trial.params[d.name]) for d in free}
            study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _distribution(optuna: Any, dim: Dim) -> Any:
    r = dim.search
    if isinstance(r, Choices):
        return optuna.distributions.CategoricalDistribution(tuple(range(dim.size())))
    if r.scale == "pow2":
        return optuna.distributions.IntDistribution(round(math.log2(r.low)), round(math.log2(r.high)))
    kind = optuna.distributions.IntDistribution if r.integer else optuna.distributions.FloatDistribution
    return kind(r.low, r.high, log=r.scale == "log")


def _encode(dim: Dim, value: Any) -> Any:
    """What Optuna sees: index of a choice, exponent of a power of two, else the number."""
    r = dim.search
    if isinstance(r, Choices):
        return max(round(dim.unit(value)), 0)
    x = r.clip(value)
    if r.scale == "pow2":
        return round(math.log2(x))
    return round(x) if r.integer else float(x)


def _decode(dim: Dim, param: Any) -> Any:
    r = dim.search
    if isinstance(r, Choices):
        return dim.value(param)
    if r.scale == "pow2":
        return 2 ** int(param)
    return int(param) if r.integer else dim.value(dim.unit(param))
