"""run: the loop with its banner, its live line and its end."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from console import places, tables
from console.awake import awake
from console.called import as_called
from console.display import Ticker, expected, finish_line
from console.looking import running_state
from console.making import Wishes, free_disk, make, passes_line
from console.notifying import Notifier, checked, notifying
from console.output import Screen
from console.rows import Row, row
from console.signals import Asked, ends
from console.words import below, bpb, clock, count, delta, duration, plural
from core.commands import quoted
from core.deadline import Deadline
from core.errors import Busy, LabError, UserError
from core.session import FINISHED

if TYPE_CHECKING:
    from core.lab import Lab
    from core.live import Event
    from core.loop import Loop

NOTIFY = "AUTORESEARCH_NOTIFY"  # the variable that stands in for --notify
DEMO_TAG = "demo"
DEMO_EXPERIMENTS = 7
VERDICTS = {
    "statistical": "statistical: kept is what several seeds show to be better than noise; the baseline runs 5",
    "simple": "simple: a candidate is kept if its single run scores lower, even by luck",
}
OVERHEAD = 15.0  # seconds outside training that are expected before any was measured
TYPICAL_RUNS = 2.5  # of a candidate, the best's own included, in simulated nights (docs/verdict.md)
ENOUGH_SEEN = 10  # candidates, whose own number of runs is believed


@dataclass(frozen=True)
class Limits:
    """When to stop: after so many more experiments, at the deadline, or not at all."""

    experiments: int | None
    deadline: Deadline | None


@dataclass(frozen=True)
class Again:
    """The command that goes on as this run would have, after an interruption. A lab knows what it was made from."""

    words: Sequence[str]  # from "run" on
    options: Mapping[str, Any]  # None: not given; True: a flag
    experiments: int | None
    deadline: Deadline | None
    counts_all: bool = False  # whether `experiments` are those of the lab, as with --demo, or more of them

    def spelled(self, decided: int = 0) -> str:
        """`decided`: in this run, so far. "" where nothing was left to do."""
        left = self.experiments if self.experiments is None or self.counts_all else self.experiments - decided
        if (left is not None and left <= 0) or (self.deadline is not None and self.deadline.left() <= 0):
            return ""
        options = {"experiments": left, "until": self.deadline and until_word(self.deadline.time()), **self.options}
        words = ["autoresearch", *self.words]
        for name, value in options.items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return as_called(" ".join(map(quoted, words)))


def until_word(deadline: float) -> str:
    """A Unix time as --until takes it: the time of day that comes next, else with its date. To the minute, and not
    before it, as a time of day that is just over would be tomorrow's."""
    minute = math.ceil(deadline / 60) * 60
    when = datetime.fromtimestamp(minute).astimezone()
    return f"{when:%H:%M}" if minute - time.time() < 86400 else f"{when:%Y-%m-%dT%H:%M}"


def run_verb(
    screen: Screen,
    given: str | None,
    *,
    experiments: int | None,
    hours: float | None,
    until: float | None,
    researcher: str,
    demo: bool,
    strict: bool,
    asking: Mapping[str, Any] | None = None,
    meanwhile: str | None = None,
    notify: str | None = None,
    **making: Any,
) -> int:
    """`asking`: options of the researcher, those that were given."""
    import researchers
    from core.sandbox import abilities

    lacks = abilities().missing
    if strict and lacks:
        raise UserError(
            f"the sandbox of this machine lacks {plural(len(lacks), 'thing')}: {'; '.join(lacks)}",
            "mend them (autoresearch doctor tells how), or run without --strict",
        )

    wishes = Wishes(**making)
    deadline = Deadline.after(hours) if hours is not None else None
    deadline = Deadline.at_time(until) if until is not None else deadline
    named, wanted = given, experiments
    if demo:
        given, wishes, experiments = _demo(given, wishes, experiments)
    who = researchers.make(researcher, **(asking or {}))  # an unknown name must not leave a lab behind
    stand_in = _stand_in(meanwhile, who)
    if notify is not None:
        checked(notify)
    lab = _lab(screen, given, wishes)
    words = ["run", *([named] if named else []), "--demo"] if demo else ["run", places.spelled(lab.path)]
    options = _options(researcher, asking or {}, meanwhile, notify, strict)
    again = Again(words, options, wanted, deadline, counts_all=demo)
    return _run(screen, lab, (who, stand_in), Limits(experiments, deadline), again, demo, notify)


def _options(
    researcher: str, asking: Mapping[str, Any], meanwhile: str | None, notify: str | None, strict: bool
) -> dict[str, Any]:
    """What the next run has to be given as this one was. The URL is a secret, so that its place is left for it."""
    return {
        "researcher": researcher if researcher != "search" else None,
        **asking,
        "meanwhile": meanwhile,
        "notify": "URL" if notify and notify != os.environ.get(NOTIFY) else None,  # else it is found there again
        "strict": strict or None,
    }


def _stand_in(name: str | None, who: Any) -> Any:
    """Who proposes while `who` cannot; None for nobody."""
    import researchers
    from core.contract import Team

    found = researchers.make(name) if name else None
    members = [m.name for m in who.members] if isinstance(who, Team) else [who.name]
    if found is not None and (isinstance(found, Team) or found.name in members):
        raise UserError(f"--meanwhile {name} cannot stand in for {who.name}", "name one other researcher, as search")
    return found


def _demo(given: str | None, wishes: Wishes, experiments: int | None) -> tuple[str, Wishes, int]:
    """The demo's lab and what it is made from. One that was cut off goes on; after a finished one comes demo-2."""
    if wishes.given():
        raise UserError(f"--demo chooses everything itself, and {wishes.given()[0]} was given", "leave one of them out")
    total = experiments or DEMO_EXPERIMENTS
    if given is None:
        number = 1
        while True:
            given = str(places.LABS / (DEMO_TAG if number == 1 else f"{DEMO_TAG}-{number}"))
            left = total - _decided(given)
            if left > 0:
                break
            number += 1
    else:
        left = total - _decided(given)
        if left <= 0:
            raise UserError(f"the demo in {given} is finished", f"autoresearch run {given}")
    return given, replace(wishes, profile=DEMO_TAG, verdict="simple"), left  # several seeds take longer than a demo


def _decided(given: str) -> int:
    """Decided experiments of the lab there; 0 where there is none."""
    found = places.find_or_none(given)
    return sum(e.status is not None for e in found[0].ledger.experiments()) if found else 0


def _lab(screen: Screen, given: str | None, wishes: Wishes) -> Lab:
    """The lab that is meant, made where it is not there."""
    found = places.find_or_none(given) if wishes.tag is None else None
    if found is not None and given is None and _is_demo(*found):
        screen.say("the last used lab is the demo; this run gets a lab of its own, fitted to this machine")
        found = None
    if found is None:
        _tell_new(screen, given, wishes)
        lab, _ = make(screen, given, wishes)
        screen.say(f"lab {lab.tag} (new): {places.spelled(lab.path)}")
        return lab
    lab, how = found
    _check_locked(lab, wishes)
    screen.say(f"lab {lab.tag} ({how}): {places.spelled(lab.path)}")
    return lab


def _tell_new(screen: Screen, given: str | None, wishes: Wishes) -> None:
    """A name that is not there makes a lab, which has to be told before the time that this takes, or is refused where
    it looks mistyped: nobody wants a night in the wrong lab. Raises `UserError`."""
    folder, tag = places.new_folder(given, wishes.tag)
    near = places.mistyped(folder) if given is not None and not wishes.given() else None
    if near is not None:
        where, meant = places.spelled(folder), places.spelled(folder.with_name(near))
        raise UserError(
            f"there is no lab {tag}; did you mean {near}?",
            f"`autoresearch run {quoted(meant)}`, or for a new one `autoresearch init {quoted(where)}` first",
        )
    others = places.beside(folder)
    here = f"; beside it: {', '.join(others[:6])}{' ...' if len(others) > 6 else ''}" if given and others else ""
    screen.say(f"makes a new lab {tag}: {places.spelled(folder)}{here}")


def _is_demo(lab: Lab, how: str) -> bool:
    """A night does not go on in the demo's lab, with its short budget, unless one names it or stands in it."""
    return lab.settings.profile == DEMO_TAG and how == "last used"


def _check_locked(lab: Lab, wishes: Wishes) -> None:
    """Settings are locked when a lab is made: asking for others is an error, not a silent no."""
    s = lab.settings
    same = {
        "--backend": wishes.backend == s.backend,
        "--profile": wishes.profile == s.profile,
        "--budget": wishes.budget == s.budget,
        "--vocab": wishes.vocab == s.vocab_size,
        "--verdict": wishes.verdict == s.verdict,
        "--min-delta": wishes.min_delta == s.min_delta,
        "--data": wishes.data in (s.data, s.data.rpartition("-v")[0]),
    }
    other = [option for option in wishes.given() if not same.get(option, False)]
    if other:
        now = f"{s.backend}, profile {s.profile}, {s.data}, {duration(s.budget)}, verdict {s.verdict}"
        raise UserError(
            f"lab {lab.tag} is locked to its settings ({now}), and {', '.join(other)} asks for others",
            "make another lab: give `run` the name of a new one, for example "
            f"`autoresearch run {places.free_tag(places.default_tag())} ...`",
        )


# --- the run -----------------------------------------------------------------------------------


def _run(
    screen: Screen, lab: Lab, who: tuple[Any, Any], limits: Limits, again: Again, demo: bool, notify: str | None
) -> int:
    """`who`: the researcher, and who stands in for it (None: nobody)."""
    from console.confirming import research
    from core.executor import LocalExecutor
    from core.loop import Loop
    from core.windows import warnings

    _must_be_free(lab)
    before = {e.number for e in lab.ledger.experiments() if e.status is not None}
    with awake() as sleep, Ticker(screen, events=True) as ticker, notifying(notify, lab.tag, _each(lab)) as notifier:
        loop = Loop(lab, who[0], LocalExecutor(), _Narrator(screen, ticker, lab, notifier), meanwhile=who[1])
        ticker.listen(*_keys(loop))
        with ends(loop.stop) as asked:
            _banner(screen, lab, " or else ".join(w.name for w in who if w), limits, sleep, again.spelled())
            for warning in warnings(lab.path, os.environ):
                screen.say(f"  warning: {warning}")
            _prices(screen, lab, [w for w in who if w])
            summary = research(screen, loop, limits.experiments, limits.deadline, ticker)
        lost = _tell_end(notifier, lab, before, asked, summary)
    if lost:
        screen.line({"event": "note", "text": lost})
        screen.say(lost)
    return _ending(screen, lab, before, asked, summary, demo, again)


def _keys(loop: Loop) -> tuple[Callable[[str], None], Callable[[bool], str]]:
    """What keys do in a terminal, and the words for it; `hint` is told whether something runs."""

    def on_key(key: str) -> None:
        if key == "p":
            loop.pause(not loop.is_paused)
        elif key == "q":
            loop.finish(not loop.is_finishing)

    def hint(runs: bool) -> str:
        if loop.is_finishing:
            return "ends after this run  [q] take that back" if runs else "ends"
        if loop.is_paused:
            return "pauses after this run  [p] take that back" if runs else "paused  [p] go on"
        return "[p] pause  [q] end, after this run" if runs else "[p] pause  [q] end"

    return on_key, hint


def _must_be_free(lab: Lab) -> None:
    """Before the banner: the loop refuses the same, but a banner followed by an error would mislead. Raises `Busy` of
    lab and device, `LabError` of a train.py that nobody handed in, `CardGone`."""
    from core import cardfaults, locks

    state, where = running_state(lab), quoted(places.spelled(lab.path))
    if state is not None:
        doing = f" with experiment {state['number']}" if state.get("number") else ""
        raise Busy(
            f"lab {lab.tag} is in use by process {state['pid']}{doing}",
            f"see `autoresearch status {where}`, or end it with `autoresearch stop {where}`",
        )
    locks.require_free(lab.settings.device)
    cards = [str(s.versions.get("card") or "") for s in lab.ledger.all_samples()]
    if lost := cardfaults.missing(lab.settings.device, next(filter(None, reversed(cards)), "")):
        raise lost
    if lab.is_dirty() and not lab.ledger.knows_source(hashlib.sha256(lab.working_source()).hexdigest()):
        raise LabError("train.py has changes that were not judged", lab.how_to_restore())


class _Narrator:
    """Events of the loop -> lines."""

    def __init__(self, screen: Screen, ticker: Ticker, lab: Lab, notifier: Notifier | None) -> None:
        self._screen, self._ticker, self._lab, self._notifier = screen, ticker, lab, notifier

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.kind == "start":
            seed = f" (with seed {data['seed']})" if "seed" in data else ""
            self._ticker.begin(f"#{data['number']}", f"{data.get('description', '')}{seed}")
            self._screen.line({"event": "start", **data})
        elif event.kind == "again":
            self._ticker.begin(f"#{data['number']} again", f"with seed {data['seed']}")
            self._screen.line({"event": "again", **data})
        elif event.kind == "decided":
            self._ticker.end()
            self._decided(int(data["number"]))
        elif event.kind in ("note", "waiting"):
            self._screen.line({"event": event.kind, **data})
            self._ticker.say(f"     {data.get('text', '')}")
            if event.kind == "waiting":
                self._ticker.wait("paused" if data.get("paused") else "waits")
        else:
            self._ticker.feed(event)

    def _decided(self, number: int) -> None:
        found = row(self._lab.ledger.get(number))
        best = self._lab.best()
        self._screen.line({"event": "experiment", **found.to_json(), "best": best and best.val_bpb})
        style = "bold green" if found.kept else None
        self._ticker.say(tables.summary_line(found, best.val_bpb if best else None), style)
        if self._notifier is not None:
            self._notifier.experiment(found)


def _each(lab: Lab) -> float:
    """Seconds that an experiment takes, all of its runs, roughly."""
    known = [r.device_seconds for r in places.look(lab).rows if r.device_seconds]
    return max(known, default=lab.settings.budget + OVERHEAD)


def _tell_end(notifier: Notifier | None, lab: Lab, before: set[int], asked: Asked, summary: Any) -> str:
    """Post the end of the run; what to say of posts that did not arrive."""
    if notifier is None:
        return ""
    view = places.look(lab)
    new = [r for r in view.rows if r.decided and r.number not in before]
    best = f"; best {bpb(view.best.val_bpb)} (#{view.best.number})" if view.best else ""
    why = f"stopped by {asked.name}" if asked.signal else _why(summary.reason)
    kept = sum(r.kept for r in new)
    data = {"experiments": len(new), "kept": kept, "best": view.best and view.best.to_json()}
    return notifier.end(f"{why}; {plural(len(new), 'experiment')}, {kept} kept{best}", data)


def _why(reason: str) -> str:
    return "ended by `autoresearch stop`" if reason == "stopped" else f"ended: {reason}"


def _runs_each(rule: str, seen: list[int]) -> float:
    """How many runs a candidate takes: as many as those of this lab, once that is told by enough of them."""
    if len(seen) >= ENOUGH_SEEN:
        return sum(seen) / len(seen)
    return TYPICAL_RUNS if rule == "statistical" else 1.0


def _banner(screen: Screen, lab: Lab, researcher: str, limits: Limits, sleep: str, again: str) -> None:
    from console.confirming import reserve, reserve_line
    from core.sandbox import abilities
    from core.verdict import Rule

    view = places.look(lab)
    s = lab.settings
    train = lab.dataset().part("train")
    measured = [r for r in view.rows if r.seconds and r.outcome.get("training_seconds")]
    each = expected(s.budget, [(r.seconds or 0.0) - r.outcome["training_seconds"] for r in measured], OVERHEAD)
    first = 0.0 if measured else each * (Rule().baseline_runs if s.verdict == "statistical" else 1)
    each *= _runs_each(s.verdict, [r.runs for r in measured if r.number > 1])
    kept_back = reserve(lab, limits.deadline)
    left = max(0.0, limits.deadline.left() - kept_back) if limits.deadline else None
    rates = [r.outcome["tokens"] / r.outcome["training_seconds"] for r in measured if r.outcome.get("tokens")]
    passes = passes_line(train.tokens, max(rates, default=None), s.budget)
    plan = finish_line(each, limits.experiments, left, first)
    latest = limits.deadline.time() if limits.deadline else None  # Unix time
    ends_at = f"; at {clock(datetime.fromtimestamp(latest).astimezone())} at the latest" if latest else ""
    screen.line({
        "event": "run", "lab": places.about(lab), "researcher": researcher, "experiments": limits.experiments,
        "deadline": latest, "seconds_each": each, "known": len(view.rows), "sleep": sleep,
        "again": again,
    })  # fmt: skip
    screen.say(f"  device      {s.device or s.backend}, {s.dtype} (backend {s.backend}, profile {s.profile})")
    screen.say(
        f"  data        {view.scale.data}, {count(train.tokens)} training tokens{'; ' + passes if passes else ''}"
    )
    screen.say(
        f"  budget      {duration(s.budget)} of training for each experiment, {s.sequence_len} tokens of context"
    )
    screen.say(f"  plan        {plan}{ends_at}; researcher {researcher}")
    screen.say(f"  verdict     {VERDICTS[s.verdict]}")
    if line := reserve_line(lab, limits.deadline):
        screen.say(f"  confirm     {line}")
    so_far = tables.tally_line(view.total) if view.total.experiments else "none yet: the first is the baseline"
    screen.say(f"  so far      {so_far}")
    screen.say(f"  disk        {free_disk(lab.record)} free at {lab.record.parent.parent}")
    for lack in abilities().missing:
        screen.say(f"  sandbox     lacks {lack}")
    screen.say(f"  sleep       {sleep}")
    screen.say(f"  to stop     Ctrl-C: ends at once, `{places.command('run', lab)}` continues")
    screen.say("              autoresearch pause | stop, from another terminal")
    screen.say(f"  val_bpb     validation bits per byte on {view.scale.data}: lower is better")


def _prices(screen: Screen, lab: Lab, who: list[Any]) -> None:
    """What paid researchers will cost, told before the first is asked."""
    for member in [member for one in who for member in getattr(one, "members", [one])]:
        if hasattr(member, "estimate"):
            said = member.estimate(lab.view({}))
            screen.line({"event": "estimate", "researcher": member.name, "text": said})
            screen.say(f"  cost        {said}")
    spent = tables.cost_line(lab.ledger.spent())
    if spent:
        screen.say(f"  so far      {spent}")


def _ending(screen: Screen, lab: Lab, before: set[int], asked: Asked, summary: Any, demo: bool, again: Again) -> int:
    view = places.look(lab)
    new = [r for r in view.rows if r.decided and r.number not in before]
    reason = getattr(summary, "reason", "") or ""
    goes_on = again.spelled(len(new)) if asked.signal or reason == FINISHED else ""
    screen.line({
        "event": "end", "reason": reason, "signal": asked.name or None, "new": len(new), "total": view.total.to_json(),
        "kept": [r.to_json() for r in new if r.kept], "again": goes_on or None,
    })  # fmt: skip
    if screen.as_json:
        return asked.status
    screen.say()
    if asked.signal:
        screen.say(f"stopped by {asked.name}; the experiment that was running is dropped and not counted")
    elif reason:
        screen.say(_why(reason))
    _kept(screen, view, new)
    spent = tables.cost_line(lab.ledger.spent())
    if spent:
        screen.say(spent)
    _next(screen, lab, view, goes_on, demo)
    return asked.status


def _kept(screen: Screen, view: places.Picture, new: list[Row]) -> None:
    baseline = view.total.baseline.number if view.total.baseline else None
    kept = [r for r in new if r.kept and r.number != baseline]
    now = replace(
        view.total, experiments=len(new), kept=len(kept), discarded=sum(r.status == "discard" for r in new),
        failed=sum(r.failed for r in new), undone=sum(r.undone for r in new), best=None,
        baseline=view.total.baseline if any(r.number == baseline for r in new) else None,
    )  # fmt: skip
    counts = f": {tables.counts_line(now)}" if new else ""
    screen.say(f"{plural(len(new), 'experiment')} in this run{counts}")
    for r in kept[-10:]:
        screen.say(f"  #{r.number:<4} {bpb(r.val_bpb)}  {delta(r.delta)}  {r.description}")
    if any(r.tainted for r in new):
        screen.say(tables.TAINTED)
    if view.best and view.total.baseline and view.total.gain:
        first, best = view.total.baseline, view.best
        came = f"{bpb(first.val_bpb)} -> {bpb(best.val_bpb)}"
        if first.epoch != best.epoch:  # the machine has moved: the two scores do not compare
            came = f"{bpb(best.val_bpb)}, {below(view.total.gain)}"
        screen.say(f"val_bpb {came} on {view.scale.conditions}")


def _next(screen: Screen, lab: Lab, view: places.Picture, again: str, demo: bool) -> None:
    """`again`: the command that goes on, after an interruption."""
    where = quoted(places.spelled(lab.path))
    commands: list[tuple[str, str]] = []
    if again:
        commands.append((again, "go on"))
    if view.best:
        commands.append((f"autoresearch log {where}", "everything that was tried"))
        if view.total.kept:
            commands.append((f"autoresearch diff {view.best.number} {where}", "what the best changed"))
        commands.append((f'autoresearch sample {where} --prompt "In the beginning"', "let it write"))
        commands.append((f"autoresearch report {where}", "the picture"))
    if demo:
        tag = places.free_tag(places.default_tag())
        commands.append((f"autoresearch run {tag} --hours 8", "a real night, fitted to this machine"))
    elif not again:
        commands.append((places.command("run", lab), "go on"))
    screen.say("next:")
    screen.commands(commands)
