"""The lab: making, finding, what is locked, what is planted, taking back, cleaning. The loop that fills it is real,
its executor follows a script."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from scripted import Limits, Loop, Night, Scripted, check, git, idea, make_lab, recipe

from core import hardware, locks, paths
from core.errors import Busy, DataError, LabError
from core.lab import Lab


@pytest.fixture
def lab(tmp_path, settings):
    return make_lab(tmp_path / "night", settings)


def run(lab: Lab, experiments: int, executor: Scripted | None = None) -> Loop:
    loop = Loop(lab, Night(), executor or Scripted(), lambda event: None)
    loop.run(Limits(experiments=experiments))
    return loop


def judge(lab: Lab, source: bytes, description: str):
    return Loop(lab, None, Scripted(), lambda event: None).judge(source, description)


# --- making ------------------------------------------------------------------------------------


def test_a_new_lab(lab):
    check(lab)
    assert sorted(f.name for f in lab.path.iterdir()) == [
        ".autoresearch.json",
        ".git",
        "program.md",
        "results.tsv",
        "train.py",
    ]
    assert git(lab, "log", "--format=%s|%an") == "night: the first recipe|autoresearch"
    assert [(e.description, e.state) for e in lab.ledger.experiments()] == [("baseline", "proposed")]
    assert list(lab.path.parent.iterdir()) == [lab.path]  # nothing is left beside it
    assert (lab.path / "results.tsv").read_text() == "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def test_into_an_empty_folder(tmp_path, settings):
    (tmp_path / "night").mkdir()
    check(make_lab(tmp_path / "night", settings))


@pytest.mark.parametrize("thing", ["file", "entry", "repository", "link"])
def test_where_something_lies_nothing_is_touched(tmp_path, settings, thing):
    place = tmp_path / "mine"
    if thing == "file":
        place.write_text("mine")
    elif thing == "link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.mkdir()
        (place / "notes").write_text("mine")
    if thing == "repository":
        subprocess.run(["git", "init", "-q", str(place)], check=True)
    before = sorted(str(f) for f in tmp_path.rglob("*"))
    records = sorted(paths.records_root().iterdir()) if paths.records_root().exists() else []
    with pytest.raises(LabError, match=r"is a file|is not empty: 1 entries|is a git repository already|cannot be made"):
        make_lab(place, settings)
    assert sorted(str(f) for f in tmp_path.rglob("*")) == before
    assert (sorted(paths.records_root().iterdir()) if paths.records_root().exists() else []) == records


def test_inside_a_repository_of_the_user_that_one_is_not_touched(tmp_path, settings, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    config = (tmp_path / ".git" / "config").read_bytes()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook of that repository
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / ".git" / "index"))
    lab = make_lab(tmp_path / "night", settings)
    run(lab, 3)
    monkeypatch.undo()
    check(lab)
    assert (tmp_path / ".git" / "config").read_bytes() == config
    assert not (tmp_path / ".git" / "index").exists()
    assert subprocess.run(["git", "-C", str(tmp_path), "for-each-ref"], capture_output=True, check=True).stdout == b""


@pytest.mark.parametrize("name", ["my lab", "a..b", "x.lock", "-f", "ünlü~^:?*[", "@{1}"])
def test_any_folder_name(tmp_path, settings, name):
    lab = make_lab(tmp_path / name, settings)
    run(lab, 2)
    check(lab)


def test_a_lab_is_not_made_over_another(lab, settings):
    with pytest.raises(LabError, match="is a git repository already"):
        make_lab(lab.path, settings)
    check(lab)


# --- finding -----------------------------------------------------------------------------------


def test_found_by_name_place_and_last_use(lab, tmp_path, settings, monkeypatch):
    other = make_lab(tmp_path / "other", settings)
    monkeypatch.chdir(tmp_path)
    assert [(found.tag, how) for found, how in [Lab.find("night")]] == [("night", "named")]
    inside = lab.path / "deeper"
    inside.mkdir()
    monkeypatch.chdir(inside)
    found, how = Lab.find(None)
    assert (found.tag, how) == ("night", "you stand in it")
    monkeypatch.chdir(tmp_path)
    Lab.open(other.path)
    found, how = Lab.find(None)
    assert (found.tag, how) == ("other", "last used")


def test_clear_errors_where_no_lab_is(tmp_path, lab, monkeypatch):
    with pytest.raises(LabError, match="there is no lab at"):
        Lab.open(tmp_path / "nothing")
    (tmp_path / "plain").mkdir()
    with pytest.raises(LabError, match=r"is not a lab: it has no \.autoresearch\.json"):
        Lab.open(tmp_path / "plain")
    for bad in ("", "{", "[]", '{"record": "../../etc", "tag": "x"}', '{"record": 3}'):
        (tmp_path / "plain" / ".autoresearch.json").write_text(bad)
        with pytest.raises(LabError, match="is not a lab"):
            Lab.open(tmp_path / "plain")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(LabError, match=r"is not under.*AUTORESEARCH_HOME"):
        Lab.open(lab.path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LabError, match="there is no lab yet"):
        Lab.find(None)


def test_a_moved_lab_goes_on_and_a_copied_one_does_not(lab, tmp_path):
    run(lab, 2)
    shutil.copytree(lab.path, tmp_path / "copy")
    with pytest.raises(LabError, match="is a copy of the lab"):
        Lab.open(tmp_path / "copy")
    lab.path.rename(tmp_path / "moved")
    moved = Lab.open(tmp_path / "moved")
    run(moved, 1)
    check(moved)
    assert len(moved.ledger.experiments()) == 3


# --- what is locked ----------------------------------------------------------------------------


def test_edited_settings_are_noticed(lab, settings):
    file = lab.record / "settings.json"
    before = file.read_text()
    file.write_text(replace(settings, budget=600.0).to_json())
    with pytest.raises(LabError, match=r"settings .* were edited"):
        Lab.open(lab.path)
    with pytest.raises(LabError, match="were edited"):
        run(lab, 1)  # also in a lab that is open already
    file.write_text("{")
    with pytest.raises(LabError, match="missing or damaged"):
        Lab.open(lab.path)
    file.write_text(before)
    run(lab, 1)
    check(lab)


def test_settings_are_checked_at_every_experiment(lab, settings):
    class Editing(Scripted):
        def execute(self, request, on_event, stop):
            (lab.record / "settings.json").write_text(replace(settings, seed=7).to_json())
            return super().execute(request, on_event, stop)

    executor = Editing()
    with pytest.raises(LabError, match="were edited"):
        run(lab, 3, executor)
    assert len(executor.runs) == 1


@pytest.mark.parametrize("what", ["truncated shard", "damaged manifest", "other manifest", "edited tokenizer"])
def test_damaged_data_stops_the_run_and_loses_nothing(tmp_path, settings, dataset, monkeypatch, what):
    home = tmp_path / "home"
    shutil.copytree(dataset.path, home / "data" / dataset.path.name)
    monkeypatch.setenv("AUTORESEARCH_HOME", str(home))
    lab = make_lab(tmp_path / "night", settings)
    run(lab, 2)
    data = home / "data" / dataset.path.name
    file = {"truncated shard": "train-00000.bin", "edited tokenizer": "tokenizer.tiktoken"}.get(what, "manifest.json")
    before = (data / file).read_bytes()
    if what == "truncated shard":
        os.truncate(data / file, len(before) - 2)
    elif what == "damaged manifest":
        (data / file).write_bytes(before[:-20])
    elif what == "edited tokenizer":
        (data / file).write_bytes(before[::-1])
    else:
        (data / file).write_text(json.dumps(json.loads(before) | {"source": "another"}))
    with pytest.raises(DataError):
        run(lab, 2)
    assert [e.state for e in lab.ledger.experiments()] == ["decided", "decided", "proposed"]
    (data / file).write_bytes(before)
    run(lab, 2)
    check(lab)
    assert [e.description for e in lab.ledger.experiments()] == ["baseline", "idea 1", "idea 2", "idea 3"]


def test_two_runs_in_one_lab(lab):
    with lab.lock(), pytest.raises(Busy, match=f"lab night is in use by process {os.getpid()}"):
        run(Lab.open(lab.path), 1)
    run(lab, 1)
    check(lab)


def test_two_labs_never_share_a_device(tmp_path, settings):
    one, two = make_lab(tmp_path / "one", settings), make_lab(tmp_path / "two", settings)

    class Meanwhile(Scripted):
        def execute(self, request, on_event, stop):
            with pytest.raises(Busy, match=f"the device cpu is in use by process {os.getpid()}"):
                run(two, 1)
            return super().execute(request, on_event, stop)

    executor = Meanwhile()
    run(one, 1, executor)
    assert len(executor.runs) == 1
    run(two, 1)
    check(two)


def test_a_card_is_known_by_its_uuid_and_a_cpu_by_its_host(monkeypatch):
    class Seen:
        def __init__(self, *uuids: str) -> None:
            self.gpus = [type("Gpu", (), {"uuid": uuid, "name": "NVIDIA"}) for uuid in uuids]

    monkeypatch.setattr(hardware, "probe", lambda: Seen("GPU-a", "GPU-b"))
    both = [locks.device_lock(f"cuda:{k}").name for k in (0, 1)]
    assert both == ["device-GPU-a.lock", "device-GPU-b.lock"]
    monkeypatch.setattr(hardware, "probe", lambda: Seen("GPU-b"))  # as CUDA_VISIBLE_DEVICES=1 leaves it
    assert locks.device_lock("cuda:0").name == both[1]
    assert locks.device_lock("cuda").name == both[1]
    assert locks.device_lock("cuda:5").name == f"device-cuda_5-{platform.node()}.lock"
    assert locks.device_lock("cpu").name == f"device-cpu-{platform.node()}.lock"


# --- planted files -----------------------------------------------------------------------------

TELLTALE = "#!/bin/sh\necho planted >> '{mark}'\n"
HOOKS = ("reference-transaction", "post-index-change", "pre-commit", "post-commit", "post-checkout", "update")


@pytest.fixture
def planted(lab, tmp_path):
    """Hooks, filters, settings, attributes and Python packages that would leave a mark if they ran."""
    mark = tmp_path / "mark"
    script = tmp_path / "evil.sh"
    script.write_text(TELLTALE.format(mark=mark))
    script.chmod(0o755)
    hooks = lab.path / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in HOOKS:
        shutil.copy(script, hooks / name)
    with (lab.path / ".git" / "config").open("a") as config:
        config.write(f"""
[core]
    hooksPath = {hooks}
    fsmonitor = {script}
    worktree = {tmp_path}
    attributesFile = {lab.path}/.gitattributes
    sshCommand = {script}
    pager = {script}
    editor = {script}
    alternateRefsCommand = {script}
    autocrlf = true
[alias]
    hash-object = !{script}
    update-ref = !{script}
    commit-tree = !{script}
[filter "evil"]
    clean = {script}
    smudge = {script}
    process = {script}
    required = true
[diff]
    external = {script}
[commit]
    gpgSign = true
[gpg]
    program = {script}
[remote "origin"]
    url = ext::{script}
    promisor = true
[protocol]
    allow = always
""")
    for place in (lab.path / ".gitattributes", lab.path / ".git" / "info" / "attributes"):
        place.write_text("* filter=evil diff=evil text eol=crlf\n")
    for package in ("core", "git", "backends", "numpy"):
        (lab.path / package).mkdir()
        (lab.path / package / "__init__.py").write_text(f"open({str(mark)!r}, 'a').write('imported')\n")
    (lab.path / "sitecustomize.py").write_text(f"open({str(mark)!r}, 'a').write('imported')\n")
    return mark


def test_what_is_planted_in_the_lab_does_nothing(lab, planted, monkeypatch):
    monkeypatch.chdir(lab.path)
    run(lab, 8)
    lab.undo([e.number for e in lab.ledger.experiments() if e.is_kept][-1])
    judge(lab, recipe(0.5, mark="\r\n"), "line ends")
    assert not planted.exists()
    best = lab.best()
    assert lab.git.read(lab.git._text("rev-parse", f"{best.commit}:train.py")) == recipe(0.5, mark="\r\n")
    assert (lab.path / "core" / "__init__.py").is_file()  # untracked files are not ours to clean


@pytest.mark.skipif(sys.platform == "win32", reason="the packages are planted by path")
def test_a_process_that_is_started_in_the_lab_imports_nothing_from_it(lab, planted):
    script = Path(__file__).with_name("scripted.py")
    argv = [sys.executable, str(script), str(paths.project_root()), str(lab.path), "2", "0"]
    subprocess.run(argv, cwd=lab.path, check=True)
    assert not planted.exists()
    assert [e.state for e in lab.ledger.experiments()] == ["decided", "decided"]


def test_a_replaced_object_is_not_read(lab):
    run(lab, 2)
    best = lab.best()
    blob = git(lab, "rev-parse", f"{best.commit}:train.py")
    fake = lab.git.blob(b"fake\n")
    git(lab, "replace", blob, fake)
    assert lab.git.read(blob) == lab.source(best.number)


def test_a_git_folder_that_leads_elsewhere_is_refused(lab, tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path / "users")], check=True)
    (lab.path / ".git").rename(tmp_path / "away")
    (lab.path / ".git").symlink_to(tmp_path / "users" / ".git")
    with pytest.raises(LabError, match="leads to another repository"):
        Lab.open(lab.path)
    (lab.path / ".git").unlink()
    (lab.path / ".git").write_text(f"gitdir: {tmp_path / 'users' / '.git'}\n")
    with pytest.raises(LabError, match="leads to another repository"):
        Lab.open(lab.path)


# --- git is only a copy of the ledger ------------------------------------------------------------


@pytest.mark.parametrize("damage", ["repository", "objects", "refs", "branch", "empty branch", "head"])
def test_git_is_made_again_from_the_ledger(lab, damage):
    run(lab, 8)
    before = git(lab, "for-each-ref")
    inside = lab.path / ".git"
    if damage == "repository":
        shutil.rmtree(inside)
    elif damage in ("objects", "refs"):
        shutil.rmtree(inside / damage)
        (inside / damage).mkdir()
    elif damage == "branch":
        (inside / lab.branch_ref).unlink()
    elif damage == "empty branch":
        (inside / lab.branch_ref).write_bytes(b"")
    else:
        (inside / "HEAD").unlink()
    again = Lab.open(lab.path)
    run(again, 0)
    assert git(again, "for-each-ref") == before
    run(again, 3)
    check(again)


def test_commits_of_others_on_the_branch_are_saved_and_the_branch_set_back(lab):
    run(lab, 3)
    (lab.path / "train.py").write_bytes(recipe(0.1, mark="not judged"))
    git(lab, "-c", "user.name=me", "-c", "user.email=me@localhost", "commit", "-qam", "I keep it myself")
    theirs = git(lab, "rev-parse", "HEAD")
    with pytest.raises(LabError, match=r"was not judged|were not judged"):
        run(lab, 1)
    assert git(lab, "rev-parse", lab.candidate_ref(f"saved/{theirs}")) == theirs
    assert git(lab, "rev-parse", lab.branch) == lab.best().commit
    notes = [e.text for e in lab.ledger.events() if e.kind == "note"]
    kept_as = lab.candidate_ref(f"saved/{theirs}")
    assert f"your commit {theirs[:10]} was taken off the branch; it is kept as {kept_as}" in notes
    assert any(said.startswith(f"branch {lab.branch} is at the best again") for said in notes)
    lab.restore_recipe()
    run(lab, 1)
    check(lab)


@pytest.mark.parametrize("name", ["index.lock", "HEAD.lock", "packed-refs.lock", "branch", "candidate", "config.lock"])
def test_stale_locks_of_dead_processes(lab, name):
    run(lab, 2)
    refs = {"branch": f"{lab.branch_ref}.lock", "candidate": f"{lab.candidate_ref(3)}.lock"}
    lock = lab.path / ".git" / refs.get(name, name)
    lock.write_bytes(b"")
    executor = Scripted()
    loop = Loop(lab, None, executor, lambda event: None)
    assert loop.judge(recipe(0.5), "better").status == "keep"
    if name == "index.lock":  # not ours: it is not needed, and not touched
        lock.unlink()
    assert not lock.exists()
    check(lab)


# --- the user's own train.py -------------------------------------------------------------------


def test_changes_that_were_not_judged_stop_a_run(lab):
    run(lab, 2)
    (lab.path / "train.py").write_bytes(recipe(1.0, mark="mine"))
    with pytest.raises(
        LabError, match=r"not judged; .*autoresearch try .* judges them, .*autoresearch best .*train\.py` drops them"
    ):
        run(lab, 1)
    assert lab.working_source() == recipe(1.0, mark="mine")
    assert judge(lab, lab.working_source(), "mine").status == "keep"
    check(lab)


def test_changes_of_others_are_saved_before_they_are_overwritten(lab):
    for text in (b"one\n", b"two\n"):
        (lab.path / "train.py").write_bytes(text)
        lab.restore_recipe()
        assert lab.working_source() == lab.best_source()
    saved = git(lab, "for-each-ref", "--format=%(refname)", lab.candidate_ref("saved")).split()
    assert sorted(git(lab, "cat-file", "blob", name) for name in saved) == ["one", "two"]


def test_a_file_that_is_edited_while_another_is_judged_stays(lab):
    run(lab, 1)

    class Editing(Scripted):
        def execute(self, request, on_event, stop):
            (lab.path / "train.py").write_bytes(b"# the next idea\n")
            return super().execute(request, on_event, stop)

    (lab.path / "train.py").write_bytes(recipe(1.0))
    told = []
    loop = Loop(lab, None, Editing(), told.append)
    assert loop.judge(recipe(1.0), "better").status == "keep"
    assert lab.working_source() == b"# the next idea\n"
    assert [e.data["text"] for e in told if e.kind == "note"][-1].startswith("train.py was edited meanwhile and stays")


@pytest.mark.parametrize("kind", ["missing", "folder", "link", "fifo", "huge"])
def test_a_train_py_that_is_no_plain_file(lab, tmp_path, kind):
    run(lab, 1)
    file = lab.path / "train.py"
    file.unlink()
    if kind == "missing":
        run(lab, 1)
        check(lab)
        return
    if kind == "folder":
        file.mkdir()
    elif kind == "link":
        (tmp_path / "secret").write_text("secret")
        file.symlink_to(tmp_path / "secret")
    elif kind == "fifo":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no named pipes here")
        os.mkfifo(file)
    else:
        file.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(LabError, match=r"cannot be read|no plain file"):
        run(lab, 1)


# --- undo, diff, clean ---------------------------------------------------------------------------


def keeps(lab: Lab) -> list[int]:
    return [e.number for e in lab.ledger.experiments() if e.is_kept]


def test_undo_takes_back_a_keep_and_what_builds_on_it(lab):
    for k in range(4):
        assert judge(lab, recipe(1.0 - k / 10), f"step {k}").status == "keep"
    assert keeps(lab) == [1, 2, 3, 4, 5]
    assert lab.undo(3) == [3, 4, 5]
    check_after_undo(lab, [1, 2])
    assert [git(lab, "cat-file", "-t", lab.candidate_ref(n)) for n in (3, 4, 5)] == ["commit"] * 3  # nothing is lost
    assert [e.status for e in lab.ledger.experiments()] == ["keep"] * 5
    rows = (lab.path / "results.tsv").read_text().splitlines()[1:]
    assert [row.split("\t")[3] for row in rows] == ["keep", "keep", "discard", "discard", "discard"]
    assert judge(lab, recipe(0.95), "another way").status == "keep"
    check_after_undo(lab, [1, 2, 6], weights=True)


def check_after_undo(lab: Lab, kept: list[int], weights: bool = False) -> None:
    """As `check`, but the weights of an earlier best are gone: only the best's are kept."""
    assert keeps(lab) == kept
    assert (lab.best_weights() is not None) == weights
    assert lab.working_source() == lab.best_source()
    commits = [lab.ledger.get(n).commit for n in kept]
    assert git(lab, "rev-list", "--first-parent", lab.branch).split()[:-1] == commits[::-1]
    assert git(lab, "status", "--porcelain") == ""


def test_undo_refuses_what_is_no_standing_keep(lab):
    judge(lab, recipe(1.0), "better")
    judge(lab, recipe(1.5), "worse")
    with pytest.raises(LabError, match="experiment 3 is not a keep that stands; keeps that can be undone: #2"):
        lab.undo(3)
    with pytest.raises(LabError, match="is the baseline"):
        lab.undo(1)
    (lab.path / "train.py").write_bytes(b"# mine\n")
    with pytest.raises(LabError, match="not judged"):
        lab.undo(2)
    lab.restore_recipe()
    with Lab.open(lab.path).lock(), pytest.raises(Busy):
        lab.undo(2)
    assert lab.undo(2) == [2]
    with pytest.raises(LabError, match="undone: none"):
        lab.undo(2)


def test_diffs_are_against_what_an_experiment_started_from(lab):
    judge(lab, recipe(1.0), "better")
    judge(lab, recipe(1.5, mark="x"), "worse")
    assert lab.diff(1) == ""
    assert "-SCORE = 2.0\n+SCORE = 1.0\n" in lab.diff(2)
    assert "-SCORE = 1.0\n" in lab.diff(3)
    assert "+SCORE = 1.5\n" in lab.diff(3)


def test_results_have_one_line_each_whatever_the_description(lab):
    judge(lab, recipe(1.0), "a\ttab\nand a new line\r\x1b[31m")
    judge(lab, recipe(status="crash"), "breaks")
    lines = (lab.path / "results.tsv").read_text().split("\n")
    assert [line.count("\t") for line in lines] == [4, 4, 4, 4, 0]
    assert lines[3].split("\t")[1] == ""  # a crash has no score, so it is never the best


def test_clean_lists_and_frees(lab):
    run(lab, 8)
    (lab.record / "best" / "999.safetensors").write_bytes(b"x" * 1000)
    (lab.record / "work" / "3").mkdir()
    (lab.record / "work" / "3" / "left").write_bytes(b"x" * 500)
    (lab.path / "notes.txt").write_text("mine")
    listed = lab.clean(dry_run=True)
    assert sum(size for _, size in listed) >= 1500
    assert lab.clean(dry_run=False) == listed
    assert lab.clean(dry_run=True) == []
    assert (lab.path / "notes.txt").exists()
    (lab.path / "notes.txt").unlink()
    check(lab)


def test_history_is_for_researchers_and_never_a_score(tmp_path, settings):
    lab = Lab.create(
        tmp_path / "night",
        recipe=recipe(2.0),
        program="p",
        settings=settings,
        message="m",
        history=[{"val_bpb": 0.1, "description": "elsewhere"}],
    )
    run(lab, 2)
    assert lab.view({}).history == [{"val_bpb": 0.1, "description": "elsewhere"}]
    assert lab.view({}).best_bpb == 2.0
    assert idea(1) == lab.view({}).past[1].source


@pytest.mark.parametrize(("line", "told"), [("from kernels.lean import feed\n", True), ("# kernels are fine\n", False)])
def test_a_researcher_is_told_what_a_recipe_imports_from_kernels(line, told, tmp_path, settings):
    lab = Lab.create(
        tmp_path / "night", recipe=line.encode() + recipe(2.0), program="p", settings=settings, message="m"
    )
    assert ("`last_norm(z)`" in lab.view({}).importable) == told


def test_a_process_that_tells_nothing_does_not_end_a_run(lab, monkeypatch):
    """Windows has bare errors for one that is just ending (seen under Wine: WinError 6)."""
    real = psutil.Process.name

    def name(process):
        if process.pid != os.getpid():
            return real(process)
        raise OSError(22, "Invalid handle")

    monkeypatch.setattr(psutil.Process, "name", name)
    (lab.git.path / f"{lab.branch_ref}.lock").touch()
    assert lab.branch_ref in str(lab.clear_leftovers())
    run(lab, 1)
    check(lab)
