"""The real Claude Code, headless, against a local server that speaks the Messages API: as a researcher, and by hand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from messages_api import Answer, Asked, Fault, MessagesApi, text, tool
from scripted import Scripted, make_lab

import researchers
from core.contract import Unavailable
from core.lab import Lab
from core.loop import Limits, Loop
from core.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm is missing: Claude Code cannot be installed"),
]


@pytest.fixture(scope="session")
def claude_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `claude`, installed once for all tests of a session."""
    place = tmp_path_factory.mktemp("claude-code")
    command = ["npm", "install", "--prefix", str(place), "--no-audit", "--no-fund", "@anthropic-ai/claude-code"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return place / "node_modules" / ".bin"


@pytest.fixture
def api(claude_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MessagesApi]:
    """The server, with `claude` on the path, in a home of its own, pointing at it."""
    (tmp_path / "claude-home").mkdir()
    with MessagesApi(lambda asked: Answer([text("ok")])) as server:
        monkeypatch.setenv("PATH", str(claude_bin), prepend=os.pathsep)
        monkeypatch.setenv("HOME", str(tmp_path / "claude-home"))
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-local")
        monkeypatch.setenv("CLAUDE_CODE_MAX_RETRIES", "0")
        yield server
        assert server.errors == []


@pytest.fixture
def lab(tmp_path: Path, settings: Settings) -> Lab:
    lab = make_lab(tmp_path / "lab", settings)
    Loop(lab, None, Scripted(), lambda event: None).judge(lab.working_source(), "baseline")
    return lab


def turn(asked: Asked) -> int:
    """How often it was answered before in this conversation; -1 for what Claude Code asks beside it."""
    if not asked.body.get("tools"):
        return -1
    return sum(m["role"] == "assistant" for m in asked.messages)


def folder(asked: Asked) -> Path:
    """The folder that Claude Code says it works in."""
    words = asked.text()
    for mark in ("Primary working directory: ", "Working directory: "):
        if mark in words:
            return Path(words.split(mark, 1)[1].split("\\n", 1)[0].strip())
    raise AssertionError("the prompt names no working directory")


def edits(asked: Asked) -> Answer:
    """Reads its file, edits it, writes down why; one tool call in each answer."""
    step = turn(asked)
    calls = [
        lambda: tool("Read", {"file_path": str(folder(asked) / "train.py")}),
        lambda: tool("Read", {"file_path": str(folder(asked) / "idea.txt")}),
        lambda: tool("Edit", {"file_path": str(folder(asked) / "train.py"), "old_string": "SCORE = 2.0",
                              "new_string": "SCORE = 1.9"}),
        lambda: tool("Write", {"file_path": str(folder(asked) / "idea.txt"), "content": "SCORE 2.0 -> 1.9: lower"}),
    ]  # fmt: skip
    return Answer([calls[step]()]) if 0 <= step < len(calls) else Answer([text("done")])


def test_it_drives_the_preset(lab: Lab, api: MessagesApi) -> None:
    api.answer = edits
    who: Any = researchers.make("claude-code", pass_env="ANTHROPIC_API_KEY,CLAUDE_CODE_MAX_RETRIES")
    assert who.is_billed()
    loop = Loop(lab, who, Scripted(), lambda event: None)
    assert loop.run(Limits(experiments=1)).kept == 1
    e = lab.ledger.get(2)
    assert (e.researcher, e.description, e.val_bpb) == ("claude-code", "SCORE 2.0 -> 1.9: lower", 1.9)
    assert b"SCORE = 1.9" in lab.best_source()
    assert e.detail["usage"]["output_tokens"] > 0 and e.detail["usage"]["usd"] > 0
    assert "dropped" not in e.detail
    asked = api.requests[0].text()
    assert "idea.txt" in asked and "Bash" not in [t["name"] for t in api.requests[0].body["tools"]]


def test_its_limit_is_waited_out_and_a_bad_login_is_not(lab: Lab, api: MessagesApi) -> None:
    who = researchers.make("claude-code", pass_env="ANTHROPIC_API_KEY,CLAUDE_CODE_MAX_RETRIES")
    api.answer = lambda asked: Fault(429, "rate_limit_error", "limit", {"x-should-retry": "false"})
    with pytest.raises(Unavailable, match="at its limit") as caught:
        who.propose(lab.view({}))
    assert caught.value.retry_after is not None and not caught.value.final
    api.answer = lambda asked: Fault(401, "authentication_error", "invalid x-api-key")
    with pytest.raises(Unavailable, match=r"--researcher claude$") as caught:
        who.propose(lab.view({}))
    assert caught.value.final


def test_without_a_login_it_says_how(lab: Lab, api: MessagesApi) -> None:
    """The key is not passed on by itself: with it Claude Code would bill by the token."""
    with pytest.raises(Unavailable, match="log in once with `claude`") as caught:
        researchers.make("claude-code").propose(lab.view({}))
    assert caught.value.final and api.requests == []


def follows(lab: Lab) -> Any:
    """A script that follows program.md: read, baseline, edit, try, wait until there is a verdict, stop."""
    cli = f"{sys.executable} {ROOT / 'cli.py'}"
    train = str(lab.path / "train.py")

    def answer(asked: Asked) -> Answer:
        step = turn(asked)
        said = str(asked.results()[-1]["content"]) if asked.results() else ""
        if step < 0:
            return Answer([text("ok")])
        opening = [
            lambda: tool("Read", {"file_path": str(lab.path / "program.md")}),
            lambda: tool("Bash", {"command": f"{cli} log"}),
            lambda: tool("Read", {"file_path": train}),
            lambda: tool("Edit", {"file_path": train, "old_string": "LR = 0.02", "new_string": "LR = 0.03"}),
            lambda: tool("Bash", {"command": f"{cli} try -m 'LR 0.02 -> 0.03: still falling' --no-wait"}),
        ]
        if step < len(opening):
            return Answer([opening[step]()])
        if "is being judged" in said or "still runs" in said:
            return Answer([tool("Bash", {"command": f"{cli} wait 2 --timeout 60s", "timeout": 90_000})])
        return Answer([text(f"verdict seen: {said}")])

    return answer


def test_it_follows_the_program_by_hand(tmp_path: Path, settings: Settings, tiny_recipe: str, api: MessagesApi) -> None:
    """In a real lab, with real experiments: `try --no-wait` and `wait` through its own Bash tool."""
    lab = Lab.create(tmp_path / "lab", recipe=tiny_recipe.encode(), program=(ROOT / "program.md").read_text(),
                     settings=settings, message="lab: the first recipe")  # fmt: skip
    cli = [sys.executable, str(ROOT / "cli.py")]
    subprocess.run([*cli, "try", str(lab.path), "-m", "baseline"], check=True, capture_output=True, timeout=200)
    api.answer = follows(lab)
    command = ["claude", "-p", "Read program.md and follow it.", "--allowedTools", "Bash,Read,Edit",
               "--permission-mode", "acceptEdits"]  # fmt: skip
    done = subprocess.run(command, cwd=lab.path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    e = lab.ledger.get(2)
    assert re.search(rf"(?m)^#2 +{e.status} ", done.stdout), done.stdout
    assert e.status in ("keep", "discard") and e.researcher == "you" and e.description.startswith("LR 0.02 -> 0.03")
    assert lab.working_source() == lab.best_source()
