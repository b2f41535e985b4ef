"""`doctor`'s look at what holds a recipe on Windows: a real child in a job, a file handed to it, its end.

What attacks the sandbox elsewhere (core/attacks.py) is POSIX; what is open on Windows is listed instead.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from core import sandbox, trees, wire
from core.doctor import Check

WITHIN = 30.0  # seconds for each answer
LIMIT = 256 << 20  # bytes, for the child that takes too much
CHILD = """
import os, subprocess, sys
from core import wire
channel = wire.own_channel()
channel.send("ready")
message = channel.receive()
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
channel.send("read", {"text": os.read(message.fds[0], 100).decode(), "pid": below.pid})
channel.receive()
"""
EAT = "b = []\nwhile True: b.append(bytearray(b'x') * (4 << 20))"


def self_check() -> list[Check]:
    """Whether the channel, the handing over of a file, the limit of memory and the end of a tree work here."""
    with tempfile.TemporaryDirectory(prefix="autoresearch-doctor-", ignore_cleanup_errors=True) as name:
        policy = sandbox.standard_policy(Path(name) / "scratch", "cpu")
        try:
            checks = [*_talked_to(Path(name), policy), _too_much(Path(name), replace(policy, memory_bytes=LIMIT))]
        except OSError as error:
            checks = [Check("sandbox: start", False, f"no child can be started: {error}", "report this, or use WSL2")]
    return checks + [Check("sandbox: lacks", None, lack, "see docs/sandbox.md") for lack in sandbox.abilities().missing]


def _start(folder: Path, policy: sandbox.Policy, code: str) -> sandbox.Child:
    return sandbox.launch([sys.executable, "-c", code], policy, cwd=folder / "scratch", log=folder / "log")


def _talked_to(folder: Path, policy: sandbox.Policy) -> list[Check]:
    child = _start(folder, policy, CHILD)
    channel = wire.Channel(child.channel, giver=child.giver)
    secret = secrets.token_hex(8)
    (folder / "file").write_text(secret)
    fd = os.open(folder / "file", os.O_RDONLY)
    try:
        channel.receive(WITHIN)
        channel.send("file", fds=[fd])
        answer = channel.receive(WITHIN)
        same, below = answer.text("text") == secret, answer.integer("pid")
    except (OSError, ValueError) as error:  # all that a channel raises
        said = f"{error}; its last lines: {child.log_tail(3)}"
        return [Check("sandbox: channel", False, said, "report this, or use WSL2")]
    finally:
        os.close(fd)
        child.kill()
        channel.close()
    left = [pid for pid in (child.pid, below) if trees.alive(pid)]
    return [
        Check("sandbox: channel", same, "a child in a job answered, and read a file that was handed to it"),
        Check("sandbox: end of the tree", not left, f"a child and its child were ended, {len(left)} left"),
    ]


def _too_much(folder: Path, policy: sandbox.Policy) -> Check:
    child = _start(folder, policy, EAT)
    code = child.wait(WITHIN)
    child.kill()
    child.channel.close()
    refused = child.exceeded() or ("MemoryError" in child.log_tail() and "an allocation was refused")
    said = refused or f"a child went over it unseen (exit status {code})"
    return Check("sandbox: limit of memory", bool(refused), said)
