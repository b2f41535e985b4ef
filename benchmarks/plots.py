"""The plots of results: each is drawn once by matplotlib, and becomes inline SVG for a page and a PNG beside it.

Series are told apart by Okabe and Ito's colours (2008), which people with any common colour blindness tell apart, and
once more by markers, dashes or hatches. In SVG, text stays text and every colour is a CSS variable, so that the page's
dark mode holds for the plots as well. They are drawn as narrow as a phone: a page lets them grow.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import comparing, shown
from benchmarks.kernel_table import byte_text, part, rate_text
from benchmarks.results import KernelResult, Peak, Result
from benchmarks.shown import Series
from console.words import count, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DARK = ("#5cb3ec", "#ff8b3d", "#2fc49a", "#e39cc5", "#ffbf40", "#9ad6ff", "#ffffff")
MARKERS = "osD^vPX"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), (0, (8, 2)), (0, (2, 3)))
HATCHES = ("", "//", "--", "xx", "\\\\", "||", "++")
INK, SOFT, LINE, GROUND = "#1d2329", "#5b6570", "#d9dee3", "#ffffff"
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", GROUND: "--ground"}
VARIABLES |= {colour: f"--s{i}" for i, colour in enumerate(OKABE_ITO)}
WIDTH = 5.2  # inches of 72 points: 374 CSS pixels on a phone
FONT = 10.5
PNG_DPI = 200
WIDE = 20.0  # times the lowest: from there on bars are logarithmic, or those of a slow machine could not be seen
MOST_LINES = 8  # curves in one plot; more cannot be told apart


def colour(number: int) -> str:
    return OKABE_ITO[number % len(OKABE_ITO)]


def plots(results: Sequence[Result]) -> dict[str, Figure]:
    """Name -> figure, of results of the same work; none that would be empty."""
    found = shown.series(results)
    drawn: dict[str, Figure | None] = {
        "throughput": throughput(found),
        "loss": loss(found),
        "memory": memory(found),
        "val_bpb": scores(found),
        "night": waits(found),
    }
    for name, lines, peak in roofs(results):
        drawn[f"roofline-{name}"] = roofline(name, lines, peak)
    return {name: figure for name, figure in drawn.items() if figure is not None}


# --- bars and dots --------------------------------------------------------------------------------


def throughput(found: Sequence[Series]) -> Figure | None:
    """Tokens per second, its range over the repeats as a line."""
    values = [(s.name, shown.speeds(s)) for s in found if shown.speeds(s)]
    return _bars("Training speed", "tokens per second", values, count)


def memory(found: Sequence[Series]) -> Figure | None:
    values = [(s.name, s.backend.speed.peak_memory) for s in found if s.backend.speed]
    small = all(max(v) < 2**30 for _, v in values)
    return _bars("Peak memory while training", "MiB" if small else "GiB", values, size, 2.0**20 if small else 2.0**30)


def scores(found: Sequence[Series]) -> Figure | None:
    """Each seed's val_bpb as a dot."""
    values = [(i, s) for i, s in enumerate(found) if s.backend.bpbs()]
    if not values:
        return None
    figure, axes = frame(
        f"val_bpb after {values[0][1].result.work.budget:g} s", "val_bpb (lower is better)", len(values)
    )
    for line, (i, s) in enumerate(values):
        axes.plot(s.backend.bpbs(), [line] * len(s.backend.bpbs()), MARKERS[i % 7], color=colour(i), markersize=8,
                  markeredgecolor=GROUND, alpha=0.9)  # fmt: skip
        middle = statistics.median(s.backend.bpbs())  # as the tables have it
        axes.annotate(f"{middle:.4f}", (max(s.backend.bpbs()), line), (9, 0), textcoords="offset points", va="center",
                      color=INK)  # fmt: skip
    categories(axes, [s.name for _, s in values])
    low, high = axes.get_xlim()
    room = max(high - low, 1e-3)
    axes.set_xlim(low - 0.05 * room, high + 0.28 * room)
    return figure


def waits(found: Sequence[Series]) -> Figure | None:
    """What an experiment takes beside its training, end to end."""
    measured = [s for s in found if s.backend.speed]
    if not measured:
        return None
    parts: list[tuple[str, Callable[[Series], float]]] = [
        ("start", lambda s: _median(s, "startup_seconds")),
        ("build", lambda s: _median(s, "build_seconds")),
        ("compile", _compiling),
        ("scoring", lambda s: s.backend.scoring_seconds() or 0.0),
    ]
    figure, axes = frame("Beside training", "seconds of an experiment", len(measured), legend=1)
    left = np.zeros(len(measured))
    for i, (name, seconds) in enumerate(parts):
        widths = np.array([seconds(s) for s in measured])
        axes.barh(
            range(len(measured)), widths, 0.6, left, color=colour(i), hatch=HATCHES[i], edgecolor=GROUND, label=name
        )
        left += widths
    for line, total in enumerate(left):
        axes.annotate(
            shown.seconds(float(total)), (total, line), (5, 0), textcoords="offset points", va="center", color=INK
        )
    categories(axes, [s.name for s in measured])
    axes.set_xlim(0, max(left.max() * 1.22, 1e-3))
    legend(figure, axes, 4)
    return figure


def _compiling(s: Series) -> float:
    """As in a night: what the first process has compiled is found again, where there was a second one."""
    found = s.backend.speed.compile_seconds if s.backend.speed else [0.0]
    return statistics.median(found[1:] or found)


def _median(s: Series, name: str) -> float:
    return statistics.median(getattr(s.backend.speed, name)) if s.backend.speed else 0.0


def _bars(
    title: str,
    label: str,
    values: Sequence[tuple[str, Sequence[float]]],
    spell: Callable[[float], str],
    unit: float = 1.0,
) -> Figure | None:
    """Medians as bars, lowest and highest as a line, the median in words behind it."""
    if not values:
        return None
    figure, axes = frame(title, label, len(values))
    top, low_end = max(max(v) for _, v in values) / unit, min(min(v) for _, v in values) / unit
    if wide := top > WIDE * low_end > 0:
        axes.set_xscale("log")
        axes.set_xlabel(f"{label}, logarithmic")
    for line, (_, measured) in enumerate(values):
        middle, low, high = (f(measured) / unit for f in (statistics.median, min, max))
        axes.barh(line, middle, 0.6, color=colour(line), hatch=HATCHES[line % 7], edgecolor=GROUND)
        if high > low:
            axes.plot([low, high], [line, line], color=INK, linewidth=1.6, marker="|", markersize=9)
        axes.annotate(spell(middle * unit), (max(high, middle), line), (6, 0), textcoords="offset points", va="center",
                      color=INK)  # fmt: skip
    categories(axes, [name for name, _ in values])
    if wide:
        axes.set_xlim(low_end / 3, top * 8)
        axes.minorticks_off()
    else:
        axes.set_xlim(0, top * 1.3)
    axes.xaxis.set_major_formatter(lambda value, _: count(value) if value >= 1000 else f"{value:g}")
    return figure


def categories(axes: Axes, names: Sequence[str]) -> None:
    if axes.get_xscale() == "linear":
        axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(range(len(names)), [short(n) for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x", color=LINE, linewidth=0.8)
    axes.grid(False, axis="y")


def short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


# --- curves ---------------------------------------------------------------------------------------


def loss(found: Sequence[Series]) -> Figure | None:
    """Training loss over seconds, of the first budgeted run of each series; where there is none, of the fixed steps."""
    curves = [(i, s, _curve(s)) for i, s in enumerate(found) if len(_curve(s)) > 1][:MOST_LINES]
    if not curves:
        return None
    rows = -(-len(curves) // 2)
    figure, axes = frame("Training loss", "seconds of training", 6, legend=rows)
    for i, s, points in curves:
        x, y = _smooth(points)
        axes.plot(x, y, color=colour(i), linestyle=DASHES[i % 7], linewidth=2, marker=MARKERS[i % 7], markersize=5,
                  markevery=max(1, len(x) // 7), markeredgecolor=GROUND, label=short(s.name))  # fmt: skip
    axes.set_ylabel("nats per token", color=SOFT)
    axes.grid(True, axis="both", color=LINE, linewidth=0.8)
    axes.set_xlim(left=0)
    legend(figure, axes, 2)
    return figure


def _curve(s: Series) -> Sequence[Sequence[float]]:
    scored = next((score.curve for score in s.backend.scores if len(score.curve) > 1), None)
    return scored if scored is not None else s.backend.fixed.curve if s.backend.fixed else []


def _smooth(points: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, loss): the mean of at most 40 stretches, as the loss of single batches jumps."""
    seconds, values = np.array([p[0] for p in points]), np.array([p[3] for p in points])
    parts = min(40, len(points))
    x, y = (np.array([part.mean() for part in np.array_split(z, parts)]) for z in (seconds, values))
    return x, y


# --- the roofline ---------------------------------------------------------------------------------


def roofs(results: Sequence[Result]) -> list[tuple[str, list[KernelResult], Peak]]:
    """(name, kernels, peak) for each backend of each machine whose kernels were measured."""
    found = []
    for i, result in enumerate(results):
        for key, peak in result.kernel_peaks.items():
            backend, _, dtype = key.partition("/")
            lines = [k for k in result.kernels if k.backend == backend and k.dtype == dtype and k.passed and k.seconds]
            suffix = f"-{comparing.letter(i)}" if len(results) > 1 else ""
            if lines and peak.flops > 0 and peak.bandwidth > 0:
                found.append((f"{backend}-{dtype}{suffix}", lines, peak))
    return found


def roofline(name: str, lines: Sequence[KernelResult], peak: Peak) -> Figure:
    """Achieved FLOP/s over FLOPs per byte (Williams et al. 2009): ours filled, others hollow."""
    from matplotlib.lines import Line2D

    kernels = list(dict.fromkeys(part(k) for k in lines))
    figure, axes = frame(f"Roofline, {name.replace('-', ' ')}", "FLOPs per byte that must be moved", 7, legend=2)
    x = [k.flops / k.bytes for k in lines]
    y = [k.flops_per_second() for k in lines]
    low, high = min(*x, peak.flops / peak.bandwidth) / 3, max(*x, peak.flops / peak.bandwidth) * 3
    reach = np.geomspace(low, high, 100)
    roof = np.minimum(peak.flops, peak.bandwidth * reach)
    axes.loglog(reach, roof, color=INK, linewidth=1.8)
    for i, kernel in enumerate(kernels):
        for k, at, rate in zip(lines, x, y, strict=True):
            if part(k) == kernel:
                axes.plot(at, rate, MARKERS[i % 7], markersize=8 if k.ours else 7, markeredgewidth=1.5,
                          color=colour(i), markerfacecolor=colour(i) if k.ours else "none")  # fmt: skip
    axes.set_ylim(min(y) / 3, peak.flops * 4)
    axes.set_xlim(low, high)
    axes.set_ylabel("FLOP/s", color=SOFT)
    axes.yaxis.set_major_formatter(lambda value, _: rate_text(value))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(True, axis="both", color=LINE, linewidth=0.8)
    axes.annotate(f"{rate_text(peak.flops)} of products\n{byte_text(peak.bandwidth)} of memory", (0.03, 0.955),
                  xycoords="axes fraction", va="top", color=INK)  # fmt: skip
    handles = [Line2D([], [], color=colour(i), marker=MARKERS[i % 7], linestyle="", markersize=8, label=k)
               for i, k in enumerate(kernels)]  # fmt: skip
    hollow = Line2D(
        [], [], color=SOFT, marker="o", markerfacecolor="none", linestyle="", markersize=7, label="a peer's"
    )
    legend(figure, axes, 3, [*handles, hollow])
    return figure


# --- frame and files ------------------------------------------------------------------------------


def frame(title: str, label: str, lines: int, legend: int = 0) -> tuple[Figure, Axes]:
    """A figure with room for `lines` lines, and `legend` rows of a legend under it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    foot, head = 0.62 + 0.28 * legend, 0.42
    height = foot + head + max(1.1, 0.42 * lines)
    figure = Figure(figsize=(WIDTH, height), facecolor=GROUND)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.28, foot / height, 0.68, 1 - (foot + head) / height))
    figure.text(0.02, 1 - 0.2 / height, title, fontsize=FONT + 2.5, fontweight="bold", color=INK, va="center",
                parse_math=False)  # fmt: skip
    axes.set_facecolor("none")
    axes.set_xlabel(label, color=SOFT, fontsize=FONT)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    axes.tick_params(colors=INK, labelsize=FONT, color=LINE)
    return figure, axes


def legend(figure: Figure, axes: Axes, columns: int, handles: Sequence[Any] | None = None) -> None:
    found = handles if handles is not None else axes.get_legend_handles_labels()[0]
    figure.legend(handles=list(found), loc="lower center", ncols=columns, frameon=False, fontsize=FONT, labelcolor=INK,
                  bbox_to_anchor=(0.5, 0.0), handlelength=2.2, columnspacing=1.1, borderaxespad=0.2)  # fmt: skip


def finish(figure: Figure) -> Figure:
    """Move the left edge to where the longest name on it ends."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if text.get_fontsize() == 10.0:  # matplotlib's default, of annotations and ticks
            text.set_fontsize(FONT)
        text.set_parse_math(False)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    box = axes.get_tightbbox()
    at = axes.get_position()
    wide = figure.bbox.width
    over = (box.x0 if box is not None else 0.0) - 0.02 * wide
    axes.set_position((at.x0 - over / wide, at.y0, at.width + over / wide, at.height))
    return figure


def svg(figure: Figure, label: str) -> str:
    """The figure as an inline SVG element whose colours are CSS variables. `label`: for people who do not see it."""
    import matplotlib

    made = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        finish(figure).savefig(made, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = made.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(<svg[^>]*?) (?:width|height)=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"(<svg[^>]*?) (?:width|height)=\"[^\"]*\"", r"\1", text, count=1)
    text = _own_ids(text, re.sub(r"\W+", "-", label))
    for plain, variable in VARIABLES.items():
        text = re.sub(re.escape(plain), f"var({variable})", text, flags=re.IGNORECASE)
    return text.replace("<svg", f'<svg role="img" aria-label="{_attribute(label)}"', 1).strip()


def _own_ids(text: str, prefix: str) -> str:
    """matplotlib names things alike in every figure; a page holds several."""
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)


def _attribute(text: str) -> str:
    from html import escape

    return escape(text, quote=True)


def png(figure: Figure) -> bytes:
    made = io.BytesIO()
    finish(figure).savefig(made, format="png", dpi=PNG_DPI, metadata={"Software": "autoresearch"})
    return made.getvalue()
