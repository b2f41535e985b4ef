"""Kinds of values that options of the command line take, and groups of options that several verbs share."""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click

SMALLEST_VOCABULARY = 257  # `core.tokenizer` says why; a page of help loads nothing of core


class Duration(click.ParamType):
    """Seconds, or with a unit: 60, 90s, 5m, 8h, 1h30m."""

    name = "duration"

    def __init__(self, least: float = 0.0) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from console.words import duration, parse_duration

        if isinstance(value, int | float):
            return float(value)
        try:
            seconds = parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not self.least <= seconds <= 30 * 86400:
            self.fail(f"{value} is out of range; use {duration(self.least)} to 30 days", param, ctx)
        return seconds


class TypedPath(click.ParamType):
    """A file or folder. "~" is the user's own, also where the shell does not put that in its place, as PowerShell."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        try:
            return path.expanduser()
        except RuntimeError:  # of a user whom the system does not know
            self.fail(f"{path.parts[0]} stands for no known user's folder; write the path out", param, ctx)


def several_paths(ctx: click.Context, param: click.Parameter, paths: Sequence[Path]) -> list[Path]:
    """A callback for arguments of `TypedPath`: on Windows, whose shells leave that to the programs, "*.json" stands for
    what is there. What nothing matches stays as it is, and is a file that is missing."""
    if sys.platform != "win32":
        return list(paths)
    return [Path(found) for path in paths for found in sorted(glob.glob(str(path))) or [str(path)]]  # noqa: PTH207


class Number(click.ParamType):
    """A number from `least` to `most`, both included; the metavar of its option names it."""

    name = "number"

    def __init__(
        self, kind: type[int] | type[float], least: float, most: float | None = None, over: bool = False
    ) -> None:
        """`over`: `least` itself is left out."""
        self.kind, self.least, self.most, self.over = kind, least, most, over

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = self.kind(value)
        except ValueError:
            self.fail(f"{value!r} is not {'an integer' if self.kind is int else 'a number'}", param, ctx)
        low = number > self.least if self.over else number >= self.least
        if not low or (self.most is not None and number > self.most):
            self.fail(f"{value} is out of range; it has to be {self._range()}", param, ctx)
        return number

    def _range(self) -> str:
        least = f"{'more than' if self.over else 'at least'} {self.least:g}"
        return least if self.most is None else f"{least}, at most {self.most:g}"


class Change(click.ParamType):
    """The number of an experiment whose change is left out, or "all"."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "all":
            return "all"
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither the number of an experiment nor 'all'", param, ctx)
        return int(value)


class NumberOrLab(click.ParamType):
    """The number of an experiment; anything else is taken for a lab."""

    name = "N|LAB"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value)
        if not text.lstrip("-").isdecimal():
            return text
        if int(text) < 1:
            self.fail(f"{text} is not the number of an experiment: they begin at 1", param, ctx)
        return int(text)


class Moment(click.ParamType):
    """HH:MM, today or tomorrow, whichever comes next, or with its date 2026-12-01T07:30; as a Unix time."""

    name = "HH:MM"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from datetime import datetime, timedelta

        now = datetime.now()
        try:
            if "T" in str(value):
                dated = datetime.strptime(str(value), "%Y-%m-%dT%H:%M")
                if dated <= now:
                    self.fail(f"{value} is over", param, ctx)
                return dated.timestamp()
            wanted = datetime.strptime(str(value), "%H:%M")
        except ValueError:
            self.fail(
                f"{value!r} is not a time of day; write it as HH:MM, for example 07:30, or {now:%Y-%m-%d}T07:30",
                param,
                ctx,
            )
        moment = now.replace(hour=wanted.hour, minute=wanted.minute, second=0, microsecond=0)
        return (moment if moment > now else moment + timedelta(days=1)).timestamp()


LAB = "A lab's folder or name; plain LAB says the same. Default: the lab you stand in, else the last used."
NEW_LAB = "The new lab's folder or name; plain LAB says the same. Default: labs/TAG."
RUN_LAB = f"{LAB} A name that is not there makes a new lab."


def lab_argument(says: str = LAB) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """LAB behind the verb's own arguments, or --lab: the same."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def with_lab(*, lab: str | None, lab_option: str | None, **given: Any) -> Any:
            if lab is not None and lab_option is not None:
                raise click.UsageError(f"LAB ({lab}) and --lab ({lab_option}) say the same; give one of them")
            return function(lab=lab if lab_option is None else lab_option, **given)

        option = click.option("--lab", "lab_option", metavar="LAB", help=says)
        return click.argument("lab", required=False)(option(with_lab))

    return decorate


def making_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a new lab is made from; locked afterwards."""
    options = [
        click.option("--backend", metavar="NAME", help="cuda, rtx, mlx or cpu; default: what this machine has."),
        click.option("--data", metavar="NAME", help="kjv, tinystories, climbmix or a prepared folder."),
        click.option("--text", type=TypedPath(), metavar="PATH", help="Your own text instead."),
        click.option("--vocab", type=Number(int, SMALLEST_VOCABULARY), metavar="N", help="Tokens in the vocabulary."),
        click.option("--profile", metavar="NAME", help="What the recipe starts from; default: fitted to here."),
        click.option("--budget", type=Duration(least=0.5), metavar="S", help="Training time of an experiment: 60, 5m."),
        click.option(
            "--verdict", type=click.Choice(["statistical", "simple"]), help="The rule that keeps; default: statistical."
        ),
        click.option(
            "--min-delta",
            type=Number(float, 0),
            metavar="BPB",
            help="The least gain that is kept; default: 0.001, with --verdict simple 0.",
        ),
        click.option("--from", "source", type=TypedPath(), metavar="DIR", help="An upstream clone."),
        click.option("--tag", metavar="TAG", help="Name of the lab; default from the date, like nov24."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def asking_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How researchers that cost money are asked; each takes those that it knows."""
    options = [
        click.option("--model", metavar="NAME", help="Which model answers; default: claude-opus-5-5."),
        click.option("--effort", metavar="E", help="low, medium, high, xhigh or max; default: high."),
        click.option(
            "--max-cost",
            type=Number(float, 0),
            metavar="USD",
            help="Stop before this run has spent this many US dollars; default: 10.",
        ),
        click.option("--max-tokens", type=Number(int, 1), metavar="N", help="The same in tokens of all kinds."),
        click.option(
            "--command", metavar="LINE", help='A coding agent, with --researcher command: "agent {prompt_file}".'
        ),
        click.option(
            "--time-limit", type=Duration(least=1), metavar="S", help="Time limit for one agent answer; default: 20m."
        ),
        click.option("--pass-env", metavar="A,B", help="Variables that an agent gets on top of the usual ones."),
        click.option(
            "--attempts", type=Number(int, 1, 3), metavar="N", help="Tries per idea, repairs included; default: 3."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


ASKING = ("model", "effort", "max_cost", "max_tokens", "command", "time_limit", "pass_env", "attempts")
