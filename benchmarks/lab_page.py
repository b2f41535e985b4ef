"""Labs side by side as Markdown, as one HTML page, and as the PNGs of its plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import lab_table, page, plots
from benchmarks.lab_facts import LabFacts
from benchmarks.markdown import escaped, rows
from benchmarks.transfer import Run, compare
from benchmarks.writing import write_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = (
    "Each lab started from a recipe that was fitted to its machine, and kept what lowered val_bpb there. A line is one "
    "constant or definition of train.py; where labs moved it in opposite directions, or one kept what another tried "
    "in vain, the best recipe may depend on the hardware; --transfer measures it. The gain at a change is the one "
    "that it was kept for, which flatters it, and of an experiment that changed several things stands at each."
)
MARKS = {"up": ("^", 0, "kept, raised"), "down": ("v", 1, "kept, lowered"), "changed": ("o", 2, "kept, changed")}
MOST = 24  # lines of the plot


def heads(labs: Sequence[LabFacts]) -> list[str]:
    return ["what", *(lab.tag for lab in labs), "together"]


def texts(line: lab_table.Line) -> list[str]:
    return [line.what, *(cell.text() for cell in line.cells), line.verdict]


def transfers(runs: Sequence[Run], labs: Sequence[LabFacts]) -> Iterator[list[str]]:
    """home, recipe, how, val_bpb, against the home's own best."""
    for run in runs:
        own = next(r for r in runs if r.home == run.home and r.guest == run.home)
        least = next(lab.locked().min_delta for lab in labs if lab.tag == run.home)
        against = "" if run is own else compare(own, run, least)
        yield [run.home, run.guest, run.how, run.text(), against]


TRANSFER_HEADS = ("measured at", "best of", "what ran", "val_bpb", "against its own best")


def facts(labs: Sequence[LabFacts]) -> list[str]:
    return [f"{lab.tag}: {lab.settings['backend']}, {lab.settings['dtype']}, {lab.machine}" for lab in labs]


def markdown(labs: Sequence[LabFacts], lines: Sequence[lab_table.Line], runs: Sequence[Run]) -> str:
    def written() -> Iterator[str]:
        yield from (f"- {escaped(fact)}" for fact in [*facts(labs), *lab_table.sentences(labs)])
        yield ""
        if lines:
            yield from rows(heads(labs), [texts(line) for line in lines], [False] * (len(labs) + 2))
        else:
            yield "No lab has kept anything yet."
        if runs:
            yield ""
            yield from rows(TRANSFER_HEADS, list(transfers(runs, labs)), [False, False, False, True, False])

    return "\n".join(written()) + "\n"


def write(labs: Sequence[LabFacts], lines: Sequence[lab_table.Line], runs: Sequence[Run], folder: Path) -> list[Path]:
    """index.html, labs.md and a PNG for each plot. Raises `UserError` where there is no place for them."""

    def make() -> dict[str, bytes]:
        files = {"index.html": html(labs, lines, runs).encode(), "labs.md": markdown(labs, lines, runs).encode()}
        return files | {f"{name}.png": plots.png(figure) for name, figure in pictures(labs, lines, runs).items()}

    return write_files(make, folder)


def html(labs: Sequence[LabFacts], lines: Sequence[lab_table.Line], runs: Sequence[Run]) -> str:
    parts = [page.bullets([escape(fact) for fact in [*facts(labs), *lab_table.sentences(labs)]])]
    figures = [f"<figure>{plots.svg(f, name)}</figure>" for name, f in pictures(labs, lines, runs).items()]
    if figures:
        parts.append(f'<div class="plots">{"".join(figures)}</div>')
    parts.append("<h2>What was kept where</h2>")
    if lines:
        parts.append(page.cards(heads(labs), [texts(line) for line in lines], [False] * (len(labs) + 2)))
    else:
        parts.append('<p class="soft">No lab has kept anything yet.</p>')
    if runs:
        parts.append("<h2>What transfers</h2>")
        numbers = [False, False, False, True, False]
        parts.append(page.cards(TRANSFER_HEADS, list(transfers(runs, labs)), numbers))
    foot = "Made by <code>autoresearch bench labs</code> from the labs' ledgers."
    return page.document("Labs side by side", ", ".join(lab.tag for lab in labs), ABOUT, "".join(parts), foot)


# --- plots ----------------------------------------------------------------------------------------


def pictures(labs: Sequence[LabFacts], lines: Sequence[lab_table.Line], runs: Sequence[Run]) -> dict[str, Figure]:
    found = {"kept": kept(labs, lines)} if lines else {}
    for home in dict.fromkeys(run.home for run in runs):
        here = [run for run in runs if run.home == home and run.bpbs]
        if here:
            found[f"transfer-{home}"] = transferred(home, here)
    return found


def kept(labs: Sequence[LabFacts], lines: Sequence[lab_table.Line]) -> Figure:
    """A column for each lab, a line for each change: which way it was kept, or that it was tried in vain."""
    from matplotlib.lines import Line2D

    shown = list(lines)[:MOST]
    title = f"The first {MOST} of {len(lines)} that were kept" if len(lines) > MOST else "What was kept where"
    figure, axes = plots.frame(title, "", len(shown), legend=2)
    for y, line in enumerate(shown):
        for x, cell in enumerate(line.cells):
            if cell.kept:
                marker, colour, _ = MARKS[cell.direction]
                axes.plot(x, y, marker, color=plots.colour(colour), markersize=11)
            elif cell.lost:
                axes.plot(x, y, "x", color=plots.SOFT, markersize=8, markeredgewidth=1.8)
            else:
                axes.plot(x, y, ".", color=plots.LINE, markersize=7)
    axes.set_xticks(range(len(labs)), [plots.short(lab.tag, 14) for lab in labs])
    axes.set_xlim(-0.6, len(labs) - 0.4)
    axes.set_yticks(range(len(shown)), [plots.short(line.what, 24) for line in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(length=0)
    handles = [Line2D([], [], color=plots.colour(c), marker=m, linestyle="", markersize=9, label=text)
               for m, c, text in MARKS.values()]  # fmt: skip
    handles.append(Line2D([], [], color=plots.SOFT, marker="x", linestyle="", markersize=8, label="tried in vain"))
    plots.legend(figure, axes, 2, handles)
    return figure


def transferred(home: str, runs: Sequence[Run]) -> Figure:
    """val_bpb of each guest's seeds beside the home's own best."""
    figure, axes = plots.frame(f"Measured at {plots.short(home)}", "val_bpb (lower is better)", len(runs))
    for y, run in enumerate(runs):
        axes.plot(run.bpbs, [y] * len(run.bpbs), plots.MARKERS[y % 7], color=plots.colour(y), markersize=8,
                  markeredgecolor=plots.GROUND)  # fmt: skip
        text = f"{statistics.fmean(run.bpbs):.4f}"
        axes.annotate(text, (max(run.bpbs), y), (9, 0), textcoords="offset points", va="center", color=plots.INK)
    plots.categories(axes, [f"best of {run.guest}" for run in runs])
    low, high = axes.get_xlim()
    room = max(high - low, 1e-3)
    axes.set_xlim(low - 0.05 * room, high + 0.28 * room)
    return figure
