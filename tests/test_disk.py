"""Disks that are full or read-only: a clear error, nothing lost, and it goes on when the disk does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from scripted import Limits, Loop, Night, Scripted, check, make_lab

from core.errors import DiskFull, UserError
from core.files import remove
from core.lab import Lab

RECIPE_FILES = (".autoresearch.json", "program.md", "results.tsv", "train.py")
MAY_MOUNT = sys.platform == "linux" and os.geteuid() == 0
needs_mount = pytest.mark.skipif(not MAY_MOUNT, reason="mounting a small disk needs root on Linux")


@contextmanager
def mounted(place: Path, *options: str):
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def small_disk(place: Path, kibibytes: int):
    with mounted(place, "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs"):
        yield place


@contextmanager
def read_only(folder: Path):
    """The folder cannot be written: by a mount where this process is root, else by its mode."""
    if MAY_MOUNT:
        with mounted(folder, "--bind", str(folder)):
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
            yield
        return
    inside = [folder, *(f for f in folder.rglob("*") if f.is_dir())]
    for f in inside:
        f.chmod(0o555)
    try:
        yield
    finally:
        for f in inside:
            f.chmod(0o755)


def fill(disk: Path, leave_bytes: int) -> Path:
    """Fill the disk but for so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass
    os.truncate(ballast, max(0, ballast.stat().st_size - leave_bytes))
    return ballast


def run(lab: Lab, experiments: int) -> None:
    Loop(lab, Night(), Scripted(), lambda event: None).run(Limits(experiments=experiments))


def run_until_full(lab: Lab) -> bool:
    """Did it end with the one error that it may end with?"""
    try:
        run(lab, 3)
    except UserError as error:
        assert "full" in str(error) or "cannot be written" in str(error), error
        assert "nothing is lost" in str(error), error
        return True
    return False


@needs_mount
@pytest.mark.parametrize("where", ["record", "lab"])
def test_a_full_disk(tmp_path, settings, dataset, monkeypatch, where):
    """With less and less room left, so that each of the writes meets the end of the disk once."""
    with small_disk(tmp_path / "disk", 4096) as disk:
        if where == "record":
            (disk / "home").mkdir()
            (disk / "home" / "data").symlink_to(dataset.path.parent)
            monkeypatch.setenv("AUTORESEARCH_HOME", str(disk / "home"))
        lab = make_lab((disk if where == "lab" else tmp_path) / "night", settings)
        run(lab, 2)
        ended = 0
        for left in (0, 4096, 8192, 12288, 20480, 28672, 36864, 65536):
            ballast = fill(disk, left)
            ended += run_until_full(lab)
            lab.ledger.close()
            ballast.unlink()
            lab = Lab.open(lab.path)
            run(lab, 1)
            check(lab)
        assert ended >= 3
        total = len(lab.ledger.experiments())
        descriptions = [e.description for e in lab.ledger.experiments()]
        assert descriptions == ["baseline", *(f"idea {k}" for k in range(1, total))]
        lab.ledger.close()


@needs_mount
def test_a_lab_on_a_disk_of_its_own(tmp_path, settings):
    """Its folder is a mount point, as a container's volume is; the record lies on another disk."""
    with small_disk(tmp_path / "night", 4096) as place:
        lab = make_lab(place, settings)
        assert {p.name for p in place.iterdir()} == {".git", *RECIPE_FILES} and list(tmp_path.iterdir()) == [place]
        run(lab, 3)
        check(lab)
        lab.ledger.close()


@needs_mount
def test_no_room_for_a_new_lab(tmp_path, settings):
    with small_disk(tmp_path / "disk", 64) as disk:
        ballast = fill(disk, 8192)
        with pytest.raises(UserError, match=r"No space left|full"):
            make_lab(disk / "night", settings)
        assert list(disk.iterdir()) == [ballast]
        ballast.unlink()


@pytest.mark.skipif(sys.platform == "win32", reason="no mode of a folder keeps files out of it there")
def test_a_read_only_lab(tmp_path, settings):
    lab = make_lab(tmp_path / "night", settings)
    run(lab, 2)
    executor = Scripted()
    with read_only(lab.path):
        with pytest.raises(UserError, match=r"cannot be written .*nothing is lost"):
            Loop(lab, Night(), executor, lambda event: None).run(Limits(experiments=2))
        assert lab.best_source() == lab.working_source()  # it can be looked at
        assert "SCORE" in lab.diff(2) or "STATUS" in lab.diff(2)
    assert executor.runs == []  # known before a budget was spent
    run(lab, 2)
    check(lab)


@pytest.mark.skipif(sys.platform == "win32", reason="no mode of a folder keeps files out of it there")
def test_a_lab_that_becomes_read_only_while_it_runs(tmp_path, settings):
    lab = make_lab(tmp_path / "night", settings)
    run(lab, 1)

    class Meanwhile(Scripted):
        def execute(self, request, on_event, stop):
            held.append(read_only(lab.path))
            held[0].__enter__()
            return super().execute(request, on_event, stop)

    held = []
    try:
        with pytest.raises(UserError, match="cannot be written"):
            Loop(lab, Night(), Meanwhile(), lambda event: None).run(Limits(experiments=2))
    finally:
        held[0].__exit__(None, None, None)
    assert [e.state for e in lab.ledger.experiments()] in (["decided", "scored"], ["decided", "audited"])
    executor = Scripted()
    Loop(lab, Night(), executor, lambda event: None).run(Limits(experiments=1))
    assert executor.runs == []  # it was measured: only the decision was left
    check(lab)


@needs_mount
def test_a_read_only_record(tmp_path, settings, dataset, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / "data").symlink_to(dataset.path.parent)
    monkeypatch.setenv("AUTORESEARCH_HOME", str(home))
    lab = make_lab(tmp_path / "night", settings)
    run(lab, 2)
    lab.ledger.close()
    with read_only(home), pytest.raises(UserError, match="cannot be written"):
        run(Lab.open(lab.path), 1)
    lab = Lab.open(lab.path)
    run(lab, 1)
    check(lab)


@pytest.mark.parametrize("what", ["the folder", "the repository"])
def test_a_lab_that_is_moved_while_it_runs_goes_on_where_it_lies(tmp_path, settings, what):
    lab, place = make_lab(tmp_path / "night", settings), tmp_path / "moved"
    run(lab, 1)

    class Meanwhile(Scripted):
        def execute(self, request, on_event, stop):
            lab.path.rename(place) if what == "the folder" else remove(lab.path / ".git")
            return super().execute(request, on_event, stop)

    with pytest.raises(UserError, match=r"was moved or removed while it was in use; .*nothing is lost"):
        Loop(lab, Night(), Meanwhile(), lambda event: None).run(Limits(experiments=2))
    lab.ledger.close()
    again = Lab.open(place if what == "the folder" else lab.path)
    run(again, 1)
    assert [e.description for e in again.ledger.experiments()] == ["baseline", "idea 1"]
    check(again)


# --- a disk that others fill while an experiment runs ------------------------------------------------


@needs_mount
@pytest.mark.parametrize("who", ["others", "the recipe"])
def test_who_fills_the_disk_in_a_training(run_recipe, tiny_recipe, tmp_path, who):
    """Others' files are held against no candidate: what it would have been nobody knows yet."""
    with small_disk(tmp_path / "disk", 400 * 1024) as disk:
        writes = "np.zeros(200 * 2**20, np.uint8).tofile('much') if self.steps == 4 else None"
        own = tiny_recipe.replace("        self.steps += 1\n", f"        self.steps += 1\n        {writes}\n")

        def others(event):
            if event.kind == "phase" and event.data["phase"] == "train":
                (disk / "theirs").write_bytes(bytes(200 * 2**20))

        if who == "others":
            with pytest.raises(DiskFull, match=r"MiB left, and 256 are needed; free some space.*nothing is lost"):
                run_recipe(tiny_recipe, workdir=disk / "work", on_event=others)
        else:
            outcome = run_recipe(own, workdir=disk / "work", lint=False)
            assert outcome.status == "crash" and re.search("the recipe's processes wrote 20. MiB", outcome.reason)


@needs_mount
@pytest.mark.parametrize(("room", "size"), [(400, 160), (400, 1100)])
def test_weights_that_will_not_fit_are_known_before_the_training(run_recipe, tiny_recipe, tmp_path, room, size):
    """`room` and `size` in MiB: of the disk, and of the weights."""
    heavy = f'            "bias": (spec.vocab_size,),\n            "heavy": ({size} * 2**18,),\n'
    source = tiny_recipe.replace('            "bias": (spec.vocab_size,),\n', heavy)
    source = source.replace(
        "for name, p in self.params.items():\n                m,", "for name, p in []:\n                m,"
    )
    phases = []
    tell = lambda event: phases.append(event.data["phase"]) if event.kind == "phase" else None  # noqa: E731
    with small_disk(tmp_path / "disk", room * 1024) as disk:
        if size < 1024:
            with pytest.raises(DiskFull, match=rf"and {256 + size} are needed"):
                run_recipe(source, workdir=disk / "work", on_event=tell)
        else:
            outcome = run_recipe(source, workdir=disk / "work", on_event=tell)
            assert outcome.status == "crash" and f"weights() takes {size} MiB" in outcome.reason
    assert "train" not in phases
