"""What early stopping would have missed and saved, on recorded learning curves of the CPU recipe.

    python -m benchmarks.early_stopping record curves.json --minutes 10
    python -m benchmarks.early_stopping replay                       # the recorded curves that come with the project
    python -m benchmarks.early_stopping replay curves.json

`record` trains the shipped CPU recipe and edits of it at a small size, a fixed number of steps each instead of seconds,
so that a busy machine changes nothing; a model whose steps cost more gets fewer of them. At shares of the way the
weights are scored on the probe rows, at the end on the validation text, by the device's trusted code. Half of the
edits change a schedule, whose curves cross those of the best late.

`replay` lets `core.probing` judge these runs in many random orders, each as a lab of its own: it knows what earlier
runs of the same lab showed and nothing else; a run that it stops teaches it nothing. Each recipe with enough runs is
the best of its labs in turn; of the others the first run is the candidate, as in a real lab.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np

from core import evaluate, probing, recipe
from core.data import Dataset
from core.paths import project_root
from core.probing import Curve, Era
from core.stream import TokenStream

RESULTS = Path(__file__).with_name("early_stopping.json")
LOOKS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
PAIRS = ((0.4, 0.7), (0.3, 0.6), (0.3,), (0.5,), (0.2, 0.4, 0.6))  # shares that `replay` compares
VOCAB, CONTEXT, STEPS = 1024, 64, 240
BASE: Mapping[str, Any] = {
    "DEPTH": 3, "ASPECT_RATIO": 21, "HEAD_DIM": 32, "TOTAL_BATCH_SIZE": 2**9, "WEIGHT_DECAY": 0.0,
    "EMBEDDING_LR": 1.5, "ADAM_BETAS": (0.8, 0.99),
}  # fmt: skip
SCHEDULES = {
    "WARMDOWN_RATIO": (0.1, 0.2, 0.3, 0.7, 0.9, 1.0),
    "WARMUP_RATIO": (0.05, 0.1, 0.2),
    "FINAL_LR_FRAC": (0.05, 0.1, 0.2),
}
OTHERS = {
    "DEPTH": (1, 2, 4, 5), "HEAD_DIM": (64,), "TOTAL_BATCH_SIZE": (2**8, 2**10, 2**11), "WEIGHT_DECAY": (0.1, 0.3),
    "WINDOW_PATTERN": ("L", "SL"),
}  # fmt: skip
RATES = ("EMBEDDING_LR", "UNEMBEDDING_LR", "MATRIX_LR", "SCALAR_LR")  # times 1/4 to 4
BASELINE_RUNS, REPEATED, REPEATS = 6, 3, 4  # seeds of the baseline; this many edits are run on more seeds
ORDERS = 10  # random orders of a lab's candidates


# --- recording -----------------------------------------------------------------------------------------


def edits(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Changes of one or two constants, each once, every other one of a schedule."""
    base = {name: c.value for name, c in recipe.constants(_source()).items()} | dict(BASE)
    number, seen = 0, set[str]()
    while True:
        schedule = number % 2 == 0
        change: dict[str, Any] = {}
        if schedule:
            change |= _one_of(SCHEDULES, rng)
        if not schedule or rng.random() < 0.5:
            if rng.random() < 0.5:
                name = str(rng.choice(RATES))
                change[name] = float(f"{base[name] * 4 ** rng.uniform(-1, 1):.3g}")
            else:
                change |= _one_of(OTHERS, rng)
        if (name := json.dumps(change, sort_keys=True)) not in seen:
            seen.add(name)
            number += 1
            yield change


def _one_of(space: Mapping[str, Sequence[Any]], rng: np.random.Generator) -> dict[str, Any]:
    name = str(rng.choice(list(space)))
    return {name: space[name][int(rng.integers(len(space[name])))]}


def _source() -> str:
    return (project_root() / "backends" / "cpu" / "train.py").read_text("utf-8")


def _module(constants: Mapping[str, Any]) -> ModuleType:
    module = ModuleType("recorded")
    exec(compile(recipe.replace(_source(), constants), "train.py", "exec"), module.__dict__)
    return module


def steps_of(constants: Mapping[str, Any]) -> int:
    """As many steps as cost what STEPS of the baseline do."""
    from backends.scaling import cost

    return max(8, round(STEPS * cost(BASE, VOCAB) / cost({**BASE, **constants}, VOCAB)))


class Bench:
    """Trains one recipe after another on one data set."""

    def __init__(self, dataset: Dataset) -> None:
        from backends.cpu.device import open_device

        self.device = open_device()
        self.dataset = dataset
        self.probe = dataset.rows("train", CONTEXT, probing.TOKENS)
        self.validation = dataset.rows("val", CONTEXT, 2**15)

    def run(self, edit: Mapping[str, Any], seed: int) -> dict[str, Any]:
        from core.contract import Spec

        module = _module({**BASE, **edit})
        spec = Spec(VOCAB, CONTEXT, self.dataset.bos_id, "cpu", self.device.dtype.value, seed, 2**32)
        training = module.build(spec)
        fds = self.dataset.open_files("train")
        stream = TokenStream(fds, self.dataset.token_dtype, seed, self.device.from_numpy)
        for fd in fds:
            os.close(fd)
        steps, probes = steps_of(edit), {}
        for step in range(steps):
            training.step(stream, step / steps)
            for share in LOOKS:
                if step + 1 == math.ceil(share * steps):
                    probes[f"{share:g}"] = round(self.score(training, self.probe), 6)
        stream.close()
        final = round(self.score(training, self.validation), 6)
        return {"edit": dict(edit), "seed": seed, "steps": steps, "probes": probes, "final": final}

    def score(self, training: Any, rows: np.ndarray) -> float:
        found = [
            self.device.nats(training.logits(self.device.from_numpy(part[:, :-1])), part[:, 1:])
            for part in np.array_split(rows, max(1, len(rows) // 64))
        ]
        return evaluate.bpb(*evaluate.totals(np.concatenate(found), rows[:, 1:], self.dataset.token_bytes))


def plan(rng: np.random.Generator) -> Iterator[tuple[dict[str, Any], int]]:
    """(edit, seed) without end: the baseline's seeds first, then edits; the first few edits get more seeds."""
    for k in range(BASELINE_RUNS):
        yield {}, 42 + k
    for number, edit in enumerate(edits(rng)):
        for k in range(REPEATS if number < REPEATED else 1):
            yield edit, 42 + k


@click.group(help=__doc__.split("\n\n")[0] if __doc__ else "")
def main() -> None:
    pass


@main.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--minutes", default=10.0, show_default=True, help="How long to record.")
def record(file: Path, minutes: float) -> None:
    """Train and write FILE, again after each run; where FILE has runs already, go on behind them."""
    os.environ.setdefault("AUTORESEARCH_HOME", tempfile.mkdtemp(prefix="early-stopping-"))
    from prepare import prepare

    bench = Bench(prepare("kjv", vocab_size=VOCAB))
    until = time.monotonic() + 60 * minutes
    runs = json.loads(file.read_text("utf-8"))["runs"] if file.exists() else []
    for edit, seed in itertools.islice(plan(np.random.default_rng(8)), len(runs), None):
        if time.monotonic() > until:
            break
        runs.append(bench.run(edit, seed))
        made = {
            "made": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {bench.device.dtype.value}",
            "base": {**BASE, "vocabulary": VOCAB, "context": CONTEXT, "steps": STEPS},
            "runs": runs,
        }
        file.write_text(json.dumps(made, indent=None).replace('{"edit"', '\n{"edit"') + "\n")
        click.echo(f"{len(runs):4} {runs[-1]['final']:.4f} {runs[-1]['probes'].get('0.3')} {seed} {edit}")


# --- replaying -----------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a rule did in all labs together."""

    judged: int = 0
    stopped: int = 0
    good: int = 0  # runs that ended better than the best, by its mean or by its run on the same seed
    good_stopped: int = 0
    saved: float = 0.0  # budgets

    def row(self, name: str) -> str:
        share = self.good_stopped / max(1, self.stopped)
        lost = self.good_stopped / max(1, self.good)
        return (
            f"| {name} | {self.stopped / self.judged:.0%} | {share:.1%} | {lost:.1%} | {self.saved / self.judged:.0%} |"
        )


def labs(runs: Sequence[Mapping[str, Any]]) -> list[tuple[list[Curve], list[Curve]]]:
    """(the best's runs, the first of everybody else) for each recipe that has runs enough to be the best of a lab."""
    by_edit: dict[str, list[Curve]] = {}
    for run in runs:
        curve = Curve({float(s): b for s, b in run["probes"].items()}, run["final"], run["seed"])
        by_edit.setdefault(json.dumps(run["edit"], sort_keys=True), []).append(curve)
    return [
        (best, [curves[0] for other, curves in by_edit.items() if other != edit])
        for edit, best in by_edit.items()
        if len(best) >= probing.LEAST_RUNS
    ]


def replay_rule(
    incumbent: Sequence[Curve], candidates: Sequence[Curve], shares: Sequence[float], tally: Tally, seed: int
) -> None:
    """One lab, its candidates in one random order."""
    known: list[Curve] = []
    for number, at in enumerate(np.random.default_rng(seed).permutation(len(candidates)), 1):
        curve = candidates[int(at)]
        era = Era(incumbent, known)
        ask = probing.never if probing.exempt(number) else probing.judge([era], shares, seed=curve.seed)
        share = _stopped_at(curve, shares, ask)
        if share is None:
            known.append(curve)
        _count(tally, _better(era, curve, shares), share)


def replay_median(
    incumbent: Sequence[Curve], candidates: Sequence[Curve], shares: Sequence[float], tally: Tally, seed: int
) -> None:
    """For comparison: Vizier's median rule (Golovin et al. 2017), a run worse than the median of the earlier ones."""
    era = Era(incumbent)
    seen: dict[float, list[float]] = {share: [c.probes[share] for c in incumbent] for share in shares}
    for at in np.random.default_rng(seed).permutation(len(candidates)):
        curve = candidates[int(at)]
        stopped = next((s for s in shares if curve.probes[s] > float(np.median(seen[s]))), None)
        for share in shares:
            if stopped is None or share <= stopped:
                seen[share].append(curve.probes[share])
        _count(tally, _better(era, curve, shares), stopped)


def _better(era: Era, curve: Curve, shares: Sequence[float]) -> bool:
    levels = [era.level(shares[0], seed) for seed in (None, curve.seed)]
    return any(level is not None and curve.final < level[1] for level in levels)


def _stopped_at(curve: Curve, shares: Sequence[float], ask: probing.Judge) -> float | None:
    for index, share in enumerate(shares):
        found = ask(index, curve.probes[share])
        if found is not None and found.hopeless:
            return share
    return None


def _count(tally: Tally, good: bool, stopped_at: float | None) -> None:
    tally.judged += 1
    tally.good += good
    tally.stopped += stopped_at is not None
    tally.good_stopped += good and stopped_at is not None
    tally.saved += 0.0 if stopped_at is None else 1 - stopped_at


def table(runs: Sequence[Mapping[str, Any]], orders: int = ORDERS) -> list[str]:
    """Rows of Markdown: of all runs, how many were stopped; how many of these, and of all good ones, would have ended
    better than the best; training time saved."""
    found = labs(runs)
    lines = [
        "| rule, looks at | stopped | of these better than the best | of the better ones stopped | training saved |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, rule in (("forecast", replay_rule), ("median of earlier runs", replay_median)):
        for shares in PAIRS if rule is replay_rule else PAIRS[:1]:
            tally = Tally()
            for best, others in found:
                for seed in range(orders):
                    rule(best, others, shares, tally, seed)
            lines.append(tally.row(f"{name}, {' and '.join(f'{s:.0%}' for s in shares)}"))
    return lines


@main.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False), default=RESULTS)
@click.option("--orders", default=ORDERS, show_default=True, help="Random orders of each lab's candidates.")
def replay(file: Path, orders: int) -> None:
    """Judge the recorded runs of FILE."""
    recorded = json.loads(file.read_text("utf-8"))
    runs, found = recorded["runs"], labs(recorded["runs"])
    click.echo(f"{len(runs)} runs of {recorded['made']} on {recorded['machine']}; {len(found)} recipes as the best")
    click.echo("\n".join(table(runs, orders)))


if __name__ == "__main__":
    main()
