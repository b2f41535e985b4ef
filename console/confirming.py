"""confirm and finalize: what was kept, measured again on fresh seeds; and a clean branch of what holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from console import ablations, places
from console.again import Again, compared_with, line
from console.display import Ticker
from console.figures import STATE_WORDS
from console.findings import Findings, Kept, findings, read
from console.output import Screen
from console.signals import Asked, ends
from console.words import duration, plural, roughly, shorten, unfinished
from core import confirming, effects
from core.commands import quoted
from core.confirming import Done, Plan
from core.deadline import Deadline
from core.errors import UserError

if TYPE_CHECKING:
    from core.finalizing import Final
    from core.lab import Lab
    from core.live import Event
    from core.loop import Loop


# --- confirm -----------------------------------------------------------------------------------


def confirm_verb(
    screen: Screen,
    given: str | None,
    number: int | None,
    *,
    without: int | Literal["all"] | None,
    seeds: int,
    kept: bool,
    holdout: bool | None,
    cost: bool,
) -> int:
    """`without`: measure the winner without that change, or without each; `holdout`: for all, for none, or (None) for
    baseline and winner; `cost`: only tell it."""
    if without is not None:
        if number is not None or kept or holdout:
            raise UserError(
                "--without measures the winner alone: N, --kept and --holdout do not go with it", "see --help"
            )
        from console.ablations import without_verb

        return without_verb(screen, given, None if without == "all" else without, seeds, cost)
    lab = places.find(screen, given)
    numbers = _numbers(lab, number, kept)
    wanted = plan(lab, numbers, seeds, scored_too(screen, lab, numbers, number, holdout))
    told = ", ".join(f"#{n}" for n in numbers)
    screen.say(
        f"{told} on {plural(seeds, 'fresh seed')}: {plural(len(wanted.runs), 'run')} to go"
        + (f", about {roughly(wanted.seconds)}" if wanted.runs else ": all is measured")
        + (", the holdout too" if any(run.holdout for run in wanted.runs) else "")
    )
    if number is None and len(numbers) == 1:
        screen.say("nothing was kept yet: the baseline alone is measured, which shows the noise")
    if cost:
        screen.document({"lab": places.about(lab), "runs": len(wanted.runs), "seconds": wanted.seconds})
        return 0
    done, asked = (Done(0, 0, ""), Asked()) if not wanted.runs else measure(screen, lab, wanted)
    return _told(screen, lab, numbers, done, asked)


def _numbers(lab: Lab, number: int | None, kept: bool) -> list[int]:
    """Whose recipes are measured: each with what it is compared with."""
    standing = [e.number for e in lab.ledger.experiments() if e.is_kept]
    if number is None:
        if not standing:
            raise UserError(f"lab {lab.tag} has no baseline yet: nothing can be confirmed", "autoresearch run")
        return standing if kept else confirming.pair(standing)
    e = lab.ledger.get(number)
    if e.status not in ("keep", "simplify", "discard"):
        how = f"ended as {e.status}" if e.status else "is not decided yet"
        raise UserError(f"experiment {number} {how}: it has no score to confirm", "autoresearch log")
    before = compared_with(e, standing)
    return [number] if before is None else [before, number]


def scored_too(
    screen: Screen, lab: Lab, numbers: Sequence[int], number: int | None, holdout: bool | None
) -> Sequence[int]:
    """For whom the holdout is scored."""
    wanted = numbers if holdout else confirming.pair(numbers) if holdout is None and number is None else []
    tokens = lab.dataset().part("holdout").tokens
    if wanted and tokens <= lab.settings.sequence_len:
        screen.say(f"the holdout has {tokens} tokens, less than a row of {lab.settings.sequence_len}: it is not scored")
        return []
    return wanted


def plan(lab: Lab, numbers: Sequence[int], seeds: int, holdout: Sequence[int]) -> Plan:
    """What is left to run, against what the ledger holds now."""
    from core.versions import versions

    samples: dict[int, list[Any]] = {}
    for sample in lab.ledger.all_samples():
        samples.setdefault(sample.number, []).append(sample)
    each, beside = costs(lab)
    now = (versions(lab.settings), lab.ledger.epoch())
    return confirming.plan(samples, lab.settings.seed, each, numbers, seeds, holdout, *now, beside)


def costs(lab: Lab) -> tuple[float, float]:
    """Seconds of one more run, and of the holdout's measurement beside it."""
    s, dataset = lab.settings, lab.dataset()
    outcomes = [e.outcome for e in lab.ledger.experiments()]
    scored, held = (min(s.eval_tokens, dataset.part(part).tokens) for part in ("val", "holdout"))
    confirmed = [sample.outcome for sample in lab.ledger.all_samples() if sample.purpose == "confirm"]
    beside = confirming.holdout_seconds([*outcomes, *confirmed], held / scored)
    return confirming.seconds_each(outcomes, s.budget), beside


def measure(screen: Screen, lab: Lab, wanted: Plan) -> tuple[Done, Asked]:
    """Run what is planned, with its progress shown, until it is done or somebody asks for an end."""
    from core.executor import LocalExecutor
    from core.loop import Loop

    with Ticker(screen, events=True) as ticker:

        def on_event(event: Event) -> None:
            if event.kind == "waiting":
                ticker.say(f"     {event.data.get('text', '')}")
            elif event.kind == "again":
                ticker.begin(f"#{event.data['number']} again", f"with seed {event.data['seed']}")
            elif event.kind != "note":
                ticker.feed(event)

        loop = Loop(lab, None, LocalExecutor(), on_event)
        with ends(loop.stop) as asked:
            ticker.begin("confirming")
            return confirming.confirm(loop, wanted, say=lambda text: _say(screen, ticker, text)), asked


def _say(screen: Screen, ticker: Ticker, text: str) -> None:
    screen.line({"event": "confirmed", "text": text})
    ticker.say(f"  {text}")


def _told(screen: Screen, lab: Lab, numbers: Sequence[int], done: Done, asked: Asked) -> int:
    found = findings(read(lab))
    pairs = list(pairwise(numbers))
    again = {b: effects.remeasured(found.record.samples, a, b, found.spread) for a, b in pairs}
    screen.line({
        "event": "end", "lab": places.about(lab), "measured": done.measured, "left": done.left,
        "reason": done.reason, "signal": asked.name or None,
        "effects": [
            {"number": b, "before": a, "change": -e.gain, "low": e.high and -e.high, "high": e.low and -e.low}
            for a, b in pairs if (e := again[b])
        ],
    })  # fmt: skip
    for a, b in pairs:
        if (e := again[b]) is not None:
            status = _claim(found, a, b)
            state = effects.settled(status, e, found.record.worth, found.spread)
            screen.say(f"#{b} {line(Again(status, a, e, state))}")
    if rest := unfinished(done.left, asked.name or done.reason, "autoresearch log"):
        screen.say(rest)
    screen.say("the whole picture: autoresearch report")
    return asked.status


def _claim(found: Findings, before: int, number: int) -> str:
    """The status by which it has to hold: with a gain among the changes that lie between, it is a gain."""
    of = next(r for r in found.rows if r.number == number)
    gained = any(r.status == "keep" for r in found.rows if r.kept and before < r.number < number)
    return "keep" if of.kept and gained else of.status


# --- at the end of a run -----------------------------------------------------------------------


def research(screen: Screen, loop: Loop, experiments: int | None, deadline: Deadline | None, ticker: Ticker) -> Any:
    """Research until a limit; with a deadline, the time before it that is kept for that goes to confirming."""
    from core.loop import Limits

    lab = loop.lab
    kept_back = reserve(lab, deadline)
    limits = Limits(experiments, None if deadline is None else deadline.earlier(kept_back))
    summary = loop.run(limits)
    if not kept_back or summary.reason == "stopped" or loop.is_finishing:
        return summary
    standing = [e.number for e in lab.ledger.experiments() if e.is_kept]
    if len(standing) < 2 and (experiments is None or summary.decided < experiments):
        ticker.say("     nothing was kept, so there is nothing to confirm: the time goes to research")
        return loop.run(Limits(experiments, deadline))
    for numbers in (confirming.pair(standing), standing):  # what matters most first
        wanted = plan(lab, numbers, confirming.SEEDS, scored_too(screen, lab, numbers, None, None))
        if wanted.runs:
            told = ", ".join(f"#{n}" for n in numbers)
            ticker.say(f"     confirming {told} on fresh seeds: {plural(len(wanted.runs), 'run')}")
            done = confirming.confirm(loop, wanted, deadline, lambda text: _say(screen, ticker, text))
            if done.reason:
                break
    return summary


def reserve(lab: Lab, deadline: Deadline | None) -> float:
    """Seconds that a run with this deadline keeps for confirming."""
    if deadline is None:
        return 0.0
    return confirming.reserved(deadline.left(), lab.settings.verdict, sum(costs(lab)))


def reserve_line(lab: Lab, deadline: Deadline | None) -> str:
    """For the banner; "" where nothing is to be said."""
    if deadline is None:
        return ""
    if lab.settings.verdict == "simple":
        return "no time is kept for it with --verdict simple: autoresearch confirm"
    seconds = reserve(lab, deadline)
    if not seconds:
        return "too little time for it: autoresearch confirm"
    share = f"{100 * confirming.RESERVED:.0f} %"
    return f"the last {duration(seconds)} ({share}): baseline and winner again, on fresh seeds"


# --- finalize ----------------------------------------------------------------------------------


def finalize_verb(screen: Screen, given: str | None, branch: str | None, also: bool, show: bool) -> None:
    """`also`: take what is not settled or not confirmed too; `show`: only tell what it would do."""
    from core import finalizing

    lab = places.find(screen, given)
    found = findings(read(lab))
    wins = [finalizing.Win(k.row.number, k.again, k.state) for k in found.kept]
    final = finalizing.arrange(lab, wins, ("open", "unconfirmed") if also else ())
    name = branch or f"{lab.branch}-final"
    if not show:
        name = finalizing.write(lab, final, branch)
    experiments = lab.ledger.experiments()
    same = final.measured_as(experiments, {e.number: lab.source(e.number) for e in experiments if e.val_bpb})
    screen.document({
        "lab": places.about(lab), "branch": name, "written": not show,
        "commits": [{"number": s.win.number, "state": s.win.state, "note": s.note} for s in final.steps],
        "left_out": [{"number": w.number, "state": w.state} for w in final.left_out],
        "idle": [k.row.number for k in _idle(found, final)],
        "measured_as": same.number if same else None,
    })  # fmt: skip
    if screen.as_json:
        return
    _tell(screen, lab, found, final)
    if same:
        screen.say(f"the recipe that results is #{same.number}'s")
    else:
        screen.say("the recipe that results was never measured as it is; to judge it, in the lab:")
        screen.say(f"  git restore {quoted(f'--source={name}')} train.py")
        screen.say('  autoresearch try -m "what holds"')
    screen.say(f"branch   {name}" + (" (not written)" if show else ""))
    if not show:
        screen.say(f"see it   git -C {places.spelled(lab.path)} log -p {name}")


def _idle(found: Findings, final: Final) -> list[Kept]:
    """Changes on the branch that the winner was measured to do without."""
    on_it = {step.win.number for step in final.steps}
    return [k for k in found.idle if k.row.number in on_it]


def _tell(screen: Screen, lab: Lab, found: Findings, final: Final) -> None:
    from core.finalizing import effect_line

    words = {r.number: shorten(r.description, 70) for r in found.rows}
    for step in final.steps:
        screen.say(f"  #{step.win.number:<4} {words[step.win.number]}")
        screen.say(f"        {effect_line(step.win.again)}{' ' + step.note if step.note else ''}")
    for k in _idle(found, final):
        if k.without:
            screen.say(f"  note: #{k.row.number} is on it; {ablations.line(k.without)}")
            screen.say("        to try the best without it, in the lab:")
            for command in ablations.advice(k.row.number):
                screen.say(f"          {command}")
    for win in final.left_out:
        screen.say(f"  left out: #{win.number}, {STATE_WORDS[win.state]}  {words[win.number]}")
