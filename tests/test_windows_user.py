"""What a Windows user's machine has: a spreadsheet with results.tsv, Git for Windows, conda, a space in a name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from scripted import Limits, Loop, Night, Scripted, check, git, make_lab, recipe
from windows_stand_in import refuse_open_files

from console import awake, places, trying
from core import apart, childlog, commands, data, files, keeper, kept, paths, sandbox_windows, torchbuild, windows
from core.errors import LabError, UserError
from core.lab import Lab
from core.settings import Settings
from prepare import prepare
from researchers import command

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def win32(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(sys, "platform", "win32")
    return monkeypatch


# --- a spreadsheet ------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib keeps os's functions to itself there")
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="who holds a file is read from /proc")
def test_results_that_are_open_elsewhere_are_told_once_and_end_no_night(
    settings: Settings, tmp_path: Path, win32: pytest.MonkeyPatch
) -> None:
    win32.setattr(files.replace_open, "__defaults__", (0.05,))
    lab, told = make_lab(tmp_path / "lab", settings), []
    loop = Loop(lab, Night(), Scripted(), told.append)
    refuse_open_files(win32)
    with (lab.path / "results.tsv").open() as spreadsheet:
        loop.run(Limits(experiments=3))
        assert loop.judge(recipe(0.5), "better").is_kept
        assert len(spreadsheet.readlines()) == 1  # the head, of when the lab was made
    held = [e for e in told if e.kind == "note" and "results.tsv is open elsewhere" in e.data["text"]]
    assert len(held) == 1
    assert not list(lab.path.glob(".results.tsv*"))
    Loop(lab, Night(), Scripted(), told.append).run(Limits(experiments=1))
    check(lab)
    with (lab.path / "results.tsv").open():
        assert lab.undo(4) == [4]
    assert "results.tsv is open elsewhere" in lab.ledger.events()[-1].text


def test_a_folder_that_cannot_be_written_is_still_an_error_elsewhere(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    made = make_lab(tmp_path / "lab", settings)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("core.lab.replace_file", refuse)
    with pytest.raises(PermissionError):
        made.write_results_tsv()


def test_the_file_that_is_held_is_named_and_not_the_one_beside_it(
    settings: Settings, tmp_path: Path, win32: pytest.MonkeyPatch
) -> None:
    def held(self: Path, target: Path) -> None:
        raise PermissionError(13, "in use", str(self), 5, str(target))

    made = make_lab(tmp_path / "lab", settings)
    (made.path / "train.py").unlink()  # to be put back
    win32.setattr(files.replace_open, "__defaults__", (0.05,))
    real = Path.replace
    win32.setattr(Path, "replace", lambda self, to: held(self, to) if to.name == "train.py" else real(self, to))
    with pytest.raises(UserError, match=r"lab.train\.py cannot be written"):
        Loop(made, Night(), Scripted(), lambda event: None).run(Limits(experiments=1))


# --- Git for Windows ----------------------------------------------------------------------------------


@pytest.fixture
def crlf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's git ends lines as Git for Windows does, and by attributes as well."""
    (tmp_path / ".gitconfig").write_text(f"[core]\n\tautocrlf = true\n\tattributesFile = {tmp_path / 'attributes'}\n")
    (tmp_path / "attributes").write_text("*.py text eol=crlf\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "GIT_CONFIG_GLOBAL"):
        monkeypatch.delenv(name, raising=False)


def edit(lab: Lab) -> None:
    (lab.path / "train.py").write_bytes(recipe(1.0, mark="an edit of my own"))


def drop_as_told(lab: Lab, refused: LabError) -> None:
    """The command that the error gives to drop what was edited does so, and `git checkout`, which many would use."""
    found = re.search(r"`autoresearch (best .*? --source --out .*?train\.py'?)`", str(refused))
    assert found
    here = f"{commands.quoted(sys.executable)} {commands.quoted(ROOT / 'cli.py')}"
    for typed in (f"{here} {found[1]}", f"git -C {commands.quoted(lab.path)} checkout train.py"):
        edit(lab)
        subprocess.run(typed, shell=True, check=True)
        assert lab.working_source() == lab.best_source() and b"\r" not in lab.working_source()


def one_more(lab: Lab) -> None:
    Loop(lab, Night(), Scripted(), lambda event: None).run(Limits(experiments=1))


@pytest.mark.skipif(sys.platform == "win32", reason="the command is run by sh")
@pytest.mark.parametrize("made", ["now", "before"])
def test_the_command_that_drops_an_edit_does_so(crlf: None, settings: Settings, tmp_path: Path, made: str) -> None:
    lab = make_lab(tmp_path / "Jane Doe" / "lab", settings)
    one_more(lab)
    attributes = lab.path / ".git" / "info" / "attributes"
    if made == "before":
        git(lab, "config", "--local", "--unset", "core.autocrlf")
        attributes.write_text("*.py text eol=crlf")  # the user's own line
    edit(lab)
    with pytest.raises(LabError, match="not judged") as refused:
        one_more(lab)
    drop_as_told(lab, refused.value)
    one_more(lab)
    if made == "before":
        assert attributes.read_text().splitlines() == ["*.py text eol=crlf", "* -text"]
    one_more(lab)
    assert attributes.read_text().count("* -text") == 1
    check(lab)


@pytest.mark.skipif(sys.platform == "win32", reason="the command is run by sh")
def test_undo_in_a_lab_from_before_gives_a_command_that_works(crlf: None, settings: Settings, tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "lab", settings)
    judge = Loop(lab, None, Scripted(), lambda event: None).judge
    judge(lab.working_source(), "baseline")
    assert judge(recipe(1.5), "better").is_kept
    git(lab, "config", "--local", "--unset", "core.autocrlf")
    (lab.path / ".git" / "info" / "attributes").unlink()
    edit(lab)
    with pytest.raises(LabError, match="not judged") as refused:
        lab.undo(2)
    drop_as_told(lab, refused.value)
    assert lab.undo(2) == [2]
    assert lab.working_source() == lab.best_source()


# --- command lines ------------------------------------------------------------------------------------


def test_a_command_line_of_windows_is_read_as_it_is_typed(win32: pytest.MonkeyPatch) -> None:
    line = r'"C:\Program Files\agent\agent.exe" --say "one idea" --log="C:\my logs" C:\x {prompt_file}'
    words = [r"C:\Program Files\agent\agent.exe", "--say", "one idea", r"--log=C:\my logs", r"C:\x", "{prompt_file}"]
    assert command._split(line) == words
    assert command._split(r"'C:\a b\c' ''") == [r"C:\a b\c", ""]  # PowerShell 5 hands no double quotes on
    with pytest.raises(UserError, match="cannot be read"):
        command._split('agent "open')


@given(st.lists(st.text(st.characters(exclude_characters='"', exclude_categories=["Cs"])), min_size=1))
@budget(deadline=None)
def test_whatever_stands_in_quotes_is_one_word(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        assert command._split(" ".join(f'"{word}"' for word in words)) == words


def test_a_task_of_many_lines_is_no_argument_of_cmd(win32: pytest.MonkeyPatch) -> None:
    win32.setattr(command.shutil, "which", lambda name: rf"C:\npm\{name}.CMD")
    with pytest.raises(UserError, match=r"cmd\.exe.*standard input"):
        command.Command("agent --task {prompt}")
    assert command.Command("agent --task {prompt_file}").argv[1:] == ["--task", "{prompt_file}"]
    for name in ("ClaudeCode", "Codex", "Aider", "Gemini"):
        getattr(command, name)()


@pytest.mark.parametrize(
    ("path", "told"),
    [(r"C:\labs\night", r"C:\labs\night"), (r"C:\Users\Jane Doe\lab", r'"C:\Users\Jane Doe\lab"'), ("a(1)", '"a(1)"')],
)
def test_a_path_is_told_as_it_has_to_be_typed(win32: pytest.MonkeyPatch, path: str, told: str) -> None:
    assert commands.quoted(path) == told


def test_torch_is_told_by_one_command_that_powershell_runs(win32: pytest.MonkeyPatch) -> None:
    """In the release that the Triton of `[rtx]` is built for."""
    win32.setattr(sys, "executable", r"C:\Users\Jane Doe\.venv\Scripts\python.exe")
    told = torchbuild.install(570)
    assert told.startswith(r'& "C:\Users\Jane Doe\.venv\Scripts\python.exe" -m pip install --force-reinstall "torch>=')
    assert told.endswith(" --index-url https://download.pytorch.org/whl/cu126")  # cu128 has no torch since 2.12
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{one}; sys_platform' in pyproject for one in (torchbuild.WINDOWS_TORCH, torchbuild.WINDOWS_TRITON))
    assert torchbuild.windows_triton(torchbuild.WINDOWS_TORCH.partition(">=")[2]) == torchbuild.WINDOWS_TRITON
    assert f'"{torchbuild.WINDOWS_TORCH}"' in (ROOT / "README.md").read_text(encoding="utf-8")
    win32.setattr(sys, "executable", r"C:\venv\Scripts\python.exe")
    assert torchbuild.install(0).startswith(r"C:\venv\Scripts\python.exe -m pip")


@pytest.mark.parametrize(
    ("driver", "capability", "action"),
    [
        ("572.83", (8, 9), "whl/cu126"),
        ("581.29", (8, 9), "whl/cu130"),
        ("581.29", (12, 0), "whl/cu130"),
        ("572.83", (12, 0), "update the driver to 580 or newer"),
        ("572.83", (10, 0), "update the driver to 580 or newer"),
        ("472.12", (8, 6), "update the driver to 525 or newer"),
    ],
)
def test_the_index_that_is_named_has_a_torch_for_driver_and_card(
    driver: str, capability: tuple[int, int], action: str
) -> None:
    wrong = torchbuild.problem(torchbuild.TorchBuild("2.15.0", ""), driver, capability)
    assert wrong and action in wrong.action and ("pip" in wrong.action) == ("whl" in action)


def test_a_build_that_has_no_code_for_the_card_is_told() -> None:
    build = torchbuild.TorchBuild("2.14.1+cu126", "12.6")
    wrong = torchbuild.problem(build, "581.29", (12, 0))
    assert wrong and "no code for compute capability 12.0" in wrong.fact and "whl/cu130" in wrong.action
    assert torchbuild.problem(build, "581.29", (8, 9)) is None
    assert torchbuild.problem(torchbuild.TorchBuild("2.11.0+cu128", "12.8"), "572.83", (12, 0)) is None


# --- Ctrl-C, windows, sleep ---------------------------------------------------------------------------


class Refused(Exception):
    """Nothing is started; the options are what is looked at."""


@pytest.fixture
def started(win32: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    options: list[dict[str, Any]] = []

    def popen(argv: list[str], **more: Any) -> None:
        options.append(more)
        raise Refused

    win32.setattr(subprocess, "Popen", popen)
    yield options
    assert len(options) == 1
    flags = options[0]["creationflags"]
    assert flags & 0x200  # CREATE_NEW_PROCESS_GROUP: no Ctrl-C
    assert flags & 0x8000000  # CREATE_NO_WINDOW
    assert not flags & 0x8  # DETACHED_PROCESS: each `git` that such a process starts opens a window


def test_the_process_that_judges_is_apart(started: list[dict[str, Any]], tmp_path: Path) -> None:
    with contextlib.suppress(Refused):
        trying._spawn(SimpleNamespace(record=tmp_path, path=tmp_path), 1)  # type: ignore[arg-type]


def test_the_keeper_of_an_agent_is_apart(started: list[dict[str, Any]], tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    orders = kept.Orders(["agent"], {}, tmp_path, nothing, nothing, nothing, 1.0)
    with contextlib.suppress(Refused):
        kept.run_kept(orders, lambda: False)


def test_the_agent_is_apart(started: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "in").touch()
    places = {name: str(tmp_path / name) for name in ("out", "err")}
    with contextlib.suppress(Refused):
        keeper._keep({"argv": ["agent"], "cwd": ".", "stdin": str(tmp_path / "in"), **places}, threading.Event())


def test_what_holds_sleep_off_is_apart(started: list[dict[str, Any]], win32: pytest.MonkeyPatch) -> None:
    win32.setattr(awake, "command", lambda: (["helper"], "sleep is held off"))
    with contextlib.suppress(Refused), awake.awake():
        pass


def test_elsewhere_apart_is_a_session() -> None:
    if sys.platform != "win32":
        assert apart.apart() == {"start_new_session": True}


@pytest.mark.parametrize(("answer", "ends"), [(0, True), (0x80000000, False)])
def test_windows_refusal_to_stay_awake_ends_the_helper(
    monkeypatch: pytest.MonkeyPatch, answer: int, ends: bool
) -> None:
    import ctypes

    kernel = SimpleNamespace(SetThreadExecutionState=lambda flags: answer)
    reads: list[int] = []
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=lambda: reads.append(1))))
    with pytest.raises(SystemExit, match="1") if ends else contextlib.nullcontext():
        exec(awake._WINDOWS)
    assert bool(reads) is not ends


# --- files --------------------------------------------------------------------------------------------


def test_a_log_is_written_as_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags, real, binary = [], os.open, 0x40000000  # a flag that Linux has not

    def opened(path: Path, how: int, *more: Any, **named: Any) -> int:
        if path == tmp_path / "log":
            flags.append(how)
        return real(path, how & ~binary, *more, **named)

    monkeypatch.setattr(os, "O_BINARY", binary, raising=False)
    monkeypatch.setattr(os, "open", opened)
    log = childlog.CappedLog(tmp_path / "log", 1000)
    log.add(b"a line\n")
    log.close()
    assert [how & binary for how in flags] == [binary]


def test_condas_libraries_are_on_the_path_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    places = [tmp_path, tmp_path / "DLLs", tmp_path / "Library" / "bin", tmp_path / "Library" / "mingw-w64" / "bin"]
    system = [r"C:\Windows\System32", r"C:\Windows"]
    monkeypatch.delenv("SYSTEMROOT", raising=False)
    assert sandbox_windows.environment(tmp_path, tmp_path)["PATH"].split(";") == [str(tmp_path), *system]
    for place in places[1:]:
        place.mkdir(parents=True)
    assert sandbox_windows.environment(tmp_path, tmp_path)["PATH"].split(";") == [*map(str, places), *system]


def test_prepared_data_is_hashed_whole_once_in_a_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit whose time was set back leaves no trace there: the "ctime" of Windows is when a file was made."""
    hashed: list[str] = []
    real = data.file_sha256
    lab = make_lab(tmp_path / "lab", settings)
    lab.dataset()
    monkeypatch.setattr(data, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    lab.dataset()
    assert hashed == []
    monkeypatch.setattr(sys, "platform", "win32")
    again = Lab.open(lab.path)
    again.dataset()
    assert {"train-00000.bin", "val-00000.bin", "holdout-00000.bin"} < set(hashed)
    hashed.clear()
    again.dataset()
    assert hashed == []


def test_a_space_in_a_users_name_moves_the_home_on_a_mac_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = tmp_path / "Jane Doe"
    usual = user / "AppData" / "Local" / "autoresearch"
    monkeypatch.delenv("AUTORESEARCH_HOME")
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setenv("USERPROFILE", str(user))

    def place(name: str, appauthor: str | bool | None = None) -> str:
        return str(usual if appauthor is False else usual / name)  # Windows' is below an author, by default the name

    monkeypatch.setattr(platformdirs, "user_data_dir", place)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert paths.home() == user / ".autoresearch"
    monkeypatch.setattr(sys, "platform", "win32")
    assert paths.home() == usual
    (user / ".autoresearch" / "records").mkdir(parents=True)  # of a lab from when this was the place
    assert paths.home() == user / ".autoresearch"
    usual.mkdir(parents=True)
    assert paths.home() == usual


# --- a text of one's own --------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="who holds a file is read from /proc")
def test_a_text_that_changes_meanwhile_leaves_nothing_behind_where_no_open_file_is_removed(
    tmp_path: Path, win32: pytest.MonkeyPatch
) -> None:
    win32.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    refused = refuse_open_files(win32)
    text = tmp_path / "own.jsonl"
    documents = [json.dumps({"text": f"{number} " * 40}) for number in range(100)]
    text.write_text("\n".join(documents))

    def change(line: str) -> None:
        if line.startswith("encoding"):
            text.write_text("\n".join(documents[:-1]))

    with pytest.raises(UserError, match="changed while it was prepared"):
        prepare(text=text, vocab_size=300, progress=change)
    assert list((tmp_path / "home" / "data").iterdir()) == [] == refused


@pytest.mark.parametrize(("encoding", "name"), [("utf-16", "UTF-16"), ("latin-1", "ISO-8859-1")])
def test_a_text_of_another_encoding_is_converted_by_what_windows_has(
    encoding: str, name: str, tmp_path: Path, win32: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "own.txt"
    text.write_bytes("Käse und Brot".encode(encoding))
    with pytest.raises(UserError) as caught:
        prepare(text=text)
    assert f"ReadAllText('{text}', [Text.Encoding]::GetEncoding('{name}'))" in caught.value.action
    assert f"WriteAllText('{tmp_path / 'utf8-own.txt'}'" in caught.value.action and "iconv" not in caught.value.action


# --- a pipe that nobody reads any more -----------------------------------------------------------------

READER_GONE = """
import errno, io, os, sys
class Pipe(io.FileIO):
    def write(self, data):
        try:
            return super().write(data)
        except BrokenPipeError:
            raise OSError(errno.EINVAL, "Invalid argument") from None
sys.stdout = io.TextIOWrapper(io.BufferedWriter(Pipe(1, "w", closefd=False)), write_through=True)
import cli
sys.platform = "win32"
@cli.cli.command("wordy")
def wordy():
    for number in range(30_000):
        print("line", number)
    if {asked!r} == "other":
        os.lseek(os.open(os.devnull, os.O_RDONLY), -1, 7)
cli.cli.main(["wordy"])
"""


@pytest.mark.parametrize("asked", ["pipe", "other"])
def test_a_reader_that_has_seen_enough_is_no_error(asked: str) -> None:
    """`autoresearch log | select -first 5`: what is EPIPE elsewhere is EINVAL on Windows (seen under Wine)."""
    code = [sys.executable, "-c", READER_GONE.format(asked=asked)]
    with subprocess.Popen(code, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "line 0\n"
        if asked == "other":
            process.stdout.read()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert said == "" if asked == "pipe" else "Invalid argument" in said


@pytest.mark.parametrize(
    ("given", "bad"),
    [
        ("labs/x:y", "x:y"),
        ("con", "con"),
        ("labs/NUL.txt", "NUL.txt"),
        ("com1/nov24", "com1"),
        ("what?", "what?"),
        ("labs/nov24.", "nov24."),
        ("C:/labs/aux", "aux"),
        ("C:/labs/nov24", ""),
        ("//server/share/nov24", ""),
        ("../console", ""),
        ("./labs/com10", ""),
        ("nov24", ""),
    ],
)
def test_a_name_that_windows_takes_for_something_else_makes_no_lab(monkeypatch, tmp_path, given, bad):
    """`x:y` would be another stream of a file x, in which git then finds no repository; `con` is the console."""
    assert windows.unusable_name(Path(given)) == bad
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "platform", "win32")
    if bad:
        with pytest.raises(UserError, match="cannot be the name of a folder on Windows"):
            places.new_folder(given, None)
