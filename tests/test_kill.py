"""kill -9 at random instants; whatever it hit, the next start goes on and nothing is lost, counted twice or half kept.
And, once, the order of writes on disk as the kernel saw it."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.numpy
from scripted import Ahead, Limits, Loop, Night, Scripted, check, git, is_source, make_lab, recipe

from core import paths
from core.executor import LocalExecutor
from core.lab import Lab
from core.thinking import READY

if sys.platform == "win32":
    pytest.skip("kill -9 and fork are POSIX", allow_module_level=True)


def in_a_process(act) -> int:
    """Run `act` in a forked process, leader of a group of its own. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        act()
        code = 0
    finally:
        os._exit(code)  # nothing of the test's own may run in here


def kill(pid: int, tree: bool) -> None:
    """The process alone, or with it all that it has started."""
    if tree:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet, or is gone
            os.kill(pid, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("name", ["HEAD.lock", "packed-refs.lock", "branch", "candidate"])
def test_a_git_that_is_killed_in_the_night_ends_no_night(tmp_path, settings, name):
    """A user's own, with its lock in the lab's repository, while an experiment runs that will be kept."""

    class Meanwhile(Scripted):
        def execute(self, request, on_event, stop):
            refs = {"branch": f"{lab.branch_ref}.lock", "candidate": f"{lab.candidate_ref(len(self.runs) + 1)}.lock"}
            lock = lab.git.path / refs.get(name, name)
            lock.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
            return super().execute(request, on_event, stop)

    lab = make_lab(tmp_path / "night", settings)
    loop = Loop(lab, Night(), Meanwhile(), lambda event: None)
    loop.run(Limits(experiments=2))
    assert loop.judge(recipe(0.5), "much better").status == "keep"
    check(lab)


def start_again(path: Path, are_weights=is_source) -> Lab:
    """What every start does first; then everything has to hold."""
    lab = Lab.open(path)
    with lab.lock():
        Loop(lab, None, Scripted(), lambda event: None).recover()
    check(lab, are_weights)
    return lab


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_instants(tmp_path, settings, seed):
    """12 kills in a lab, four labs; the loop, or the loop with the git that it has just called."""
    dice = random.Random(seed)
    lab = make_lab(tmp_path / "night", settings)
    decided = 0
    for _ in range(12):
        lab.ledger.close()

        def act(path=lab.path):
            Loop(Lab.open(path), Night(), Scripted(seconds=0.005), lambda event: None).run(Limits())

        pid = in_a_process(act)
        time.sleep(dice.uniform(0.02, 0.4))
        kill(pid, tree=dice.random() < 0.5)
        lab = start_again(lab.path)
        after = sum(e.status is not None for e in lab.ledger.experiments())
        assert after >= decided
        decided = after
    Loop(lab, Night(), Scripted(), lambda event: None).run(Limits(experiments=3))
    check(lab)
    total = decided + 3
    assert [e.description for e in lab.ledger.experiments()] == ["baseline", *(f"idea {k}" for k in range(1, total))]


@pytest.mark.slow
def test_killed_while_the_next_proposal_is_made(tmp_path, settings):
    """A proposal that was ready is neither lost nor counted twice, and what it cost stays with it."""
    dice = random.Random(11)
    lab = make_lab(tmp_path / "night", settings)
    decided = 0
    for _ in range(12):
        lab.ledger.close()

        def act(path=lab.path):
            Loop(Lab.open(path), Ahead(0.01), Scripted(seconds=0.02), lambda event: None).run(Limits())

        pid = in_a_process(act)
        time.sleep(dice.uniform(0.1, 0.6))
        kill(pid, tree=dice.random() < 0.5)
        ready = Lab.open(lab.path).ledger.meta(READY, {})
        lab = start_again(lab.path)
        assert lab.ledger.meta(READY, {}) == ready
        known = {e.description for e in lab.ledger.experiments()}
        assert not known & {row["description"] for row in ready.values()}
        after = sum(e.status is not None for e in lab.ledger.experiments())
        assert after >= decided
        decided = after
    Loop(lab, Ahead(), Scripted(), lambda event: None).run(Limits(experiments=3))
    check(lab)
    found = lab.ledger.experiments()
    assert [e.description for e in found] == ["baseline", *(f"idea {k}" for k in range(1, decided + 3))]
    assert all(lab.ledger.spent(e.number).answers for e in found[1:])


@pytest.mark.slow
def test_an_undo_that_is_killed(tmp_path, settings):
    """At any instant of the time that one takes here, until all but the baseline are undone."""
    dice = random.Random(7)
    lab = make_lab(tmp_path / "night", settings)
    for k in range(6):
        Loop(lab, None, Scripted(), lambda event: None).judge(recipe(1.0 - k / 10), f"step {k}")
    began = time.monotonic()
    lab.ledger.close()
    os.waitpid(in_a_process(lambda: Lab.open(lab.path).undo(6)), 0)
    takes = time.monotonic() - began
    lab = Lab.open(lab.path)
    while len(keeps := [e.number for e in lab.ledger.experiments() if e.is_kept]) > 1:
        lab.ledger.close()
        pid = in_a_process(lambda: Lab.open(lab.path).undo(keeps[-1]))  # noqa: B023 - used before the next turn
        time.sleep(dice.uniform(0.0, 1.25 * takes))
        kill(pid, tree=True)
        lab = Lab.open(lab.path)
        with lab.lock():
            Loop(lab, None, Scripted(), lambda event: None).recover()
        left = [e for e in lab.ledger.experiments() if e.is_kept]
        assert [e.number for e in left] in (keeps, keeps[:-1])
        assert git(lab, "rev-list", "--first-parent", lab.branch).split()[:-1] == [e.commit for e in left][::-1]
        assert lab.working_source() == lab.best_source()
        assert git(lab, "fsck", "--strict", "--no-dangling", "--no-progress") == ""


def test_a_killed_init_leaves_no_half_made_lab(tmp_path, settings):
    dice = random.Random(3)
    for k in range(12):
        path = tmp_path / f"lab{k}"
        pid = in_a_process(lambda: make_lab(path, settings))  # noqa: B023 - used before the next turn
        time.sleep(dice.uniform(0.0, 0.12))
        kill(pid, tree=dice.random() < 0.5)
        if path.exists():
            check(Lab.open(path))
        else:
            check(make_lab(path, settings))


# --- with the real referee and its children ----------------------------------------------------------


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def are_tensors(weights: bytes, lab: Lab) -> bool:
    return bool(safetensors.numpy.load(weights))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["start", "train", "score"])
def test_the_real_referee_killed(phase, tmp_path, settings, tiny_recipe):
    """Its children go with it, and the experiment keeps its number."""
    lab = make_lab(tmp_path / "night", settings, first=tiny_recipe.encode())
    lab.ledger.close()
    reached = tmp_path / "reached"

    def tell(event):
        if event.data.get("phase") == phase:
            reached.touch()

    pid = in_a_process(lambda: Loop(Lab.open(lab.path), None, LocalExecutor(), tell).judge_pending(1))
    while not reached.exists():
        time.sleep(0.01)
    time.sleep(random.Random(phase).uniform(0.0, 0.1))
    children = descendants(pid)
    kill(pid, tree=False)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children and not alive
    lab = start_again(lab.path, are_tensors)
    assert [(e.number, e.status, e.attempts) for e in lab.ledger.experiments()] == [(1, None, 1)]
    found = Loop(lab, None, LocalExecutor(), lambda event: None).judge_pending(1)
    assert found.status == "keep", found.reason
    assert len(lab.ledger.samples(1)) == 1
    check(lab, are_tensors)


@pytest.mark.slow
def test_its_children_killed(tmp_path, settings, tiny_recipe):
    """The experiment fails without a number, and the next one runs."""
    lab = make_lab(tmp_path / "night", settings, first=tiny_recipe.encode())
    me = os.getpid()
    trained = []

    def on_event(event):
        if event.kind == "progress" and not trained:
            trained.append(True)
            for child in descendants(me):
                child.kill()

    found = Loop(lab, None, LocalExecutor(), on_event).judge_pending(1)
    assert trained
    assert (found.status, found.val_bpb) == ("crash", None)
    better = Loop(lab, None, LocalExecutor(), lambda event: None).judge(tiny_recipe.encode() + b"\n# again\n", "again")
    assert better.status == "keep", better.reason


# --- the order on disk -------------------------------------------------------------------------------

# fsync(3</path/of/file>)   rename("from", "to")   link("from", "to")
CALL = re.compile(r"(\w+)\((?:\d+<(?P<synced>[^>]*)>|\"(?P<source>[^\"]*)\", \"(?P<target>[^\"]*)\")")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_order_of_writes_and_syncs(tmp_path, settings):
    """Intent, objects, refs, decision, the lab's file: each on disk before the next begins."""
    lab = make_lab(tmp_path / "night", settings)
    Loop(lab, Night(), Scripted(), lambda event: None).run(Limits(experiments=1))
    lab.ledger.close()
    log = tmp_path / "strace"
    calls = "trace=fsync,fdatasync,rename,renameat,renameat2,link,linkat"
    code = (
        f"import sys; sys.path[:0] = [{str(paths.project_root())!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path; from scripted import *\n"
        f"lab = Lab.open(Path({str(lab.path)!r}))\n"
        "Loop(lab, None, Scripted(), lambda event: None).judge(recipe(1.0), 'better')\n"
    )
    argv = ["strace", "-f", "-y", "-o", str(log), "-e", calls, sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True)
    if "ptrace" in done.stderr.lower():
        pytest.skip(f"strace is not allowed here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    steps = [found for line in log.read_text().splitlines() if (found := CALL.search(line))]
    syncs = [(k, f["synced"]) for k, f in enumerate(steps) if f["synced"]]
    moves = [(k, f["source"], f["target"]) for k, f in enumerate(steps) if f["target"]]

    def moved_to(part: str) -> list[int]:
        """Positions of the renames and links into place; what was moved was synced before."""
        found = [(k, source) for k, source, target in moves if part in target]
        for k, source in found:
            assert any(at < k and Path(name).name == Path(source).name for at, name in syncs), source
        return [k for k, _ in found]

    ledger = [k for k, name in syncs if "ledger.sqlite" in name]
    objects = moved_to("/.git/objects/")
    candidate, branch = moved_to(f"refs/autoresearch/{lab.tag}/2"), moved_to(lab.branch_ref)
    [recipe_file] = moved_to("/train.py")
    assert len(objects) == 3  # blob, tree, commit
    assert len(candidate) == len(branch) == 1
    refs = candidate + branch
    assert len([k for k in ledger if k < objects[0]]) >= 3  # proposed, started, measured
    assert max(objects) < min(refs)
    assert not [k for k in ledger if min(objects) < k < max(refs)]
    assert any(max(refs) < k < recipe_file for k in ledger)  # decided
