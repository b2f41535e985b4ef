"""The command line. Every verb is thin: what it does lives in `console` and `core`, loaded when it is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from console import failing
from console.called import as_called
from console.options import (
    ASKING,
    NEW_LAB,
    RUN_LAB,
    Change,
    Duration,
    Moment,
    Number,
    NumberOrLab,
    TypedPath,
    asking_options,
    lab_argument,
    making_options,
)
from console.output import complain
from console.verbs import SECTIONS, VERBS

LAZY = {  # verbs that live elsewhere and are not imported for a help page: module, command, what the page says
    "prepare": ("prepare", "main", "Fetch and tokenize a data set, once."),
    "bench": ("benchmarks.command", "bench", "Benchmark backends, machines and kernels on the same work."),
    "kernels": ("console.importable", "kernels", "What a train.py of `cuda` or `rtx` may import from `kernels`."),
}


class Formatter(click.HelpFormatter):
    """Usage lines and examples are commands that work in the shell that asked for them."""

    def getvalue(self) -> str:
        return as_called(super().getvalue())


class Verbs(click.Group):
    """Groups the verbs in the help, and turns every error into one line and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in LAZY:
            from importlib import import_module

            module, command, _ = LAZY[cmd_name]
            found: click.Command = getattr(import_module(module), command)
            return found
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.list_commands(ctx), 1)
            hint = f"; did you mean `{near[0]}`?" if near else "; see `autoresearch --help`"
            ctx.fail(f"no such command: {args[0]!r}{hint}")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, names in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name, self._summary(ctx, name)) for name in names], col_max=10)

    def _summary(self, ctx: click.Context, name: str) -> str:
        if name in LAZY:
            return LAZY[name][2]
        command = super().get_command(ctx, name)
        return command.get_short_help_str(200) if command else ""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **_: Any) -> NoReturn:  # type: ignore[override]
        """Exit status: 0 done, 1 a clear error or a negative answer, 2 bad usage, 128 + signal when ended by one."""
        given = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in given
        try:
            check_modules()
            click.Context.formatter_class = Formatter  # of the verbs that are loaded when they are called, too
            status = super().main(given, prog_name or "autoresearch", standalone_mode=False)
        except click.UsageError as error:
            sys.exit(failing.usage(error, as_json, next((word for word in given[:1] if word in VERBS), "")))
        except click.Abort:
            complain("Interrupted", "interrupted", "", as_json)
            sys.exit(130)
        except click.ClickException as error:
            complain(type(error).__name__, error.format_message(), "", as_json)
            sys.exit(error.exit_code)
        except Exception as error:  # noqa: BLE001 - sorted here: the user's to mend, or a bug that is shown whole
            if failing.reader_gone(error):
                sys.exit(1)  # as click does it elsewhere
            sys.exit(failing.failed(error, as_json))
        sys.exit(status if isinstance(status, int) else 0)


def check_modules() -> None:
    """`core`, `kernels` and `prepare` are common names: others' packages of that name must not be taken for ours."""
    from importlib.util import find_spec

    root = Path(__file__).resolve().parent
    for name in ("core", "kernels", "prepare", "backends", "benchmarks", "console"):
        spec = find_spec(name)
        if spec is None:
            raise click.ClickException(f"the module {name!r} of autoresearch is missing from {root}; install it again")
        places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
        folders = {Path(place).resolve() for place in places}
        if not any(root in folder.parents or folder == root / name for folder in folders):
            found = ", ".join(sorted(map(str, folders)))
            raise click.ClickException(
                f"the module {name!r} comes from {found} and not from {root}: another package of that name is in the "
                "way; uninstall it, or use a virtual environment of autoresearch's own"
            )


# --- what several verbs share ------------------------------------------------------------------


def _json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="For programs: JSON on stdout, errors too.")(function)


def verb(name: str) -> Callable[[Callable[..., Any]], Any]:
    """A verb of the command line; its docstring is the help, examples included."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        return cli.command(name)(_json_option(function))

    return decorate


def _screen(as_json: bool) -> Any:
    from console.output import Screen

    return Screen(as_json)


@click.group(cls=Verbs, invoke_without_command=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="autoresearch", message="autoresearch %(version)s")
def cli() -> None:
    """Machine-learning research overnight, on the hardware that is there.

    A researcher rewrites one file, train.py; a fixed time budget trains it; one number, val_bpb (validation bits
    per byte, lower is better), judges it; git keeps it or not; and so on until the morning.

    \b
    autoresearch run --demo         five minutes, to see it work
    autoresearch run --hours 8      a night
    autoresearch log                what it tried
    autoresearch report             the picture
    """


# --- the three that matter ---------------------------------------------------------------------


@verb("run")
@lab_argument(RUN_LAB)
@click.option("--experiments", type=Number(int, 1), metavar="N", help="Stop after N more experiments.")
@click.option(
    "--hours", type=Number(float, 0, 720, over=True), metavar="H", help="Stop after H hours, asleep or awake."
)
@click.option("--until", type=Moment(), metavar="HH:MM", help="Stop at this time of day (or 2026-12-01T07:30).")
@click.option("--researcher", metavar="NAME", default="search", show_default=True, help="Who proposes; A+B: in turns.")
@click.option("--meanwhile", metavar="NAME", help="Who proposes while that one cannot answer, for example search.")
@click.option("--demo", is_flag=True, help="About five minutes on two cores: small text, short budgets.")
@click.option("--notify", metavar="URL", envvar="AUTORESEARCH_NOTIFY", help="Post keeps, stalls and the end there.")
@click.option("--strict", is_flag=True, help="Refuse to run where the sandbox lacks anything.")
@asking_options
@making_options
def run(lab: str | None, as_json: bool, **options: Any) -> int:
    """Research until told to stop. Goes on with a lab, or makes one, and its data, where it is missing.

    The first experiment is the baseline. Ctrl-C ends at once; the running experiment is dropped, not counted, and
    `run` again continues. With --json: one JSON line for each event.

    \b
    autoresearch run --demo
    autoresearch run --until 07:30
    autoresearch run labs/nov24 --experiments 20
    autoresearch run novels --text ~/books --budget 5m --hours 8
    autoresearch run --researcher claude --max-cost 5 --hours 8
    autoresearch run --researcher claude-code --hours 8
    """
    from console.running import run_verb

    if options["hours"] and options["until"]:
        raise click.UsageError("--hours and --until exclude each other")
    asking = {name: options.pop(name) for name in ASKING}
    return run_verb(_screen(as_json), lab, asking={k: v for k, v in asking.items() if v is not None}, **options)


@verb("log")
@lab_argument()
@click.option("--follow", "-f", is_flag=True, help="Keep printing as things happen.")
@click.option("--limit", "-n", type=Number(int, 1), metavar="N", help="Only the last N.")
@click.option("--kept", is_flag=True, help="Only what was kept.")
def log(lab: str | None, as_json: bool, follow: bool, limit: int | None, kept: bool) -> None:
    """All experiments of a lab: number, status, val_bpb, what was tried.

    \b
    autoresearch log
    autoresearch log nov24 --kept
    autoresearch log --follow --json | jq .status
    """
    from console.looking import log_verb

    log_verb(_screen(as_json), lab, follow=follow, limit=limit, kept=kept)


@verb("report")
@lab_argument()
@click.option("--out", type=TypedPath(), metavar="DIR", help="Where to write; default: the lab.")
def report(lab: str | None, as_json: bool, out: Path | None) -> None:
    """The night as a page, report.html, with its picture, report.png, and in short, report.md. Never trains.

    It says what was gained, whether that holds on fresh seeds and on text that no decision has seen, what was tried,
    where the time went, and what to try next.

    \b
    autoresearch report
    autoresearch report nov24 --out ~/Desktop
    """
    from console.report import report_verb

    report_verb(_screen(as_json), lab, out)


# --- afterwards --------------------------------------------------------------------------------


@verb("confirm")
@click.argument("number", type=NumberOrLab(), metavar="[N]", required=False)
@click.option(
    "--seeds", type=Number(int, 1, 64), default=4, show_default=True, metavar="K", help="Fresh seeds per recipe."
)
@click.option("--kept", is_flag=True, help="All that was kept, each against the one before it.")
@click.option("--without", type=Change(), metavar="N|all", help="The winner without kept change N, or without each.")
@click.option("--holdout/--no-holdout", default=None, help="Score the holdout too; default: for baseline and winner.")
@click.option("--cost", is_flag=True, help="Only say how long it would take.")
@lab_argument()
def confirm(number: int | str | None, as_json: bool, lab: str | None, **options: Any) -> int:
    """Measure baseline and winner again on fresh seeds, or experiment N.

    No decision has seen those. A score that was kept because it came out low flatters; fresh seeds do not. --without
    tells whether the winner still needs a change that was kept: it alone is taken back, and both run on the same seeds.
    Ctrl-C ends at once, and the same command goes on where it stopped. With --json: one JSON line for each event.

    \b
    autoresearch confirm
    autoresearch confirm 12 --seeds 6
    autoresearch confirm --kept --cost
    autoresearch confirm --without 12
    """
    from console.confirming import confirm_verb

    if isinstance(number, str):  # `confirm nov24`
        if lab is not None:
            raise click.UsageError(f"{number!r} is not the number of an experiment")
        lab, number = number, None
    return confirm_verb(_screen(as_json), lab, number, **options)


@verb("finalize")
@lab_argument()
@click.option("--branch", metavar="NAME", help="Default: autoresearch/TAG-final.")
@click.option("--unconfirmed", is_flag=True, help="Also what is not settled or not confirmed; commits say so.")
@click.option("--dry-run", is_flag=True, help="Only say what it would do.")
def finalize(lab: str | None, as_json: bool, branch: str | None, unconfirmed: bool, dry_run: bool) -> None:
    """Put the changes that hold on fresh seeds on a clean branch, one commit each.

    Each commit tells its effect, measured again. What did not replicate is left out where the rest can be made without
    it. Your files are not touched.

    \b
    autoresearch finalize
    autoresearch finalize nov24 --branch for-review --dry-run
    """
    from console.confirming import finalize_verb

    finalize_verb(_screen(as_json), lab, branch, unconfirmed, dry_run)


# --- before ------------------------------------------------------------------------------------


@verb("doctor")
@click.option("--backend", metavar="NAME", help="Check for this backend rather than the chosen one.")
@click.option("--bundle", is_flag=True, help="Also write a redacted report to attach to an issue.")
def doctor(as_json: bool, backend: str | None, bundle: bool) -> int:
    """Check this machine and say what to do: PASS, FAIL or note.

    A note is worth knowing, and stops nothing. Each line says why, and the exact next command.

    \b
    autoresearch doctor
    autoresearch doctor --bundle
    """
    from console.doctor import doctor_verb

    return doctor_verb(_screen(as_json), backend, bundle)


@verb("init")
@lab_argument(NEW_LAB)
@making_options
def init(lab: str | None, as_json: bool, **options: Any) -> None:
    """Make a lab without running it.

    It fits the recipe to this machine, commits it and locks the settings. LAB is the new folder, default ./labs/TAG.
    --from takes an upstream clone or fork: its constants are carried over, its results become history for researchers
    (never a score), its program.md is kept.

    \b
    autoresearch init
    autoresearch init labs/novels --text ~/novels --budget 5m
    autoresearch init --from ~/autoresearch --data climbmix
    """
    from console.making import init_verb

    init_verb(_screen(as_json), lab, **options)


# --- one experiment ----------------------------------------------------------------------------


@verb("try")
@lab_argument()
@click.option("-m", "--message", required=True, metavar="TEXT", help="What was changed, and why.")
@click.option("--no-wait", is_flag=True, help="Print the number and return; see `wait`.")
@click.option("--timeout", type=Duration(), metavar="S", help="Wait at most this long; the experiment goes on.")
def try_(lab: str | None, as_json: bool, message: str, no_wait: bool, timeout: float | None) -> int:
    """Judge the train.py that now lies in the lab: run, score, audit, keep or revert, record.

    It outlives its caller: called again on the same file it re-attaches and never starts twice. Exit status 0 when
    there is a verdict, 1 when the experiment failed (crash, timeout, invalid).

    \b
    autoresearch try -m "MATRIX_LR 0.04 -> 0.06: loss still falls fast at the end"
    autoresearch try -m "wider MLP" --no-wait
    """
    from console.trying import try_verb

    return try_verb(_screen(as_json), lab, message, wait=not no_wait, timeout=timeout)


@verb("wait")
@click.argument("number", type=Number(int, 0), metavar="N")
@click.option("--timeout", type=Duration(), metavar="S", help="Return after this long with status 124.")
@lab_argument()
def wait(number: int, as_json: bool, lab: str | None, timeout: float | None) -> int:
    """Wait for experiment N and print its verdict.

    Exit status 0 when there is a verdict, 1 when the experiment failed, 124 when it still runs after --timeout.

    \b
    autoresearch wait 12
    autoresearch wait 12 --timeout 90s
    """
    from console.trying import wait_verb

    return wait_verb(_screen(as_json), lab, number, timeout)


@verb("train")
@lab_argument()
@click.option("--recipe", type=TypedPath(), metavar="FILE", help="Default: the lab's best.")
@click.option("--budget", type=Duration(least=0.5), metavar="S", help="Training time; default: the lab's.")
@click.option("--out", type=TypedPath(), metavar="DIR", help="Export weights, tokenizer and recipe.")
def train(lab: str | None, as_json: bool, recipe: Path | None, budget: float | None, out: Path | None) -> int:
    """Train once, without a verdict: the best for real, or a recipe to look at.

    \b
    autoresearch train
    autoresearch train --budget 8h --out ./model
    autoresearch train --recipe idea.py --budget 2m
    """
    from console.training import train_verb

    return train_verb(_screen(as_json), lab, recipe, budget, out)


# --- look --------------------------------------------------------------------------------------


@verb("labs")
def labs(as_json: bool) -> None:
    """The labs of this machine: what each has reached, on what, where it lies, whether it runs.

    \b
    autoresearch labs
    autoresearch labs --json | jq -r .labs[].path
    """
    from console.labs import labs_verb

    labs_verb(_screen(as_json))


@verb("status")
@lab_argument()
def status(lab: str | None, as_json: bool) -> None:
    """Is it running, and how far is it?

    \b
    autoresearch status
    autoresearch status --json | jq .running.remaining
    """
    from console.looking import status_verb

    status_verb(_screen(as_json), lab)


@verb("best")
@lab_argument()
@click.option("--source", is_flag=True, help="Print its train.py and nothing else.")
@click.option("--without", type=Number(int, 1), metavar="N", help="With --source: without the kept change N.")
@click.option("--out", type=TypedPath(), metavar="FILE", help="With --source: write it to this file.")
def best(lab: str | None, as_json: bool, source: bool, without: int | None, out: Path | None) -> None:
    """The best experiment so far, and what led to it.

    --source --out train.py, in the lab, drops an edit: what was never judged is saved in git first.

    \b
    autoresearch best
    autoresearch best --source --out train.py
    """
    from console.looking import best_verb

    best_verb(_screen(as_json), lab, source, without, out)


@verb("show")
@click.argument("number", type=Number(int, 0), metavar="N")
@lab_argument()
def show(number: int, as_json: bool, lab: str | None) -> None:
    """Everything about experiment N.

    \b
    autoresearch show 12
    """
    from console.looking import show_verb

    show_verb(_screen(as_json), lab, number)


@verb("diff")
@click.argument("number", type=Number(int, 0), metavar="N")
@lab_argument()
def diff(number: int, as_json: bool, lab: str | None) -> None:
    """What experiment N changed in train.py.

    \b
    autoresearch diff 12
    """
    from console.looking import diff_verb

    diff_verb(_screen(as_json), lab, number)


@verb("sample")
@lab_argument()
@click.option("--prompt", default="", metavar="TEXT", help="Text to continue.")
@click.option("--tokens", type=Number(int, 1, 100_000), default=200, show_default=True, metavar="N")
@click.option("--temperature", type=Number(float, 0), default=0.8, show_default=True, metavar="X")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N")
@click.option("--beside", is_flag=True, help="Although an experiment runs on the device, which this slows down.")
def sample(lab: str | None, as_json: bool, prompt: str, **options: Any) -> None:
    """Let the best model write.

    \b
    autoresearch sample --prompt "In the beginning"
    autoresearch sample nov24 --prompt "And he said" --temperature 0.6 --tokens 400
    """
    from console.sampling import sample_verb

    sample_verb(_screen(as_json), lab, prompt, **options)


# --- for agents --------------------------------------------------------------------------------


@verb("mcp")
@lab_argument()
def mcp(lab: str | None, as_json: bool) -> None:
    """Serve a lab to an agent, as an MCP server.

    Over standard input and output; needs the extra `mcp`. The tools are the verbs: program, kernels, status, best, log,
    show, diff, try_candidate, wait, report. No call lasts longer than 45 seconds. It speaks JSON in any case.

    \b
    claude mcp add lab -- autoresearch mcp /path/to/the/lab
    autoresearch mcp labs/nov24
    """
    from console.serving import mcp_verb

    mcp_verb(lab)


# --- steer -------------------------------------------------------------------------------------


@verb("pause")
@lab_argument()
def pause(lab: str | None, as_json: bool) -> None:
    """Let the run under way end, then wait for `resume`. An experiment may take several runs; the rest come after.

    \b
    autoresearch pause
    """
    from console.steering import ask_verb

    ask_verb(_screen(as_json), lab, "pause")


@verb("resume")
@lab_argument()
def resume(lab: str | None, as_json: bool) -> None:
    """Go on after `pause`.

    \b
    autoresearch resume
    """
    from console.steering import ask_verb

    ask_verb(_screen(as_json), lab, "resume")


@verb("stop")
@lab_argument()
def stop(lab: str | None, as_json: bool) -> None:
    """End a run now, as Ctrl-C would: the running experiment is dropped, not counted.

    \b
    autoresearch stop
    """
    from console.steering import ask_verb

    ask_verb(_screen(as_json), lab, "stop")


@verb("undo")
@click.argument("number", type=Number(int, 0), metavar="N")
@lab_argument()
def undo(number: int, as_json: bool, lab: str | None) -> None:
    """Take back the kept experiment N: the best before it is the best again. Its record stays.

    \b
    autoresearch undo 12
    """
    from console.steering import undo_verb

    undo_verb(_screen(as_json), lab, number)


@verb("clean")
@lab_argument()
@click.option("--yes", is_flag=True, help="Free it; without this it is only shown.")
def clean(lab: str | None, as_json: bool, yes: bool) -> None:
    """Show what can be freed (old logs, caches, scratch), and with --yes free it.

    \b
    autoresearch clean
    autoresearch clean --yes
    """
    from console.steering import clean_verb

    clean_verb(_screen(as_json), lab, yes)


@cli.command("_judge", hidden=True)
@click.argument("lab")
@click.argument("number", type=int)
def judge(lab: str, number: int) -> int:
    """The process that `try` leaves behind."""
    from console.trying import judge as judge_

    return judge_(lab, number)


def main() -> NoReturn:
    """Entry point of the `autoresearch` command."""
    cli.main()


if __name__ == "__main__":
    main()
