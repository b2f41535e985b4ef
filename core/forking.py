"""Children as forks of a process that has loaded the backend's library: two seconds of processor time less for each.

Three children of an experiment (trainer, scorer, auditor) and its probers each load torch: seconds on a small machine,
and as much memory again. Here it is loaded once (`core/inside.py SETUP fork MODULE FD`), before anything of a recipe
is there, by a process that never works for one: it forks a *launcher* (core/launcher.py), that its init and the
recipe's process, and this goes on in the copy with what else Python would be executed for. Such processes are known as
fork servers (Python's multiprocessing) and zygotes (Android).

The walls are those of every child: nothing that Landlock, seccomp, namespaces or limits hold depends on an exec. What
an exec does beside is done by hand: descriptors are closed, the environment is the child's, signals are as Python
starts with, `gettempdir` is asked anew, NumPy's random numbers are not those of the others (`random` sees to its own).
Hashes of strings are equal in all children anyway (PYTHONHASHSEED). The copy holds what the process had in memory:
the library, and the child's own orders until they are cleared.

For libraries that survive a fork: torch does while no device was opened and nothing was computed. MLX's threads do not.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys
import tempfile
import traceback

import numpy as np

from core import launcher
from core.wire import CHANNEL

GIVEN = ("channel", "control", "status")  # descriptors that come behind the orders, in this order; then the output
EXPECTED = 1 + len(GIVEN) + 1


def serve(descriptor: int) -> list[str]:
    """Fork a child for each message, until the referee closes its end. Returns in the children's recipe processes
    only, behind all walls, with the arguments of the child."""
    server = socket.socket(fileno=descriptor)
    server.send(b"r")  # the library is loaded
    while True:
        descriptors = received(server)
        reap()
        if not descriptors:
            os._exit(0)
        pid = os.fork()
        if not pid:
            server.detach()
            os.close(descriptor)
            return confined(descriptors)
        for given in descriptors:
            os.close(given)
        server.send(array.array("i", [pid]).tobytes())


def reap() -> None:
    """Launchers that have ended since the last message: by now the referee has handles of them, which outlive a pid."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def received(server: socket.socket) -> list[int]:
    """The descriptors of the next message; none when the referee has closed its end, or is gone."""
    message, descriptors, _, _ = socket.recv_fds(server, 1, EXPECTED)  # one byte carries them
    if message and len(descriptors) != EXPECTED:
        sys.exit(f"{len(descriptors)} of {EXPECTED} descriptors came: this process may open too few (ulimit -n)")
    return list(descriptors)


def confined(descriptors: list[int]) -> list[str]:
    """`launched`; a launcher ends here, whatever happens: nothing else is to go on as a copy of this process."""
    try:
        arguments = launched(descriptors)
    except BaseException:  # noqa: BLE001 - see above
        traceback.print_exc()
        os._exit(launcher.FAILED)
    if arguments is None:
        os._exit(0)
    return arguments


def launched(descriptors: list[int]) -> list[str] | None:
    """The life of a launcher, in a fork; then None. In its recipe's process the arguments."""
    stream, *given, output = descriptors
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    with os.fdopen(stream) as text:
        orders: launcher.Orders = json.load(text) | dict(zip(GIVEN, given, strict=True))
    arguments = orders["argv"]
    if not launcher.supervise(orders):
        return None
    become_new({**orders["env"], CHANNEL: str(orders["channel"])})
    orders.clear()  # type: ignore[attr-defined]
    return arguments


def become_new(env: dict[str, str]) -> None:
    """What a fresh interpreter would begin with."""
    os.environ.clear()
    os.environ.update(env)
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGPIPE, signal.SIG_IGN),
        (signal.SIGCHLD, signal.SIG_DFL),
    ):
        signal.signal(number, usual)
    tempfile.tempdir = None
    np.random.seed()  # those of its old interface
