"""doctor: what is right and wrong with this machine, and a report of it without anything private."""

from __future__ import annotations

import getpass
import json
import platform
import re
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from console.output import Screen

WORDS = {True: "PASS", False: "FAIL", None: "warn"}


@dataclass(frozen=True)
class Line:
    """One check. ok: True, False, or None for a lack that one can live with."""

    name: str
    ok: bool | None
    detail: str
    action: str = ""


def doctor_verb(screen: Screen, backend: str | None, bundle: bool) -> int:
    from core import hardware as machines

    machine = machines.probe()
    lines = gather(machine, backend)
    written = write_bundle(machine, lines) if bundle else None
    failed = [line for line in lines if line.ok is False]
    screen.document({
        "ok": not failed, "machine": machine.to_dict(), "bundle": str(written) if written else None,
        "checks": [{"name": x.name, "ok": x.ok, "detail": x.detail, "action": x.action} for x in lines],
    })  # fmt: skip
    show(screen, machine.summary(), lines)
    if written:
        screen.say(f"report for an issue, without names and paths of yours: {written} (read it before you send it)")
    return 1 if failed else 0


def gather(machine: Any, backend: str | None) -> list[Line]:
    """All checks, those of the hardware first."""
    from core import hardware as machines
    from core import sandbox

    lines: list[Line] = []
    for check in [*machines.checks(machine, backend), *sandbox.self_check()]:
        lines.append(Line(check.name, check.ok, check.detail, getattr(check, "action", "")))
    return lines


def show(screen: Screen, summary: str, lines: Sequence[Line]) -> None:
    if screen.as_json:
        return
    screen.say(summary)
    wide = max(len(line.name) for line in lines)
    for line in lines:
        screen.say(f"{WORDS[line.ok]}  {line.name:<{wide}}  {line.detail}")
        if line.action and line.ok is not True:
            screen.say(f"      {'':<{wide}}  -> {line.action}")
    counts = {word: sum(WORDS[x.ok] == word for x in lines) for word in WORDS.values()}
    screen.say(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['warn']} to know about")
    screen.say("next: autoresearch run --demo" if not counts["FAIL"] else "next: do what stands at the arrows above")


# --- the bundle --------------------------------------------------------------------------------


def redact(text: str) -> str:
    """Without the user's name, home, host name, addresses and anything that looks like a key."""
    secret = re.compile(
        r"(?i)\b(?:sk-[\w-]{8,}|hf_\w{8,}|gh[pousr]_\w{8,}|[A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD)=\S+)"
    )
    text = secret.sub("<secret>", text)
    text = re.sub(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", "<address>", text)
    for private, sign in _private():
        text = re.sub(rf"(?<![\w]){re.escape(private)}(?![\w])", sign, text)
    return text


def _private() -> list[tuple[str, str]]:
    from core.paths import home

    found = [(str(home()), "<autoresearch home>"), (str(Path.home()), "~"), (socket.gethostname(), "<host>")]
    try:
        found.append((getpass.getuser(), "<user>"))
    except (KeyError, OSError):
        pass
    return [(private, sign) for private, sign in found if len(private) > 2 and private != "root"]


def write_bundle(machine: Any, lines: Sequence[Line], folder: Path | None = None) -> Path:
    """One text file; nothing of labs, recipes or data is in it."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    packages = ("autoresearch", "torch", "mlx", "triton", "numpy", "tiktoken", "rustbpe", "click", "rich", "optuna")
    report = {
        "made": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": sys.version,
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in packages},
        "machine": machine.to_dict(),
        "checks": [{"name": x.name, "ok": x.ok, "detail": x.detail, "action": x.action} for x in lines],
    }
    path = (folder or Path.cwd()) / f"autoresearch-doctor-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(redact(json.dumps(report, indent=1, default=str)) + "\n", encoding="utf-8")
    return path
