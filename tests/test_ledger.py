"""The ledger: states, constraints, transactions, two processes at once, damage."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import database
from core.errors import LabError, UserError
from core.ledger import STATES, Ledger, Spent

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def ledger(tmp_path):
    made = Ledger.create(tmp_path / "ledger.sqlite")
    yield made
    made.close()


def propose(ledger: Ledger, source: bytes = b"A = 1\n", **fields) -> int:
    given = {"program": b"p", "fingerprint": source.hex(), "description": "an idea", "researcher": "me", **fields}
    return ledger.propose(source=source, **given)


SCORED = {"status": "scored", "val_bpb": 1.25, "audited": True}


def test_from_proposed_to_decided(ledger):
    number = propose(ledger, detail={"temperature": 0.5}, parent=None)
    assert (number, ledger.get(1).state, ledger.get(1).detail) == (1, "proposed", {"temperature": 0.5})
    ledger.start(1)
    ledger.record(1, SCORED, seed=42, versions={"torch": "2"})
    assert (ledger.get(1).state, ledger.get(1).val_bpb, ledger.get(1).status) == ("audited", 1.25, None)
    ledger.advance(1, "decided", status="keep", reason="the baseline", commit="a" * 40)
    found = ledger.get(1)
    assert (found.status, found.is_kept, found.commit, found.outcome) == ("keep", True, "a" * 40, SCORED)
    assert [(s.seed, s.val_bpb, s.versions) for s in ledger.samples(1)] == [(42, 1.25, {"torch": "2"})]
    assert ledger.best() == found
    assert ledger.pending() == []


def test_it_is_there_after_opening_again(ledger):
    propose(ledger)
    ledger.event("note", "hello", 1)
    ledger.close()
    again = Ledger.open(ledger.path)
    assert again.source(again.get(1).source_sha256) == b"A = 1\n"
    assert [(e.kind, e.text, e.number) for e in again.events()] == [("note", "hello", 1)]
    assert again.events(after=1) == []
    again.close()


@pytest.mark.parametrize("status", ["crash", "timeout", "invalid"])
def test_a_failure_has_no_number_whatever_it_claims(ledger, status):
    propose(ledger)
    ledger.start(1)
    ledger.record(1, {"status": status, "val_bpb": 0.5}, 42, {})
    assert (ledger.get(1).val_bpb, ledger.samples(1)) == (None, [])
    with pytest.raises(sqlite3.IntegrityError):
        ledger.advance(1, "decided", status=status, val_bpb=0.5)
    with pytest.raises(sqlite3.IntegrityError):
        ledger.advance(1, "decided", status="keep")  # no keep without a number
    assert ledger.get(1).state == "scored"


@pytest.mark.parametrize("score", [math.nan, math.inf, 0.0, -1.0, None, "1.2"])
def test_a_score_that_is_no_number_is_not_recorded(ledger, score):
    propose(ledger)
    ledger.start(1)
    ledger.record(1, {"status": "scored", "val_bpb": score, "audited": True}, 42, {})
    assert (ledger.get(1).state, ledger.get(1).val_bpb, ledger.samples(1)) == ("scored", None, [])


def test_the_same_file_waits_once(ledger):
    assert propose(ledger) == propose(ledger, description="again") == 1
    assert propose(ledger, b"B = 2\n") == 2
    for number in (1, 2):
        ledger.start(number)
        ledger.record(number, {"status": "crash"}, 42, {})
        ledger.advance(number, "decided", status="crash")
    assert propose(ledger) == 3  # judged ones may be tried again: that is the caller's choice


def test_dropped_experiments_keep_their_number_and_lose_their_samples(ledger):
    propose(ledger)
    ledger.start(1)
    ledger.requeue(1, "stopped", counts=False)
    assert (ledger.get(1).state, ledger.get(1).attempts) == ("proposed", 0)
    ledger.start(1)
    ledger.record(1, SCORED | {"audited": False}, 42, {})
    ledger.requeue(1, "was not audited", counts=True)
    found = ledger.get(1)
    assert (found.state, found.attempts, found.val_bpb, found.outcome) == ("proposed", 1, None, None)
    assert ledger.samples(1) == []


MOVES = {
    ("proposed", "running"), ("running", "proposed"), ("running", "scored"), ("scored", "audited"),
    ("scored", "decided"), ("audited", "decided"), ("scored", "proposed"), ("proposed", "decided"),
    ("audited", "proposed"),
}  # fmt: skip


@pytest.mark.parametrize("present", STATES)
@pytest.mark.parametrize("wanted", STATES)
def test_only_the_moves_of_a_life(ledger, present, wanted):
    propose(ledger)
    status = {"status": "crash"}
    for state in STATES[1 : STATES.index(present) + 1]:
        ledger.advance(1, state, **(status if state == "decided" else {}))
    fields = status if "decided" in (wanted, present) else {}
    if (present, wanted) in MOVES:
        ledger.advance(1, wanted, **fields)
        assert ledger.get(1).state == wanted
    else:
        with pytest.raises(ValueError, match="cannot go from"):
            ledger.advance(1, wanted, **fields)
        assert ledger.get(1).state == present


def test_a_transaction_is_all_or_nothing(ledger):
    with pytest.raises(RuntimeError), ledger.transaction():
        propose(ledger)
        ledger.set_meta("x", 1)
        raise RuntimeError
    assert ledger.experiments() == []
    assert ledger.meta("x") is None
    ledger.set_meta("x", {"a": [1, None]})
    assert ledger.meta("x") == {"a": [1, None]}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=2000))
def test_sources_come_back_byte_by_byte(ledger, content):
    assert ledger.source(ledger.add_source(content)) == content


def test_threads_share_one_ledger(ledger):
    def work(name: str) -> None:
        for i in range(20):
            ledger.event("note", f"{name} {i}")

    threads = [threading.Thread(target=work, args=(str(t),)) for t in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(ledger.events()) == 80


def test_processes_share_one_ledger(ledger):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from core.ledger import Ledger
ledger = Ledger.open(Path({str(ledger.path)!r}))
for i in range(15):
    source = f"{{sys.argv[1]}} {{i}}".encode()
    ledger.propose(source=source, program=b"p", fingerprint="f", description=source.decode(), researcher="me")
"""
    running = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "abc"]
    assert [p.wait() for p in running] == [0, 0, 0]
    assert [e.number for e in ledger.experiments()] == list(range(1, 46))
    assert len({e.description for e in ledger.experiments()}) == 45


def test_everything_is_on_disk_when_a_transaction_ends(ledger):
    mode = ledger._connection.execute("PRAGMA journal_mode").fetchone()[0]
    assert mode == ("wal" if database.is_local(ledger.path) else "delete")
    assert ledger._connection.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_no_shared_memory_on_disks_that_may_be_a_network(tmp_path, monkeypatch):
    class Disk:
        mountpoint, fstype, opts = "/", "nfs4", "rw"

    monkeypatch.setattr(database.psutil, "disk_partitions", lambda all: [Disk])
    made = Ledger.create(tmp_path / "ledger.sqlite")
    assert made._connection.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
    propose(made)
    made.close()
    assert [f.name for f in tmp_path.iterdir()] == ["ledger.sqlite"]


def test_clear_errors(tmp_path, ledger):
    with pytest.raises(UserError, match=r"no experiment 7.*`autoresearch run` makes the first"):
        ledger.get(7)
    propose(ledger)
    with pytest.raises(UserError, match=r"no experiment 7.*1 to 1"):
        ledger.get(7)
    with pytest.raises(LabError, match="missing"):
        Ledger.open(tmp_path / "nothing.sqlite")
    (tmp_path / "text.sqlite").write_text("this is no database, and long enough to be looked at " * 50)
    with pytest.raises(LabError, match="damaged"):
        Ledger.open(tmp_path / "text.sqlite")
    ledger.set_meta("schema", 99)
    with pytest.raises(LabError, match="schema 99; this program knows 4"):
        Ledger.open(ledger.path)


def test_a_damaged_page_is_a_clear_error(ledger):
    for k in range(200):
        propose(ledger, f"A = {k}\n".encode() * 40)
    ledger.close()
    content = bytearray(ledger.path.read_bytes())
    content[4096 * 3 : 4096 * 20] = b"\xff" * (4096 * 17)
    ledger.path.write_bytes(content)
    with pytest.raises(LabError, match="damaged"):
        Ledger.open(ledger.path).experiments()


USAGE = {
    "model": "m",
    "input_tokens": 10,
    "output_tokens": 5,
    "cache_read_tokens": 100,
    "cache_write_tokens": 20,
    "usd": 0.25,
}


def test_what_answers_cost_is_on_the_account_of_what_came_of_them(ledger):
    ledger.spend(USAGE)
    ledger.spend({**USAGE, "usd": None})
    propose(ledger, b"A = 0\n")  # somebody who costs nothing
    assert ledger.spent(1).answers == 0
    two = propose(ledger, detail={"usage": {}})
    ledger.spend(USAGE)
    assert ledger.spent(two) == Spent(2, 20, 10, 200, 40, 0.25, 1)
    assert ledger.spent() == Spent(3, 30, 15, 300, 60, 0.5, 1)
    assert ledger.spent().tokens == 405
    with pytest.raises(sqlite3.IntegrityError):
        ledger.spend({**USAGE, "input_tokens": -1})
