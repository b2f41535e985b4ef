"""Kept changes left out of the best: confirm --without, and how every other verb tells what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from console import places
from console.figures import signed
from console.output import Screen
from console.words import plural, roughly, unfinished
from core import ablation, confirming, effects
from core.ablation import Known, LeftOut, Without
from core.confirming import Done, Plan

if TYPE_CHECKING:
    from console.signals import Asked
    from core.lab import Lab


# --- confirm --without -------------------------------------------------------------------------


def without_verb(screen: Screen, given: str | None, number: int | None, seeds: int, cost: bool) -> int:
    """`number`: whose change is left out, None: each that was kept, in its turn; `cost`: only tell what it takes."""
    from console.confirming import measure
    from console.signals import Asked

    lab = places.find(screen, given)
    lefts = [ablation.leave_out(lab, n) for n in ablation.choose(lab, number)]
    wanted = plan(lab, lefts, seeds)
    _announce(screen, lefts, wanted, seeds)
    if cost:
        screen.document({
            "lab": places.about(lab), "runs": len(wanted.runs), "seconds": wanted.seconds,
            "cannot_be_left_out": {left.number: left.reason for left in lefts if left.source is None},
        })  # fmt: skip
        return 0
    with lab.ledger.transaction():
        for left in lefts:
            lab.ledger.ablate(left.number, left.winner, left.source, left.reason)
    done, asked = measure(screen, lab, wanted) if wanted.runs else (Done(0, 0, ""), Asked())
    return _told(screen, lab, lefts, done, asked)


def plan(lab: Lab, lefts: list[LeftOut], seeds: int) -> Plan:
    """What is left to run, against what the ledger holds now."""
    from core.versions import versions

    ledger, s = lab.ledger, lab.settings
    experiments = ledger.experiments()
    each = confirming.seconds_each([e.outcome for e in experiments], s.budget)
    known = Known.of(experiments, ledger.all_samples())
    return ablation.plan(lefts, ledger.ablations(), known, s.seed, each, seeds, versions(s), ledger.epoch())


def _announce(screen: Screen, lefts: list[LeftOut], wanted: Plan, seeds: int) -> None:
    possible = [f"#{left.number}" for left in lefts if left.source is not None]
    for left in lefts:
        if left.source is None:
            screen.say(f"#{left.number} cannot be left out: {left.reason}")
    if not possible:
        return
    there = seeds * (1 + len(possible)) - len(wanted.runs)
    shared = f" ({there} are there already)" if there and wanted.runs else ""
    takes = f", about {roughly(wanted.seconds)}" if wanted.runs else ": all is measured"
    each = ", each in its turn" if len(possible) > 1 else ""
    screen.say(
        f"#{lefts[0].winner} with and without {', '.join(possible)}{each}, on {plural(seeds, 'fresh seed')}: "
        f"{plural(len(wanted.runs), 'run')} to go{shared}{takes}"
    )


def _told(screen: Screen, lab: Lab, lefts: list[LeftOut], done: Done, asked: Asked) -> int:
    asked_for = {(left.number, left.winner) for left in lefts}
    found = [w for of_one in withouts(lab).values() for w in of_one if (w.number, w.winner) in asked_for]
    screen.line({
        "event": "end", "lab": places.about(lab), "measured": done.measured, "left": done.left, "reason": done.reason,
        "signal": asked.name or None, "ablations": [to_json(w) for w in found],
    })  # fmt: skip
    for w in found:
        if w.possible:
            screen.say(f"#{w.number} {line(w)}")
    if rest := unfinished(done.left, asked.name or done.reason, "the same command tries again"):
        screen.say(rest)
    for w in found:
        if idle(w):
            screen.say(f"to try the best without #{w.number}, in the lab:")
            for command in advice(w.number):
                screen.say(f"  {command}")
    screen.say("the whole picture: autoresearch report")
    return asked.status


# --- for every verb ----------------------------------------------------------------------------


def withouts(lab: Lab) -> dict[int, list[Without]]:
    """By experiment, what the bests of the lab are without its change, oldest first."""
    ablations = lab.ledger.ablations()
    if not ablations:
        return {}
    known = Known.of(lab.ledger.experiments(), lab.ledger.all_samples())
    spread = effects.spread_of(known.samples, next(iter(known.kept), None), ablations=ablations)
    found: dict[int, list[Without]] = {}
    for a in ablations:
        found.setdefault(a.number, []).append(ablation.judge(a, known, spread, lab.settings.min_delta))
    return found


def idle(w: Without) -> bool:
    """Does the best do without the change?"""
    return w.stands and w.effect is not None and w.state == "not replicated"


def advice(number: int) -> tuple[str, str]:
    """Commands, one after the other. They have to work in PowerShell 5.1 too, which has no `&&` and writes UTF-16."""
    return (
        f"autoresearch best --source --without {number} --out train.py",
        f'autoresearch try -m "without #{number}"',
    )


def line(w: Without) -> str:
    """'left out of the best (#12): +0.0012 ± 0.0004 (95 %, 4 and 4 runs): still pays'."""
    place = f"left out of {'the best (' if w.stands else ''}#{w.winner}{')' if w.stands else ''}"
    if w.effect is None:
        return f"{place}: {says(w)}" if w.possible else f"{says(w)}, for #{w.winner}"
    return f"{place}: {amount(w.effect)}{_runs(w.effect)}: {says(w)}"


def amount(found: effects.Effect) -> str:
    """'+0.0012 ± 0.0004': by what val_bpb grows when the change is left out, so above zero it pays."""
    half = half_width(found)
    return signed(found.gain) + ("" if half is None else f" ± {half:.4f}")


def half_width(found: effects.Effect) -> float | None:
    return None if found.high is None else found.high - found.gain


def _runs(found: effects.Effect) -> str:
    interval = "" if found.high is None else "95 %, "
    return f" ({interval}{found.runs_before} and {found.runs_after} runs)"


def says(w: Without) -> str:
    """'still pays', 'no longer pays: a later change does the same now', 'cannot be left out: #7 builds on it', ..."""
    if not w.possible:
        return f"cannot be left out: {w.reason}"
    if w.effect is None:
        return f"the recipe without it fails: {w.reason}" if w.reason else "not measured yet"
    failed = f" (a further seed failed: {w.reason})" if w.reason else ""
    return _verdict(w, w.effect) + failed


def _verdict(w: Without, there: effects.Effect) -> str:
    shorter = w.status == "simplify"
    if w.state == "replicated":
        return "still costs little" if shorter else "still pays"
    if w.state == "open":
        return "not settled"
    if shorter:
        return "costs too much by now"
    plain = "no longer pays" if w.before == "replicated" else "does not pay"
    if not w.replaced:
        return plain
    return (
        f"{plain}: {'beside later changes it harms' if (there.high or 0.0) < 0 else 'a later change does the same now'}"
    )


def to_json(w: Without) -> dict[str, Any]:
    """`change`: of val_bpb when it is left out; above zero it pays."""
    e = w.effect
    return {
        "number": w.number, "left_out_of": w.winner, "is_best": w.stands, "possible": w.possible,
        "reason": w.reason or None, "same_recipe_as": w.twin, "change": e and e.gain, "low": e and e.low,
        "high": e and e.high, "runs_without": e and e.runs_before, "runs_with": e and e.runs_after,
        "state": w.state if w.possible else None, "says": says(w),
    }  # fmt: skip
