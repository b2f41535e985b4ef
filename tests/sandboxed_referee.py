"""A small referee, run as a process of its own by the sandbox tests: with secrets in its environment and arguments,
as another user, or to be killed. `python sandboxed_referee.py PROJECT JSON [anything]`; prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

from core import sandbox, selfcheck, trees
from core.forkserver import Forkserver

DEEP = """
import os, time
for generation in range(3):
    if os.fork(): break
    os.setsid()
else:
    print("deep", flush=True)
time.sleep(120)
"""


def launch(policy: sandbox.Policy, folder: Path, argv: list[str], forked: bool) -> sandbox.Child:
    """As children are started: by executing Python, or as a fork of one that has loaded torch. In `folder`/scratch."""
    scratch = folder / "scratch"
    server = Forkserver(policy, folder) if forked else None
    if server:
        server.wait(lambda: None, 120)
    child = sandbox.launch([sys.executable, *argv], policy, cwd=scratch, log=folder / "log", forkserver=server)
    if server:
        server.close()
    return child


def policy(orders: dict[str, Any], folder: Path, **limits: int) -> sandbox.Policy:
    made = sandbox.standard_policy(folder / "scratch", orders.get("backend", "cpu"))
    return replace(made, layers=sandbox.Layers(**orders["layers"]), **limits)  # type: ignore[arg-type]


def start(orders: dict[str, Any], folder: Path, *argv: str, **limits: int) -> sandbox.Child:
    chosen = policy(orders, folder, **limits)
    return launch(chosen, folder, list(argv), orders.get("forked", False))


def attacks(orders: dict[str, Any], folder: Path) -> dict[str, Any]:
    outside = folder / "outside"
    outside.mkdir(exist_ok=True)
    with selfcheck.surroundings(outside, orders["secret"]) as targets:
        targets["readable"] += orders.get("planted", [])
        child = start(orders, folder, "-m", "core.attacks", json.dumps(targets), *orders.get("attacks", []))
        code = child.wait(240)
        child.kill()
        (outside / "socket").unlink()
    return {"code": code, "log": child.log_tail(), "enforced": child.enforced}


def limits(orders: dict[str, Any], folder: Path) -> dict[str, Any]:
    found = {}
    for name, code, limit in (
        ("memory", selfcheck.EAT, {"memory_bytes": selfcheck.LIMIT}),
        ("processes", selfcheck.STORM, {"processes": 16}),
    ):
        child = start(orders, folder, "-c", code, **limit)
        child.wait(20)
        child.kill()
        found[name] = child.exceeded()
    return found


def code(orders: dict[str, Any], folder: Path) -> dict[str, Any]:
    child = start(orders, folder, "-c", orders["code"])
    status = child.wait(60)
    child.kill()
    return {"code": status, "log": child.log_tail(), "exceeded": child.exceeded()}


def tree(orders: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A child, grandchildren in sessions of their own; then wait to be killed."""
    child = start(orders, folder, "-c", DEEP)
    deadline = time.monotonic() + 20
    while "deep" not in child.log_tail() and time.monotonic() < deadline:
        time.sleep(0.02)
    return {"launcher": child.pid, "tree": trees.descendants(child.pid)}


def abilities(orders: dict[str, Any], folder: Path) -> dict[str, Any]:
    return sandbox.abilities().to_dict()


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    print(json.dumps(globals()[given["do"]](given, Path(given["folder"]))), flush=True)
    time.sleep(given.get("stay", 0))
