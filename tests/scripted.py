"""An executor and a researcher that follow a script, for tests of the loop: everything else in them is real.

A recipe here is two lines of constants, and what it says is what comes out:

    SCORE = 1.25          its val_bpb; without it the experiment ends as STATUS
    STATUS = "crash"

As a process: `python scripted.py PROJECT LAB EXPERIMENTS SECONDS_EACH` runs a lab.
"""

from __future__ import annotations

import ast
import hashlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

from core.contract import Exhausted, Proposal, View
from core.lab import Lab
from core.loop import Limits, Loop
from core.outcome import Event, Outcome, Request
from core.settings import Settings
from core.syntax import parse


def recipe(score: float | None = None, status: str = "crash", mark: str = "") -> bytes:
    """`mark` makes equal outcomes different programs."""
    line = f"SCORE = {score}" if score is not None else f"STATUS = {status!r}"
    return f"{line}\nMARK = {mark!r}\n".encode()


def idea(number: int) -> bytes:
    """Recipe k of an endless night: a third fails, some are better than all before."""
    dice = random.Random(number)
    if dice.random() < 0.3:
        return recipe(status=dice.choice(["crash", "timeout", "invalid"]), mark=f"idea {number}")
    return recipe(2.0 - 0.002 * number + dice.uniform(-0.05, 0.05), mark=f"idea {number}")


class Scripted:
    """An executor. `seconds` is what an experiment takes; `runs` lists the ids that it was asked to run. `noise` is the
    standard deviation between seeds: the same recipe and seed always have the same score."""

    def __init__(self, seconds: float = 0.0, noise: float = 0.0, **changes: Any) -> None:
        self.seconds = seconds
        self.noise = noise
        self.changes = changes  # fields of every outcome
        self.runs: list[str] = []
        self.lints = True  # whether recipes pass the lint
        self.dry: list[str] = []  # what was built to try it
        self.dry_caches: list[list[str] | None] = []  # names in the caches that it was given
        self.dry_seconds = 0.0
        self.measures = False  # is a clock running?
        self.together = False  # did a dry build begin beside a running clock?

    def lint(self, source: bytes) -> str:
        return "" if self.lints else "no recipe for this machine"

    def dry_build(
        self, source: bytes, settings: Settings, workdir: Path, stop: threading.Event, caches: Path | None
    ) -> str:
        """Takes `dry_seconds`; a recipe whose SCORE is below zero does not run."""
        self.dry_caches.append(sorted(p.name for p in caches.iterdir()) if caches else None)
        self.dry.append(hashlib.sha256(source).hexdigest())
        self.together = self.together or self.measures
        time.sleep(self.dry_seconds)
        return "it does not run" if _constants(source).get("SCORE", 0) < 0 else ""

    def settle(self, request: Request, say: Callable[[str], None], stop: threading.Event) -> str:
        return ""

    def execute(self, request: Request, on_event: Callable[[Event], None], stop: threading.Event) -> Outcome:
        self.runs.append(request.experiment)
        said = _constants(request.source)
        outcome = Outcome(status="scored", log_tail="Traceback: the last line", timings={"total": self.seconds})
        request.workdir.mkdir(parents=True, exist_ok=True)
        (request.workdir / "trainer.log").write_text("the last line\n")
        on_event(Event("phase", {"phase": "train"}))
        self.measures = True
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            if stop.is_set():
                self.measures = False
                outcome.status = "stopped"
                return outcome
            on_event(Event("progress", {"step": 1, "loss": 5.0, "remaining": end - time.monotonic()}))
            time.sleep(min(0.01, self.seconds))
        self.measures = False
        on_event(Event("phase", {"phase": "score"}))
        if "SCORE" not in said:
            outcome.status, outcome.reason = said["STATUS"], f"the recipe says {said['STATUS']}"
        else:
            outcome.val_bpb, outcome.steps, outcome.peak_memory = self.score(request, said["SCORE"]), 10, 2**28
            outcome.audited = request.would_keep(outcome.val_bpb)
            outcome.weights = request.workdir / "weights.safetensors"
            outcome.weights.write_bytes(request.source)
        for name, value in self.changes.items():
            setattr(outcome, name, value)
        return outcome

    def score(self, request: Request, plain: float) -> float:
        if not self.noise:
            return plain
        return round(plain + random.Random(f"{request.source!r} {request.seed}").gauss(0.0, self.noise), 6)


class Night:
    """A researcher without state: its k-th idea follows the k-th experiment."""

    name = "night"

    def __init__(self, ideas: int | None = None) -> None:
        self.ideas = ideas

    def propose(self, view: View) -> Proposal:
        number = len(view.past)
        if self.ideas is not None and number > self.ideas:
            raise Exhausted(f"{self.ideas} ideas")
        return Proposal(idea(number), f"idea {number}")


class Ahead(Night):
    """Thinks ahead, for `seconds`, and is paid for it. Without state as well: the k-th idea follows k experiments."""

    name = "ahead"
    thinks_ahead = True

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds

    def propose(self, view: View) -> Proposal:
        number = len(view.past) + sum("is being measured" in note for note in view.notes)
        time.sleep(self.seconds)
        view.spend({"model": "scripted", "input_tokens": 100, "output_tokens": 10, "usd": 0.01})
        return Proposal(idea(number), f"idea {number}", {"usage": {"usd": 0.01}})


def _constants(source: bytes) -> dict[str, Any]:
    body = parse(source).body
    return {n.targets[0].id: ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign)}  # type: ignore[attr-defined]


def make_lab(path: Path, settings: Settings, first: bytes | None = None) -> Lab:
    source = recipe(2.0) if first is None else first
    return Lab.create(
        path, recipe=source, program="# try things\n", settings=settings, message="night: the first recipe"
    )


def git(lab: Lab, *arguments: str, stdin: str = "") -> str:
    """Plain git as a user would call it in the lab."""
    done = subprocess.run(["git", *arguments], cwd=lab.path, capture_output=True, text=True, check=True, input=stdin)
    return (done.stdout + done.stderr).strip()


def is_source(weights: bytes, lab: Lab) -> bool:
    """The weights that `Scripted` makes for a recipe."""
    return weights == lab.best_source()


def check(lab: Lab, are_weights: Callable[[bytes, Lab], bool] = is_source) -> None:
    """What holds whenever no process is between two writes, whatever happened before."""
    experiments = lab.ledger.experiments()
    assert [e.number for e in experiments] == list(range(1, len(experiments) + 1))
    assert {e.state for e in experiments} <= {"proposed", "decided"}
    statistical = lab.settings.verdict == "statistical"
    descriptions = [e.description for e in experiments]
    assert len(set(descriptions)) == len(descriptions), "an idea was counted twice"
    blobs = {}
    for e in experiments:
        scored = e.status in ("keep", "simplify", "discard") and not e.verdict.get("stopped_early")
        assert (e.val_bpb is not None) == scored, e
        if e.status is not None or not statistical:  # one that waits for another run has the runs that were made
            assert bool(lab.ledger.samples(e.number)) == scored, e
        if e.status is not None:
            source = lab.source(e.number)
            blobs[f"{lab.candidate_ref(e.number)} {e.commit}"] = hashlib.sha1(b"blob %d\0" % len(source) + source)
    refs = set(git(lab, "for-each-ref", "--format=%(refname) %(objectname)").splitlines())
    assert blobs.keys() <= refs
    names = "".join(f"{name.split()[0]}:train.py\n" for name in blobs)
    found = git(lab, "cat-file", "--batch-check=%(objectname)", stdin=names).split()
    assert found == [blob.hexdigest() for blob in blobs.values()]
    kept = [e.commit for e in experiments if e.is_kept]
    assert git(lab, "rev-list", "--first-parent", lab.branch).split()[:-1] == kept[::-1]
    assert git(lab, "fsck", "--strict", "--no-dangling", "--no-progress") == ""
    assert git(lab, "status", "--porcelain") == ""
    assert lab.working_source() == lab.best_source()
    rows = [line.split("\t") for line in (lab.path / "results.tsv").read_text().splitlines()[1:]]
    assert rows == [
        [
            e.commit[:7],
            f"{e.val_bpb:.6f}" if e.val_bpb else "",
            *row[2:3],
            "discard" if e.undone else e.status,
            e.description,
        ]
        for e, row in zip([e for e in experiments if e.status], rows, strict=True)
    ]
    best = lab.best()
    file = lab.best_weights()
    assert file is None if best is None else file is not None and are_weights(file.read_bytes(), lab)
    waiting = {str(e.number) for e in experiments if e.status is None and lab.ledger.samples(e.number)}
    assert {folder.name for folder in (lab.record / "work").glob("*")} <= waiting


def run(path: Path, experiments: int, seconds: float) -> None:
    loop = Loop(Lab.open(path), Night(), Scripted(seconds), lambda event: None)
    loop.run(Limits(experiments=experiments))


if __name__ == "__main__":
    run(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
