"""What experiments and benchmarks need is there on Windows, and asks for nothing that it lacks without a look."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Never loaded on Windows: Linux' sandbox, what attacks it, and what it is made of.
ELSEWHERE = {f"core/{name}.py" for name in ("launcher", "forking", "attacks", "selfcheck", "landlock", "seccomp")}
PARTS = ("core", "console", "researchers", "backends", "benchmarks", "kernels")
LOADED = sorted(
    path
    for path in [ROOT / "cli.py", ROOT / "prepare.py", *(p for part in PARTS for p in (ROOT / part).rglob("*.py"))]
    if path.relative_to(ROOT).as_posix() not in ELSEWHERE
)

# Of the standard library's documentation: "Availability: Unix", and what came to Windows after Python 3.10.
LACKING = {
    "os": "fork forkpty pread pwrite preadv getuid geteuid getgid getegid setuid setgid getpgid getpgrp setpgid setsid "
    "killpg wait wait3 wait4 waitid WNOHANG sysconf nice uname mkfifo mknod chown lchown fchown fchmod chroot fwalk "
    "getloadavg statvfs fstatvfs sched_setaffinity sched_getaffinity getpriority setpriority PRIO_PROCESS O_NOFOLLOW "
    "O_NONBLOCK O_CLOEXEC O_DIRECTORY O_PATH openpty pidfd_open set_blocking get_blocking setxattr getxattr sync "
    "posix_fadvise sendfile readv writev ttyname getgroups initgroups EX_OK EX_USAGE",
    "signal": "SIGKILL SIGHUP SIGSTOP SIGCONT SIGCHLD SIGPIPE SIGALRM SIGUSR1 SIGUSR2 SIGQUIT SIGSYS SIGTSTP SIGWINCH "
    "alarm setitimer pthread_kill pthread_sigmask sigwait pause siginterrupt",
    "socket": "AF_UNIX send_fds recv_fds SCM_RIGHTS CMSG_SPACE CMSG_LEN SO_PEERCRED SO_REUSEPORT",
    "select": "poll epoll POLLIN POLLOUT POLLHUP kqueue",
    "mmap": "PROT_READ PROT_WRITE PROT_EXEC MAP_SHARED MAP_PRIVATE MAP_ANONYMOUS",
    "time": "clock_gettime CLOCK_MONOTONIC CLOCK_BOOTTIME tzset pthread_getcpuclockid",
    "shutil": "chown",
}
MODULES = ("fcntl", "resource", "grp", "pwd", "termios", "tty", "pty", "syslog", "crypt", "nis", "readline", "curses")
METHODS = {"symlink", "symlink_to", "lchmod", "sendmsg", "recvmsg"}  # links are for administrators there
KEYWORDS = {"pass_fds", "preexec_fn", "dir_fd"}  # start_new_session is taken and means nothing

# Functions that Windows does not come to, and why.
UNREACHED = {
    ("benchmarks/blank_card/building.py", "*"): "a blank card is Linux' (its `obstacle` says so)",
    ("core/caches.py", "_open_beside"): "where os.fwalk is",
    ("core/cgroups.py", "*"): "asked on Linux only (core/sandbox.py)",
    ("core/forkserver.py", "*"): "made on Linux only (its `possible` says so)",
    ("core/handles.py", "Postbox"): "POSIX' stand-in for duplicated handles",
    ("core/inside.py", "forked"): "asked for by a forkserver",
    ("core/keeper.py", "*"): "its POSIX parts are behind LINUX",
    ("core/processes.py", "*"): "behind trees.LINUX",
    ("core/sandbox.py", "launch"): "Windows leaves in its first lines",
    ("core/sandbox.py", "started"): "called by `launch`, behind those",
    ("core/sandbox.py", "_keep"): "replaced by WindowsChild",
    ("core/wire.py", "_send_fds"): "a channel on Windows has a giver",
    ("core/wire.py", "_read"): "a channel on Windows takes none with its bytes",
}


def lacking(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every mention of what Windows lacks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            module = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in LACKING.get(module, "").split():
                yield node, f"{module}.{node.attr}"
            elif node.attr in METHODS:
                yield node, node.attr
        elif isinstance(node, ast.Call):
            yield from ((node, f"{k.arg}=") for k in node.keywords if k.arg in KEYWORDS)
        elif isinstance(node, ast.Import):
            yield from ((node, a.name) for a in node.names if a.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield node, str(node.module)


def looks(node: ast.AST) -> bool:
    """Whether it asks where it runs, or what there is."""
    text = ast.unparse(node)
    return any(word in text for word in ("sys.platform", "hasattr(", "getattr(", "LINUX", "os.name", "AttributeError"))


def is_guarded(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Below an `if` or within an expression that looks, or behind an `if` that looks and leaves."""
    inner, at = node, parents.get(node)
    while at is not None:
        if isinstance(at, (ast.If, ast.IfExp)) and looks(at.test) and inner is not at.test:
            return True
        if isinstance(at, (ast.BoolOp, ast.comprehension, ast.ListComp)) and looks(at):
            return True
        if isinstance(at, ast.With) and any(looks(item.context_expr) for item in at.items):
            return True
        body = getattr(at, "body", [])
        before = body[: body.index(inner)] if isinstance(body, list) and inner in body else []
        if any(isinstance(s, ast.If) and looks(s.test) and leaves(s.body) for s in before):
            return True
        inner, at = at, parents.get(at)
    return False


def leaves(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], (ast.Return, ast.Raise, ast.Continue))


def unreached(file: str, node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    if (file, "*") in UNREACHED:
        return True
    at: ast.AST | None = node
    while at is not None:
        if isinstance(at, (ast.FunctionDef, ast.ClassDef)) and (file, at.name) in UNREACHED:
            return True
        at = parents.get(at)
    return False


def unguarded(source: str, file: str) -> list[str]:
    tree = ast.parse(source)
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    return [
        f"{file}:{getattr(node, 'lineno', 0)}: {what}"
        for node, what in lacking(tree)
        if not is_guarded(node, parents) and not unreached(file, node, parents)
    ]


def test_what_windows_lacks_is_asked_for_after_a_look() -> None:
    found = [f for p in LOADED for f in unguarded(p.read_text("utf-8"), p.relative_to(ROOT).as_posix())]
    assert found == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import os\nos.pread(0, 1, 0)", 1),
        ("import fcntl", 1),
        ("p.symlink_to(q)", 1),
        ("subprocess.Popen(a, pass_fds=[1])", 1),
        ("if sys.platform != 'win32':\n    os.getuid()", 0),
        ("def f():\n    if sys.platform == 'win32':\n        return 1\n    return os.getuid()", 0),
        ("def f():\n    x = os.getuid()\n    if sys.platform == 'win32':\n        return 1\n    return x", 1),
        ("a = os.getloadavg() if hasattr(os, 'getloadavg') else []", 0),
    ],
)
def test_the_search_finds_what_it_is_to_find(source: str, count: int) -> None:
    assert len(unguarded(source, "x.py")) == count


# Everything is imported once as it is, so that other people's packages are there; then ours again, as on Windows.
PRESENTED = """
import importlib, json, sys, types
names, lacking, absent = json.loads(sys.argv[1])
for name in names:
    importlib.import_module(name)
ours = {name.partition(".")[0] for name in names}
for name in [name for name in sys.modules if name.partition(".")[0] in ours or name in absent]:
    del sys.modules[name]

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in absent:
            raise ModuleNotFoundError(f"No module named {name!r} on Windows", name=name)

sys.meta_path.insert(0, Absent())
for module, attributes in lacking.items():
    for attribute in attributes.split():
        if hasattr(sys.modules[module], attribute):
            delattr(sys.modules[module], attribute)
sys.modules["msvcrt"] = types.ModuleType("msvcrt")
sys.platform = "win32"
failed = {}
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""
LIBRARIES = ("torch", "mlx", "triton")  # which those who import one at once would load for this machine


def test_every_module_is_imported_where_there_is_no_posix() -> None:
    named = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in LOADED]
    texts = {name: path.read_text("utf-8") for name, path in zip(named, LOADED, strict=True)}
    names = [name for name, text in texts.items() if not any(f"\nimport {library}" in text for library in LIBRARIES)]
    assert len(names) > 100 and {"core.referee", "backends.worker", "core.loop", "cli"} <= set(names)
    done = subprocess.run(
        [sys.executable, "-c", PRESENTED, json.dumps([names, LACKING, MODULES])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
