"""The night as a PNG: every experiment, the staircase of the best, what was kept written beside its step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.rows import Row, Scale, recorded_gain
from console.words import below, bpb, plural, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from console.findings import Level

# Okabe and Ito's colours: told apart by people with any common colour blindness. Shapes say the same again.
KEEP, BEST_LINE, DISCARD, FAIL, INK = "#007a5a", "#0072b2", "#8a8a8a", "#c44e00", "#222222"


def scored(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r.val_bpb is not None and r.decided]


def staircase(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    """(experiment numbers, best val_bpb so far) at every decided experiment from the first keep on."""
    numbers: list[int] = []
    values: list[float] = []
    for r in rows:
        if not r.decided:
            continue
        if r.kept and r.val_bpb is not None:
            numbers.append(r.number)
            values.append(r.val_bpb)
        elif values:
            numbers.append(r.number)
            values.append(values[-1])
    return numbers, values


def window(rows: Sequence[Row], levels: Sequence[Level] = ()) -> tuple[float, float]:
    """The range of val_bpb that is drawn: mostly the staircase and its band; far worse experiments go to the upper
    edge."""
    values = sorted(r.val_bpb for r in scored(rows) if r.val_bpb is not None)
    if not values:
        return 0.0, 1.0
    kept = [r.val_bpb for r in rows if r.kept and r.val_bpb is not None] or values
    low, first = min(min(kept), values[0]), max(kept)
    low = min([low, *(x for level in levels for x in (level.estimate.low, level.estimate.mean) if x is not None)])
    first = max([first, *(x for level in levels for x in (level.estimate.high, level.estimate.mean) if x is not None)])
    usual = values[min(len(values) - 1, math.ceil(0.8 * len(values)))]
    span = max(first - low, 1e-3 * low, 1e-4)
    high = max(first, min(usual, first + 0.75 * span))
    pad = 0.12 * (high - low or span)
    return low - pad, high + pad


def crowd(rows: Sequence[Row], apart: float) -> list[Row]:
    """Of what was kept, those that get a name: at least `apart` experiments from each other, the largest gains
    first."""
    kept = [r for r in rows if r.kept and r.val_bpb is not None]
    chosen: list[Row] = []
    for r in sorted(kept, key=lambda r: (r is not kept[0], r.delta or 0.0)):
        if all(abs(r.number - other.number) >= apart for other in chosen):
            chosen.append(r)
    return chosen


def draw(rows: Sequence[Row], scale: Scale, title: str, path: Path, levels: Sequence[Level] = ()) -> Path:
    """Write the picture to `path` (PNG, 1600 x 800 pixels). Without `levels` the best is as it was recorded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, 6.4), dpi=125, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.07, 0.1, 0.915, 0.74))
    _frame(figure, axes, scale, title)
    low, high = window(rows, levels)
    axes.set_ylim(low, high)
    last = max([r.number for r in rows], default=1)
    axes.set_xlim(min([r.number for r in rows], default=0) - 0.03 * last - 0.4, last * 1.12 + 0.6)
    _best(axes, rows, levels)
    _points(axes, rows, low, high)
    _labels(axes, rows, low, high)
    if scored(rows):
        figure.legend(loc="upper right", bbox_to_anchor=(0.985, 0.985), ncol=2, frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "no experiment has a score yet", transform=axes.transAxes, ha="center", color=INK)
    figure.savefig(path, metadata={"Software": "autoresearch"})
    return path


def _frame(figure: Any, axes: Axes, scale: Scale, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    figure.text(0.07, 0.945, title, fontsize=15, fontweight="bold", color=INK, va="center", parse_math=False)
    figure.text(0.07, 0.896, str(scale), fontsize=10, color="#555555", va="center", parse_math=False)
    axes.set_xlabel("experiment", color=INK)
    axes.set_ylabel("val_bpb (lower is better)", color=INK)
    axes.grid(True, axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.tick_params(colors="#444444")


def _best(axes: Axes, rows: Sequence[Row], levels: Sequence[Level]) -> None:
    """The running best, with its band where the noise of the lab is known."""
    numbers, values = staircase(rows)
    if not numbers:
        return
    if levels:
        starts = [level.first for level in levels]
        numbers = [*starts, max(numbers[-1], starts[-1])]
        values = [level.estimate.mean for level in levels]
        values.append(values[-1])
    bounds = [(level.estimate.low, level.estimate.high) for level in levels]
    for left, right, (low, high) in zip(numbers, numbers[1:], bounds, strict=False):
        if low is not None and high is not None:
            label = "" if axes.collections else "95 % band"
            axes.fill_between([left, right], low, high, color=BEST_LINE, alpha=0.15, linewidth=0, zorder=2, label=label)
    axes.step(numbers, values, where="post", color=BEST_LINE, linewidth=2.2, zorder=3, label="best so far")


def _points(axes: Axes, rows: Sequence[Row], low: float, high: float) -> None:
    groups: dict[str, list[Row]] = {"kept": [], "not kept": [], "off": [], "failed": [], "stopped": []}
    for r in rows:
        if r.failed:
            groups["failed"].append(r)
        elif r.decided and r.val_bpb is not None:
            groups["kept" if r.kept else "off" if r.val_bpb > high else "not kept"].append(r)
        elif r.decided:
            groups["stopped"].append(r)
    edge, floor = high - 0.02 * (high - low), low + 0.025 * (high - low)

    def scatter(name: str, label: str, y: list[float], **how: Any) -> None:
        if groups[name]:
            axes.scatter([r.number for r in groups[name]], y, label=f"{label} ({len(groups[name])})", **how)

    def score(name: str) -> list[float]:
        return [r.val_bpb or 0.0 for r in groups[name]]

    scatter("kept", "baseline and kept", score("kept"), s=62, color=KEEP, edgecolor="white", linewidth=1.2, zorder=5)
    scatter(
        "not kept", "discarded", score("not kept"), s=26, facecolor="none", edgecolor=DISCARD, linewidth=1.3, zorder=4
    )
    scatter("off", "discarded, off the scale", [edge] * len(groups["off"]), s=34, marker="^", facecolor="none",
            edgecolor=DISCARD, linewidth=1.3, zorder=4)  # fmt: skip
    scatter("failed", "failed, no score", [floor] * len(groups["failed"]), s=42, marker="x", color=FAIL,
            linewidth=1.8, zorder=4)  # fmt: skip
    scatter("stopped", "stopped early, no score", [floor] * len(groups["stopped"]), s=60, marker="_", color=DISCARD,
            linewidth=1.8, zorder=4)  # fmt: skip


def _labels(axes: Axes, rows: Sequence[Row], low: float, high: float) -> None:
    """The kept ones' descriptions, slanted; of a crowd, the ones that gained most."""
    if not rows:
        return
    wide = max(r.number for r in rows) - min(r.number for r in rows) or 1
    for r in crowd(rows, wide / 30):
        axes.annotate(
            f"{shorten(change(r.description), 40)}  {bpb(r.val_bpb)}{', disturbed' * r.tainted}",
            (r.number, r.val_bpb or low),
            xytext=(6, 7),
            textcoords="offset points",
            rotation=24,
            rotation_mode="anchor",
            fontsize=8.5,
            color=KEEP,
            va="bottom",
            parse_math=False,
            zorder=2.5,  # under the points, so that no experiment is hidden by another's name
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )


def change(description: str) -> str:
    """What was changed, without the reason that the search gives behind it."""
    what, _, _ = description.partition(": ")
    return what if " -> " in what else description


def title(tag: str, rows: Sequence[Row]) -> str:
    kept = [r for r in rows if r.kept]
    done = sum(r.decided for r in rows)
    text = f"{tag}: {plural(done, 'experiment')}, {max(len(kept) - 1, 0)} kept"
    gain = recorded_gain(kept)
    if len(kept) < 2 or gain is None:
        return text
    doubt = " (disturbed)" if kept[0].tainted or kept[-1].tainted else ""
    if kept[0].epoch != kept[-1].epoch:  # the machine has moved: the two scores do not compare
        return f"{text}, {below(gain)}{doubt}"
    return f"{text}, {bpb(kept[0].val_bpb)} to {bpb(kept[-1].val_bpb)}{doubt}"
