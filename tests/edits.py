"""Edits of the tiny recipe (conftest.py) for tests of the referee, and what has to be left of an experiment."""

from __future__ import annotations

from pathlib import Path

import psutil


def left_behind() -> list[str]:
    """Processes of ours that still run; the referee's contract is that there is none."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(part in command for part in ("backends.worker", "launcher", "core/inside.py")):
            found.append(command)
    return found


def check_clean(workdir: Path) -> None:
    assert left_behind() == []
    roles = ("trainer", "scorer", "auditor", "prober-1", "prober-2")
    assert {p.name for p in workdir.iterdir()} <= {"weights.safetensors", *(f"{role}.log" for role in roles)}


# --- edits: (what stands there, what comes instead) ----------------------------------------------------


def changed(source: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


STEP = "        loss = F.cross_entropy(self.model(tokens[:, :-1])"
LOGITS = "        return self.model(tokens)\n"
HANDED = "        return {n: p.detach().numpy() for n, p in self.params.items()}\n"
BUILD = "def build(spec):\n"
OS = ("import numpy as np\n", "import json, os, struct, sys, time\nimport numpy as np\n")
CHANNEL = 'int(os.environ["AUTORESEARCH_CHANNEL"])'

Edit = tuple[str, str]


def before(mark: str, code: str) -> Edit:
    """Put lines of code, indented like a method's, before the marked line."""
    return mark, "".join(f"        {line}\n" for line in code.splitlines()) + mark


def in_step(code: str, step: int = 4) -> Edit:
    """Do this once, after so many steps of one build: after the warm-up, whose builds take one step."""
    return before(STEP, f"if self.steps == {step}:\n" + "".join(f"    {line}\n" for line in code.splitlines()))


def instead(mark: str, code: str) -> Edit:
    return mark, f"        {code}\n"


def trained_in_weights(code: str) -> Edit:
    return before(HANDED, f"if self.steps > 4: {code}")


def forged(kind: str, fields: str) -> Edit:
    return in_step(
        f"""header = json.dumps({{"kind": "{kind}", "fields": {fields}, "arrays": []}}).encode()
os.write({CHANNEL}, struct.pack("<4sIQI", b"ARW1", len(header), 0, 0) + header)
time.sleep(60)"""
    )
