"""Fetching from the hub: the real huggingface-hub client against a server on this machine that behaves like one."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.data import PARTS, Dataset
from core.errors import DataError, UserError
from prepare import known, prepare

ROOT = Path(__file__).parent.parent
COMMIT = "c0ffee" + "0" * 34
SYLLABLES = [a + b for a in "bdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "ai", "on")]


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    promised: dict[str, str] = field(default_factory=dict)  # other hashes than the true ones
    cut_after: list[int] = field(default_factory=list)  # for each of the next bodies: bytes until the line is cut
    slow: float = 0.0  # seconds for each 64 KB
    ranges: bool = True
    status: int = 0  # of every answer, instead of a real one
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    url: str = ""
    cdn: str = ""  # another host name, as the hub's large files lie elsewhere

    def bodies(self) -> list[str]:
        """Range headers of the requests for bodies."""
        return [r[2] for r in self.requests if r[0] == "GET" and r[1].startswith("/cdn/")]

    def etag(self, name: str) -> str:
        return self.promised.get(name) or hashlib.sha256(self.files[name]).hexdigest()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, **headers: str | int) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": 0, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()

        def do_HEAD(self) -> None:
            self.respond()

        def do_GET(self) -> None:
            self.respond()

        def respond(self) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
            if hub.status:
                self.answer(hub.status)
            elif self.path.startswith("/cdn/"):
                self.body(hub.files[self.path.removeprefix("/cdn/")])
            elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
                self.resolve(found[1], found[2], found[3])
            else:
                self.answer(404)

        def resolve(self, repository: str, revision: str, name: str) -> None:
            """The redirect that the hub sends for large files."""
            if repository not in (s.repository for s in known().values()):
                self.answer(404, X_Error_Code="RepoNotFound")
            elif revision not in ("main", COMMIT):
                self.answer(404, X_Error_Code="RevisionNotFound")
            elif name not in hub.files:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                self.answer(
                    302,
                    Location=f"{hub.cdn}/cdn/{name}",
                    X_Repo_Commit=COMMIT,
                    X_Linked_Size=len(hub.files[name]),
                    X_Linked_Etag=f'"{hub.etag(name)}"',
                )

        def body(self, data: bytes) -> None:
            start = int(re.sub(r"bytes=(\d+)-.*", r"\1", self.headers.get("Range", "bytes=0-")))
            if not hub.ranges:
                start = 0
            if start >= len(data) > 0:
                self.answer(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            stop = min(len(data), start + hub.cut_after.pop(0)) if hub.cut_after else len(data)
            for at in range(start, stop, 2**16):
                self.wfile.write(data[at : min(at + 2**16, stop)])
                time.sleep(hub.slow)
            if stop < len(data):
                self.close_connection = True

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no error here."""


def stories(file: int, count: int = 150) -> bytes:
    """A parquet file of made-up stories."""
    rng = random.Random(file)
    texts = [f"{file}.{i} " + " ".join("".join(rng.choices(SYLLABLES, k=2)) for _ in range(60)) for i in range(count)]
    out = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), out, compression="none")
    return out.getvalue().to_pybytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the first three files of climbmix and all four of tinystories."""
    names = [*known()["climbmix"].files[:3], *known()["tinystories"].files]
    hub = Hub(files={name: stories(i) for i, name in enumerate(names)})
    server = Server(("127.0.0.1", 0), handler(hub))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.cdn = f"http://localhost:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("time.sleep", lambda seconds, real=time.sleep: real(min(seconds, 0.01)))  # between attempts
    return tmp_path / "home"


def climbmix(shards: int = 2, say: Callable[[str], None] = lambda line: None) -> Dataset:
    return prepare("climbmix", vocab_size=400, shards=shards, progress=say)


def left_behind(home: Path) -> list[str]:
    return sorted(p.name for p in (home / "data").glob("*")) if (home / "data").exists() else []


def fetched(home: Path) -> list[str]:
    return sorted(p.name for p in (home / "downloads").rglob("*") if p.is_file())


def start(home: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "prepare.py", *words, "--vocab", "400", "--json"],
        cwd=ROOT,
        env={**os.environ, "AUTORESEARCH_HOME": str(home), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- when all goes well --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shards"), [("climbmix", 2), ("tinystories", None)])
def test_a_data_set_is_fetched_once_and_made(hub: Hub, home: Path, name: str, shards: int | None) -> None:
    told: list[str] = []
    dataset = prepare(name, vocab_size=400, shards=shards, progress=told.append)
    count = shards or 4
    assert sum(dataset.part(p).documents for p in PARTS) == 150 * count
    expected = [{"file": f, "bytes": len(hub.files[f]), "sha256": hub.etag(f)} for f in known()[name].files[:count]]
    assert dataset.source["files"] == expected
    assert hub.bodies() == [""] * count
    asked = len(hub.requests)
    assert prepare(name, vocab_size=400, shards=shards).sha256 == dataset.sha256
    prepare(name, vocab_size=300, shards=shards)  # another vocabulary is made of the same files
    assert len(hub.requests) == asked
    size = sum(len(hub.files[f]) for f in known()[name].files[:count])
    assert f"fetching {count} files, {size / 1e6:,.1f} MB, from {hub.url}/datasets/" in told[0]
    assert f"to {home / 'downloads'}" in told[0]
    assert "min at" in told[0]
    assert "tokens will take" in told[0]


def test_more_files_are_another_data_set_and_only_the_new_ones_are_fetched(hub: Hub) -> None:
    first = climbmix(2)
    bodies = len(hub.bodies())
    second = climbmix(3)
    assert len(hub.bodies()) == bodies + 1
    assert first.path != second.path
    assert hub.requests[-2][1].split("/")[5] == COMMIT  # the new file is of the commit of the old ones
    assert climbmix(2).path == first.path


@pytest.mark.parametrize("right", [True, False])
def test_gits_hash_of_a_small_file_is_checked_too(hub: Hub, right: bool) -> None:
    name = known()["climbmix"].files[0]
    data = hub.files[name]
    hub.promised[name] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() if right else "0" * 40
    if right:
        assert climbmix(1).part("train").documents
    else:
        with pytest.raises(DataError, match="came with hash"):
            climbmix(1)


# --- cut lines and kills -------------------------------------------------------------------------


def test_a_cut_line_is_taken_up_where_it_was_cut(hub: Hub) -> None:
    size = len(hub.files[known()["climbmix"].files[0]])
    hub.cut_after = [size // 3, size // 3]
    undisturbed = climbmix(1)
    assert hub.bodies() == ["", f"bytes={size // 3}-", f"bytes={2 * (size // 3)}-"]
    assert undisturbed.part("train").documents > 100


def test_a_line_that_is_cut_for_good_is_told_and_the_next_run_goes_on(hub: Hub, home: Path) -> None:
    size = len(hub.files[known()["climbmix"].files[0]])
    hub.cut_after = [1000] + [0] * 60
    with pytest.raises(DataError, match=r"cannot be reached .*run the same command again.*kept.*prepare kjv"):
        climbmix(1)
    assert left_behind(home) == []
    hub.cut_after.clear()
    hub.requests.clear()
    climbmix(1)
    assert hub.bodies() == ["bytes=1000-"]
    assert size > 1000


def test_a_server_that_knows_no_ranges_sends_it_all_again(hub: Hub) -> None:
    hub.ranges = False
    hub.cut_after = [5000]
    assert climbmix(1).source["files"][0]["sha256"] == hub.etag(known()["climbmix"].files[0])


def test_killed_while_fetching_it_goes_on_at_the_byte_it_had(hub: Hub, home: Path) -> None:
    name = known()["climbmix"].files[0]
    hub.files[name] = stories(0, 12_000)
    hub.slow = 0.02
    process = start(home, "climbmix", "--files", "1")
    part = home / "downloads" / "karpathy--climbmix-400b-shuffle"
    while process.poll() is None and not any(p.stat().st_size > 2**17 for p in part.glob(".*.part")):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = part.glob(".*.part")
    have = left.stat().st_size
    assert 0 < have < len(hub.files[name])
    hub.slow = 0
    hub.requests.clear()
    dataset = climbmix(1)
    assert hub.bodies() == [f"bytes={have}-"]
    assert dataset.source["files"][0]["sha256"] == hub.etag(name)


def test_two_that_fetch_at_once_fetch_once(hub: Hub, home: Path) -> None:
    processes = [start(home, "climbmix", "--files", "2") for _ in range(2)]
    processes.append(start(home, "climbmix", "--files", "2"))
    answers = [p.communicate(timeout=100) for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], answers
    assert len({json.loads(out)["sha256"] for out, _ in answers}) == 1
    assert len(hub.bodies()) == 2


# --- wrong answers -------------------------------------------------------------------------------


def test_a_wrong_hash_is_tried_once_more_and_then_told_and_nothing_is_kept(hub: Hub, home: Path) -> None:
    name = known()["climbmix"].files[1]
    hub.promised[name] = "ab" * 32
    told: list[str] = []
    with pytest.raises(DataError, match=rf"{name} came with hash .* twice, .* promised abababab.*another mirror"):
        climbmix(2, told.append)
    assert any("its hash is wrong" in line for line in told)
    assert len(hub.bodies()) == 3
    assert left_behind(home) == []
    assert not [f for f in fetched(home) if name in f]
    del hub.promised[name]
    climbmix(2)
    assert len(hub.bodies()) == 4


def test_a_partial_file_that_is_wrong_is_fetched_anew(hub: Hub, home: Path) -> None:
    name = known()["climbmix"].files[0]
    folder = home / "downloads" / "karpathy--climbmix-400b-shuffle"
    folder.mkdir(parents=True)
    (folder / f".{name}.{hub.etag(name)[:16]}.part").write_bytes(b"not what the hub has")
    climbmix(1)
    assert hub.bodies() == ["bytes=20-", ""]


@pytest.mark.parametrize("much", [10**7, 0])
def test_a_partial_file_that_is_too_long_or_just_right_is_no_trouble(hub: Hub, home: Path, much: int) -> None:
    name = known()["climbmix"].files[0]
    folder = home / "downloads" / "karpathy--climbmix-400b-shuffle"
    folder.mkdir(parents=True)
    (folder / f".{name}.{hub.etag(name)[:16]}.part").write_bytes(hub.files[name] + b"x" * much)
    climbmix(1)
    assert hub.bodies() == ([""] if much else [])


def test_a_missing_file_is_told(hub: Hub, home: Path) -> None:
    name = known()["climbmix"].files[1]
    del hub.files[name]
    with pytest.raises(DataError, match=rf"{name} is missing at {hub.url}/datasets/karpathy/climbmix.*--files"):
        climbmix(3)
    assert hub.bodies() == []  # told before anything is fetched
    assert left_behind(home) == []
    assert climbmix(1).part("train").documents


@pytest.mark.parametrize(
    ("status", "says"), [(401, "status 401"), (403, "status 403"), (404, "status 404"), (500, "status 500")]
)
def test_other_answers_are_told_with_what_to_do(hub: Hub, home: Path, status: int, says: str) -> None:
    hub.status = status
    with pytest.raises(DataError, match=says) as caught:
        climbmix(1)
    assert "prepare kjv" in caught.value.action
    assert "--text" in caught.value.action
    assert "\n" not in str(caught.value)
    assert left_behind(home) == []


def test_a_server_that_is_no_hub_is_told(hub: Hub) -> None:
    hub.status = 200
    with pytest.raises(DataError, match="does not answer as a hub does"):
        climbmix(1)


def test_a_file_that_was_damaged_after_it_was_fetched_is_fetched_again(hub: Hub, home: Path) -> None:
    first = climbmix(1)
    (file,) = (home / "downloads").rglob("shard_*.parquet")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="was damaged after it was fetched"):
        prepare("climbmix", vocab_size=300, shards=1)
    prepare("climbmix", vocab_size=300, shards=1)
    assert len(hub.bodies()) == 2
    assert climbmix(1).sha256 == first.sha256


def test_more_files_than_there_are_is_told() -> None:
    with pytest.raises(UserError, match="tinystories has 4 files, 5 were asked for"):
        prepare("tinystories", shards=5)


# --- no network, no space ------------------------------------------------------------------------


def test_without_a_network_the_alternatives_are_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9 cannot be reached.*HF_ENDPOINT.*prepare kjv.*--text"):
        climbmix(1)
    assert left_behind(home) == []
    assert fetched(home) == []


def test_offline_by_choice_is_told_and_what_is_here_still_works(hub: Hub, home: Path) -> None:
    climbmix(1)
    process = start(home, "climbmix", "--files", "2", HF_HUB_OFFLINE="1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "HF_HUB_OFFLINE forbids" in json.loads(out)["error"]
    assert f"`{sys.executable} prepare.py kjv`" in json.loads(out)["action"]
    process = start(home, "climbmix", "--files", "1", "--vocab", "300", HF_HUB_OFFLINE="1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A home on a file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = sys.platform == "linux" and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root and Linux")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_no_room_is_told_before_anything_is_fetched(hub: Hub, small_disk: Path, monkeypatch) -> None:
    monkeypatch.setenv("AUTORESEARCH_HOME", str(small_disk))
    hub.files[known()["climbmix"].files[0]] = stories(0, 6000)
    with pytest.raises(UserError, match=r"needs [\d.]+ MB, [\d.]+ MB are free in .*--files.*prepare kjv"):
        climbmix(1)
    assert hub.bodies() == []
    assert left_behind(small_disk) == []


def test_room_that_another_program_takes_meanwhile_is_told_and_the_fetch_goes_on_later(
    hub: Hub, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTORESEARCH_HOME", str(small_disk))
    name = known()["climbmix"].files[0]
    hub.files[name] = stories(0, 800)
    hog = small_disk / "hog"

    def take(what: str, done: int, total: int) -> None:
        if not hog.exists():
            hog.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 2**17))

    with pytest.raises(UserError, match=r"no space left on the disk .*goes on where it was"):
        prepare("climbmix", vocab_size=400, shards=1, meter=take)
    hog.unlink()
    hub.requests.clear()
    climbmix(1)
    assert re.fullmatch(r"bytes=\d{4,}-", hub.bodies()[0])


def test_a_new_lab_without_a_network_is_told_what_needs_none_as_its_own_options(tmp_path: Path) -> None:
    """Not the other set that is fetched, nor a command of another verb that would not help by itself."""
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "AUTORESEARCH_HOME": str(tmp_path / "home")}
    given = [sys.executable, str(ROOT / "cli.py"), "init", "--backend", "cpu", "--data", "tinystories", "--json"]
    done = subprocess.run(given, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120)
    said = json.loads(done.stderr)["error"]
    assert done.returncode == 1 and "http://127.0.0.1:9 cannot be reached" in said["fact"]
    assert said["action"].endswith(
        "set HF_ENDPOINT to a mirror, or use what needs no network: --data kjv or --text PATH"
    )
    assert not (tmp_path / "labs").exists()
