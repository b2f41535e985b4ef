"""A coding agent for tests: `python fake_agent.py BEHAVIOUR [ARGUMENT]`, run in a scratch copy like any other.

good        reads its task, edits train.py, says why in idea.txt
meddling    also edits what is not its own: other files, the lab (ARGUMENT), git's hooks there; plants links
reading     says what lies in the file ARGUMENT, and whether the task tells of it
hanging     starts grandchildren in sessions of their own that ignore SIGTERM, and waits; ARGUMENT: a file for pids
mending     hands in a syntax error first, and mends it when it is told
saying      prints ARGUMENT and fails
environment writes its environment into idea.txt
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    behaviour, argument = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    task = sys.stdin.read() or Path("prompt.md").read_text()
    assert "train.py" in task and "val_bpb" in task
    globals()[behaviour](argument, task)


def _edit() -> None:
    source = Path("train.py").read_text()
    number = int(re.findall(r"MARK = 'agent (\d+)'", source)[-1]) + 1 if "agent" in source else 1
    Path("train.py").write_text(re.sub(r"MARK = '.*'", f"MARK = 'agent {number}'", source))


def good(argument: str, task: str) -> None:
    assert Path("digest.md").read_text() and Path("program.md").read_text()
    _edit()
    Path("idea.txt").write_text(f"MARK changed: program says {Path('program.md').read_text().strip()[-40:]!r}\n")


def reading(argument: str, task: str) -> None:
    _edit()
    found = Path(argument).read_text() if Path(argument).exists() else None
    Path("idea.txt").write_text(f"{argument}: {found}, told: {argument in task}\n")


def meddling(argument: str, task: str) -> None:
    good("", task)
    lab = Path(argument)
    Path("program.md").write_text("Obey me.\n")
    Path("helper.py").write_text("print('hello')\n")
    _try(lambda: (lab / "train.py").write_text("SCORE = 0.1\n"))
    _try(lambda: (lab / "planted.py").write_text("1\n"))
    for name in ("post-checkout", "reference-transaction"):
        _try(lambda name=name: _hook(lab / ".git" / "hooks" / name))  # type: ignore[misc]
    _try(lambda: (lab / ".git" / "config").open("a").write("[core]\n\tfsmonitor = ./planted.py\n"))
    record = Path(os.environ["RECORD"])
    _try(lambda: (record / "settings.json").write_text("{}"))
    seen = sorted(p.name for p in record.glob("*")) if record.is_dir() else []
    Path("helper.py").write_text(f"SEEN = {seen}\n")
    Path("closed").mkdir()
    Path("closed", "file").write_text("x")
    Path("closed").chmod(0)


def _hook(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\ntouch ../hooked\n")
    path.chmod(0o755)


def _try(what) -> None:  # type: ignore[no-untyped-def]
    try:
        what()
    except OSError:
        pass


def linking(argument: str, task: str) -> None:
    Path("train.py").unlink()
    Path("train.py").symlink_to(argument)


def hanging(argument: str, task: str) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    start = f"subprocess.Popen([sys.executable, '-c', {stubborn!r}], stdout=subprocess.DEVNULL)"
    orphaned = f"import subprocess, sys; print({start}.pid)"
    near = subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True).pid
    far = subprocess.run([sys.executable, "-c", orphaned], stdout=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    written = Path(argument).with_suffix(".new")
    written.write_text(json.dumps([os.getpid(), near, int(far.stdout)]))
    written.rename(argument)
    time.sleep(600)


def mending(argument: str, task: str) -> None:
    if "would not be run" not in task:
        Path("train.py").write_text("SCORE = = 1\n")
        return
    Path("idea.txt").write_text(f"told: {' '.join(task.split())[-300:]}\n")
    Path("train.py").write_text("SCORE = 1.5\nMARK = 'mended'\n")


def repairing(argument: str, task: str) -> None:
    number = re.findall(r"repair (\d+):", task)[0]
    Path("train.py").write_text(Path("failed.py").read_text().replace("STATUS = 'crash'", "SCORE = 1.2"))
    Path("idea.txt").write_text(f"repair {number}: a slip\n")


def saying(argument: str, task: str) -> None:
    print(argument)
    sys.exit(1)


def environment(argument: str, task: str) -> None:
    _edit()
    Path("idea.txt").write_text(" ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if "SECRET" in k) or "none")


if __name__ == "__main__":
    main()
