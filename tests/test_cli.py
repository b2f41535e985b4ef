"""The command line through real processes: exit status, what is said where, JSON, and a whole small lab."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLI = ROOT / "cli.py"
VERBS = (
    "run log report doctor prepare init try wait train status best show diff sample pause resume stop undo clean"
).split()


class Shell:
    """Runs `autoresearch` in a folder of its own with a home of its own."""

    def __init__(self, cwd: Path, home: Path) -> None:
        self.cwd, self.home = cwd, home
        self.env = {**os.environ, "AUTORESEARCH_HOME": str(home), "COLUMNS": "100", "NO_COLOR": "1"}

    def start(self, *argv: str, **more: Any) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, str(CLI), *argv], cwd=self.cwd, env=self.env, text=True,
                                **{**pipes, **more})  # fmt: skip

    def __call__(self, *argv: str, status: int = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        child = self.start(*argv)
        out, err = child.communicate(timeout=timeout)
        assert child.returncode == status, f"{argv}: {child.returncode}\n{out}\n{err}"
        assert "Traceback" not in err
        return subprocess.CompletedProcess(argv, child.returncode, out, err)

    def json(self, *argv: str, status: int = 0) -> Any:
        return json.loads(self(*argv, "--json", status=status).stdout)

    def lines(self, *argv: str, status: int = 0) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self(*argv, "--json", status=status).stdout.splitlines()]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    (tmp_path / "work").mkdir()
    return Shell(tmp_path / "work", tmp_path / "home")


# --- help and usage ------------------------------------------------------------------------------


def test_help_groups_the_verbs_and_puts_three_first(shell: Shell) -> None:
    text = shell("--help").stdout
    places = [text.index(f"\n  {verb} ") for verb in VERBS]
    assert places == sorted(places)
    assert text.index("The three that matter") < text.index("Before:")


def test_help_loads_nothing_heavy(shell: Shell) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['autoresearch', '--help']\n"
        "import atexit; atexit.register(lambda: print(sorted(m for m in sys.modules if '.' not in m), file=sys.stderr))\n"
        "import cli; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=shell.env, check=True)
    loaded = set(eval(done.stderr.strip().splitlines()[-1]))
    assert "click" in loaded
    assert not loaded & {"torch", "mlx", "numpy", "rich", "git", "optuna", "matplotlib", "anthropic", "psutil", "sqlite3",
                         "platformdirs", "core", "kernels", "prepare", "tiktoken"}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(shell: Shell, verb: str) -> None:
    text = shell(verb, "--help").stdout
    assert "--json" in text
    assert f"autoresearch {verb}" in text or f"prepare.py {'kjv' if verb == 'prepare' else ''}" in text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["rnu"], "did you mean `run`"),
        (["run", "--hours", "0"], "--hours"),
        (["run", "--hours", "1", "--until", "07:00"], "exclude each other"),
        (["run", "--until", "25:00"], "HH:MM"),
        (["run", "--budget", "5x"], "1h30m"),
        (["run", "--budget", "0"], "out of range"),
        (["run", "--budget", "-1"], "not a duration"),
        (["run", "--experiments", "0"], "experiments"),
        (["try"], "--message"),
        (["show"], "N"),
        (["show", "x"], "integer"),
        (["wait", "1", "--timeout", "soon"], "not a duration"),
        (["log", "--nonsense"], "--nonsense"),
    ],
)
def test_bad_usage_is_status_2_and_one_line(shell: Shell, argv: list[str], says: str) -> None:
    done = shell(*argv, status=2)
    assert says in done.stderr and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    error = json.loads(shell(*argv, "--json", status=2).stderr)
    assert says.split()[0] in error["error"]["fact"]


@pytest.mark.parametrize(
    "argv",
    [[v] for v in ("log", "report", "status", "best", "pause", "resume", "stop", "clean", "train")]
    + [["show", "1"], ["diff", "1"], ["undo", "1"], ["wait", "1"], ["try", "-m", "x"], ["sample", "--prompt", "x"]],
)
def test_without_any_lab_every_verb_says_how_to_get_one(shell: Shell, argv: list[str]) -> None:
    done = shell(*argv, status=1)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert "autoresearch" in done.stderr
    error = json.loads(shell(*argv, "--json", status=1).stderr)["error"]
    assert error["kind"] == "LabError" and error["fact"] and error["action"]


def test_a_lab_that_is_not_there(shell: Shell) -> None:
    for given in ("nowhere", "/no/such/place"):
        assert "nowhere" in shell("log", given, status=1).stderr or given.startswith("/")


def test_others_packages_of_our_names_are_noticed(shell: Shell, tmp_path: Path) -> None:
    """A folder `kernels` that lies before ours on the import path is named, and nothing of it is run."""
    other = tmp_path / "other" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit('it was run')\n")
    code = f"import sys; sys.path[:0] = [{str(other.parent)!r}, {str(ROOT)!r}]; import cli; cli.cli.main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=shell.env, check=False)
    assert done.returncode == 1
    assert str(other) in done.stderr and "another package of that name" in done.stderr


def test_unknown_names_leave_no_lab_behind(shell: Shell) -> None:
    assert "search" in shell("run", "--researcher", "nobody", status=1).stderr
    assert "cpu" in shell("init", "--backend", "abacus", status=1).stderr
    assert "profile" in shell("init", "--backend", "cpu", "--profile", "nonesuch", status=1).stderr
    assert "kjv" in shell("init", "--backend", "cpu", "--data", "nonesuch", status=1).stderr
    assert "no folder" in shell("init", "--backend", "cpu", "--from", "nowhere", status=1).stderr
    assert "cannot name a lab" in shell("init", "--backend", "cpu", "--tag", "a/b", status=1).stderr
    assert not any((shell.cwd / "labs").glob("*")) if (shell.cwd / "labs").exists() else True
