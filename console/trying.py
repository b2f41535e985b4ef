"""try and wait: one experiment by hand, judged by a process that outlives whoever asked for it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console import places, tables
from console.looking import progress_parts, running_state
from console.output import Screen
from console.rows import Row, row
from console.words import bpb, duration
from core.apart import apart
from core.errors import Busy, UserError
from core.ledger import BY_HAND

if TYPE_CHECKING:
    from core.lab import Lab
    from core.ledger import Experiment

FINISHES_WITHIN = 10.0  # seconds from a decision to the files that follow it
POLL = 0.3  # seconds between two looks at the ledger
STARTS_WITHIN = 20.0  # seconds in which the judging process must have taken the lab
IDLE = 2.0  # seconds without a running process after which one is started
REFUSED = "refused edit"  # in the ledger: the file that does not fit the best, and the best, as they were told last
STILL_RUNNING = 124  # exit status, as of timeout(1)


def try_verb(screen: Screen, given: str | None, message: str, wait: bool, timeout: float | None) -> int:
    if not message.strip():
        raise UserError("the message is empty", 'say in one line what was changed and why: -m "..."')
    lab = places.find(screen, given)
    source = lab.working_source()
    known = _known(lab, source)
    if known is not None and known.status is not None:
        return _told(screen, lab, row(known), again=True)
    number = known.number if known else _propose(screen, lab, source, message)
    judged = _is_judged(lab)
    if not judged:
        _spawn(lab, number)
    state = running_state(lab) or {}
    if state.get("number") not in (None, number):
        screen.say(f"#{state['number']} is running; #{number} comes next")
    if not wait:
        screen.document({"lab": places.about(lab), "number": number, "state": lab.ledger.get(number).state,
                         "parent": lab.ledger.get(number).parent})  # fmt: skip
        screen.say(f"#{number} is being judged; see: autoresearch wait {number}")
        return 0
    if known is not None:
        already = "is being judged already" if judged else "was handed in before, and is judged now"
        screen.say(f"#{number} {already}; waiting for it")
    try:
        return _wait(screen, lab, number, timeout)
    except KeyboardInterrupt:
        screen.say(f"#{number} goes on by itself; see: autoresearch wait {number}")
        raise


def wait_verb(screen: Screen, given: str | None, number: int, timeout: float | None) -> int:
    lab = places.find(screen, given)
    lab.ledger.get(number)
    return _wait(screen, lab, number, timeout)


def judge(path: str, number: int) -> int:
    """What the detached process does, also for what is handed in meanwhile. Ends quietly where another one does it."""
    from console.signals import ends
    from core.executor import LocalExecutor
    from core.lab import Lab
    from core.loop import Loop

    lab = Lab.open(Path(path))
    wanted: int | None = number
    busy = 0
    while wanted is not None:
        loop = Loop(lab, None, LocalExecutor(), lambda event: None)
        try:
            with ends(loop.stop) as asked:
                if loop.judge_pending(wanted).status is None:
                    return asked.status  # stopped: it waits for the next start
        except Busy:
            if running_state(lab) is not None:
                return 0  # whoever holds the lab takes what waits first
            busy += 1
            if busy > 3:  # the device is another lab's; a single time may be somebody who just looked at the lock
                raise
            time.sleep(0.2)
        wanted = next((e.number for e in lab.ledger.pending() if e.researcher == BY_HAND or e.number == number), None)
    return 0


def _known(lab: Lab, source: bytes) -> Experiment | None:
    """The experiment that this very file is: waiting, running or judged. The last one, where it was judged twice."""
    same = lab.ledger.of_source(hashlib.sha256(source).hexdigest())
    return next((e for e in same if e.status is None), same[-1] if same else None)


def _is_judged(lab: Lab) -> bool:
    return running_state(lab) is not None


def _propose(screen: Screen, lab: Lab, source: bytes, message: str) -> int:
    from core import guard
    from core.recipe import fingerprint

    guard.require(source)
    return lab.ledger.propose(
        source=source,
        program=lab.program(),
        fingerprint=fingerprint(source),
        description=" ".join(message.split()),
        researcher=BY_HAND,
        parent=_made_to(screen, lab, source),
    )


def _made_to(screen: Screen, lab: Lab, source: bytes) -> int | None:
    """The number of the best that train.py is an edit of; None before there is one. Raises `UserError`, once for each
    file, where that is not the best any more and the edit does not fit the one that is."""
    from core import rebase
    from core.executor import LocalExecutor

    best, base = lab.best(), rebase.began_from(lab, source)
    if best is None or base is None:
        return None
    handed_in = [hashlib.sha256(source).hexdigest(), best.number]
    if base.number != best.number and lab.ledger.meta(REFUSED) == handed_in:
        screen.say(f"train.py is judged as it is written, as a change of #{best.number}")
        return best.number
    if base.number != best.number:
        found = rebase.onto(lab, base.number, source, best, LocalExecutor().lint)
        if found.source is None:
            lab.ledger.set_meta(REFUSED, handed_in)
            raise UserError(
                f"train.py is no change of the best: {found.refused}",
                "make its change to what `autoresearch best --source` prints; the same file handed in again is judged "
                "as it is written",
            )
        screen.say(f"train.py was edited from #{base.number}; #{best.number} is the best now: the edit is made to that")
    elif (older := rebase.takes_back(lab, source)) is not None:
        screen.say(
            f"train.py is nearer to #{older.number} than to the best, #{best.number}: it takes back what was kept "
            "since, and is judged as it is written"
        )
    return base.number


def _spawn(lab: Lab, number: int) -> None:
    """Start the judging process in a session of its own, and wait until it has the lab."""
    log = lab.record / "logs" / "judge.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    cli = Path(__file__).resolve().parent.parent / "cli.py"
    argv = [sys.executable, str(cli), "_judge", str(lab.path), str(number)]
    with log.open("wb") as output:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **apart())
    give_up = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < give_up:
        if _is_judged(lab) or lab.ledger.get(number).status is not None:
            return
        if child.poll() is not None:
            tail = log.read_text(errors="replace").strip().splitlines()
            raise UserError(f"experiment {number} could not be started: {tail[-1] if tail else 'no reason given'}",
                            f"`autoresearch try` again; the log is {log}")  # fmt: skip
        time.sleep(0.05)
    raise UserError(f"experiment {number} did not start within {duration(STARTS_WITHIN)}", f"see {log}")


def _wait(screen: Screen, lab: Lab, number: int, timeout: float | None) -> int:
    give_up = time.monotonic() + timeout if timeout is not None else None
    idle_since: float | None = None
    shown = ""
    while True:
        found = lab.ledger.get(number)
        if found.status is not None:
            _let_it_finish(lab, number)
            return _told(screen, lab, row(found), again=False)
        state = running_state(lab)
        if state is None and idle_since is None:
            idle_since = time.monotonic()
        if state is not None:
            idle_since = None
            shown = _phase(screen, state, number, shown)
        elif time.monotonic() - (idle_since or 0.0) > IDLE:
            if found.researcher != BY_HAND:
                raise UserError(f"experiment {number} waits and nothing runs it", places.command("run", lab))
            _spawn(lab, number)  # whoever judged it was ended
            idle_since = None
        if give_up is not None and time.monotonic() >= give_up:
            return _unfinished(screen, lab, found, state)
        time.sleep(POLL)


def _let_it_finish(lab: Lab, number: int) -> None:
    """The lab's files follow the decision: whoever is told of it must find the best's train.py there."""
    give_up = time.monotonic() + FINISHES_WITHIN
    while time.monotonic() < give_up and (running_state(lab) or {}).get("number") == number:
        time.sleep(POLL)


def _phase(screen: Screen, state: dict[str, Any], number: int, shown: str) -> str:
    """Say it when the phase changes: a handful of lines in all."""
    other = state.get("number")
    phase = str(state.get("phase") or "") if other == number else f"waits for #{other}" if other else ""
    if phase and phase != shown:
        screen.say(f"#{number} {phase}")
    return phase or shown


def _unfinished(screen: Screen, lab: Lab, found: Experiment, state: dict[str, Any] | None) -> int:
    other = (state or {}).get("number")
    parts = ", ".join(progress_parts(state or {}))
    screen.document({
        "lab": places.about(lab), "experiment": row(found).to_json(), "running": state,
        "waits_for": None if other == found.number else other,
    })  # fmt: skip
    doing = (
        "waits" if other is None else "still runs" if other == found.number else f"waits for #{other}, which still runs"
    )
    screen.say(f"#{found.number} {doing}{parts and f': {parts}'}; see: autoresearch wait {found.number}")
    return STILL_RUNNING


def _told(screen: Screen, lab: Lab, found: Row, again: bool) -> int:
    """The verdict, in a few lines; for a failure also what it last printed."""
    best = lab.best()
    screen.document({"lab": places.about(lab), "experiment": found.to_json(full=True), "judged_before": again,
                     "best": {"number": best.number, "val_bpb": best.val_bpb} if best else None})  # fmt: skip
    if screen.as_json:
        return 1 if found.failed else 0
    if again:
        same = best is not None and best.number == found.number
        screen.say("train.py is the best as it stands: change it first" if same else "this file was judged before:")
    screen.say(tables.summary_line(found, best.val_bpb if best else None))
    if found.val_bpb is not None:
        screen.say(f"  {found.reason or bpb(found.val_bpb)} ({places.scale(lab)})")
    if found.failed:
        tail = (found.outcome.get("log_tail") or "").strip().splitlines()
        for line in tail[-6:]:
            screen.say(f"  | {line[:110]}")
    if line := tables.reapplied_line(found):
        screen.say(f"  {line}")
    if not again:
        says = "kept: train.py is committed and is the best now" if found.kept else "train.py is the best again"
        screen.say(f"  {says}; `autoresearch show {found.number}` tells all")
    return 1 if found.failed else 0
