"""Results as one self-contained HTML page, PNGs of its plots, and Markdown: no script, no font, nothing from elsewhere.

write([result], folder)          backends of one machine
write(results, folder)           machines side by side; results of different work in parts of their own
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import kernel_table, markdown, plots, shown
from benchmarks.results import Result
from benchmarks.writing import write_files
from console.page import STYLE
from console.words import plural
from core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = "".join(f"--s{i}: {c}; " for i, c in enumerate(plots.OKABE_ITO))
DARK = "".join(f"--s{i}: {c}; " for i, c in enumerate(plots.DARK))
OWN_STYLE = f"""
:root {{ {SERIES}}}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK}}} }}
h3 {{ font-size: 1rem; margin: 1.6rem 0 .4rem }}
.plots {{ columns: 21rem; column-gap: 1rem }}
figure {{ break-inside: avoid; margin: 0 0 1rem; padding: .6rem; background: var(--panel);
  border-radius: .6rem; --ground: var(--panel) }}
svg text {{ font-family: system-ui, "Liberation Sans", sans-serif }}
ul {{ padding-left: 1.2rem }}
li {{ overflow-wrap: anywhere }}
.ours td {{ font-weight: 600 }}
tr.case th {{ color: var(--ink); border-bottom: 1px solid var(--line); padding-top: .9rem }}
tr.case span {{ color: var(--soft); font-weight: 400 }}
@media (max-width: 44rem) {{
  table.cards thead {{ display: none }}
  table.cards tr.case, table.cards tr.case th {{ display: block; border: 0; padding: .3rem 0 0 }}
  table.cards tr {{ display: block; border: 1px solid var(--line); border-radius: .5rem; margin: 0 0 .7rem;
    padding: .3rem 0 }}
  table.cards td, table.cards td.n {{ display: flex; justify-content: space-between; gap: 1rem; border: 0; width: auto;
    text-align: right; white-space: normal; overflow-wrap: anywhere; padding: .15rem .6rem }}
  table.cards td:empty {{ display: none }}
  table.cards td::before {{ content: attr(data-head); color: var(--soft); text-align: left; flex: none;
    font-weight: 400 }}
}}
"""
ABOUT = (
    "Every backend computes the same reference model on the same text, batches and starting weights; before anything "
    "is compared, logits, loss, gradients and one optimizer step are held against each other, and what differs is left "
    "out. Figures are medians over rounds in which all backends of a machine take turns, with the lowest and the "
    "highest."
)


def write(results: Sequence[Result], folder: Path) -> list[Path]:
    """index.html, results.md and one PNG for each plot, each replaced as a whole; their paths.

    Raises `UserError` where nothing was given, the folder cannot be made, or the disk is full: files that were there
    stay as they were.
    """
    if not results:
        raise UserError("there is no result to show", "run `autoresearch bench`, or name result files")

    def make() -> dict[str, bytes]:
        files = {"index.html": html(results).encode(), "results.md": markdown.table(results).encode()}
        return files | {f"{name}.png": plots.png(figure) for name, figure in pictures(results).items()}

    return write_files(make, folder)


def pictures(results: Sequence[Result]) -> dict[str, Figure]:
    """Name -> figure, of all groups of the same work."""
    groups = shown.works(results)
    found: dict[str, Figure] = {}
    for group in groups:
        suffix = f"-{group[0].work.profile}-{group[0].work_id[:6]}" if len(groups) > 1 else ""
        found.update({f"{name}{suffix}": figure for name, figure in plots.plots(group).items()})
    return found


# --- the page -------------------------------------------------------------------------------------


def html(results: Sequence[Result]) -> str:
    """The whole page."""
    machines = plural(len({r.machine.id() for r in results}), "machine")
    body = "".join(group(g) for g in shown.works(results))
    foot = "Made by <code>autoresearch bench</code>. The figures are as good as the machines were idle."
    return document("autoresearch bench", machines, ABOUT, body, foot)


def document(title: str, subject: str, about: str, body: str, foot: str) -> str:
    """A whole page. `body` and `foot` are HTML, the rest is text."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: {escape(subject)}</title>
<style>{STYLE}{OWN_STYLE}</style>
<h1>{escape(title)}</h1>
<p class="scale">{escape(about)}</p>
{body}
<footer>{foot}</footer>
</html>
"""


def group(results: Sequence[Result]) -> str:
    """Everything about results of one work."""
    found, named = shown.series(results), shown.named(results)
    parts = [f"<section><h2>{escape(markdown.work_line(results[0]))}</h2>", _machines(results)]
    figures = [
        f"<figure>{plots.svg(figure, f'{results[0].work_id[:6]} {name}')}</figure>"
        for name, figure in plots.plots(results).items()
    ]
    if figures:
        parts.append(f'<div class="plots">{"".join(figures)}</div>')
    if not found:
        parts.append('<p class="soft">Nothing was measured.</p>')
    for title, columns in markdown.TABLES if found else ():
        parts.append(f"<h3>{escape(title)}</h3>{_grid(found, [*named, *columns])}")
    parts += [
        _against(results),
        _troubles(results),
        _parity(results),
        _kernels(results),
        _notes(results),
        "</section>\n",
    ]
    return "".join(parts)


def bullets(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


def _machines(results: Sequence[Result]) -> str:
    named = zip(shown.places(results), results, strict=True)
    return bullets([escape(markdown.machine_line(place, result)) for place, result in named])


def _against(results: Sequence[Result]) -> str:
    heads, lines = shown.against(results)
    if not lines:
        return ""
    how = (
        "Multiples of the first, with their 95 % interval. Within one bench it is the median of the ratios of single "
        "rounds, in which all share the machine's state; between machines the ratio of medians. Within noise is what "
        "the repeats, or two benches of one machine, differ by anyway."
    )
    return f'<h3>Side by side</h3><p class="soft">{how}</p>{cards(heads, lines, [False] * len(heads))}'


def _grid(found: Sequence[shown.Series], columns: Sequence[shown.Column]) -> str:
    heads, lines = shown.grid(found, columns)
    return cards(heads, lines, [c.number for c in columns])


def cards(heads: Sequence[str], lines: Sequence[Sequence[str]], numbers: Sequence[bool]) -> str:
    """A table that becomes a card for each line where the window is narrow."""
    return _table(heads, numbers, "".join(_line(heads, line, numbers) for line in lines))


def _table(heads: Sequence[str], numbers: Sequence[bool], body: str) -> str:
    head = "".join(f"<th{_kind(number)}>{escape(text)}</th>" for text, number in zip(heads, numbers, strict=True))
    return f'<div class="wide"><table class="cards"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _line(heads: Sequence[str], line: Sequence[str], numbers: Sequence[bool], kind: str = "") -> str:
    cells = "".join(
        f'<td{_kind(number)} data-head="{escape(head, quote=True)}">{escape(text)}</td>'
        for head, text, number in zip(heads, line, numbers, strict=True)
    )
    return f"<tr{kind}>{cells}</tr>"


def _kind(number: bool) -> str:
    return ' class="n"' if number else ""


def _troubles(results: Sequence[Result]) -> str:
    lines = [
        f"<strong>{escape(name)}</strong> ({escape(status)}): {escape(why)}"
        for name, status, why in shown.troubles(results)
    ]
    return f"<h3>Not compared</h3>{bullets(lines)}" if lines else ""


def _parity(results: Sequence[Result]) -> str:
    lines = [f"{escape(s.name)}: {escape(shown.checked(s))}" for s in shown.series(results) if s.backend.parity]
    return f"<h3>Same work</h3>{bullets(lines)}" if lines else ""


def _kernels(results: Sequence[Result]) -> str:
    return "".join(_kernels_of(place, r) for place, r in zip(shown.places(results), results, strict=True) if r.kernels)


def _kernels_of(place: str, result: Result) -> str:
    peaks = bullets([escape(line) for line in kernel_table.peak_lines(result.kernel_peaks)])
    heads, width = kernel_table.HEADS, len(kernel_table.HEADS)
    numbers = [i > 0 for i in range(width)]
    body = []
    for title, lines in kernel_table.cases(result.kernels, result.kernel_peaks):
        name, _, what = title.partition(": ")
        body.append(f'<tr class="case"><th colspan="{width}">{escape(name)} <span>{escape(what)}</span></th></tr>')
        body += [_line(heads, line.texts, numbers, ' class="ours"' if line.ours else "") for line in lines]
    return f"<h3>Kernels, {escape(place)}</h3>{peaks}{_table(heads, numbers, ''.join(body))}"


def _notes(results: Sequence[Result]) -> str:
    def lines() -> Iterator[str]:
        for place, result in zip(shown.places(results), results, strict=True):
            for backend in result.backends:
                if backend.peak is not None:
                    p = backend.peak
                    rates = f"{kernel_table.rate_text(p.flops)}, {kernel_table.byte_text(p.bandwidth)}"
                    sources = f"{p.flops_source}; {p.bandwidth_source}"
                    yield f"{escape(place)}, {escape(backend.name)}: {rates} ({escape(sources)})"
                if backend.attention:
                    yield f"{escape(place)}, {escape(backend.name)}, attention: {escape(backend.attention)}"
                if backend.energy is not None:
                    yield f"{escape(place)}, {escape(backend.name)}, energy: {escape(backend.energy.source)}"
            yield from (f"{escape(place)}: {escape(note)}" for note in result.notes)

    found = bullets(list(lines()))
    return f"<h3>Peaks, attention, energy, notes</h3>{found}" if found else ""
