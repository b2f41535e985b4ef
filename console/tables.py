"""Rows of the ledger as tables and lines for a terminal. Nothing is said by colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from console.output import Screen, plain
from console.rows import Row, Scale, Tally, doubt
from console.words import below, bpb, clock, count, delta, duration, moment, plural, shorten, sparkline

if TYPE_CHECKING:
    from rich.box import Box
    from rich.table import Table

    from core.ledger import Spent

TAINTED = "tainted: something else used the machine meanwhile, so the score may be worse than it would be alone"
STYLES = {"keep": "bold green", "simplify": "bold green", "crash": "dark_orange3", "timeout": "dark_orange3",
          "invalid": "dark_orange3"}  # fmt: skip


def summary_line(r: Row, best: float | None, width: int = 0) -> str:
    """'#3  discard  1.8123  (best 1.8010)  MATRIX_LR 0.04 -> 0.055': one experiment in one line."""
    score = bpb(r.val_bpb) if r.val_bpb is not None else "no score"
    against = f"(best {bpb(best)})" if best is not None and not r.kept else f"({delta(r.delta)})" if r.delta else ""
    runs = plural(r.runs, "run") if r.runs > 1 else ""
    line = "  ".join(
        part for part in (f"#{r.number:<3} {r.shown_status:<8} {score:<8}", against, runs, r.description) if part
    )
    line = f"{line}: {r.reason}" if r.failed and r.reason else line
    return shorten(line, width) if width else " ".join(line.splitlines())


def log_table(rows: Sequence[Row], scale: Scale, screen: Screen) -> Table:
    """The log; on a narrow terminal the last columns go first and descriptions fold."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=plain(str(scale)), title_justify="left", title_style="", box=_box(screen), pad_edge=False)
    wide, narrow = screen.width >= 100, screen.width < 60  # a time of another day takes 12 columns
    several = wide and any(r.runs > 1 for r in rows)
    for name, right in (("#", True), ("status", False), ("val_bpb", True), ("change", True)):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    if several:
        table.add_column("95 % interval", justify="right", no_wrap=True)
        table.add_column("runs", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold", ratio=1)
    if wide:
        table.add_column("took", justify="right", no_wrap=True)
    if not narrow:
        table.add_column("ended", justify="right", no_wrap=True)
    for r in rows:
        style = STYLES.get(r.status, "") if not r.undone else ""
        what = f"{r.description}: {shorten(r.reason, 120)}" if r.failed and r.reason else r.description
        cells = [str(r.number), r.shown_status, bpb(r.val_bpb), delta(r.delta)]
        cells += [_between(r), str(r.runs)] if several else []
        cells += [plain(what)]
        cells += [duration(r.device_seconds) if r.device_seconds else ""] if wide else []
        cells += [] if narrow else [clock(moment(r.finished)) if r.finished else ""]
        table.add_row(*(Text(cell, style=style if i == 1 else "") for i, cell in enumerate(cells)))
    return table


def _between(r: Row) -> str:
    """'-0.0051..-0.0012': in which the change lies with 95 %."""
    if r.interval is None:
        return ""
    low, high = r.interval  # of the gain, whose sign is the other one
    return f"{delta(-high)}..{delta(-low)}"


def other_rule_line(rows: Sequence[Row]) -> str:
    """What upstream's rule would have kept of these, and what it would not have; "" where that is the same."""
    more = [f"#{r.number}" for r in rows if r.simple == "keep" and not r.kept and not r.undone]
    less = [f"#{r.number}" for r in rows if r.simple == "discard" and r.kept]
    parts = [f"kept {', '.join(more)} as well"] if more else []
    parts += [f"not kept {', '.join(less)}"] if less else []
    return f"on one run each, upstream's rule would have {' and '.join(parts)}" if parts else ""


def verdict_lines(r: Row) -> list[str]:
    """How an experiment was decided, where it took more than one run of something."""
    v = r.verdict
    if v.get("rule") != "statistical":
        return []
    runs = [
        f"{run['bpb']:.6f} (seed {run['seed']}{', disturbed' if run.get('tainted') else ''})" for run in v["all_runs"]
    ]
    lines = [f"runs  {', '.join(runs)}"] if runs else []
    lines += [f"seed {run['seed']} was disturbed: {run['disturbed']}" for run in v["all_runs"] if run.get("disturbed")]
    if r.interval is not None:
        low, high = r.interval
        against = f", against {plural(int(v['control_runs']), 'run')} of the best" if v.get("control_runs") else ""
        noise = f"; noise {v['noise']['sd']:.6f}" if v.get("noise") else ""
        lines.append(f"gain  {v['gain']:+.6f}, 95 % interval {low:+.6f} to {high:+.6f}{against}{noise}")
    if early := v.get("stopped_early"):
        lines.append(f"saved  {duration(early.get('saved_seconds'))} of training")
    if r.simple and r.simple != r.status:
        lines.append(f"upstream's rule would have said: {r.simple}")
    return lines


def reapplied_line(r: Row) -> str:
    """Said of what was proposed as a change of one best and measured as the same change of another; else ""."""
    made = r.detail.get("reapplied") or {}
    if not made:
        return ""
    first = f"#{made['from']}" if made.get("from") else "an earlier recipe"
    return f"it was made to {first}; what is judged is the same change to #{made['to']}, which was kept meanwhile"


def _box(screen: Screen) -> Box:
    from rich import box

    return box.ASCII2 if screen.ascii else box.SIMPLE_HEAD


def tally_line(total: Tally) -> str:
    """'12 experiments: baseline, 3 kept, 7 discarded, 1 failed; best 1.8010 (#9), 0.0490 below the baseline'."""
    text = f"{plural(total.experiments, 'experiment')}: {counts_line(total)}"
    if total.best is None:
        return text
    text += f"; best {bpb(total.best.val_bpb)} (#{total.best.number})"
    if not total.gain or total.baseline is None:
        return text
    return f"{text}, {below(total.gain)}{doubt(total.baseline, total.best)}"


def counts_line(total: Tally) -> str:
    """'baseline, 3 kept, 7 discarded, 1 failed': all that were decided, each once."""
    parts = ["baseline"] if total.baseline else []
    parts += [f"{total.kept} kept", f"{total.discarded} discarded", f"{total.failed} failed"]
    parts += [f"{total.undone} taken back"] if total.undone else []
    return ", ".join(parts)


def cost_line(spent: Spent) -> str:
    """'$1.23 for 40 answers: 120k tokens in, 30k out, 900k from the cache'; "" where nobody was paid."""
    if not spent.answers:
        return ""
    sizes = (
        f"{count(spent.input_tokens + spent.cache_write_tokens)} tokens in, {count(spent.output_tokens)} out, "
        f"{count(spent.cache_read_tokens)} from the cache"
    )
    unpriced = f"; no price is known for {spent.unpriced} of them" if spent.unpriced else ""
    return f"${spent.usd:.2f} for {plural(spent.answers, 'answer')}: {sizes}{unpriced}"


def uses_line(total: Tally) -> str:
    """'device idle 1.2 % of the time: 40 s thinking, 12 s dry build, 8 s other'; "" before anything is known."""
    uses = total.uses
    if not uses.busy:
        return ""
    parts = [f"{duration(seconds)} {what}" for what, seconds in uses.waits.items() if seconds >= 0.5]
    return f"device idle {100 * uses.idle_share:.1f} % of the time" + (f": {', '.join(parts)}" if parts else "")


def card(r: Row, scale: Scale, screen: Screen) -> list[str]:
    """All about one experiment, line by line."""
    from console.page import facts

    lines = [f"#{r.number}  {r.shown_status}  {r.description}"]
    if r.val_bpb is not None:
        change = f"  {delta(r.delta)} against {bpb(r.best_before)}" if r.delta is not None else ""
        lines.append(f"  {bpb(r.val_bpb)}{change}  ({scale})")
    if r.reason:
        lines.append(f"  {r.reason}")
    lines += [f"  {line}" for line in (reapplied_line(r),) if line]
    lines += [f"  {line}" for line in verdict_lines(r)]
    pairs = facts(r)
    wide = max((len(what) for what, _ in pairs), default=0)
    lines += [f"  {what:<{wide}}  {figure}" for what, figure in pairs]
    losses = [float(p[3]) for p in r.outcome.get("curve") or [] if len(p) > 3 and p[3] is not None]
    if losses:
        spark = sparkline(losses, max(10, min(60, screen.width - 40)), screen.ascii)
        lines.append(f"  training loss  {losses[0]:.3f} {spark} {losses[-1]:.3f} nats/token")
    timings = r.outcome.get("timings") or {}
    if timings:
        lines.append("  time  " + ", ".join(f"{name} {duration(value)}" for name, value in timings.items() if value))
    tail = (r.outcome.get("log_tail") or "").strip().splitlines()
    if tail and r.failed:
        lines += [
            "  what it last printed:",
            *(f"    {line[: max(40, screen.width - 6)]}" for line in tail[-12:]),
        ]
    return [plain(line) for line in lines]
