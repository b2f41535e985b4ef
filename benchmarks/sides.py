"""One side in a process of its own: what it is asked, what it says, and in one line why it ended where it did.

A side prints JSON lines, each with an `event`. One that is asked a single thing ends after its `answer`; one that takes
turns (`task="turns"`) stays alive between them and waits for a line on its standard input.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import anonymous
from benchmarks.side import Order
from core import caches as compile_caches
from core.paths import project_root
from core.sandbox import preloaded

LIMIT = 900.0  # seconds of one task: what hangs must not hold up the others
OTHERS = {  # variable -> folder, of what core.caches does not name
    "TMPDIR": "tmp",
    "CUDA_CACHE_PATH": "cuda",
}
COMPILED = ("inductor", "triton", "cuda", "xdg")  # folders, as the referee's children have them

Told = Callable[[Mapping[str, Any]], None]


class SideFailed(Exception):
    """A side ended without an answer; the message is for people and holds no path and no name of a user."""


def ask(order: Order, caches: Path | None, told: Told, limit: float = LIMIT) -> dict[str, Any]:
    """The answer of `benchmarks.side`, with what it said of its device. Raises `SideFailed`.

    `caches`: where what is compiled is kept; None: the libraries' usual places, which may hold it already.
    """
    return listen(_command(order), _environment(order, caches), project_root(), told, limit)


def start(order: Order, caches: Path, told: Told) -> Side:
    """A side that takes turns. Raises `SideFailed` where it cannot be started."""
    return Side(_command(order), _environment(order, caches), project_root(), told)


def _command(order: Order) -> list[str]:
    return [sys.executable, "-m", "benchmarks.side", json.dumps(asdict(order))]


def _environment(order: Order, caches: Path | None) -> dict[str, str]:
    ours = {**os.environ, **preloaded(order.backend), "PYTHONPATH": str(project_root())}
    return ours | (cache_folders(caches) if caches else {})


def cache_folders(caches: Path) -> dict[str, str]:
    """Where libraries keep what they compile, so that the first repeat compiles anew and the referee's children find it
    again: all that counts in the keys of it is as it is for them."""
    made = {name: caches / folder for name, folder in OTHERS.items()}
    for folder in (*made.values(), *(caches / name for name in COMPILED)):
        folder.mkdir(parents=True, exist_ok=True)
    return compile_caches.environment(caches) | {name: str(folder) for name, folder in made.items()}


def compiled(caches: Path, target: Path) -> Path | None:
    """What sides have compiled, as the referee's children keep it; None where that is nothing."""
    kept = {caches / "tmp" / "mlx": "mlx", **{caches / n: n for n in COMPILED}}
    for folder, name in kept.items():
        if folder.is_dir() and any(folder.iterdir()) and not (target / name).exists():
            shutil.copytree(folder, target / name)
    return target if target.is_dir() else None


def listen(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path, told: Told, limit: float
) -> dict[str, Any]:
    """What a process answers that is asked one thing, with what `ready` said before. It never outlives this call."""
    side = Side(command, environment, cwd, told)
    try:
        answer = side.hear("answer", limit)
        return {**side.facts, **answer}
    finally:
        side.close()


class Side:
    """A process that prints JSON lines. It and all that it has started end with `close()`, which must be called."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], cwd: Path, told: Told) -> None:
        self.facts: dict[str, Any] = {}  # what `ready` said: device, dtype, dtype_reason
        self._told = told
        self._last = "while it started"
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see close()
        self._process = subprocess.Popen(
            command, env=dict(environment), cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._clear_up, daemon=True).start()

    def hear(self, kind: str, limit: float = LIMIT) -> dict[str, Any]:
        """What it says next under this name. Raises `SideFailed` where it ends before, or says nothing of it for
        `limit` seconds."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _end(self._process)

        timer = threading.Timer(limit, expire)
        timer.start()
        try:
            for said, event in self._events():
                if said == kind:
                    return event
            self._process.wait()
        finally:
            timer.cancel()
        self._errors.seek(0)
        reason = _reason(self._process.returncode, expired.is_set(), limit, self._last, self._errors.read())
        raise SideFailed(reason)

    def turn(self, steps: int, limit: float = LIMIT) -> dict[str, Any]:
        """Let it take one turn of so many timed steps."""
        assert self._process.stdin is not None  # a pipe was asked for
        try:
            self._process.stdin.write(json.dumps({"steps": steps}) + "\n")
            self._process.stdin.flush()
        except OSError:  # it has ended: `hear` says how
            pass
        return self.hear("turn", limit)

    def close(self) -> None:
        _end(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._errors.close()

    def _clear_up(self) -> None:
        """What it left running when it ended would hold the pipe open, and so us."""
        self._process.wait()
        _end(self._process)

    def _events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(kind, event), until it ends."""
        assert self._process.stdout is not None  # a pipe was asked for
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:  # a library that prints
                continue
            if not isinstance(event, dict) or "event" not in event:
                continue
            kind = event.pop("event")
            self._last = f"after step {event['step']} of {event['of']}" if kind == "step" else f"after `{kind}`"
            if kind == "ready":
                self.facts = event
            self._told({"kind": kind, **event})
            yield kind, event


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
