"""Ablation: the best without one of the changes that were kept on the way to it. Does it still need that change?

A change that held when it was kept may be idle by now, because a later one does the same. So it is taken back alone, by
a merge (core.reapply the other way round), and the recipe that results is run beside the best on the same fresh seeds.
That recipe is no candidate: it gets no number, and no verdict reads its runs. Where some experiment is exactly that
recipe, as the one before the last keep is, the runs are that experiment's confirmations.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from core import effects
from core.confirming import Plan, Run, missing
from core.effects import Effect, Replication, Spread
from core.errors import UserError
from core.gitstore import GitStore
from core.lab import Lab
from core.ledger import Ablation, Experiment, Sample
from core.reapply import reapply
from core.recipe import fingerprint


@dataclass(frozen=True)
class LeftOut:
    """A best without one kept change."""

    number: int  # whose change it is
    winner: int  # of what it is left out
    source: bytes | None  # the recipe that results; None: it cannot be left out
    reason: str = ""  # why not


# --- making the recipe -----------------------------------------------------------------------------


def choose(lab: Lab, number: int | None) -> list[int]:
    """Which changes are left out, each in its turn: that of experiment `number`, or (None) all that were kept on
    the way to the best. Raises `UserError` where there is none."""
    kept = [e.number for e in lab.ledger.experiments() if e.is_kept]
    if not kept:
        raise UserError(f"lab {lab.tag} has no baseline yet: there is no best", "autoresearch run")
    if len(kept) == 1:
        raise UserError(
            f"nothing was kept over the baseline (#{kept[0]}): no change can be left out", "autoresearch run"
        )
    if number is None:
        return kept[1:]
    e = lab.ledger.get(number)
    if number in kept[1:]:
        return [number]
    if number == kept[0]:
        fact = f"experiment {number} is the baseline, which the others change"
    elif e.undone is not None:
        fact = f"experiment {number} was taken back: the best (#{kept[-1]}) is without it"
    else:
        how = f"ended as {e.status}" if e.status else "is not decided yet"
        fact = f"experiment {number} {how}: the best (#{kept[-1]}) is without it"
    raise UserError(fact, f"leave out what was kept: {', '.join(f'#{n}' for n in kept[1:])}")


def leave_out(lab: Lab, number: int) -> LeftOut:
    """The best without the change of experiment `number`, one of `choose`. Nothing is written."""
    kept = [e.number for e in lab.ledger.experiments() if e.is_kept]
    return take_back(lab.git, {n: lab.source(n) for n in kept}, number)


def take_back(git: GitStore, sources: Mapping[int, bytes], number: int) -> LeftOut:
    """`sources`: the kept recipes, oldest first; `number`: one of them, not the first."""
    chain = list(sources)
    at, winner = chain.index(number), chain[-1]
    before, changed, best = (sources[n] for n in (chain[at - 1], number, winner))
    made = before if best == changed else reapply(git, changed, before, best)
    if made is None:
        later = {n: sources[n] for n in chain[at + 1 :]}
        return LeftOut(number, winner, None, _builds_on(git, before, changed, later))
    if fingerprint(before) == fingerprint(changed):
        return LeftOut(number, winner, None, "it changed nothing that the program does")
    if fingerprint(made) == fingerprint(best):
        return LeftOut(number, winner, None, f"nothing of it is left in #{winner}")
    return LeftOut(number, winner, made)


def _builds_on(git: GitStore, before: bytes, changed: bytes, later: Mapping[int, bytes]) -> str:
    """'#7 builds on it (lines 40-52)'. `later`: the kept recipes after it, the best last; the lines are the best's."""
    first = next(n for n, source in later.items() if reapply(git, changed, before, source) is None)
    best = list(later.values())[-1]
    lines = touched(before, changed, best)
    where = f" (line{'s' if len(lines) > 1 else ''} {_spelled(lines)})" if lines else ""
    return f"#{first} builds on it{where}"


def touched(before: bytes, changed: bytes, best: bytes) -> list[int]:
    """Lines of `best`, from 1, that stand where `before` became `changed` and were changed again since, or stand right
    beside such lines, which a merge does not part."""
    old, new, now = (source.decode("utf-8", "replace").splitlines() for source in (before, changed, best))
    own, beside = set[int](), set[int]()
    for _, _, low, high in _differences(old, new):
        own |= set(range(low, high))
        beside |= set(range(low - 1, high + 1))
    again = list(_differences(new, now))
    meet = [d for d in again if own & set(range(d[0], d[1]))] or [d for d in again if beside & _around(d[0], d[1])]
    found = {line for _, _, low, high in meet for line in (range(low, high) or [low])}
    return sorted(line + 1 for line in found if line < len(now))


def _around(low: int, high: int) -> set[int]:
    """The lines of a stretch; of a gap both of its neighbours."""
    return set(range(low, high)) or {low - 1, low}


def _differences(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[int, int, int, int]]:
    """(from, to, from, to) of the lines that differ, from 0; of stretches of one length line by line."""
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "replace" and b - a == d - c:
            yield from ((a + k, a + k + 1, c + k, c + k + 1) for k in range(b - a))
        elif tag != "equal":
            yield a, b, c, d


def _spelled(lines: Sequence[int]) -> str:
    """[3, 4, 5, 9] -> '3-5, 9'; of many stretches from the first to the last."""
    starts = [n for n in lines if n - 1 not in lines]
    ends = [n for n in lines if n + 1 not in lines]
    if len(starts) > 3:
        starts, ends = starts[:1], ends[-1:]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


# --- what its runs say -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """What a lab has on the record, by experiment."""

    kept: Mapping[int, str]  # what stands, oldest first: its status
    recipes: Mapping[int, str]  # those with a score: sha256 of the recipe
    samples: Mapping[int, Sequence[Sample]]

    @classmethod
    def of(cls, experiments: Iterable[Experiment], samples: Iterable[Sample]) -> Known:
        by_number: dict[int, list[Sample]] = {}
        for s in samples:
            by_number.setdefault(s.number, []).append(s)
        found = list(experiments)
        return cls(
            {e.number: e.status or "" for e in found if e.is_kept},
            {e.number: e.source_sha256 for e in found if e.status and e.val_bpb is not None},
            by_number,
        )

    def twin(self, source_sha256: str | None) -> int | None:
        """The newest experiment with a score that is exactly this recipe."""
        return max((n for n, digest in self.recipes.items() if digest == source_sha256), default=None)

    def runs(self, source_sha256: str | None, ablation: Ablation | None) -> list[Sample]:
        """The runs of a recipe on fresh seeds: those of its ablation, and of every experiment that is exactly it."""
        twins = [n for n, digest in self.recipes.items() if digest == source_sha256]
        found = [s for n in twins for s in self.samples.get(n, ()) if s.purpose == "confirm"]
        own = ablation is not None and ablation.source_sha256 == source_sha256
        return sorted([*found, *(ablation.runs if ablation and own else ())], key=lambda s: s.created)


@dataclass(frozen=True)
class Without:
    """What a best is without a kept change, as far as it is known."""

    number: int
    status: str  # of the keep
    winner: int
    stands: bool  # is it the best still?
    possible: bool  # can the change be left out?
    reason: str  # why not, or why the recipe that results does not run; else ""
    twin: int | None  # the experiment that is exactly that recipe
    effect: Effect | None  # what the change gives there: above zero it pays; None: not measured, or nothing to measure
    state: Replication
    before: Replication  # what it was on fresh seeds when it was kept
    replaced: bool  # it gave more then than it gives there, beyond noise


def judge(a: Ablation, known: Known, spread: Spread, worth: float) -> Without:
    """`spread`: the lab's; `worth`: the smallest gain that is worth keeping."""
    chain, status = list(known.kept), known.kept.get(a.number, "")
    without, best = effects.together(known.runs(a.source_sha256, a), known.samples.get(a.winner, ()))
    there = effects.effect(effects.scores(without), effects.scores(best), spread)
    at = chain.index(a.number) if a.number in chain else 0
    then = effects.remeasured(known.samples, chain[at - 1], a.number, spread) if at else None
    return Without(
        number=a.number,
        status=status,
        winner=a.winner,
        stands=chain[-1:] == [a.winner],
        possible=a.source_sha256 is not None,
        reason=a.reason,
        twin=known.twin(a.source_sha256),
        effect=there,
        state=effects.settled(status, there, worth, spread),
        before=effects.settled(status, then, worth, spread),
        replaced=effects.shrunk(then, there, spread),
    )


def newest(number: int, ablations: Sequence[Ablation], known: Known) -> Ablation | None:
    """Of a change that stands, out of the newest best that stands too: the present one, where it was asked."""
    chain = list(known.kept)
    found = [a for a in ablations if a.number == number and a.winner in chain and number in chain]
    return max(found, key=lambda a: chain.index(a.winner), default=None)


def plan(
    lefts: Sequence[LeftOut],
    ablations: Sequence[Ablation],
    known: Known,
    lab_seed: int,
    seconds_each: float,
    seeds: int,
    versions: Mapping[str, Any],
    epoch: int,
) -> Plan:
    """The runs that are missing until the best and what it is without each change have `seeds` fresh ones."""
    possible = [(left, sha256(left.source).hexdigest()) for left in lefts if left.source is not None]
    recipes = [(Run(n, lab_seed, False), known.samples.get(n, ())) for n in {left.winner for left, _ in possible}]
    for left, digest in possible:
        twin = known.twin(digest)
        run = Run(left.winner, lab_seed, False, left.number) if twin is None else Run(twin, lab_seed, False)
        own = next((a for a in ablations if (a.number, a.winner) == (left.number, left.winner)), None)
        recipes.append((run, known.runs(digest, own)))
    return missing(recipes, seconds_each, seeds, versions, epoch)
