"""Results as Markdown for a README, and as tables for a terminal: the same tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from benchmarks import shown
from benchmarks.results import Result
from console.words import duration, plural

if TYPE_CHECKING:
    from rich.console import RenderableType

TABLES = (
    ("Speed and memory", shown.SPEED),
    ("What was learnt", shown.LEARNT),
    ("What a night holds", shown.NIGHT),
    ("What takes time beside training", shown.WAITS),
)


def table(results: Sequence[Result]) -> str:
    """Everything as Markdown. Results of different work come one after the other and are never compared."""
    return "\n".join(line for group in shown.works(results) for line in _group(group)).rstrip() + "\n"


def _group(results: Sequence[Result]) -> Iterator[str]:
    yield f"### {work_line(results[0])}"
    yield ""
    for place, result in zip(shown.places(results), results, strict=True):
        yield f"- {escaped(machine_line(place, result))}"
    yield ""
    found, named = shown.series(results), shown.named(results)
    for title, columns in TABLES if found else ():
        yield f"**{title}**"
        yield ""
        yield from grid([*named, *columns], found)
        yield ""
    for sentence in shown.sentences(results):
        yield f"- {escaped(sentence)}"
    for name, status, why in shown.troubles(results):
        yield f"- **{escaped(name)} is not compared ({status})**: {escaped(why)}"
    yield ""


def grid(columns: Sequence[shown.Column], found: Sequence[shown.Series]) -> Iterator[str]:
    heads, lines = shown.grid(found, columns)
    yield f"| {' | '.join(map(escaped, heads))} |"
    yield f"| {' | '.join('---:' if c.number else '---' for c in columns)} |"
    for line in lines:
        yield f"| {' | '.join(map(escaped, line))} |"


def escaped(text: str) -> str:
    """A file that somebody sent may hold anything: nothing of it becomes markup."""
    plain = " ".join(text.split())
    for sign in "\\`*_[]<>|#":
        plain = plain.replace(sign, f"&#{ord(sign)};" if sign in "<>|" else f"\\{sign}")
    return plain


def work_line(result: Result) -> str:
    w = result.work
    return (
        f"Profile {w.profile}: {w.data}, {w.context} tokens of context, {w.batch_tokens} tokens a step, "
        f"{w.params / 1e6:.2f}M parameters, {duration(w.budget)} of training for val_bpb (work {result.work_id})"
    )


def machine_line(place: str, result: Result) -> str:
    software = ", ".join(f"{name} {version}" for name, version in result.machine.software.items())
    quick = ", a quick run" if result.quick else ""
    return f"{place} ({result.machine.os} {result.machine.release}; {software}), {result.created}{quick}"


def terminal(results: Sequence[Result]) -> Iterator[RenderableType]:
    """The same for `rich`: one table after the other, then the sentences."""
    from rich.table import Table
    from rich.text import Text

    for group in shown.works(results):
        yield Text(work_line(group[0]), style="bold")
        for place, result in zip(shown.places(group), group, strict=True):
            yield Text(machine_line(place, result), style="dim")
        found, named = shown.series(group), shown.named(group)
        short = [c for c in named if c.head != "machine"] if len(group) == 1 else _lettered(named)
        for title, columns in TABLES if found else ():
            drawn = Table(title=title, title_justify="left", title_style="", box=None, padding=(0, 2, 0, 0))
            for column in (*short, *columns):
                drawn.add_column(column.head, justify="right" if column.number else "left")
            for line in shown.grid(found, [*short, *columns])[1]:
                drawn.add_row(*map(Text, line))
            yield drawn
        lines = [*shown.sentences(group), *(f"{n} is not compared ({s}): {why}" for n, s, why in shown.troubles(group))]
        if not found:
            lines.insert(0, f"nothing was measured: {plural(len(group[0].backends), 'backend')} tried")
        yield Text("\n".join(lines))


def _lettered(named: Sequence[shown.Column]) -> list[shown.Column]:
    """A terminal is narrow: the machine's letter stands for its line, which is above."""
    machine = shown.Column("machine", lambda s: s.place.partition(":")[0], number=False)
    return [machine, *(c for c in named if c.head != "machine")]
