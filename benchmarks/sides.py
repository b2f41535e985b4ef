"""Asks one side in a process of its own, listens to it, and says in one line why it ended where it did."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import anonymous
from benchmarks.side import Order
from core.paths import project_root
from core.sandbox import preloaded

LIMIT = 900.0  # seconds of one task: what hangs must not hold up the others
CACHES = {  # where libraries keep what they compile: variable -> folder, so that the first repeat compiles anew
    "TMPDIR": "tmp",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
}

Told = Callable[[Mapping[str, Any]], None]


class SideFailed(Exception):
    """A side ended without an answer; the message is for people and holds no path and no name of a user."""


def ask(order: Order, caches: Path | None, told: Told, limit: float = LIMIT) -> dict[str, Any]:
    """The answer of `benchmarks.side`, with what it said of its device. Raises `SideFailed`.

    `caches`: where what is compiled is kept; None: the libraries' usual places, which may hold it already.
    """
    command = [sys.executable, "-m", "benchmarks.side", json.dumps(asdict(order))]
    environment = {**os.environ, **preloaded(order.backend), "PYTHONPATH": str(project_root())}
    folders = cache_folders(caches) if caches else {}
    return listen(command, environment | folders, project_root(), told, limit)


def cache_folders(caches: Path) -> dict[str, str]:
    made = {name: caches / folder for name, folder in CACHES.items()}
    for folder in made.values():
        folder.mkdir(parents=True, exist_ok=True)
    return {name: str(folder) for name, folder in made.items()}


def compiled(caches: Path, target: Path) -> Path | None:
    """What sides have compiled, as the referee's children keep it; None where that is nothing."""
    kept = {caches / "tmp" / "mlx": "mlx", **{caches / n: n for n in CACHES.values() if n != "tmp"}}
    for folder, name in kept.items():
        if folder.is_dir() and any(folder.iterdir()) and not (target / name).exists():
            shutil.copytree(folder, target / name)
    return target if target.is_dir() else None


def listen(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path, told: Told, limit: float
) -> dict[str, Any]:
    """Runs a process that prints JSON lines; its last, `answer`, with what `ready` said before. It never outlives
    this call."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command, env=dict(environment), cwd=cwd, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _end(process)

        def clear_up() -> None:
            """What it left running would hold the pipe open, and so us."""
            process.wait()
            _end(process)

        timer = threading.Timer(limit, expire)
        timer.start()
        threading.Thread(target=clear_up, daemon=True).start()
        try:
            found, last = _events(process, told)
            process.wait()
        finally:
            timer.cancel()
            _end(process)
        if "answer" in found:
            return {**found.get("ready", {}), **found["answer"]}
        errors.seek(0)
        raise SideFailed(_reason(process.returncode, expired.is_set(), limit, last, errors.read()))


def _events(process: subprocess.Popen[str], told: Told) -> tuple[dict[str, dict[str, Any]], str]:
    """The last event of each kind, and where it was when it ended."""
    found: dict[str, dict[str, Any]] = {}
    last = "while it started"
    assert process.stdout is not None  # a pipe was asked for
    for line in process.stdout:
        try:
            event = json.loads(line)
        except ValueError:  # a library that prints
            continue
        if not isinstance(event, dict) or "event" not in event:
            continue
        kind = event.pop("event")
        found[kind] = event
        last = f"after step {event['step']} of {event['of']}" if kind == "step" else f"after `{kind}`"
        told({"kind": kind, **event})
    return found, last


def _end(process: subprocess.Popen[str]) -> None:
    """The process and all that it started."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):  # gone, or a zombie's group (macOS)
        pass
    process.wait()


def _reason(code: int, expired: bool, limit: float, last: str, errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")
    if expired:
        how = f"ended after {limit:g} s"
    elif code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    else:
        how = f"ended with status {code}"
    return anonymous(f"{how} {last}" + (f": {said[:300]}" if said else ""))
