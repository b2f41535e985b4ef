"""run --notify: what reaches a real HTTP server, and that a failing one disturbs nothing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, make_lab, recipe

from console.notifying import Notifier, checked
from console.output import Screen
from console.rows import row
from console.running import run_verb
from core.errors import UserError
from core.lab import Lab
from core.loop import Loop
from core.settings import Settings

SECRET = "T0-planted-secret-path"


class Received(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.posts: list[tuple[str, dict[str, str], bytes]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook/{SECRET}"

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, _, body in self.posts]


class _Handler(BaseHTTPRequestHandler):
    server: Received

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.posts.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()


@contextmanager
def receiving(status: int = 200) -> Iterator[Received]:
    server = Received(status)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def lab(tmp_path: Path, settings: Settings) -> Lab:
    lab = make_lab(tmp_path / "lab", settings)
    Loop(lab, None, Scripted(), lambda event: None).judge(lab.working_source(), "baseline")
    return lab


def night(lab: Lab, monkeypatch: pytest.MonkeyPatch, url: str, experiments: int = 8) -> int:
    """`run` itself, with scripted experiments in the place of trained ones."""
    monkeypatch.setattr("core.executor.LocalExecutor", Scripted)
    return run_verb(
        Screen(True), str(lab.path), experiments=experiments, hours=None, until=None, researcher="scripted:Night",
        demo=False, strict=False, asking={}, notify=url, backend=None, data=None, text=None, vocab=None, profile=None,
        budget=None, source=None, tag=None,
    )  # fmt: skip


def everything_written(*folders: Path) -> bytes:
    return b"".join(p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file())


def test_keeps_and_the_end_are_posted(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with receiving() as server:
        assert night(lab, monkeypatch, server.url) == 0
    kept = [e for e in lab.ledger.experiments() if e.is_kept and e.number > 1]
    posts = server.events()
    assert [p["event"] for p in posts] == ["keep"] * len(kept) + ["end"] and kept
    assert [p["experiment"]["number"] for p in posts[:-1]] == [e.number for e in kept]
    first, end = posts[0], posts[-1]
    assert first["lab"] == lab.tag and kept[0].description in first["text"] and first["content"] == first["text"]
    assert end["experiments"] == 8 and end["kept"] == len(kept) and f"#{kept[-1].number}" in end["text"]
    assert server.posts[0][1]["content-type"] == "application/json"
    said = capsys.readouterr()
    written = everything_written(lab.path, lab.record)
    assert SECRET not in said.out + said.err and SECRET.encode() not in written


@pytest.mark.parametrize("status", [500, 0])
def test_a_failing_url_disturbs_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    with receiving(status or 200) as server:
        url = server.url
        if status == 0:  # nobody listens there
            server.shutdown()
            server.server_close()
        assert night(lab, monkeypatch, url, experiments=3) == 0
    assert len(lab.ledger.experiments()) == 4
    said = capsys.readouterr()
    assert "of the notifications did not arrive" in said.out and SECRET not in said.out + said.err
    assert ("HTTP 500" if status else "ConnectionRefused") in said.out


def test_a_stall_is_told_once_until_something_finishes(lab: Lab) -> None:
    with receiving() as server:
        notifier = Notifier(server.url, lab.tag, each=1.0, stalled=0.5)
        wait_for(lambda: len(server.posts) == 1)
        judged = Loop(lab, None, Scripted(), lambda event: None).judge(recipe(1.5), "better")
        notifier.experiment(row(judged))
        wait_for(lambda: len(server.posts) == 3)
        assert notifier.end("over", {}) == ""
    assert [p["event"] for p in server.events()] == ["stall", "keep", "stall", "end"]


def test_ntfy_gets_plain_text() -> None:
    from console.notifying import _request

    sent = _request("https://ntfy.sh/topic", {"event": "keep", "lab": "nov24", "text": "#3 kept"})
    assert sent.data == b"#3 kept" and sent.get_header("Title") == "autoresearch nov24: keep"


def test_a_url_that_is_none_is_refused_without_being_repeated() -> None:
    for url in (f"ftp://x/{SECRET}", SECRET, f"http:///{SECRET}", f"http://[{SECRET}"):
        with pytest.raises(UserError, match="needs a URL of http or https") as caught:
            checked(url)
        assert SECRET not in str(caught.value)


def wait_for(what: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 30
    while not what():
        assert time.monotonic() < give_up
        time.sleep(0.05)
