"""Coding agents by a command line: what comes back, what does not, and that nothing of them stays."""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import pytest
from scripted import Scripted, git, make_lab, recipe

import researchers
from core.contract import Unavailable, View
from core.errors import UserError
from core.kept import Orders, environment, run_kept
from core.lab import Lab
from core.loop import Limits, Loop
from core.settings import Settings
from researchers.agents import AGENTS, is_limit, is_login, read_codex, read_gemini, retry_after

AGENT = Path(__file__).with_name("fake_agent.py")
SECRET = "sk-planted-secret-0123456789"


def agent(behaviour: str, argument: object = "", **options: Any) -> Any:
    line = f"{sys.executable} {AGENT} {behaviour} '{argument}'"
    return researchers.make("command", command=line, **options)


def parses(source: bytes) -> str:
    try:
        ast.parse(source)
    except SyntaxError as error:
        return f"it is no Python: {error.msg}"
    return ""


@pytest.fixture
def lab(tmp_path: Path, settings: Settings) -> Lab:
    lab = make_lab(tmp_path / "lab", settings)
    Loop(lab, None, Scripted(), lambda event: None).judge(lab.working_source(), "baseline")
    return lab


def see(lab: Lab, **more: Any) -> View:
    return replace(lab.view({}), check=parses, spend=lab.ledger.spend, **more)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- good ----------------------------------------------------------------------------------------


def test_a_night_with_an_agent_and_an_idea_dropped_in_meanwhile(lab: Lab) -> None:
    def on_event(event: Any) -> None:
        if event.kind == "decided" and event.data["number"] == 2:
            (lab.path / "program.md").write_text("# try things\nTry rotary embeddings.\n")

    loop = Loop(lab, agent("good"), Scripted(), on_event)
    assert loop.run(Limits(experiments=3)).decided == 3
    first, later = lab.ledger.get(2), lab.ledger.get(4)  # the third was being thought of when the idea came
    assert first.researcher == "command" and "try things" in first.description
    assert "Try rotary embeddings." in later.description  # the file was read again
    assert b"MARK = 'agent 1'" in lab.source(2)
    assert first.detail["by"] == "command" and "dropped" not in first.detail


@pytest.mark.parametrize("importable", ["", "# What a recipe may import"])
def test_what_the_recipe_may_import_lies_beside_it(importable: str, lab: Lab) -> None:
    proposal = agent("reading", "kernels.md").propose(see(lab, importable=importable))
    assert proposal.description == f"kernels.md: {importable or None}, told: {bool(importable)}"


def test_an_objection_goes_back_to_the_agent(lab: Lab) -> None:
    proposal = agent("mending").propose(see(lab))
    assert proposal.source == b"SCORE = 1.5\nMARK = 'mended'\n"
    assert "it is no Python" in proposal.description
    assert proposal.detail["usage"]["answers"] == 2


def test_it_may_answer_only_so_often(lab: Lab) -> None:
    with pytest.raises(Unavailable, match=r"nothing that would be run, 1 times.*no Python") as caught:
        agent("mending", attempts=1).propose(see(lab))
    assert not caught.value.final


def test_a_failed_experiment_is_mended(lab: Lab) -> None:
    loop = Loop(lab, None, Scripted(), lambda event: None)
    loop.judge(recipe(status="crash", mark="broken"), "an idea", "command", {"by": "command"})
    proposal = agent("repairing").propose(see(lab))
    assert proposal.detail["repairs"] == 2 and b"SCORE = 1.2" in proposal.source


# --- meddling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolate", [True, False])
def test_a_meddling_agent_leaves_nothing(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolate: bool
) -> None:
    monkeypatch.setenv("RECORD", str(lab.record) if isolate else str(tmp_path / "none"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    before, record = files(lab.path), files(lab.record)
    who = agent("meddling", lab.path, pass_env="RECORD", isolate=isolate)
    proposal = who.propose(see(lab))
    assert proposal.source.startswith(b"SCORE = 2.0")  # its own edit came back, and nothing else
    dropped = proposal.detail["dropped"]
    assert {"changed program.md", "made helper.py"} <= set(dropped)
    assert list((tmp_path / "scratch").iterdir()) == []
    after = files(lab.path)
    if who.lacks:
        # Not closed: what git obeys is as it was, and the rest is told.
        assert "made .git/hooks/post-checkout in the lab (removed)" in dropped
        assert "changed .git/config in the lab (put back)" in dropped
        assert "made planted.py in the lab" in dropped
        assert proposal.detail["not_isolated"]
        acting = [name for name in after if name.startswith((".git/hooks", ".git/config"))]
        assert {n: after[n] for n in acting} == {n: before[n] for n in before if n in acting}
        git(lab, "checkout", "-q", "--", "train.py")
        assert not (lab.path.parent / "hooked").exists()
    else:
        assert isolate and after == before
        assert files(lab.record) == record


@pytest.mark.skipif(sys.platform != "linux", reason="folders are closed to a process on Linux only")
def test_on_linux_the_lab_is_read_only_and_records_are_not_there(lab: Lab, tmp_path: Path) -> None:
    look = (
        "import os, sys; from pathlib import Path; lab, record = map(Path, sys.argv[1:3])\n"
        "s = Path('train.py'); s.write_text(s.read_text().replace('night', 'x') + 'X = 1\\n')\n"
        "caps = [l for l in open('/proc/self/status') if l.startswith('CapEff')][0].split()[1]\n"
        "try: environ = open(f'/proc/{sys.argv[3]}/environ').read() and 'readable'\n"
        "except OSError: environ = 'closed'\n"
        "print(os.access(lab, os.W_OK), list(record.parent.glob('*')), int(caps, 16), environ)\n"
    )
    script = tmp_path / "look.py"
    script.write_text(look)
    line = f"{sys.executable} {script} {lab.path} {lab.record} {os.getpid()}"
    who = researchers.make("command", command=line)
    proposal = who.propose(see(lab))
    if who.lacks:
        pytest.skip(f"this kernel or container does not allow it: {who.lacks}")
    assert proposal.description == "False [] 0 closed"
    assert lab.record.is_dir()


def test_a_link_is_not_followed(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    with pytest.raises(Unavailable) as caught:
        agent("linking", tmp_path / "secret", attempts=2).propose(see(lab))
    assert SECRET not in str(caught.value) and "train.py" in str(caught.value)
    assert (tmp_path / "secret").read_text() == SECRET


def test_secrets_of_ours_do_not_reach_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", SECRET)
    monkeypatch.setenv("ITS_SECRET", "its own")
    proposal = agent("environment", pass_env="ITS_SECRET").propose(see(lab))
    assert proposal.description == "ITS_SECRET=its own"


def test_its_own_key_does_not_get_into_the_record(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITS_SECRET_KEY", SECRET)
    assert agent("environment", pass_env="ITS_SECRET_KEY").propose(see(lab)).description.endswith("=(ITS_SECRET_KEY)")
    who = agent("saying", f"Incorrect key {SECRET}: not logged in", pass_env="ITS_SECRET_KEY")
    with pytest.raises(Unavailable, match=r"Incorrect key \(ITS_SECRET_KEY\)") as caught:
        who.propose(see(lab))
    assert caught.value.final and SECRET not in who.estimate(see(lab))


# --- hanging -------------------------------------------------------------------------------------


def _gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_a_hanging_agent_is_ended_with_all_that_it_started(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="did not end within 4 s"):
        agent("hanging", tmp_path / "pids", time_limit=4).propose(see(lab))
    pids = json.loads((tmp_path / "pids").read_text())
    assert len(pids) == 3 and _gone(pids)


def test_the_end_of_the_run_ends_it(lab: Lab, tmp_path: Path) -> None:
    started = (tmp_path / "pids").exists
    with pytest.raises(Unavailable, match="ended with the run"):
        agent("hanging", tmp_path / "pids").propose(see(lab, stopped=started))
    assert _gone(json.loads((tmp_path / "pids").read_text()))


@pytest.mark.skipif(sys.platform == "win32", reason="a parent is killed with a signal")
def test_it_ends_when_whoever_started_it_is_killed(lab: Lab, tmp_path: Path) -> None:
    line = f"{sys.executable} {AGENT} hanging {tmp_path / 'pids'}"
    fields = "program='val_bpb', best_source=b'MARK = 1', best_bpb=1.0, past=[], device={}, settings={}"
    code = (
        f"import sys; sys.path[:0] = {[str(AGENT.parent.parent), str(AGENT.parent)]}\n"
        "import researchers; from core.contract import View\n"
        f"view = View({fields})\n"
        f"who = researchers.make('command', command={line!r})\n"
        "who.propose(view)\n"
    )
    parent = psutil.Popen([sys.executable, "-c", code])
    _wait_for((tmp_path / "pids").exists)
    parent.kill()
    parent.wait()
    pids = json.loads((tmp_path / "pids").read_text())
    _wait_for(lambda: _gone(pids))


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is a signal")
def test_a_keeper_that_is_interrupted_ends_the_agent_first(tmp_path: Path) -> None:
    """As Windows' console does it with every process of its group."""
    (tmp_path / "in").touch()
    waits = "import os, time; from pathlib import Path; Path('new').write_text(str(os.getpid()))\n"
    waits += "os.rename('new', 'pid'); time.sleep(600)"
    places = [tmp_path / name for name in ("in", "out", "err")]
    orders = Orders([sys.executable, "-c", waits], environment([]), tmp_path, *places, seconds=300.0, isolate=False)
    told: list[int] = []

    def look() -> bool:
        if (tmp_path / "pid").exists() and not told:
            (keeper,) = [p for p in psutil.Process().children() if "keeper.py" in " ".join(p.cmdline())]
            told.append(keeper.pid)
            os.kill(keeper.pid, signal.SIGINT)
        return False

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
    try:
        ended = run_kept(orders, look)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "its keeper failed" in ended.error
    assert _gone([int((tmp_path / "pid").read_text())])


def _wait_for(what: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not what():
        assert time.monotonic() < give_up
        time.sleep(0.05)


# --- limits and logins ---------------------------------------------------------------------------

NOW = datetime(2026, 11, 25, 22, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("You've hit your limit · resets 3am (UTC)", 5 * 3600),
        ("You've hit your session limit · resets 12:50am (America/Los_Angeles)", 10 * 3600 + 50 * 60),
        ("You've hit your weekly limit · resets Nov 27, 3pm (UTC)", 41 * 3600),
        ("Claude usage limit reached. Your limit will reset at 9am (America/Chicago).", 17 * 3600),
        (f"Claude AI usage limit reached|{int(NOW.timestamp()) + 90}", 90),
        ("You've hit your usage limit. Try again in 2 days 3 hours 5 minutes.", 2 * 86400 + 3 * 3600 + 300),
        ("Quota exceeded for requests. Your quota will reset after 3h20m5s.", 3 * 3600 + 1205),
        ("429 Too Many Requests, retry-after: 30", 30),
        ("API Error: Request rejected (429) · limit", None),
        ("API Error: 529 Overloaded", None),
    ],
)
def test_limits_are_recognised_and_say_when_they_are_over(said: str, seconds: float | None) -> None:
    assert is_limit(said) and not is_login(said)
    assert retry_after(said, NOW) == seconds


@pytest.mark.parametrize(
    "said", ["the learning rate limit of Muon", "at run (node:internal/loader:401:30)", "loss at step 401 and 429: 3.5"]
)
def test_talk_about_research_is_no_limit_and_no_login(said: str) -> None:
    assert not is_limit(said) and not is_login(said)


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")
def test_nothing_that_an_agent_plants_is_followed_or_waited_for(lab: Lab, tmp_path: Path) -> None:
    """A link where its next task will be written, a pipe where its output is read, a file of the keeper's removed."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    script = tmp_path / "planter.sh"
    script.write_text(
        "#!/bin/sh\n"
        f"rm -f prompt.md ../stdin ../out ../err; ln -s {victim} prompt.md; ln -s {victim} ../stdin; mkfifo ../out\n"
        "echo 'not ( python' > train.py; sleep 1\n"
    )
    script.chmod(0o755)
    who = researchers.make("command", command=str(script), attempts=2, time_limit=20.0)
    with pytest.raises(Unavailable) as caught:
        who.propose(see(lab))
    assert not caught.value.final
    assert victim.read_text() == "mine"


def test_a_limit_is_waited_out(lab: Lab) -> None:
    with pytest.raises(Unavailable, match="at its limit") as caught:
        agent("saying", "Usage limit reached. Try again in 90 seconds.").propose(see(lab))
    assert caught.value.retry_after == 90 and not caught.value.final
    with pytest.raises(Unavailable) as caught:
        agent("saying", "Error: 529 Overloaded").propose(see(lab))
    assert caught.value.retry_after is not None and not caught.value.final


def test_a_missing_login_is_for_a_person(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "claude"
    script.write_text("#!/bin/sh\necho 'Not logged in · Please run /login'\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(Unavailable, match="use an API key: --researcher claude") as caught:
        researchers.make("claude-code").propose(see(lab))
    assert caught.value.final
    with pytest.raises(Unavailable, match="failed with exit status 1: something else") as caught:
        agent("saying", "something else").propose(see(lab))
    assert not caught.value.final


# --- making one ----------------------------------------------------------------------------------


def test_clear_errors_before_anything_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no program 'claude'; npm install .*--researcher claude$"):
        researchers.make("claude-code")
    with pytest.raises(UserError, match="npm install -g @openai/codex"):
        researchers.make("codex")
    with pytest.raises(UserError, match="needs a command line"):
        researchers.make("command")
    with pytest.raises(UserError, match="cannot be read"):
        researchers.make("command", command="agent 'open")
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(UserError, match="--researcher claude-code"):
        researchers.make("claude")


def test_a_model_goes_behind_a_subcommand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("codex", "claude"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert researchers.make("codex", model="m").argv[:4] == [str(tmp_path / "codex"), "exec", "--model", "m"]  # type: ignore[attr-defined]
    assert researchers.make("claude-code", model="m").argv[:3] == [str(tmp_path / "claude"), "--model", "m"]  # type: ignore[attr-defined]
    assert not researchers.make("claude-code").is_billed()  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for the agent")
@pytest.mark.parametrize("name", ["gemini", "codex", "claude-code"])
def test_an_agent_that_npm_installs_gets_its_task_on_standard_input(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """npm's script for cmd.exe would end an argument of many lines at the first."""
    script = tmp_path / AGENTS[name].command.split()[0]
    script.write_text(
        "#!/bin/sh\ngrep -q 'Then do this once' || exit 3\n"
        "case $* in *val_bpb*) exit 4;; esac\n"
        "echo 'OF_ITS_OWN = 1' >> train.py; echo 'one idea' > idea.txt\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    proposal = researchers.make(name).propose(see(lab))
    assert proposal.source.endswith(b"OF_ITS_OWN = 1\n") and proposal.description == "one idea"


def test_what_other_agents_print_is_read() -> None:
    words = {"type": "item.completed", "item": {"type": "agent_message", "text": "done"}}
    used = {"input_tokens": 100, "cached_input_tokens": 40, "output_tokens": 7}
    codex = f"{json.dumps(words)}\n{json.dumps({'type': 'turn.completed', 'usage': used})}\n"
    said = read_codex(codex)
    assert said.text == "done" and said.usage[0]["input_tokens"] == 60 and said.usage[0]["cache_read_tokens"] == 40
    gemini = {"response": "done", "stats": {"models": {"g": {"tokens": {"prompt": 10, "candidates": 3, "cached": 4}}}}}
    assert read_gemini(json.dumps(gemini, indent=1)).usage == [
        {"model": "g", "input_tokens": 6, "output_tokens": 3, "cache_read_tokens": 4, "usd": None}
    ]
    assert set(AGENTS) < set(researchers.names())
