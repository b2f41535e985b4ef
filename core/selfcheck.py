"""`doctor`'s look at the sandbox: real children that try things, and whether each was refused. Some four seconds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from core import forkserver, sandbox, trees
from core.attacks import Targets
from core.doctor import Check
from core.forkserver import Forkserver, NotLoaded

LIMIT = 128 << 20  # bytes, for the child that takes too much
LOADED_WITHIN = 60.0  # seconds for torch
EAT = "b = []\nwhile True: b.append(bytearray(b'x') * (4 << 20))"
STORM = "import os, time\nfor _ in range(200):\n    if not os.fork(): time.sleep(30)"  # forks 200 times at most
DAEMON = """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        time.sleep(60)
    os._exit(0)
os.wait()
print("started", flush=True)
time.sleep(60)
"""

GROUPS = {  # what doctor shows: attacks of core/attacks.py that belong together
    "network": "tcp udp ipv6 unix_path unix_abstract unix_datagram unix_serve netlink listen",
    "files": "read_planted everything_readable embedded_corpus write_outside mode_and_time run_written",
    "other processes": "parent_in_proc all_of_proc own_environment open_descriptors other_processes",
    "kernel": "kernel_calls cached_pages foreign_calls privileges",
}


@contextlib.contextmanager
def surroundings(folder: Path, secret: str = "") -> Iterator[Targets]:
    """Something to attack: listening sockets, a file with a secret, this process's pid."""
    secret = secret or secrets.token_hex(16)
    victim = folder / "victim"
    victim.write_text(f"{secret}\n")
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = tcp.getsockname()[1]
        port6 = 0
        if socket.has_dualstack_ipv6():
            try:
                port6 = stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6)).getsockname()[1]
            except OSError:
                pass  # no IPv6 address on this machine
        path, abstract = str(folder / "socket"), f"autoresearch-{secret[:8]}"
        if hasattr(socket, "AF_UNIX"):
            for address in (path, "\0" + abstract) if sys.platform == "linux" else (path,):
                server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                server.bind(address)
                server.listen()
        yield Targets(
            secret=secret,
            referee=os.getpid(),
            port=port,
            port6=port6,
            socket=path,
            abstract=abstract,
            readable=[str(victim), *private_files()],
            folder=str(folder),
            victim=str(victim),
        )


def private_files() -> list[str]:
    """Files of this user and of the machine that no recipe has any business with."""
    home = Path("~").expanduser()
    names = (".bashrc", ".profile", ".netrc", ".ssh/id_ed25519", ".ssh/id_rsa", ".config/gh/hosts.yml")
    return [
        str(p) for p in (*(home / name for name in names), Path("/etc/passwd"), Path("/etc/hostname")) if p.exists()
    ]


def self_check() -> list[Check]:
    """One line for each group of attacks and each limit; `ok` None where this platform is known to lack the wall."""
    able = sandbox.abilities()
    with tempfile.TemporaryDirectory(prefix="autoresearch-doctor-") as name, surroundings(Path(name)) as targets:
        scratch = Path(name) / "scratch"
        policy = sandbox.standard_policy(scratch, "cpu")

        server = with_library(policy, Path(name))

        def start(label: str, *argv: str, **limits: int) -> sandbox.Child:
            chosen, log = replace(policy, **limits), Path(name) / f"{label}.log"  # type: ignore[arg-type]
            parent = server if label == "fork" else None
            return sandbox.launch([sys.executable, *argv], chosen, cwd=scratch, log=log, forkserver=parent)

        attacks = ("-m", "core.attacks", json.dumps(targets))
        forked = {"fork": start("fork", *attacks)} if server else {}
        children = {
            "attacks": start("attacks", *attacks),
            **forked,
            "memory": start("memory", "-c", EAT, memory_bytes=LIMIT),
            "processes": start("processes", "-c", STORM, processes=16),
            "daemon": start("daemon", "-c", DAEMON),
        }
        checks = attacks_checked([children["attacks"], *forked.values()], able)
        checks += [limit_checked(children[kind], kind, able) for kind in ("memory", "processes")]
        checks.append(end_checked(children["daemon"]))
        for child in children.values():
            child.kill()
            child.channel.close()
        if server:
            server.close()
    return checks + [Check("sandbox: lacks", None, lack, "see docs/sandbox.md") for lack in able.missing]


def with_library(policy: sandbox.Policy, folder: Path) -> Forkserver | None:
    """What an experiment's children are forks of, where they are: attacks come from such a fork, too. Where torch does
    not load, of which doctor tells elsewhere, from a new Python alone."""
    if not forkserver.possible(policy.backend):
        return None
    server = Forkserver(policy, folder)
    try:
        server.wait(lambda: None, LOADED_WITHIN)
    except NotLoaded:
        server.close()
        return None
    return server


def attacks_checked(children: list[sandbox.Child], able: sandbox.Abilities) -> list[Check]:
    """By kind, of all children together: a new Python, and where there are such a fork."""
    found = []
    for child in children:
        child.wait(20)
        try:
            found.append(json.loads(child.log_tail(1)))
        except ValueError:
            return [Check("sandbox", False, f"the child failed: {child.log_tail(1) or child.poll()}", "report this")]
    checks = []
    for group, names in GROUPS.items():
        failed = [f"{n}: {results[n][1]}" for results in found for n in names.split() if not results[n][0]]
        total = len(names.split()) * len(found)
        if failed:
            action = "run on Linux 5.13 or newer with Landlock enabled (lsm=landlock,...)" if not able.landlock else ""
            checks.append(Check(f"sandbox: {group}", False, "; ".join(failed)[:300], action))
        else:
            checks.append(Check(f"sandbox: {group}", True, f"{total} of {total} attempts refused"))
    return checks


def limit_checked(child: sandbox.Child, kind: str, able: sandbox.Abilities) -> Check:
    child.wait(10)
    how = getattr(able, kind)
    said = child.exceeded()  # "processes: 22 of 16", or "processes: more than 16 processes and threads"
    fact = (said or "a child went over it unseen").removeprefix("processes: ").removeprefix("memory: ")
    ended = re.sub(r"^(.+) of (.+)$", r"ended at \1, \2 allowed", fact)
    return Check(f"sandbox: limit of {kind}", bool(said), f"{ended} ({how})")


def end_checked(child: sandbox.Child) -> Check:
    """A daemon that left its session, ended with the rest."""
    for _ in range(100):
        if "started" in child.log_tail(1) or child.poll() is not None:
            break
        child.wait(0.05)
    tree = trees.descendants(child.pid)
    child.kill()
    left = [pid for pid in tree if trees.alive(pid)]
    detail = f"{len(tree)} processes, a daemon among them, {len(left)} left after the end"
    return Check("sandbox: end of the tree", not left and len(tree) > 1, detail)
