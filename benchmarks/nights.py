"""What the verdict is worth: thousands of simulated nights, with the real verdict functions and known truth.

    python -m benchmarks.nights                       # all worlds, some minutes
    python -m benchmarks.nights --nights 200 --only equal
    python -m benchmarks.nights --nights 2000 --world "noise only"
    python -m benchmarks.nights --json > nights.json

Every world is played by five rules: `statistical` is what the loop does; `naive` keeps what scores below the best's
recorded score, one run each; `three seeds` does so with the mean of three; `naive, honest` asks for a margin over the
recorded score that is just large enough for at most 5 % false keeps, found by trying (no loop can know it);
`clairvoyant` is the least time per true gain that any rule with at most 5 % false keeps can need: it knows everything
but the candidate. Where all candidates are shorter than the best, what matters is what simplifications lose together:
there the rule is played as it is, and with each simplification held against the one before alone. docs/verdict.md has
the tables.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.simulated import Clairvoyant, Simple, Statistical, Strategy, World, nights
from core.verdict import Rule

FALSE_SHARE = 0.05
MARGINS = tuple(np.arange(0.0, 6.01, 0.25))  # sds, of `naive, honest`
MARGIN_NIGHTS = 200
KEEPING = (0.8, 0.85, 0.9, 0.93, 0.95)  # posterior probabilities of a true gain, of `clairvoyant`
DROPPING = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
PART = 10  # nights of one task

WORLDS: tuple[World, ...] = (
    World("noise only"),
    World("noise only, machine creeps by 2 sds", creep=2.0),
    World("noise only, machine moves by 3 sds at once", step=3.0),
    World("a fifth better by 2 sds, others equal", better=0.2, gain=2.0),
    World("a fifth better by 1 sd, others equal", better=0.2, gain=1.0),
    World("a fifth better by 2 sds, others mostly worse", better=0.2, gain=2.0, worse=0.75),
    World("a fifth better by 1 sd, others mostly worse", better=0.2, gain=1.0, worse=0.75),
    World("a fifth better by 2 sds, others equal, seeds correlate by 0.7", better=0.2, gain=2.0, correlation=0.7),
    World("a fifth better by 1 sd, others equal, seeds correlate by 0.7", better=0.2, gain=1.0, correlation=0.7),
    World("a fifth better by 2 sds, others equal, machine creeps by 2 sds", better=0.2, gain=2.0, creep=2.0),
    World("a fifth better by 2 sds, others equal, machine moves by 3 sds", better=0.2, gain=2.0, step=3.0),
    World("a fifth better by 1 sd, every fourth of them by 6, others equal", better=0.2, gains=(1.0, 1.0, 1.0, 6.0)),
    World("a fifth better by 2 sds, every fourth of them by 10, others equal", better=0.2, gains=(2.0, 2.0, 2.0, 10.0)),
    World("a fifth better by 1, 2, 3 or 4 sds, others equal", better=0.2, gains=(1.0, 2.0, 3.0, 4.0)),
    World(
        "a fifth better by 2 sds, others equal, candidates twice as noisy", better=0.2, gain=2.0, candidate_noise=2.0
    ),
)


LOSSES: tuple[tuple[float, ...], ...] = ((0.0,), (0.25,), (0.5,), (1.0,), (1.5,), (2.0,), (0.0, 0.25), (0.0, 0.5))
WORLDS += tuple(
    World(f"all shorter, worse by {' or '.join(f'{loss:g}' for loss in loses)} sds; {worth:g} sds are worth keeping",
          loses=loses, worth=worth, shorter=40)
    for worth in (0.1, 1.0)
    for loses in LOSSES
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One rule in one world, over all nights. Gains in sds, time in full runs."""

    world: str
    rule: str
    nights: int
    keeps: float  # a night
    anything: float  # share of nights that kept anything for a gain
    anything_interval: tuple[float, float]  # of that share, 95 %
    simplified: float  # kept for being shorter, a night
    simplified_worse: float  # of those, with a true loss
    power: float  # share of the truly better that was kept; NaN where there are none
    false_share: float  # false keeps of all keeps; NaN where nothing was kept
    false_rate: float  # mean over nights of that share, 0 for a night without keeps: the false discovery rate
    time: float  # a night
    time_ratio: float  # of the naive rule's
    time_per_gain: float  # for one true gain
    true_gain: float
    true_gain_se: float
    true_gain_least: float  # in the worst night
    claimed_error: float  # claimed less true gain, a night
    confirmed_error: float  # re-measured less true gain
    confirmed_error_se: float
    controls: float
    epochs: float


def summary(world: World, rule: str, found: Sequence[dict[str, float]]) -> Row:
    """The figures of one rule in one world; `time_ratio` against one run for each candidate and the baseline."""
    all_of = {name: np.array([night[name] for night in found], dtype=float) for name in found[0]}
    kept = all_of["found"] + all_of["false"]
    error = all_of["confirmed_gain"] - all_of["true_gain"]
    mean = {name: float(values.mean()) for name, values in all_of.items()}
    return Row(
        world=world.name,
        rule=rule,
        nights=len(found),
        keeps=float(kept.mean()),
        anything=float((kept > 0).mean()),
        anything_interval=interval(int((kept > 0).sum()), len(found)),
        simplified=mean["simplified"],
        simplified_worse=mean["simplified_worse"],
        power=_ratio(mean["found"], mean["better"]),
        false_share=_ratio(mean["false"], float(kept.mean())),
        false_rate=float((all_of["false"] / np.maximum(kept, 1)).mean()),
        time=mean["time"],
        time_ratio=mean["time"] / (world.candidates + 1),
        time_per_gain=_ratio(mean["time"], mean["found"]),
        true_gain=mean["true_gain"],
        true_gain_se=float(all_of["true_gain"].std() / np.sqrt(len(found))),
        true_gain_least=float(all_of["true_gain"].min()),
        claimed_error=mean["claimed_gain"] - mean["true_gain"],
        confirmed_error=float(error.mean()),
        confirmed_error_se=float(error.std() / np.sqrt(len(error))),
        controls=mean["controls"],
        epochs=mean["epochs"],
    )


def interval(part: int, whole: int, z: float = 1.96) -> tuple[float, float]:
    """Of a share, by Wilson's score (1927)."""
    share = part / whole
    middle = (share + z**2 / (2 * whole)) / (1 + z**2 / whole)
    half = z / (1 + z**2 / whole) * math.sqrt(share * (1 - share) / whole + z**2 / (4 * whole**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


class Players:
    """Plays nights on several processes."""

    def __init__(self, pool: ProcessPoolExecutor, seed: int) -> None:
        self.pool = pool
        self.seed = seed

    def play(self, world: World, strategy: Strategy, many: int) -> list[dict[str, float]]:
        seeds = np.random.SeedSequence(self.seed).spawn(many)
        parts = [seeds[k : k + PART] for k in range(0, many, PART)]
        done = self.pool.map(nights, [world] * len(parts), [strategy] * len(parts), parts)
        return [night for part in done for night in part]

    def rows(self, world: World, rule: Rule, many: int) -> Iterator[Row]:
        yield summary(world, "statistical", self.play(world, Statistical(rule), many))
        if world.shorter:
            alone = Statistical(rule, anchored=False)
            yield summary(world, "each against the last alone", self.play(world, alone, many))
            return
        yield summary(world, "naive", self.play(world, Simple(), many))
        yield summary(world, "three seeds", self.play(world, Simple(3), many))
        if world.better and (margin := self._margin(world)) is not None:
            name = f"naive, honest ({margin:g} sds)"
            yield summary(world, name, self.play(world, Simple(margin=margin), many))
        odd = world.creep or world.step or world.candidate_noise != 1.0 or world.correlation or world.gains
        if world.better and not odd:  # the clairvoyant knows none of these
            yield summary(world, "clairvoyant", self.play(world, self._clairvoyant(world), many))

    def _margin(self, world: World) -> float | None:
        """The smallest margin with at most 5 % false keeps, None where none is large enough."""
        for margin in MARGINS:
            tried = summary(world, "", self.play(world, Simple(margin=float(margin)), MARGIN_NIGHTS))
            if tried.false_share <= FALSE_SHARE:
                return float(margin)
        return None

    def _clairvoyant(self, world: World) -> Clairvoyant:
        """With the thresholds of least time per true gain among those with at most 5 % false keeps."""
        best, least = Clairvoyant(KEEPING[-1], DROPPING[0]), float("inf")
        for keep in KEEPING:
            for drop in DROPPING:
                tried = summary(world, "", self.play(world, Clairvoyant(keep, drop), MARGIN_NIGHTS))
                if tried.false_share <= FALSE_SHARE and tried.time_per_gain < least:
                    best, least = Clairvoyant(keep, drop), tried.time_per_gain
        return best


def table(rows: Sequence[Row]) -> Table:
    shown = Table(show_lines=False)
    names = (
        "world",
        "rule",
        "keeps",
        "nights that keep",
        "simplified",
        "power",
        "false keeps",
        "time",
        "x naive",
        "time per true gain",
    )
    for name in (*names, "true gain", "claimed less true", "re-measured less true"):
        shown.add_column(name, justify="left" if name in ("world", "rule") else "right")
    last = ""
    for r in rows:
        if last and r.world != last:
            shown.add_section()
        shown.add_row(
            r.world if r.world != last else "",
            r.rule,
            f"{r.keeps:.1f}",
            f"{r.anything:.1%} ({' to '.join(f'{end:.1%}' for end in r.anything_interval)})",
            f"{r.simplified:.1f} ({r.simplified_worse:.1f} worse)" if r.simplified else "",
            _percent(r.power),
            _percent(r.false_share),
            f"{r.time:.0f}",
            f"{r.time_ratio:.2f}",
            f"{r.time_per_gain:.1f}" if np.isfinite(r.time_per_gain) else "",
            f"{r.true_gain:.1f} ± {r.true_gain_se:.2f} ({r.true_gain_least:.1f} at least)",
            f"{r.claimed_error:+.1f}",
            f"{r.confirmed_error:+.2f} ± {r.confirmed_error_se:.2f}",
        )
        last = r.world
    return shown


def _percent(share: float) -> str:
    return f"{share:.1%}" if np.isfinite(share) else ""


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--nights", "many", default=1000, show_default=True, type=click.IntRange(1), help="Nights per world.")
@click.option("--candidates", default=100, show_default=True, type=click.IntRange(5), help="Candidates of a night.")
@click.option("--only", default="", metavar="TEXT", help="Only worlds with TEXT in their name.")
@click.option("--world", "exactly", default="", metavar="NAME", help="Only the world of this name.")
@click.option("--seed", default=1, show_default=True, help="Seed of the random numbers.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(1), help="Processes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list of all rows.")
def main(many: int, candidates: int, only: str, exactly: str, seed: int, jobs: int, as_json: bool) -> None:
    worlds = [replace(w, candidates=candidates) for w in WORLDS if only in w.name and exactly in ("", w.name)]
    if not worlds:
        wanted = f"the name {exactly!r}" if exactly else f"{only!r} in its name"
        named = "; ".join(w.name for w in WORLDS)
        raise click.BadParameter(f"no world has {wanted}; there are: {named}", param_hint="--world, --only")
    rule = Rule()
    rows: list[Row] = []
    console = Console(stderr=True)
    with ProcessPoolExecutor(jobs) as pool, console.status("") as status:
        players = Players(pool, seed)
        for number, world in enumerate(worlds, 1):
            status.update(f"{number} of {len(worlds)}: {world.name}, {many} nights")
            rows += players.rows(world, rule, many)
    if as_json:
        click.echo(json.dumps([vars(r) for r in rows], indent=1))
    else:
        Console(width=None if console.is_terminal else 200).print(table(rows))


if __name__ == "__main__":
    main()
