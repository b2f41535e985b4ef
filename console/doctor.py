"""doctor: what is right and wrong with this machine, and a report of it without anything private."""

from __future__ import annotations

import os
import shutil
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
    checks = [*doctor.checks(machine, backend), *_walls(), *_researchers()]
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


def _researchers() -> list[Check]:
    """Who could be asked for proposals from here; `search` always can, so that none of the others is needed."""
    from core.commands import setting
    from core.doctor import Check
    from researchers.agents import AGENTS

    keys = AGENTS["claude-code"].keys
    key = next((name for name in keys if os.environ.get(name)), None)
    fact = f"{key} is set (whether it is accepted was not asked)" if key else f"{keys[0]} is not set"
    found = [Check("researcher claude", True if key else None, fact, f"to use it: {setting(keys[0], '...')}")]
    for agent in AGENTS.values():
        program = agent.command.split()[0]
        there = shutil.which(program)
        if there or agent.name == "claude-code":  # the others are worth a line only where somebody has them
            fact = f"`{program}` is {there} (its login was not tried)" if there else f"`{program}` is not on the PATH"
            action = f"to use it: {agent.install}, and {agent.login}"
            found.append(Check(f"researcher {agent.name}", True if there else None, fact, action))
    return found


def _show(screen: Screen, checks: Sequence[Check]) -> None:
    wide = max(len(check.name) for check in checks)
    for check in checks:
        screen.say(f"{WORDS[check.ok]}  {check.name:<{wide}}  {check.detail}")
        if check.action and check.ok is not True:
            screen.say(f"      {'':<{wide}}  -> {check.action}")
    counts = {word: sum(WORDS[c.ok] == word for c in checks) for word in WORDS.values()}
    screen.say(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['note']} worth knowing")
    screen.say("next: do what stands at the arrows after FAIL" if counts["FAIL"] else "next: autoresearch run --demo")
