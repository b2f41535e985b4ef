"""Which of a lab's recorded runs can be compared, and what they say of its noise and of its steady state.

Runs are comparable within one epoch and one set of versions. Confirmations are made to see what was gained without the
luck of the draw: they tell of the noise, but no verdict rests on them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from core import steady
from core.ledger import Experiment, Ledger, Sample
from core.noise import CHANGE_POINTS, Noise, Run, estimate_noise
from core.steady import Steady
from core.verdict import Night

DECIDING = ("verdict", "control")  # purposes of the runs that verdicts rest on
REPEATS = 2  # seeds of a lab that are run twice, to see how far two runs of one seed lie apart on this machine
DECIDED = "decided"  # with the outcome of a run of the best: the last experiment that was decided before it


@dataclass(frozen=True)
class Runs:
    """All runs of a lab that have a number, oldest first, seen from its present epoch and versions."""

    samples: Sequence[Sample]
    epoch: int
    versions: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, ledger: Ledger, versions: Mapping[str, Any]) -> Runs:
        return cls(ledger.all_samples(), ledger.epoch(), versions)

    def with_run(self, number: int, seed: int, bpb: float) -> Runs:
        """As if experiment `number` had made this one too."""
        last = self.samples[-1].id if self.samples else 0
        made = Sample(number, seed, bpb, False, dict(self.versions), "", id=last + 1, epoch=self.epoch)
        return replace(self, samples=[*self.samples, made])

    def of_now(self, number: int) -> list[Sample]:
        """The comparable runs of an experiment, disturbed ones too."""
        return [s for s in self.samples if s.number == number and s.purpose in DECIDING and self._is_now(s)]

    def scores(self, number: int) -> list[Run]:
        """What a verdict may rest on: the comparable runs that were not disturbed. Where there is no other, as with a
        baseline whose every run was, the disturbed ones."""
        found = self.of_now(number)
        return [_run(s) for s in [s for s in found if not s.tainted] or found]

    def noise(self, leave_out: Sequence[Sample] = ()) -> Noise:
        """Of this lab, from every run that was not disturbed but for those that are left out."""
        left_out = {s.id for s in leave_out}
        groups: dict[tuple[int, int, str], list[Run]] = defaultdict(list)
        repeats: dict[tuple[tuple[int, int, str], int], list[float]] = defaultdict(list)
        for s in self.samples:
            if s.tainted or s.id in left_out:
                continue
            key = (s.number, s.epoch, json.dumps(s.versions, sort_keys=True))
            groups[key].append(_run(s))
            repeats[key, s.seed].append(s.val_bpb)
        return estimate_noise(list(groups.values()), [r for r in repeats.values() if len(r) > 1])

    def steady(self, number: int) -> Steady:
        """What a run of experiment `number` is compared with."""
        present = [s for s in self.samples if s.purpose in DECIDING and self._is_now(s)]
        good = [s for s in present if not s.tainted]
        if not present:
            return Steady()
        rates: dict[int, list[float]] = defaultdict(list)  # of disturbed runs too: what is usual includes some of that
        for s in present:
            if found := steady.rate(s.outcome or {}):
                rates[s.number].append(found)
        own = [found for s in good if s.number == number and (found := steady.rate(s.outcome or {}))]
        health = _health(good[0] if good else present[-1])
        most = 0.0 if good else max(float(_health(s).get("our_cores") or 0.0) for s in present)
        return Steady(health, bool(good), most, own, steady.spread(list(rates.values())))

    def to_repeat(self, number: int, is_baseline: bool) -> int | None:
        """A seed of the best for its next run that makes the second on it; None where enough of them are known, or none
        will do. A run that a best was kept for was lucky, and so its seed would be: but for a baseline only controls
        will do. And none of the last runs, which the test for drift takes for independent of the next."""
        if self.noise().repeat_df >= REPEATS:
            return None
        made = [s for s in self.of_now(number) if not s.tainted]
        times = Counter(s.seed for s in made)
        fair = [s.seed for s in made[: 1 - CHANGE_POINTS] if is_baseline or s.purpose == "control"]
        return next((seed for seed in fair if times[seed] == 1), None)

    def since(self, number: int, experiments: Sequence[Experiment]) -> dict[int, bool]:
        """The others that were run since the last good run of experiment `number` (all, where it has none), and of each
        whether a run of it was disturbed. What was stopped early or failed has left no sample: of `experiments` those
        count that were decided later."""
        last = max((run.order for run in self.scores(number)), default=0)
        found: dict[int, bool] = {}
        for s in self.samples:
            if s.id > last and s.purpose == "verdict" and s.number != number:
                found[s.number] = found.get(s.number, False) or s.tainted
        sampled, decided = {s.number for s in self.samples}, self._decided_by(last)
        unsampled = [e for e in experiments if e.status and e.number > decided and e.number not in sampled]
        return found | {e.number: e.tainted for e in unsampled}

    def _decided_by(self, sample: int) -> int:
        """The last experiment that was decided before the run with this id. Runs of the best say so; before any other
        it is the one that was run, as decisions come in the order of the numbers."""
        until = [s for s in self.samples if s.id <= sample]
        noted = (until[-1].outcome or {}).get(DECIDED) if until else None
        return max((s.number for s in until), default=0) if noted is None else int(noted)

    def _is_now(self, s: Sample) -> bool:
        return s.epoch == self.epoch and s.versions == self.versions


def night(experiments: Sequence[Experiment]) -> Night:
    """What these candidates, oldest first, leave for the next one. What was taken back is tested, but not kept."""
    records = [{k: v for k, v in e.verdict.items() if k != "kept" or e.undone is None} for e in experiments]
    return Night.from_records(records)


def _health(s: Sample) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (s.outcome or {}).get("health") or {}
    return found


def _run(s: Sample) -> Run:
    return Run(s.seed, s.val_bpb, order=s.id)
