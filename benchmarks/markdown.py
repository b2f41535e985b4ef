"""Results as Markdown for a README."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from benchmarks import shown
from benchmarks.results import Result
from console.words import duration

_ESCAPES = str.maketrans({s: f"\\{s}" for s in "\\`*[]"} | {s: f"&#{ord(s)};" for s in "<>|&"})
# Within a word an underscore is one, and a number sign only begins a heading at the start.
_WHERE = re.compile(r"(?<![^\W_])_|_(?![^\W_])|^#")
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
    heads, lines = shown.against(results)
    if lines:
        yield from rows(heads, lines, [False] * len(heads))
        yield ""
    for line in shown.attentions(results):
        yield f"- {escaped(line)}"
    for name, status, why in shown.troubles(results):
        yield f"- **{escaped(name)} is not compared ({status})**: {escaped(why)}"
    yield ""


def grid(columns: Sequence[shown.Column], found: Sequence[shown.Series]) -> Iterator[str]:
    heads, lines = shown.grid(found, columns)
    yield from rows(heads, lines, [c.number for c in columns])


def rows(heads: Sequence[str], lines: Sequence[Sequence[str]], numbers: Sequence[bool]) -> Iterator[str]:
    """A table of text; numbers are set to the right."""
    yield f"| {' | '.join(map(escaped, heads))} |"
    yield f"| {' | '.join('---:' if number else '---' for number in numbers)} |"
    for line in lines:
        yield f"| {' | '.join(map(escaped, line))} |"


def escaped(text: str) -> str:
    """A file that somebody sent may hold anything: nothing of it becomes markup."""
    return _WHERE.sub(lambda found: f"\\{found.group()}", " ".join(text.split()).translate(_ESCAPES))


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
