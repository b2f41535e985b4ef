"""Runs somebody's program with a time limit, without our secrets, and without leaving any of its processes behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.apart import apart

KEEPER = Path(__file__).with_name("keeper.py")
LOOK = 0.1  # seconds between two looks at whether the run is over
OUTPUT = 64 << 20  # bytes of standard output or error, beyond which it is ended

# What a program needs to find its way; everything else in our environment stays here. Proxies may carry a password,
# which is for whoever uses the network on this machine.
PASSED_ON = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TERM", "TZ", "COLORTERM", "NO_COLOR",
    "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy",
    "SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT", "APPDATA", "LOCALAPPDATA", "PROGRAMDATA",
    "PROGRAMFILES", "USERPROFILE", "HOMEDRIVE", "HOMEPATH", "USERNAME",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How it ended. `how`: exit, time, stop or output; `status` is None where it was ended by us."""

    status: int | None
    how: str
    lacks: str  # why folders could not be closed to it; "" when they were
    error: str = ""  # it could not be started, or its keeper failed


@dataclass(frozen=True)
class Orders:
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    stdin: Path
    out: Path
    err: Path
    seconds: float
    isolate: bool = True  # close the folders; otherwise nothing is closed
    read_only: Sequence[Path] = field(default_factory=list)
    hidden: Sequence[Path] = field(default_factory=list)


def environment(names: Iterable[str], **more: str) -> dict[str, str]:
    """The allow-list, `names` where set, and `more`. `LC_*` are for the language."""
    wanted = {*PASSED_ON, *names}
    passed = {name: value for name, value in os.environ.items() if name in wanted or name.startswith("LC_")}
    return {**passed, **more}


def run_kept(orders: Orders, stopped: Callable[[], bool]) -> Ended:
    """Returns when the program and all that it started are gone."""
    written: dict[str, Any] = {
        "argv": list(orders.argv), "cwd": str(orders.cwd), "stdin": str(orders.stdin), "out": str(orders.out),
        "err": str(orders.err), "seconds": orders.seconds, "most": OUTPUT, "isolate": orders.isolate,
        "read_only": [str(p) for p in orders.read_only], "hidden": [str(p) for p in orders.hidden],
    }  # fmt: skip
    keeper = subprocess.Popen(
        [sys.executable, "-I", str(KEEPER), json.dumps(written)],
        env=dict(orders.env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **apart(),
    )  # fmt: skip
    assert keeper.stdin is not None
    try:
        while keeper.poll() is None and not stopped():
            time.sleep(LOOK)
    finally:
        keeper.stdin.close()  # from here on it ends everything
        keeper.stdin = None
        said, complaint = keeper.communicate()
    try:
        told = json.loads(said)
    except ValueError:
        return Ended(None, "exit", "", f"its keeper failed: {complaint.decode('utf-8', 'replace').strip()[-300:]}")
    if told["ended"] == "exit":
        return Ended(told["status"], "exit", told["lacks"], told.get("error", ""))
    return Ended(None, told["ended"], told["lacks"])
