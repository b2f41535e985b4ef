"""The report's sections as HTML. Each takes the findings and spells them; none of them counts anything itself."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from console import ablations
from console.chart import Whisker, reach, whisker
from console.figures import (
    cells,
    change,
    cost,
    fact,
    interval,
    link,
    mark,
    number,
    score,
    spans,
    state,
    table,
    time,
    words_of,
)
from console.findings import Findings, Gain, Kept, Near
from console.themes import Theme
from console.words import count, shorten
from core.ablation import Without
from core.effects import Effect

if TYPE_CHECKING:
    from core.noise import Noise

NAMES = 4  # parts of a theme that are named
REASONS = 3  # why runs were disturbed that are told
SIMPLE_SEES = "Simple is given the first run of each, and compares it with the last that it would have kept itself"
EARLIER_SEES = "that an earlier version judged, with the first run of the lab's best"


# --- the answer ------------------------------------------------------------------------------------


def answer(found: Findings) -> str:
    """The first thing to read: what was gained, and whether that holds."""
    kind, lead, more = _answer(found)
    return f'<section class="answer {kind}"><p class="lead">{lead}</p>{more}</section>'


def _answer(found: Findings) -> tuple[str, str, str]:
    total = found.total
    if not total.experiments:
        return "", "Nothing was measured yet.", "<p><code>autoresearch run</code> makes the baseline first.</p>"
    if total.baseline is None or found.gain is None:
        return _no_gain(found)
    gain = found.gain
    again = gain.validation
    if again is None:
        came = (
            f"{link(gain.winner.number)} came out <b>{change('gain.recorded', gain.recorded)}</b> against the baseline"
        )
        lead = f"{came} when it was kept{gain.doubt}. That is not confirmed yet."
        more = "<p>A figure that was chosen because it was low flatters. On fresh seeds it is known after "
        return "", lead, more + f"{cost('gain.seconds', gain.seconds)}: <code>autoresearch confirm</code></p>"
    size = f"<b>{change('gain.val', again.gain)}</b> val_bpb"
    range_ = f" (95 %: {interval('gain.val', again)})" if spans(again) else ""
    where = f"from the baseline to {link(gain.winner.number)}" if gain.state == "replicated" else "on fresh seeds"
    of = number("gain.val.runs_before", again.runs_before), number("gain.val.runs_after", again.runs_after)
    kind = {"replicated": "good", "not replicated": "bad"}.get(gain.state, "")
    return kind, f"{came_to(gain)}: {size}{range_} {where}, {' and '.join(of)} runs.", _forest(found)


def came_to(gain: Gain) -> str:
    """What fresh seeds say of the whole night: of the gain, or where none was claimed of the simplification."""
    what = "The simplification" if gain.simpler else "The gain"
    return {"replicated": f"{what} holds", "not replicated": f"{what} did not hold"}.get(gain.state, "Not settled")


def _no_gain(found: Findings) -> tuple[str, str, str]:
    total = found.total
    if total.baseline is None:
        lead = f"No experiment has a score: all {number('tally.failed', total.failed)} failed."
        reason, many = Counter(r.reason for r in found.rows if r.failed).most_common(1)[0]
        often = f" ({fact('failed.most', many, str(many))} of them)" if many > 1 else ""
        return "bad", lead, f'<p>The most frequent reason{often}: <span class="says">{escape(reason)}</span></p>'
    best = score("baseline.val_bpb", total.baseline.val_bpb)
    if total.experiments == 1:
        return "", f"Only the baseline was measured: <b>{best}</b>.", "<p>There is nothing to compare it with yet.</p>"
    tried = number("tally.experiments", total.experiments)
    lead = f"Nothing was kept over the baseline, <b>{best}</b>, in {tried} experiments."
    return "", lead, "<p>That is a result too: what was tried is below, by theme.</p>"


def _forest(found: Findings) -> str:
    """Recorded and re-measured gain side by side."""
    gain = found.gain
    if gain is None:
        return ""
    kept = f"when it was kept{gain.doubt}"
    lines = [(kept, Whisker(-gain.recorded, pale=True), change("gain.recorded", gain.recorded))]
    lines += [
        (what, _whisker(again), change(name, again.gain))
        for what, name, again in (
            ("fresh seeds, validation", "gain.val", gain.validation),
            ("fresh seeds, holdout", "gain.holdout", gain.holdout),
        )
        if again is not None
    ]
    within = reach([w for _, w, _ in lines])
    inner = "".join(
        f'<div class="entry"><div class="what">{what}</div><div class="plot">{whisker(w, within, 420)}</div>'
        f'<div class="figure">{figure}</div></div>'
        for what, w, figure in lines
    )
    return f'<div class="forest">{inner}</div>{_holdout_line(found)}'


def _holdout_line(found: Findings) -> str:
    gain = found.gain
    if gain is None or gain.holdout is None:
        return (
            "<p>The holdout, text that no decision has seen, is not scored yet: <code>autoresearch confirm</code></p>"
        )
    range_ = f" (95 %: {interval('gain.holdout', gain.holdout)})" if spans(gain.holdout) else ""
    return (
        "<p>The holdout is text that no decision has seen: a gain there is not fitted to the validation text. There it "
        f"is {change('gain.holdout', gain.holdout.gain)}{range_}. Left of the dashed line is better.</p>"
    )


def _whisker(again: Effect) -> Whisker:
    low, high = again.low, again.high
    return Whisker(-again.gain, None if high is None else -high, None if low is None else -low)


def tiles(found: Findings) -> str:
    total, use = found.total, found.time
    best = total.best
    of = [
        (score("best.val_bpb", best.val_bpb if best else None), "best val_bpb, as recorded"),
        (number("tally.experiments", total.experiments), "experiments"),
        (number("tally.kept", total.kept), "kept after the baseline"),
        (number("tally.discarded", total.discarded), "discarded"),
        (number("tally.failed", total.failed), "failed"),
        (time("time.busy", use.busy), "the device worked"),
    ]
    if use.idle_share is not None:
        of.append((fact("time.idle_share", use.idle_share, f"{100 * use.idle_share:.1f} %"), "of the time it was idle"))
    if found.record.spent.answers:
        usd = found.record.spent.usd
        of.append((fact("spent.usd", usd, f"${usd:.2f}"), "spent on researchers"))
    inner = "".join(f'<div class="tile"><b>{value}</b><span class="what">{what}</span></div>' for value, what in of)
    return f'<div class="tiles">{inner}</div>'


# --- what was kept, what was tried -----------------------------------------------------------------


def kept(found: Findings) -> str:
    if not found.kept:
        return '<p class="soft">Nothing beyond the baseline.</p>'
    shown = [Whisker(k.row.delta or 0.0, pale=True) for k in found.kept]
    shown += [_whisker(k.again) for k in found.kept if k.again]
    within = reach(shown)
    asked = any(k.without for k in found.kept)
    lines = [f'<tr data-kept="{k.row.number}">{_kept(k, within, asked)}</tr>' for k in found.kept]
    head = [
        ("n", "#"), ("what", "what"), ("n", "when kept"), ("n", "on fresh seeds"),
        ("plot", "95 % interval; left is better"), ("w", "does it hold?"),
        *([("without", "the winner without it")] if asked else []),
    ]  # fmt: skip
    return _kept_lead(found) + table(head, lines)


def _kept_lead(found: Findings) -> str:
    states = Counter[str](k.state for k in found.kept)
    parts = [
        f"{number(f'kept.{name}', states[name])} {words}"
        for name, words in (
            ("replicated", "held on fresh seeds"), ("not replicated", "did not"), ("open", "not settled"),
            ("unconfirmed", "not confirmed"),
        )
        if states[name]
    ]  # fmt: skip
    seconds = sum(k.seconds for k in found.unsettled)
    more = ""
    if states["unconfirmed"] and seconds:
        more = f" Confirming all takes {cost('kept.seconds', seconds)}: <code>autoresearch confirm --kept</code>"
    elif found.seconds_without:
        more = (
            f" Does the winner still need each? To leave them out, one at a time, takes "
            f"{cost('kept.without.seconds', found.seconds_without)} at most: "
            "<code>autoresearch confirm --without all</code>"
        )
    return f"<p>Of {number('tally.kept', len(found.kept))} kept: {', '.join(parts)}.{more}</p>"


def _kept(k: Kept, within: tuple[float, float], asked: bool) -> str:
    n = k.row.number
    again = change(f"kept.{n}.again", k.again.gain) if k.again else ""
    runs = ""
    if k.again:
        of = f"{k.again.runs_before}+{k.again.runs_after}"
        runs = f'<br><span class="soft">{fact(f"kept.{n}.runs", of, of)} runs</span>'
    plot = whisker(_whisker(k.again), within) if k.again else ""
    range_ = interval(f"kept.{n}", k.again)
    plot += f'<span class="soft">{range_}</span>' if range_ else ""
    takes = ""
    if k.state == "unconfirmed" and k.seconds:
        takes = (
            f'<br><span class="soft">{cost(f"kept.{n}.seconds", k.seconds)}:</span> '
            f"<code>confirm {number(f'kept.{n}.number', n)}</code>"
        )
    simpler = " (simpler)" if k.row.status == "simplify" else ""
    doubt = f'<br><span class="soft">{escape(k.disturbed)}</span>' if k.disturbed else ""
    return cells(
        ("n head", "#", link(n)),
        ("what", "what", f'<span class="says">{escape(k.row.description)}</span>{simpler}'),
        ("n", "when kept", change(f"kept.{n}.delta", None if k.row.delta is None else -k.row.delta) + doubt),
        ("n", "on fresh seeds", again + runs),
        ("plot", "95 %", plot),
        ("w", "does it hold?", state(k.state, takes)),
        *([("without", "the winner without it", _without(k.without) if k.without else "")] if asked else []),
    )


def _without(w: Without) -> str:
    """By what val_bpb grows when the change is left out, and what that says."""
    key, said = f"kept.{w.number}.without", f'<span class="says">{escape(ablations.says(w))}</span>'
    other = "" if w.stands else f' <span class="soft">(left out of {link(w.winner)})</span>'
    if w.effect is None:
        return f'<span class="soft">{said}</span>{other}'
    half, of = ablations.half_width(w.effect), f"{w.effect.runs_before}+{w.effect.runs_after}"
    size = change(key, -w.effect.gain) + ("" if half is None else f" ± {fact(f'{key}.half', half, f'{half:.4f}')}")
    runs = f'<span class="soft">{fact(f"{key}.runs", of, of)} runs</span>'
    return f"{size}<br>{runs}<br>{mark(w.state, said)}{other}"


def tried(found: Findings) -> str:
    """By theme; what never helped is seen at once."""
    if not found.themes:
        return '<p class="soft">Nothing but the baseline.</p>'
    head = [
        ("w", "theme"), ("n", "tried"), ("n", "kept"), ("n", "failed"), ("n", "best change"),
        ("what", "what was changed"),
    ]  # fmt: skip
    lines = [f"<tr>{_theme(i, t)}</tr>" for i, t in enumerate(found.themes)]
    never = [t.name for t in found.themes if not t.kept and len(t.rows) > 1]
    lead = f'<p>Never kept so far: <span class="says">{escape(", ".join(never))}</span>.</p>' if never else ""
    return lead + table(head, lines)


def _theme(i: int, theme: Theme) -> str:
    closest = theme.closest
    best = ""
    if closest is not None and closest.delta is not None:
        best = f"{change(f'theme.{i}.best', -closest.delta)} {link(closest.number)}"
    named = [f"{escape(n)} ×{many}" if many > 1 else escape(n) for n, many in list(theme.parts.items())[:NAMES]]
    more = len(theme.parts) - NAMES
    parts = ", ".join(named) + (f" and {more} more" if more > 0 else "")
    return cells(
        ("w what", "theme", f'<b class="says">{escape(theme.name)}</b>'),
        ("n inline", "tried", number(f"theme.{i}.tried", len(theme.rows))),
        ("n inline", "kept", number(f"theme.{i}.kept", theme.kept)),
        ("n inline", "failed", number(f"theme.{i}.failed", theme.failed)),
        ("n inline", "best", best),
        ("what", "changed", f'<span class="says soft">{parts}</span>'),
    )


# --- time ------------------------------------------------------------------------------------------


def time_parts(found: Findings) -> list[tuple[str, str, float, str]]:
    """(key, what, seconds, colour) of everything that is known, in the order of the bar."""
    use = found.time
    parts = [
        ("time.training", "training", use.training, "t1"),
        ("time.scoring", "scoring and audit", use.scoring, "t2"),
        ("time.starting", "start, compile, hand over", use.starting, "t3"),
    ]
    parts += [(f"time.wasted.{why}", f"wasted: {why}", s, "t4") for why, s in use.wasted.items()]
    parts += [(f"time.idle.{why}", f"idle: {why}", s, "t5") for why, s in use.idle.items()]
    parts += [("time.paused", "paused", use.paused, "t6")]
    if use.away is not None:
        parts.append(("time.away", "no run, or one that was dropped", use.away, "t7"))
    return [p for p in parts if p[2] >= 0.5]


def time_used(found: Findings) -> str:
    parts = time_parts(found)
    whole = sum(seconds for _, _, seconds, _ in parts)
    if not whole:
        return '<p class="soft">Nothing is known of it.</p>'
    bar = "".join(
        f'<i style="flex: {seconds / whole:.5f}; background: var(--{colour})" title="{escape(what)}"></i>'
        for _, what, seconds, colour in parts
    )
    lines = [
        "<tr>" + cells(
            ("what", "", f'<i class="swatch" style="background: var(--{colour})"></i>{escape(what)}'),
            ("n", "time", time(key, seconds)),
            ("n", "share", fact(f"{key}.share", seconds / whole, f"{100 * seconds / whole:.1f} %")),
        ) + "</tr>"
        for key, what, seconds, colour in parts
    ]  # fmt: skip
    body = table([("what", "what"), ("n", "time"), ("n", "share")], lines, "")
    return f'<div class="bar" aria-hidden="true">{bar}</div>{_beside(body, _time_notes(found))}'


def _beside(left: str, right: str) -> str:
    return f'<div class="pair"><div>{left}</div><div>{right}</div></div>'


def _time_notes(found: Findings) -> str:
    use = found.time
    notes = []
    if use.wall is not None:
        notes.append(f"From the first start to the last end: {time('time.wall', use.wall)}.")
    if use.stopped_early:
        notes.append(
            f"{number('time.stopped_early', use.stopped_early)} hopeless runs were stopped early: "
            f"{time('time.saved', use.saved)} saved."
        )
    if use.repeats:
        told = ", ".join(f"{escape(why)} {time(f'time.repeats.{why}', s)}" for why, s in use.repeats.items())
        notes.append(f"Measuring again took, of the above: {told}.")
    if paid := _cost(found):
        notes.append(paid)
    notes += [f'<span class="warn">{line}</span>' for line in clock_notes(found)]
    return "".join(f"<p>{note}</p>" for note in notes)


def _cost(found: Findings) -> str:
    """What researchers were paid."""
    spent = found.record.spent
    if not spent.answers:
        return ""
    read = spent.input_tokens + spent.cache_write_tokens
    tokens = [
        (read, "in", "in"),
        (spent.output_tokens, "out", "out"),
        (spent.cache_read_tokens, "cached", "from the cache"),
    ]
    told = ", ".join(f"{fact(f'spent.{key}', many, count(many))} {where}" for many, key, where in tokens)
    usd = fact("spent.usd", spent.usd, f"${spent.usd:.2f}")
    unknown = f"; no price is known for {number('spent.unpriced', spent.unpriced)} of them" if spent.unpriced else ""
    return f"Researchers: {usd} for {number('spent.answers', spent.answers)} answers; tokens: {told}{unknown}."


def clock_notes(found: Findings) -> list[str]:
    """What is odd about the time of day, as HTML."""
    notes = []
    for i, odd in enumerate(found.time.oddities):
        how = time(f"clock.{i}", abs(odd.seconds))
        if odd.seconds > 0:
            notes.append(
                f"While {link(odd.number)} was measured, the time of day went {how} further than its runs took: the "
                "machine slept, or its clock was set. Trainings are timed by a clock that stands still then."
            )
        else:
            notes.append(
                f"At {link(odd.number)} the clock was set back, by {how} at least: how long the night was is not known."
            )
    return notes


# --- how far to trust it ---------------------------------------------------------------------------


def trust(found: Findings) -> str:
    return (
        f'<div class="pair"><div>{_noise(found)}{_rules(found)}</div><div>{_machine(found)}{_drift(found)}</div></div>'
    )


def _noise(found: Findings) -> str:
    spread = found.spread
    if spread.sd is None:
        return (
            "<h3>Noise</h3><p>Not known: no recipe ran twice on fresh seeds, so no figure here has an interval. "
            "<code>autoresearch confirm</code> measures it.</p>"
        )
    sd = fact("noise.sd", spread.sd, f"{spread.sd:.4f}")
    many = "recipe" if spread.recipes == 1 else "recipes"
    of = f"{number('noise.runs', spread.runs)} runs of {number('noise.recipes', spread.recipes)} {many}"
    return (
        f"<h3>Noise</h3><p>Runs of one recipe on different seeds lie {sd} apart (standard deviation; {of} that no "
        f"decision has chosen). All intervals are Student's, with this figure.{_repeats(found.noise)}</p>"
    )


def _repeats(noise: Noise) -> str:
    if noise.repeat_sd is None:
        return ""
    sd = fact("noise.repeat_sd", noise.repeat_sd, f"{noise.repeat_sd:.4f}")
    many = number("noise.repeats", noise.repeat_df)
    return f" Runs of one recipe on one seed lie {sd} apart ({many} repeated): so much of it is this machine's own."


def _rules(found: Findings) -> str:
    rules = found.rules
    if rules.statistical is None:
        used = "The lab decides by the simple rule: keep what comes out lower." if rules.used == "simple" else ""
        body = f"{used} It kept {number('rules.simple', rules.simple)}; nobody asked the statistical rule."
    else:
        asked = (("simple", rules.simple), ("statistical", rules.statistical), ("both", rules.both))
        counts = [number(f"rules.{name}", many) for name, many in asked]
        body = (
            "The lab decides by the statistical rule: keep what is better beyond noise. Of the experiments that were "
            f"judged it kept {counts[1]}; <em>simple</em> (upstream's: keep what comes out lower) would have kept "
            f"{counts[0]}; both {counts[2]}. {SIMPLE_SEES}"
            + (f"; {number('rules.earlier', rules.earlier)} {EARLIER_SEES}." if rules.earlier else ".")
        )
    return f"<h3>The rule</h3><p>{body}</p>"


def _machine(found: Findings) -> str:
    m = found.machine
    if not m.runs and not m.again:
        return '<h3>The machine</h3><p class="soft">Nothing was taken down.</p>'
    noun = "experiment" if m.experiments == 1 else "experiments"
    lead = (
        f"Runs that were watched: {number('machine.runs', m.runs)}; disturbed: {number('machine.tainted', m.tainted)}"
    )
    lead += f", of {number('machine.experiments', m.experiments)} {noun}" if m.experiments else ""
    parts = [f'<p class="says">{escape(shorten(device, 200))}</p>' for device in m.devices]
    parts += [f"<p>{lead}. Dropped, and repeated: {number('machine.again', m.again)}.</p>"]
    parts += [f'<p class="says soft">{escape(shorten(reason, 200))}</p>' for reason in m.reasons[:REASONS]]
    if m.speed:
        first, last = m.speed
        parts.append(
            f"<p>The recipe that ran most often: {fact('machine.speed.first', first, count(first))} tokens/s at first, "
            f"{fact('machine.speed.last', last, count(last))} at last.</p>"
        )
    lines = [
        "<tr>" + cells(
            ("what", "", f'<span class="says">{escape(r.name)}{", " + r.unit if r.unit else ""}</span>'),
            ("n", "lowest", fact(f"machine.{i}.low", r.low, _short(r.low))),
            ("n", "middle", fact(f"machine.{i}.middle", r.middle, _short(r.middle))),
            ("n", "highest", fact(f"machine.{i}.high", r.high, _short(r.high))),
        ) + "</tr>"
        for i, r in enumerate(m.readings)
    ]  # fmt: skip
    head = [("what", "over all runs"), ("n", "lowest"), ("n", "middle"), ("n", "highest")]
    return "<h3>The machine</h3>" + "".join(parts) + (table(head, lines, "") if lines else "")


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _drift(found: Findings) -> str:
    controls = sum(s.purpose == "control" for of_one in found.record.samples.values() for s in of_one)
    if not found.drift:
        if not controls:
            return ""
        return f"<h3>Drift</h3><p>It was not seen in {number('drift.controls', controls)} re-runs of the best.</p>"
    lines = "".join(f'<li class="says">{escape(e.text)}</li>' for e in found.drift)
    return f"<h3>Drift</h3><p>Runs from here on are not compared with those before:</p><ul>{lines}</ul>"


# --- what to try next ------------------------------------------------------------------------------


def following(found: Findings) -> str:
    items = [
        f"Confirm {link(k.row.number)}: {cost(f'kept.{k.row.number}.seconds', k.seconds)}, "
        f"<code>autoresearch confirm {number(f'kept.{k.row.number}.number', k.row.number)}</code>"
        for k in found.unsettled
        if k.seconds
    ]
    items += [_doubt(k) for k in found.kept if k.state == "not replicated"]
    items += [_idle(k) for k in found.idle]
    items += [_near(near) for near in found.near]
    if found.untried:
        names = ", ".join(found.untried[:12]) + (" and others" if len(found.untried) > 12 else "")
        items.append(f'Constants with a range that nothing has changed yet: <span class="says">{escape(names)}</span>')
    if not items:
        return '<p class="soft">Nothing stands out: go on with <code>autoresearch run</code>.</p>'
    return f'<ul class="next">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _doubt(k: Kept) -> str:
    n = number(f"kept.{k.row.number}.number", k.row.number)
    return (
        f"{link(k.row.number)} did not replicate: <code>autoresearch finalize</code> leaves it out; "
        f"<code>autoresearch undo {n}</code> takes it back, with all that came after"
    )


def _idle(k: Kept) -> str:
    n = number(f"kept.{k.row.number}.number", k.row.number)
    return (
        f"The winner was as good without {link(k.row.number)}: <code>autoresearch best --source --without {n}</code> "
        "is that recipe, for <code>autoresearch try</code> to judge"
    )


def _near(near: Near) -> str:
    r, key = near.row, f"near.{near.row.number}"
    then = "" if r.delta is None else f", {change(key, -r.delta)} ({how_near(near)})"
    again = ""
    if near.again:
        range_ = f" (95 %: {interval(f'{key}.again', near.again)})" if spans(near.again) else ""
        of = f"{near.again.runs_before}+{near.again.runs_after}"
        again = (
            f"; on fresh seeds {change(f'{key}.again', near.again.gain)}{range_}, {fact(f'{key}.runs', of, of)} runs: "
            f"{mark(near.state, words_of(r.status, near.state))}"
        )
    said = f'<span class="says">{escape(shorten(r.description, 140))}</span>'
    return f"{'Near miss' if near.close else 'Discard'} {link(r.number)}, {said}{then}{again}"


def how_near(near: Near) -> str:
    if not near.close:
        return "when it was discarded"
    return "better by too little" if (near.row.delta or 0.0) < 0 else "worse by less than noise explains"
