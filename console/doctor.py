"""doctor: what is right and wrong with this machine, and a report of it without anything private."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from console.output import Screen

if TYPE_CHECKING:
    from core.doctor import Check

WORDS = {True: "PASS", False: "FAIL", None: "note"}


def doctor_verb(screen: Screen, backend: str | None, bundle: bool) -> int:
    from core import doctor, hardware

    machine = hardware.probe()
    screen.say(machine.summary())
    checks = [*doctor.checks(machine, backend), *_walls()]
    failed = [check for check in checks if check.ok is False]
    written = None
    if bundle:
        name = f"autoresearch-doctor-{time.strftime('%Y%m%d-%H%M%S')}.md"
        written = doctor.bundle(Path.cwd() / name, machine, checks)
    screen.document({
        "ok": not failed, "machine": machine.to_dict(), "bundle": str(written) if written else None,
        "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail, "action": c.action} for c in checks],
    })  # fmt: skip
    _show(screen, checks)
    if written:
        screen.say(f"report for an issue, without names, keys and addresses of yours: {written.name}")
        screen.say("read it before you send it")
    return 1 if failed else 0


def _walls() -> list[Check]:
    """What the sandbox really stops here."""
    from core.doctor import Check
    from core.sandbox import self_check

    return [Check(c.name, c.ok, c.detail, getattr(c, "action", "")) for c in self_check()]


def _show(screen: Screen, checks: Sequence[Check]) -> None:
    wide = max(len(check.name) for check in checks)
    for check in checks:
        screen.say(f"{WORDS[check.ok]}  {check.name:<{wide}}  {check.detail}")
        if check.action and check.ok is not True:
            screen.say(f"      {'':<{wide}}  -> {check.action}")
    counts = {word: sum(WORDS[c.ok] == word for c in checks) for word in WORDS.values()}
    screen.say(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['note']} worth knowing")
    screen.say("next: do what stands at the arrows after FAIL" if counts["FAIL"] else "next: autoresearch run --demo")
