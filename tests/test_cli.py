"""The command line through real processes: exit status, what is said where, JSON, and a whole small lab."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core import locks
from core.commands import quoted
from core.lab import Lab
from core.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
CLI = ROOT / "cli.py"
VERBS = ["run", "log", "report", "doctor", "prepare", "init", "try", "wait", "train", "status", "best", "show", "diff",
         "sample", "bench", "kernels", "mcp", "pause", "resume", "stop", "undo", "clean"]  # fmt: skip


class Running(subprocess.Popen[str]):
    """A verb with --json that still runs."""

    def until(self, event: str) -> dict[str, Any]:
        """The next event of this kind."""
        assert self.stdout is not None
        return next(found for line in self.stdout if (found := json.loads(line))["event"] == event)

    def rest(self) -> list[dict[str, Any]]:
        assert self.stdout is not None
        return [json.loads(line) for line in self.stdout]


CALLED = f"{quoted(sys.executable)} {quoted(CLI)}"


class Shell:
    """Runs `autoresearch` in a folder of its own with a home of its own."""

    def __init__(self, cwd: Path, home: Path) -> None:
        self.cwd, self.home = cwd, home
        self.env = {**os.environ, "AUTORESEARCH_HOME": str(home), "COLUMNS": "100", "NO_COLOR": "1"}

    def start(self, *argv: str, **more: Any) -> Running:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return Running([sys.executable, str(CLI), *argv], cwd=self.cwd, env=self.env, text=True,
                                **{**pipes, **more})  # fmt: skip

    @contextmanager
    def running(self, *argv: str) -> Iterator[Running]:
        """Ended at the end of the block, whatever happens in it."""
        child = self.start(*argv, stderr=subprocess.DEVNULL)
        try:
            yield child
        finally:
            child.kill()
            child.communicate(timeout=30)

    def __call__(self, *argv: str, status: int = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        child = self.start(*argv)
        out, err = child.communicate(timeout=timeout)
        assert child.returncode == status, f"{argv}: {child.returncode}\n{out}\n{err}"
        assert "Traceback" not in err
        return subprocess.CompletedProcess(argv, child.returncode, out, err)

    def json(self, *argv: str, status: int = 0) -> Any:
        return json.loads(self(*argv, "--json", status=status).stdout)

    def json_error(self, *argv: str) -> Any:
        return json.loads(self(*argv, "--json", status=1).stderr)["error"]

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


def test_without_git_the_next_step_is_told(shell: Shell) -> None:
    shell.env["PATH"] = str(shell.cwd)
    assert "git was not found" in shell("log", status=1).stderr
    assert "apt-get install git" in shell.json_error("log")["action"]


def test_help_loads_nothing_heavy(shell: Shell) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['autoresearch', '--help']\n"
        "import atexit\n"
        "atexit.register(lambda: print(sorted(m for m in sys.modules if '.' not in m), file=sys.stderr))\n"
        "import cli; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=shell.env, check=True)
    loaded = set(eval(done.stderr.strip().splitlines()[-1]))
    assert "click" in loaded
    heavy = {"torch", "mlx", "numpy", "rich", "git", "optuna", "matplotlib", "anthropic", "psutil", "sqlite3"}
    assert not loaded & (heavy | {"platformdirs", "core", "kernels", "prepare", "tiktoken"})


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(shell: Shell, verb: str) -> None:
    text = shell(verb, "--help").stdout
    assert "--json" in text
    assert re.search(rf"\n +{CALLED} {verb}", text) and f"Usage: {CALLED} {verb}" in " ".join(text.split())
    assert not re.search(r"autoresearch [a-z]+ --", text)


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
        (["show", "x"], "is not an integer"),
        (["run", "--hours", "x"], "is not a number"),
        (["run", "--hours", "721"], "more than 0, at most 720"),
        (["run", "--vocab", "256"], "at least 257"),
        (["prepare", "--vocab", "256"], "at least 257"),
        (["log", "here", "--lab", "there"], "say the same; give one of them"),
        (["wait", "1", "--timeout", "soon"], "not a duration"),
        (["log", "--nonsense"], "--nonsense"),
    ],
)
def test_bad_usage_is_status_2_and_one_line(shell: Shell, argv: list[str], says: str) -> None:
    done = shell(*argv, status=2)
    assert says in done.stderr and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    verb = f"{argv[0]} " if argv[0] in VERBS else ""
    assert "--help" not in done.stderr or f"{CALLED} {verb}--help`" in done.stderr
    error = json.loads(shell(*argv, "--json", status=2).stderr)
    assert says.split()[0] in error["error"]["fact"]


def test_an_option_without_its_argument_names_the_help_of_its_verb(shell: Shell) -> None:
    told = f"requires an argument; see `{CALLED} run --help`\n"
    assert shell("run", "--json", "nov30", "--text", status=2).stderr.count("requires an argument") == 1
    assert shell("run", "nov30", "--text", status=2).stderr.endswith(told)


@pytest.mark.parametrize(
    "argv",
    [[v] for v in ("log", "report", "status", "best", "pause", "resume", "stop", "clean", "train")]
    + [["show", "1"], ["diff", "1"], ["undo", "1"], ["wait", "1"], ["try", "-m", "x"], ["sample", "--prompt", "x"]],
)
def test_without_any_lab_every_verb_says_how_to_get_one(shell: Shell, argv: list[str]) -> None:
    done = shell(*argv, status=1)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert f"; {CALLED} run --demo (or: {CALLED} init)" in done.stderr
    error = json.loads(shell(*argv, "--json", status=1).stderr)["error"]
    assert error["kind"] == "LabError" and error["fact"] and error["action"]


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("doctor", "prepare", "init", "bench", "kernels")])
def test_every_verb_that_takes_a_lab_takes_it_by_option_and_explains_it(shell: Shell, verb: str) -> None:
    assert "--lab LAB" in shell(verb, "--help").stdout
    assert "the lab you stand in, else the last used" in " ".join(shell(verb, "--help").stdout.split())


def test_no_help_shows_ranges_of_numbers_or_ends_in_the_middle(shell: Shell) -> None:
    texts = [shell("--help").stdout, *(shell(verb, "--help").stdout for verb in ("run", "confirm", "prepare", "bench"))]
    for text in texts:
        assert "RANGE" not in text and "x>=" not in text and "python prepare.py" not in text
    assert "..." not in texts[0].replace("[ARGS]...", "")


@pytest.mark.parametrize("options", [[], ["-u", "-X", "utf8"]])
def test_a_module_tells_commands_as_it_was_called(shell: Shell, options: list[str]) -> None:
    """From a clone whose command is not installed."""

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        given = [sys.executable, *options, "-m", *argv]
        env = {**shell.env, "PYTHONPATH": str(ROOT)}
        return subprocess.run(given, cwd=shell.cwd, env=env, capture_output=True, text=True, check=False)

    python = " ".join([quoted(sys.executable), *options])
    name = f"{python} -m cli"
    assert call("cli", "--help").stdout.startswith(f"Usage: {name} [OPTIONS]")
    said = " ".join(call("cli", "bench", "kernels", "--help").stdout.split())
    assert said.startswith(f"Usage: {name} bench kernels [OPTIONS]")
    assert f"    {name} prepare kjv --vocab 2048 " in call("cli", "prepare", "--help").stdout
    assert f"; {name} run --demo (or: {name} init)" in call("cli", "log").stderr
    assert f"see `{name} run --help`" in call("cli", "run", "--hours", "x").stderr
    alone = call("prepare", "--help").stdout
    assert " ".join(alone.split()).startswith(f"Usage: {python} -m prepare [OPTIONS]")
    assert f"    {python} -m prepare kjv --vocab 2048 " in alone and "autoresearch prepare" not in alone


@pytest.mark.skipif(sys.platform == "win32", reason="the launcher is a script of POSIX")
@pytest.mark.parametrize("name", [".venv/bin/autoresearch", "autoresearch", "uv run autoresearch"])
def test_commands_are_spelled_as_they_work_here(shell: Shell, name: str) -> None:
    """`.venv/bin/autoresearch` of an environment that is not activated; of one that is; and by `uv run`."""
    script = shell.cwd / ".venv" / "bin" / "autoresearch"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nimport cli\ncli.main()\n")
    script.chmod(0o755)
    path = "/usr/bin:/bin" if name.startswith(".venv") else f"{script.parent}{os.pathsep}/usr/bin:/bin"
    env = {variable: said for variable, said in shell.env.items() if not variable.startswith("UV_")} | {"PATH": path}
    env |= {"UV_RUN_RECURSION_DEPTH": "1"} if name.startswith("uv") else {}

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        given = [".venv/bin/autoresearch", *argv]
        return subprocess.run(given, cwd=shell.cwd, env=env, capture_output=True, text=True, check=False)

    assert f"\n  {name} run --demo " in call("--help").stdout
    assert call("--help").stdout.startswith(f"Usage: {name} [OPTIONS]")
    assert f"\n  {name} log nov24 --kept\n" in call("log", "--help").stdout
    assert call("bench", "compare", "--help").stdout.startswith(f"Usage: {name} bench compare [")
    assert f"    {name} prepare kjv --vocab 2048 " in call("prepare", "--help").stdout
    assert f"see `{name} --help`" in call("nosuch").stderr
    assert f"; {name} run --demo" in call("log").stderr
    assert json.loads(call("log", "--json").stderr)["error"]["action"].startswith(f"{name} run --demo")


def test_doctor_says_who_could_be_asked_for_proposals(shell: Shell) -> None:
    folder = shell.cwd / "bin"
    folder.mkdir()
    program = folder / ("codex.bat" if sys.platform == "win32" else "codex")
    program.write_text("")
    program.chmod(0o755)
    shell.env["PATH"] = f"{folder}{os.pathsep}/usr/bin:/bin"
    shell.env.pop("ANTHROPIC_API_KEY", None)
    shell.env.pop("ANTHROPIC_AUTH_TOKEN", None)
    child = shell.start("doctor", "--json")
    found = {check["name"]: check for check in json.loads(child.communicate(timeout=240)[0])["checks"]}
    assert found["researcher claude"]["ok"] is None and "ANTHROPIC_API_KEY" in found["researcher claude"]["action"]
    assert "`claude` is not on the PATH" in found["researcher claude-code"]["detail"]
    assert found["researcher codex"]["ok"] is True and "researcher aider" not in found


def test_the_verbs_that_hints_name_are_all(shell: Shell) -> None:
    from console.called import VERBS as known

    text = shell("--help").stdout
    assert sorted(known) == sorted(re.findall(r"^  ([a-z]+)  ", text.partition("The three that matter")[2], re.M))


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


# --- a whole small lab, with real training -------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, home: Path, settings: Settings, tiny_recipe: str) -> Shell:
    """A shell that stands beside ./labs/small: a tiny recipe with one second of training."""
    cwd = tmp_path_factory.mktemp("small")
    Lab.create(
        cwd / "labs" / "small",
        recipe=tiny_recipe.encode(),
        program="# program\n",
        settings=replace(settings, budget=1.0),
        message="a tiny recipe",
        history=[{"description": "an old idea", "claimed_bpb": 0.9979, "status": "keep", "commit": "a1b2c3d"}],
    ).ledger.close()
    return Shell(cwd, home)


@pytest.mark.slow
@pytest.mark.timeout(300)
class TestASmallLab:
    """One story, in this order: each test goes on where the one before ended."""

    def test_before_the_first_run(self, small: Shell) -> None:
        assert "not measured yet" in small("status", "small").stdout or "baseline" in small("status").stdout
        assert small.json("log")["total"]["experiments"] == 0
        assert "no best" in small("best", status=1).stderr
        assert "no trained best" in small("sample", status=1).stderr
        assert "nothing runs" in small("pause", status=1).stderr

    def test_run_measures_a_baseline_and_goes_on(self, small: Shell) -> None:
        events = small.lines("run", "--experiments", "2")
        kinds = [event["event"] for event in events]
        assert kinds[0] == "run" and kinds[-1] == "end" and kinds.count("experiment") == 2
        first = next(e for e in events if e["event"] == "experiment")
        assert first["status"] == "keep" and first["description"] == "baseline" and 1 < first["val_bpb"] < 8
        assert any(e["event"] == "progress" and "loss" in e and "remaining" in e for e in events)
        assert events[0]["lab"]["scale"] == {
            "data": "kjv-v512", "context": 64, "budget_seconds": 1.0, "backend": "cpu", "device": "cpu",
        }  # fmt: skip

    def test_what_was_done_can_be_looked_at(self, small: Shell) -> None:
        log = small.json("log", "small")
        assert [e["number"] for e in log["experiments"]] == [1, 2]
        shape = {"number", "status", "val_bpb", "delta", "description", "seconds", "reason"}
        assert shape <= set(log["experiments"][0])
        text = small("log").stdout
        assert "last used" in text.splitlines()[0]
        assert "kjv-v512, 64 tokens of context, 1 s of training" in text and "baseline" in text
        best = small.json("best")
        assert best["best"]["outcome"]["curve"] and best["kept"]
        assert "def build(spec)" in small("best", "--source").stdout
        shown = small("show", "1").stdout
        assert "tokens/s" in shown and "training loss" in shown
        assert small.json("show", "2")["diff"].startswith("--- ")
        assert "+" in small("diff", "2").stdout
        assert "1 to 2" in small("show", "9", status=1).stderr
        status = small.json("status")
        assert status["running"] is None and status["best"]["number"] == best["best"]["number"]

    def test_standing_in_the_lab(self, small: Shell) -> None:
        inside = Shell(small.cwd / "labs" / "small", small.home)
        assert "you stand in it" in inside("status").stdout.splitlines()[0]

    def test_a_changed_train_py_is_not_run_over(self, small: Shell) -> None:
        file = small.cwd / "labs" / "small" / "train.py"
        before = file.read_bytes()
        file.write_bytes(before + b"# mine\n")
        error = small("run", "--experiments", "1", status=1).stderr
        assert "not judged" in error and "try" in error
        assert file.read_bytes() == before + b"# mine\n"
        file.write_bytes(before)

    def test_other_settings_are_refused(self, small: Shell) -> None:
        for option in (
            ["--budget", "2"],
            ["--verdict", "statistical"],
            ["--data", "tinystories"],
            ["--text", "x"],
            ["--backend", "cuda"],
        ):
            error = small("run", "small", *option, status=1).stderr
            assert "locked" in error and option[0] in error
        assert "exists and is not empty" in small("init", "small", status=1).stderr

    def test_try_without_waiting_twice_is_one_experiment(self, small: Shell) -> None:
        file = small.cwd / "labs" / "small" / "train.py"
        file.write_bytes(file.read_bytes().replace(b"WIDTH = 32", b"WIDTH = 64"))
        callers = [small.start("try", "-m", "wider", "--no-wait", "--json") for _ in range(2)]
        answers = [caller.communicate(timeout=60) for caller in callers]
        assert [caller.returncode for caller in callers] == [0, 0], answers
        numbers = {json.loads(out)["number"] for out, _ in answers}
        assert numbers == {3}
        assert small("wait", "3", "--timeout", "0", status=124).stdout
        again = small("try", "-m", "wider")
        assert len(again.stdout.splitlines()) < 15 and "#3" in again.stdout
        assert "64 tokens of context" in again.stdout
        assert small.json("wait", "3")["experiment"]["number"] == 3
        assert small.json("log")["total"]["experiments"] == 3

    def test_try_tells_what_is_wrong(self, small: Shell) -> None:
        file = small.cwd / "labs" / "small" / "train.py"
        best = file.read_bytes()
        assert "change it first" in small("try", "-m", "nothing").stdout
        file.write_bytes(best + b"import os\n")
        assert "os" in small("try", "-m", "look around", status=1).stderr
        assert "empty" in small("try", "-m", "  ", status=1).stderr
        file.write_bytes(best.replace(b"loss.backward()", b"raise RuntimeError('on purpose')"))
        done = small("try", "-m", "raise an error", status=1)
        assert "crash" in done.stdout and "on purpose" in done.stdout and len(done.stdout.splitlines()) < 15
        assert file.read_bytes() == best
        assert small.json("show", "4")["experiment"]["val_bpb"] is None

    def test_ctrl_c_ends_at_once_and_resumably(self, small: Shell) -> None:
        before = small.json("log")["total"]["experiments"]
        with small.running("run", "--json", "--hours", "5") as running:
            again = running.until("run")["again"]
            assert re.fullmatch(rf"{CALLED} run labs/small --until \d\d:\d\d", again), again
            seen = [running.until("progress")]
            error = small("run", status=1).stderr
            assert str(running.pid) in error and "in use" in error
            state = small.json("status")["running"]
            assert state["pid"] == running.pid
            running.send_signal(signal.SIGINT)
            seen += running.rest()
            assert running.wait(30) == 130
        assert seen[-1]["event"] == "end" and seen[-1]["signal"] == "Ctrl-C"
        log = small.json("log")
        assert log["total"]["experiments"] == before + seen[-1]["new"]  # what ran is not counted
        assert small.json("status")["running"] is None

    def test_pause_resume_and_stop_from_outside(self, small: Shell) -> None:
        with small.running("run", "--json") as running:
            running.until("start")
            assert "pause" in small("pause").stdout
            running.until("waiting")
            for _ in range(50):  # the live state is published once a second
                state = small.json("status")["running"]["state"]
                if state == "paused":
                    break
                time.sleep(0.1)
            assert state == "paused"
            small("resume")
            running.until("start")
            small("stop")
            assert running.rest()[-1]["event"] == "end"
            assert running.wait(30) == 0

    def test_report(self, small: Shell, tmp_path: Path) -> None:
        made = small.json("report", "--out", str(tmp_path / "report"))
        assert Path(made["html"]).read_text().startswith("<!doctype html>")
        assert Path(made["png"]).read_bytes().startswith(b"\x89PNG")
        assert "baseline" in small("report").stdout
        assert (small.cwd / "labs" / "small" / "report.html").exists()

    def test_sample_streams_text(self, small: Shell) -> None:
        done = small.json("sample", "--prompt", "And God said", "--tokens", "12", "--seed", "3")
        assert done["prompt"] == "And God said" and done["tokens"] <= 12
        text = small("sample", "--prompt", "And God said", "--tokens", "12", "--seed", "3").stdout
        assert "And God said" + done["text"] in text

    def test_sample_slows_no_experiment_down_unless_asked(self, small: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AUTORESEARCH_HOME", str(small.home))
        with locks.hold_device("cpu"):
            refused = small("sample", "--prompt", "And", status=1)
            assert "the device cpu is in use" in refused.stderr and "And" not in refused.stdout
            assert small.json("sample", "--prompt", "And", "--tokens", "3", "--beside")["tokens"] <= 3

    def test_train_prints_upstreams_summary_and_exports(self, small: Shell, tmp_path: Path) -> None:
        out = tmp_path / "model"
        text = small("train", "--budget", "1", "--out", str(out)).stdout
        names = [line.partition(":")[0] for line in text.partition("---\n")[2].splitlines()[:9]]
        assert names == [
            "val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M",
            "num_steps", "num_params_M", "depth",
        ]  # fmt: skip
        assert {p.name for p in out.iterdir()} >= {"weights.safetensors", "tokenizer.tiktoken", "train.py", "README.md"}
        assert "not an empty folder" in small("train", "--out", str(out), status=1).stderr
        assert "no file" in small("train", "--recipe", "nothing.py", status=1).stderr

    def test_undo_and_clean(self, small: Shell) -> None:
        kept = [e["number"] for e in small.json("log", "--kept")["experiments"]]
        if len(kept) > 1:
            undone = small.json("undo", str(kept[-1]))
            assert undone["undone"] == [kept[-1]] and undone["best"]["number"] == kept[-2]
        assert "baseline" in small("undo", str(kept[0]), status=1).stderr
        assert {"items", "bytes", "freed"} <= set(small.json("clean"))
        assert small.json("clean", "--yes")["freed"] is True

    def test_what_was_handed_in_and_is_judged_by_nobody_is_said_to_be_so(self, small: Shell) -> None:
        folder = small.cwd / "labs" / "small"
        (folder / "train.py").write_bytes((folder / "train.py").read_bytes() + b"# another\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AUTORESEARCH_HOME", str(small.home))
            lab = Lab.open(folder)
            sha = lab.ledger.experiments()[0].fingerprint
            best = lab.best()
            assert best is not None
            number = lab.ledger.propose(
                source=lab.working_source(), program=lab.program(), fingerprint=sha, description="another",
                researcher="you", parent=best.number,
            )  # fmt: skip
            lab.ledger.close()
        said = small("try", "-m", "another").stdout
        assert f"#{number} was handed in before, and is judged now" in said and "already" not in said

    def test_keys_end_a_run_in_a_terminal_after_the_run_under_way(self, small: Shell) -> None:
        from test_keyboard import Terminal

        if sys.platform == "win32":
            pytest.skip("pseudo-terminals are POSIX")
        program = "import sys; sys.argv = ['cli.py', 'run', 'small', '--hours', '1']; import cli; cli.main()"
        shown = Terminal(program, cwd=small.cwd, home=small.home)
        try:
            shown.until("[q] end, after this run")
            shown.type("q")
            seen = shown.until("left=")
        finally:
            shown.close()
        assert "ended: asked to end after the run that was under way" in " ".join(seen.split())
        assert "status=0 echo=True left=0" in seen
        assert small.json("status")["running"] is None

    def test_a_read_only_place(self, small: Shell, tmp_path: Path) -> None:
        place = tmp_path / "file"
        place.write_text("not a folder")
        for argv in (["report", "--out", str(place)], ["train", "--out", str(place)], ["init", str(place / "lab")]):
            assert small(*argv, status=1).stderr.startswith("error: ")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_init_fits_commits_and_imports(shell: Shell, home: Path, tmp_path: Path) -> None:
    """The shipped recipe on this machine, with constants of an upstream clone."""
    clone = tmp_path / "clone"
    clone.mkdir()
    constants = ["MATRIX_LR = 2**-5", "DEPTH = 2", "ASPECT_RATIO = 64", "TOTAL_BATCH_SIZE = 2**10", "ZED = 1"]
    (clone / "train.py").write_text("\n".join(constants))
    results = ["commit\tval_bpb\tmemory_gb\tstatus\tdescription", "abc\t0.99\t4.0\tkeep\tbaseline"]
    (clone / "results.tsv").write_text("\n".join(results))
    (clone / "program.md").write_text("# their own strategy\n")
    shell.env["AUTORESEARCH_HOME"] = str(home)
    argv = ["init", "labs/one", "--backend", "cpu", "--budget", "2", "--vocab", "512", "--from", str(clone)]
    made = shell.json(*argv, "--min-delta", "0.002")
    lab = shell.cwd / "labs" / "one"
    assert made["settings"]["budget"] == 2.0 and made["settings"]["vocab_size"] == 512
    assert made["imported"]["carried"]["MATRIX_LR"] == 2**-5 and made["imported"]["unknown"] == {"ZED": 1}
    assert "MATRIX_LR = 0.03125" in (lab / "train.py").read_text()
    program = (lab / "program.md").read_text()
    assert program.startswith("# their own strategy\n") and "this part holds" in program
    assert "autoresearch try -m" in program and "Strategy (edit this)" not in program
    assert made["settings"]["min_delta"] == 0.002
    git = subprocess.run(["git", "-C", str(lab), "status", "--porcelain"], capture_output=True, text=True, check=True)
    assert git.stdout == ""
    assert Lab.open(lab).ledger.meta("history")[0]["claimed_bpb"] == 0.99
    assert f"{CALLED} run" in shell("status", "one").stdout
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        said = shell("init", "labs/two", "--backend", "cpu", "--budget", "2", "--vocab", "512").stdout
    finally:
        for process in burning:
            process.kill()
            process.wait()
    assert "cores busy beside our" in said and "the model may be too small" in said
    assert "our 0.0" not in said
