"""status, log, best, show, diff: what the ledger and the running experiment say."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console import ablations, places, tables
from console.output import Screen, plain
from console.rows import Row, row, rows
from console.words import bpb, clock, count, delta, duration, moment, plural
from core.commands import quoted
from core.errors import UserError
from core.files import replace_file

if TYPE_CHECKING:
    from core.lab import Lab

POLL = 0.5  # seconds between two looks of --follow
STALE = 10.0  # seconds without a sign of life after which a live state counts as old


# --- log ---------------------------------------------------------------------------------------


def log_verb(screen: Screen, given: str | None, follow: bool, limit: int | None, kept: bool) -> None:
    lab = places.find(screen, given)
    if follow:
        _follow(screen, lab, limit, kept)
        return
    view = places.look(lab)
    chosen = _chosen(view.rows, limit, kept)
    screen.document(
        {"lab": places.about(lab), "experiments": _with_ablations(lab, chosen), "total": view.total.to_json(),
         "spent": asdict(lab.ledger.spent())}
    )  # fmt: skip
    if not view.rows:
        screen.say(f"No experiment yet. Next: {places.command('run', lab)}")
        return
    screen.show(tables.log_table(chosen, view.scale, screen))
    screen.say(tables.tally_line(view.total))
    if cost := tables.cost_line(lab.ledger.spent()):
        screen.say(f"spent on researchers: {cost}")
    if uses := tables.uses_line(view.total):
        screen.say(uses)
    if other := tables.other_rule_line(chosen):
        screen.say(other)
    if any(r.tainted for r in chosen):
        screen.say(tables.TAINTED)
    for r in chosen:
        if r.cut_off:
            screen.say(f"#{r.number} was interrupted: {_goes_on(r)} ({places.command('run', lab)})")


def _with_ablations(lab: Lab, chosen: list[Row], full: bool = False) -> list[dict[str, Any]]:
    """Of each experiment also what the bests were without its change."""
    known = ablations.withouts(lab)
    return [{**r.to_json(full), "ablations": list(map(ablations.to_json, known.get(r.number, ())))} for r in chosen]


def _chosen(all_rows: list[Row], limit: int | None, kept: bool) -> list[Row]:
    chosen = [r for r in all_rows if r.kept or not kept]
    return chosen[-limit:] if limit else chosen


def _follow(screen: Screen, lab: Lab, limit: int | None, kept: bool) -> None:
    """One line for each verdict, as they come, until Ctrl-C."""
    screen.say(str(places.scale(lab)))
    seen: set[int] = set()
    events = 0
    first = True
    while True:
        now = [r for r in rows(lab.ledger.experiments()) if r.decided]
        fresh = [r for r in now if r.number not in seen]
        seen.update(r.number for r in fresh)
        for r in _chosen(fresh, limit if first else None, kept):
            best = min([b.val_bpb for b in now if b.kept and b.val_bpb and b.number <= r.number], default=None)
            screen.line({"event": "experiment", **r.to_json()})
            screen.say(tables.summary_line(r, best))
        for event in lab.ledger.events(events):
            events = event.id
            if not first:
                screen.line({"event": event.kind, "number": event.number, "text": event.text, "time": event.created})
                screen.say(f"     {event.kind}: {event.text}")
        first = False
        time.sleep(POLL)


# --- status ------------------------------------------------------------------------------------


def running_state(lab: Lab) -> dict[str, Any] | None:
    """What the lab's running process says of itself; None where none runs."""
    from core import live

    pid = places.holder(lab)
    if pid is None:
        return None
    state = live.read(lab.record)
    return {**state, "pid": pid, "age": time.time() - float(state.get("updated") or 0.0)}


def status_verb(screen: Screen, given: str | None) -> None:
    lab = places.find(screen, given)
    view = places.look(lab)
    state = running_state(lab)
    kept = [r for r in view.rows if r.kept]
    screen.document({
        "lab": places.about(lab), "running": state, "total": view.total.to_json(),
        "best": view.best and view.best.to_json(), "last_keep": kept[-1].to_json() if kept else None,
        "pending": [r.to_json() for r in view.rows if not r.decided],
        "verdict": _verdict(lab),
    })  # fmt: skip
    if screen.as_json:
        return
    screen.say(_running_line(state))
    for line in _progress_lines(state, screen):
        screen.say(line)
    for r in view.rows:
        if r.cut_off:
            screen.say(f"interrupted  #{r.number}  {r.description}: {_goes_on(r)}")
    done = tables.tally_line(view.total) if view.total.experiments else "none yet: the first is the baseline"
    screen.say(f"experiments  {done}")
    if view.best:
        screen.say(f"best         {bpb(view.best.val_bpb)}  #{view.best.number}  {view.best.description}")
        screen.say(f"             ({view.scale})")
    if len(kept) > 1:  # the first is the baseline
        last = kept[-1]
        screen.say(
            f"last keep    #{last.number} at {clock(moment(last.finished))}  {delta(last.delta)}  {last.description}"
        )
    screen.say(f"verdict      {_verdict_line(_verdict(lab))}")
    if state is None:
        first = "" if view.total.experiments else "   (the baseline first)"
        screen.say(f"next         {places.command('run', lab)}{first}")


def _goes_on(r: Row) -> str:
    """What the next start does with one that was cut off."""
    return "the next run repeats it" if r.status == "running" else "it is measured, and the next run decides it"


def _verdict(lab: Lab) -> dict[str, Any]:
    """The rule, and what it knows: the noise, how many runs were made, and since when they can be compared."""
    from core.runs import Runs

    samples = lab.ledger.all_samples()
    found: dict[str, Any] = {"rule": lab.settings.verdict, "runs": len(samples), "epoch": lab.ledger.epoch()}
    if lab.settings.verdict == "statistical" and samples:
        found["noise"] = asdict(Runs(samples, found["epoch"], samples[-1].versions).noise())
        best = lab.best()
        found["runs_of_the_best"] = len(lab.best_samples()) if best else 0
    return found


def _verdict_line(found: dict[str, Any]) -> str:
    """'statistical; noise 0.0032 (12 degrees of freedom); 31 runs, 7 of the best; the machine has moved once'."""
    parts = [found["rule"]]
    if noise := found.get("noise"):
        known = f"noise {noise['sd']:.4f} between seeds ({noise['df']:g} degrees of freedom)"
        if noise["repeat_df"]:
            known += f", {noise['repeat_sd']:.4f} between two runs of one ({plural(noise['repeat_df'], 'repeat')})"
        parts += [known if noise["df"] else "noise not known yet", f"{plural(found['runs'], 'run')}"]
        parts[-1] += f", {found['runs_of_the_best']} of the best" if found["runs_of_the_best"] else ""
    if found["epoch"]:
        parts.append(f"what is measured with has changed {plural(found['epoch'], 'time')}")
    return "; ".join(parts)


def _running_line(state: dict[str, Any] | None) -> str:
    if state is None:
        return "running      no"
    since = state.get("since")
    started = f", since {clock(datetime.fromtimestamp(since).astimezone())}" if isinstance(since, int | float) else ""
    quiet = f", silent for {duration(state['age'])}" if state["age"] > STALE and state.get("updated") else ""
    doing = state.get("state") or "yes"
    pending = "; pauses after the run under way" if state.get("pause_asked") and doing != "paused" else ""
    return f"running      {doing} (process {state['pid']}{started}{quiet}){pending}"


def _progress_lines(state: dict[str, Any] | None, screen: Screen) -> list[str]:
    if not state or state.get("number") is None:
        return []
    lines = [f"experiment   #{state['number']}  {state.get('description') or ''}"]
    parts = progress_parts(state)
    if parts:
        lines.append("             " + ", ".join(parts))
    return lines


RATES = ("tokens_per_second", "mfu")


def progress_parts(state: dict[str, Any], only: Collection[str] = ()) -> list[str]:
    """'training', 'step 410', 'loss 4.312', ... of a live state or a progress event; `only`: of these fields."""
    mfu, rate, loss, left = (state.get(name) for name in ("mfu", "tokens_per_second", "loss", "remaining"))
    parts = {
        "phase": str(state["phase"]) if state.get("phase") else "",
        "step": f"step {state['step']}" if state.get("step") is not None else "",
        "loss": f"loss {loss:.3f}" if isinstance(loss, float) else "",
        "tokens_per_second": f"{count(rate)} tokens/s" if rate else "",
        "mfu": f"MFU {100 * mfu:.2g} %" if mfu else "",
        "remaining": f"{duration(left)} left" if isinstance(left, int | float) else "",
    }
    return [part for name, part in parts.items() if part and (not only or name in only)]


# --- best, show, diff --------------------------------------------------------------------------


def best_verb(
    screen: Screen, given: str | None, source: bool, without: int | None = None, out: Path | None = None
) -> None:
    """`without`: of the source, that without this kept change; `out`: the file that it is written to."""
    if without is not None and not source:
        raise UserError("--without is for the source of the best", f"autoresearch best --source --without {without}")
    if out is not None and not source:
        raise UserError("--out is for the source of the best", f"autoresearch best --source --out {quoted(out)}")
    quiet = Screen(True) if source and not screen.as_json else screen
    lab = places.find(quiet, given)
    view = places.look(lab)
    if view.best is None and out is None:  # a file can get the recipe that the lab begins with
        raise UserError(
            f"lab {lab.tag} has no best yet: {plural(view.total.experiments, 'experiment')}", places.command("run", lab)
        )
    recipe = lab.best_source() if without is None else _source_without(lab, without)
    aside = _write(lab, out, recipe) if out is not None else ""
    text = recipe.decode("utf-8", "replace")
    if source and not screen.as_json:
        print(text if out is None else plain(f"written to {out}\n"), end="")
        if aside:
            print(plain(f"what lay there was never judged, and is kept: {aside}"))
        return
    path = [r for r in view.rows if r.kept]
    screen.document({
        "lab": places.about(lab), "best": view.best and view.best.to_json(full=True),
        "kept": [r.to_json() for r in path], "source": text if source else None, "set_aside": aside or None,
    })  # fmt: skip
    if view.best is None:
        return
    for line in tables.card(view.best, view.scale, screen):
        screen.say(line)
    screen.say("how it got there:")
    for r in path:
        screen.say(f"  #{r.number:<4} {bpb(r.val_bpb)}  {delta(r.delta):<8} {r.description}")


def _write(lab: Lab, file: Path, recipe: bytes) -> str:
    """Byte for byte, which a shell's `>` does not do everywhere. Not over what could not be had again: a `train.py` of
    the lab that was never judged is saved first, and the command that prints it is returned."""
    aside = ""
    try:
        present = file.read_bytes() if file.exists() else None
        if present is not None and present != recipe:
            if file.resolve() == (lab.path / "train.py").resolve():
                aside = lab.set_aside(present)
            elif not lab.ledger.knows_source(hashlib.sha256(present).hexdigest()):
                raise UserError(
                    f"{file} holds what was never judged, and would be lost", "name another file, or move it"
                )
        replace_file(file, recipe)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}", "name another file") from None
    return aside


def _source_without(lab: Lab, number: int) -> bytes:
    from core import ablation

    left = ablation.leave_out(lab, *ablation.choose(lab, number))
    if left.source is None:
        raise UserError(f"#{number} cannot be left out: {left.reason}", f"autoresearch diff {number}")
    return left.source


def show_verb(screen: Screen, given: str | None, number: int) -> None:
    from console import again

    lab = places.find(screen, given)
    runs = places.holder(lab) is not None
    found = row(lab.ledger.get(number), lab.ledger.samples(number), runs)
    spent, measured = lab.ledger.spent(number), again.again(lab, number)
    screen.document({
        "lab": places.about(lab), "experiment": _with_ablations(lab, [found], full=True)[0], "diff": lab.diff(number),
        "again": again.to_json(measured) if measured else None, "spent": asdict(spent),
    })  # fmt: skip
    if screen.as_json:
        return
    for line in tables.card(found, places.scale(lab), screen):
        screen.say(line)
    if measured:
        screen.say(f"  {again.line(measured)}")
    for w in ablations.withouts(lab).get(number, ()):
        screen.say(f"  {ablations.line(w)}")
    if cost := tables.cost_line(spent):
        screen.say(f"  proposal  {cost}")
    screen.say(f"  autoresearch diff {number}   shows what it changed")


def diff_verb(screen: Screen, given: str | None, number: int) -> None:
    lab = places.find(screen, given)
    lab.ledger.get(number)  # a clear error for a number that is not there
    text = lab.diff(number)
    screen.document({"lab": places.about(lab), "number": number, "diff": text})
    if screen.as_json:
        return
    if not text.strip():
        screen.say(
            f"#{number} changed nothing: it is the recipe that the lab began with" if number == 1 else "no difference"
        )
        return
    for line in text.splitlines():
        style = "green" if line.startswith("+") else "dark_orange3" if line.startswith("-") else None
        screen.say(line, style if screen.interactive else None, wrap=False)
