"""What `autoresearch bench` does between its options and its tables: data, locks, files, progress."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import backends
from benchmarks import results, running, work
from benchmarks.assembling import Contender
from benchmarks.bystanders import Bystanders
from benchmarks.command import shown
from benchmarks.machine import fingerprint
from benchmarks.results import Result
from console.awake import awake
from console.output import Screen, plain
from core import hardware as machines
from core import locks
from core.errors import UserError
from core.hardware import Hardware
from prepare import prepare

if TYPE_CHECKING:
    from core.data import Dataset

SEEDS = (42, 43, 44, 45, 46, 47, 48, 49)
SCORED, QUICK_SCORED = 3, 1
BUSY = 0.1  # share of the machine's processors that others keep busy, above which a result says so
STOLEN = 0.02  # share of the processors' time that the host took, above which a result says so


def bench_verb(
    wanted: Sequence[str],
    profile: str | None,
    quick: bool,
    fresh: bool,
    upstream: Path | None,
    recipes: Sequence[tuple[str, Path]],
    repeats: int | None,
    seeds: int | None,
    out: Path | None,
    page: Path | None,
    markdown: bool,
    as_json: bool,
) -> int:
    """Exit status 0 where every backend that takes part was measured."""
    screen = Screen(as_json)
    hardware = machines.probe()
    given = dict(recipes)
    found = running.contenders(hardware, [*wanted], given, upstream)
    chosen = work.profile(profile, hardware, found[0].name, quick)
    count = seeds if seeds is not None else QUICK_SCORED if quick else SCORED
    if count > len(SEEDS):
        raise UserError(f"{count} seeds were asked for", f"--seeds takes {len(SEEDS)} at most")
    together = running.together(found, hardware)
    for device in devices_of(found, hardware):  # one that is in use is told before data are prepared for minutes
        locks.require_free(device)
    plan = running.Plan(chosen, found, repeats, SEEDS[:count], quick, together, fresh or not quick)
    file = results.reserve(out or Path(f"bench-{chosen.name}-{date.today().isoformat()}.json"), out is not None)
    dataset = prepare(chosen.data, vocab_size=chosen.vocab_size, progress=lambda line: _aside(screen, line))
    _aside(screen, f"{hardware.summary()}; profile {chosen.name}: {chosen.about}")
    try:
        result = measured(screen, plan, dataset, hardware, file)
    except KeyboardInterrupt:
        if file.exists():
            _aside(screen, f"what was measured so far is in {file}")
        raise
    written = keep_or_tell(screen, result, file)
    screen.document(results.plain(result))
    shown([result], screen, markdown, page)
    if written:
        screen.say(f"wrote {file}; beside another machine's: autoresearch bench compare {file.name} OTHER.json")
    return 0 if written and all(b.status == "measured" for b in result.backends) else 1


def devices_of(contenders: Sequence[Contender], hardware: Hardware) -> list[str]:
    """What they are measured on, in one order, so that two benches cannot wait for each other."""
    return sorted({backends.device_name(c.name, hardware) for c in contenders if c.name != running.UPSTREAM})


def measured(screen: Screen, plan: running.Plan, dataset: Dataset, hardware: Hardware, file: Path) -> Result:
    names = [c.name for c in plan.contenders if c.name != running.UPSTREAM]
    with ExitStack() as stack:
        for device in devices_of(plan.contenders, hardware):
            stack.enter_context(locks.hold_device(device))
        stack.enter_context(awake())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="autoresearch-bench-")))
        progress = stack.enter_context(telling(screen, stages(plan)))
        machine = fingerprint(hardware, names)
        described = work.describe(plan.profile, dataset)
        bystanders = Bystanders()
        run = running.Run(
            plan, dataset, described, machine, folder, lambda r: _keep(r, file), progress, bystanders
        )  # fmt: skip
        result = run.go()
        told = notes(hardware, bystanders.others(), bystanders.stolen(), run.unsure())
        return replace(result, notes=[*told, *run.kept()])


def notes(hardware: Hardware, others: float, stolen: float, unsure: Sequence[tuple[str, float]] = ()) -> Iterator[str]:
    """What to know when reading the result. `others`: cores, `stolen`: a share, `unsure`: of `running.Run`."""
    if others > BUSY * hardware.threads:
        yield f"others kept {others:.1f} of {hardware.threads} processors busy: measure again on a quiet machine"
    if stolen > STOLEN:
        yield f"the host of this virtual machine took {stolen:.0%} of its processors' time for others"
    for name, share in unsure:
        if running.KNOWN < share < float("inf"):
            yield f"the rounds tell the speed of {name} to {share:.0%} only: the machine's own speed changed meanwhile"
    if hardware.power.plugged is False:
        yield "the machine ran on battery, which slows many down"


def _aside(screen: Screen, line: str) -> None:
    """For a person who watches; standard output is for the result."""
    if not screen.as_json:
        print(plain(line, sys.stderr), file=sys.stderr, flush=True)


def _keep(result: Result, file: Path) -> None:
    """What there is so far. A disk that is full now is told at the end, with the result."""
    with suppress(UserError):
        results.save(result, file)


def keep_or_tell(screen: Screen, result: Result, file: Path) -> bool:
    """Write the result; where that fails it is printed, so that minutes of work are not lost with it."""
    try:
        results.save(result, file)
        return True
    except UserError as error:
        from console.output import complain

        complain(type(error).__name__, error.fact, "the result follows; " + error.action, screen.as_json)
        if not screen.as_json:
            print(results.dumps(result), flush=True)
        return False


def stages(plan: running.Plan) -> int:
    """First steps, parity, rounds, experiments, rounds again."""
    ours = [c for c in plan.contenders if c.name != running.UPSTREAM]
    return len(plan.contenders) + len(ours) * (1 + len(plan.seeds)) + (2 if plan.after()[1] else 1)


@contextmanager
def telling(screen: Screen, total: int) -> Iterator[running.Progress]:
    """A bar where a person watches, and a line for each stage that ended: on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not screen.interactive)
    task = bar.add_task("", total=float(total))
    ended = [0]

    def stage(text: str) -> None:
        bar.update(task, description=plain(text), completed=ended[0])

    def step(share: float) -> None:
        bar.update(task, completed=ended[0] + min(1.0, share))

    def done(text: str) -> None:
        ended[0] += 1
        bar.update(task, completed=ended[0])
        if not screen.as_json:
            bar.console.print(plain(text, sys.stderr), soft_wrap=True)

    with bar:
        yield running.Progress(stage, step, done)
