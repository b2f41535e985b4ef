"""The report as Markdown: the same figures as on the page, in the order of what matters."""

from __future__ import annotations

from collections.abc import Sequence

from console import ablations, sections
from console.figures import STATE_WORDS, signed, words_of
from console.findings import Findings, Kept, Near
from console.tables import cost_line
from console.words import bpb, duration, plural, roughly, shorten
from core.effects import Effect


def markdown(found: Findings, made: str) -> str:
    """`made`: when, as text."""
    record = found.record
    parts = [
        f"# {record.tag}",
        f"{record.scale}; lower is better.",
        "\n".join(answer(found)),
        f"![The night](report.png)\n\n{_tally(found)}",
        "## What was kept\n" + _kept(found),
        "## What was tried\n" + _tried(found),
        "## What to try next\n" + _following(found),
        "## Where the time went\n" + _time(found),
        "## How far to trust it\n" + _trust(found),
        f"Made {made} by autoresearch from the lab's ledger; nothing was trained for it. Changes are of val_bpb: below "
        "zero is better.",
    ]
    return "\n\n".join(parts) + "\n"


def answer(found: Findings) -> list[str]:
    """What was gained, and whether that holds, in one to three sentences."""
    total, gain = found.total, found.gain
    if not total.experiments:
        return ["Nothing was measured yet. Next: `autoresearch run`"]
    if total.baseline is None:
        return [f"No experiment has a score: all {total.failed} failed."]
    if gain is None:
        best = bpb(total.baseline.val_bpb)
        if total.experiments == 1:
            return [f"Only the baseline was measured: {best}. There is nothing to compare it with yet."]
        return [f"Nothing was kept over the baseline, {best}, in {plural(total.experiments, 'experiment')}."]
    came = f"{signed(-gain.recorded)} against the baseline when it was kept{gain.doubt}"
    recorded = f"#{gain.winner.number} came out {came}."
    if gain.validation is None:
        return [
            recorded,
            f"Not confirmed: on fresh seeds that takes about {roughly(gain.seconds)}: `autoresearch confirm`",
        ]
    again = gain.validation
    runs = f"{again.runs_before} and {again.runs_after} runs"
    lines = [recorded, f"{sections.came_to(gain)}: {changed(again)} on fresh seeds, {runs}."]
    if gain.holdout is not None:
        return [*lines, f"On the holdout, which no decision has seen: {changed(gain.holdout)}."]
    return [*lines, "The holdout is not scored yet: `autoresearch confirm`"]


def changed(again: Effect) -> str:
    """'−0.0151 (95 %: −0.0200 to −0.0102)'."""
    text = signed(-again.gain)
    if again.low is None or again.high is None:
        return text
    return f"{text} (95 %: {signed(-again.high)} to {signed(-again.low)})"


def _tally(found: Findings) -> str:
    total = found.total
    parts = [f"{total.kept} kept after the baseline, {total.discarded} discarded, {total.failed} failed"]
    parts += [f"the device worked for {duration(found.time.busy)}"]
    parts += [f"researchers: {cost}" if (cost := cost_line(found.record.spent)) else ""]
    return f"{plural(total.experiments, 'experiment')}: {'; '.join(p for p in parts if p)}."


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _kept(found: Findings) -> str:
    if not found.kept:
        return "Nothing beyond the baseline."
    asked = any(k.without for k in found.kept)
    head = ("#", "what", "when kept", "on fresh seeds", "does it hold?", *(["the winner without it"] if asked else []))
    lines = [[*_kept_line(k), *([_without(k)] if asked else [])] for k in found.kept]
    return table(head, lines)


def _without(k: Kept) -> str:
    if (w := k.without) is None:
        return ""
    other = "" if w.stands else f" (left out of #{w.winner})"
    size = f"{ablations.amount(w.effect)}: " if w.effect else ""
    return f"{size}{_plain(ablations.says(w))}{other}"


def _kept_line(k: Kept) -> list[str]:
    cost = (
        f", about {roughly(k.seconds)}: `autoresearch confirm {k.row.number}`"
        if k.state == "unconfirmed" and k.seconds
        else ""
    )
    doubt = f" ({k.disturbed})" if k.disturbed else ""
    claimed = "" if k.row.delta is None else signed(k.row.delta) + doubt
    simpler = " (simpler)" if k.row.status == "simplify" else ""
    again = changed(k.again) if k.again else ""
    return [f"#{k.row.number}", _plain(k.row.description) + simpler, claimed, again, STATE_WORDS[k.state] + cost]


def _tried(found: Findings) -> str:
    if not found.themes:
        return "Nothing but the baseline."
    lines = []
    for theme in found.themes:
        closest = theme.closest
        best = f"{signed(closest.delta or 0.0)} #{closest.number}" if closest else ""
        named = ", ".join(list(theme.parts)[: sections.NAMES])
        lines.append([theme.name, str(len(theme.rows)), str(theme.kept), str(theme.failed), best, named])
    return table(("theme", "tried", "kept", "failed", "best change", "what was changed"), lines)


def _following(found: Findings) -> str:
    items = [
        f"Confirm #{k.row.number}: about {roughly(k.seconds)}, `autoresearch confirm {k.row.number}`"
        for k in found.unsettled
        if k.seconds
    ]
    items += [
        f"#{k.row.number} did not replicate: `autoresearch finalize` leaves it out, "
        f"`autoresearch undo {k.row.number}` takes it back"
        for k in found.kept
        if k.state == "not replicated"
    ]
    items += [
        f"The winner was as good without #{k.row.number}: `autoresearch best --source --without {k.row.number}` is "
        "that recipe, for `autoresearch try` to judge"
        for k in found.idle
    ]
    items += [_near(near) for near in found.near]
    if found.untried:
        items.append(f"Constants with a range that nothing has changed yet: {', '.join(found.untried[:12])}")
    return "\n".join(f"- {item}" for item in items) or "Nothing stands out: go on with `autoresearch run`."


def _near(near: Near) -> str:
    r, again = near.row, near.again
    then = "" if r.delta is None else f", {signed(r.delta)} ({sections.how_near(near)})"
    said = ""
    if again:
        runs = f"{again.runs_before} and {again.runs_after} runs"
        said = f"; on fresh seeds {changed(again)}, {runs}: {words_of(r.status, near.state)}"
    return f"{'Near miss' if near.close else 'Discard'} #{r.number}, {_plain(r.description)}{then}{said}"


def _time(found: Findings) -> str:
    parts = sections.time_parts(found)
    whole = sum(seconds for _, _, seconds, _ in parts)
    if not whole:
        return "Nothing is known of it."
    lines = [[what, duration(seconds), f"{100 * seconds / whole:.1f} %"] for _, what, seconds, _ in parts]
    notes = []
    if found.time.stopped_early:
        notes.append(
            f"{plural(found.time.stopped_early, 'hopeless run')} stopped early: {duration(found.time.saved)} saved."
        )
    for odd in found.time.oddities:
        how = "ran ahead: the machine slept, or its clock was set" if odd.seconds > 0 else "was set back"
        notes.append(f"At #{odd.number} the time of day {how} ({duration(abs(odd.seconds))}).")
    return "\n\n".join([table(("what", "time", "share"), lines), *notes])


def _trust(found: Findings) -> str:
    spread, rules, m = found.spread, found.rules, found.machine
    lines = ["Noise is not known: no recipe ran twice on fresh seeds."]
    if spread.sd is not None:
        of = f"{spread.runs} runs of {plural(spread.recipes, 'recipe')}"
        lines = [f"Noise between seeds: {spread.sd:.4f} (standard deviation, {of})."]
    if found.noise.repeat_sd is not None:
        repeated = plural(found.noise.repeat_df, "repeat")
        lines.append(f"Noise between two runs of one seed: {found.noise.repeat_sd:.4f} ({repeated}).")
    if rules.statistical is None:
        lines.append(f"The simple rule kept {rules.simple}; nobody asked the statistical rule.")
    else:
        lines.append(
            f"The lab decides by the statistical rule, which kept {rules.statistical}; simple would have kept "
            f"{rules.simple}; both {rules.both}. {sections.SIMPLE_SEES}"
            + (f"; {rules.earlier} {sections.EARLIER_SEES}." if rules.earlier else ".")
        )
    lines += [f"Measured on {_plain(device)}." for device in m.devices]
    of = f", of {plural(m.experiments, 'experiment')}" if m.experiments else ""
    lines.append(f"{plural(m.runs, 'run')} watched; disturbed: {m.tainted}{of}. Dropped, and repeated: {m.again}.")
    lines += [f"Why: {_plain(reason)}" for reason in m.reasons[: sections.REASONS]]
    lines += [shorten(e.text, 200) for e in found.drift]
    return "\n".join(f"- {line}" for line in lines)


def _plain(text: str, width: int = 200) -> str:
    """One line that Markdown takes for text."""
    return shorten(text, width).replace("<", "&lt;").replace("`", "'")
