"""Ledgers of earlier versions: they become the present one, whole or not at all, and lose nothing."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import time
import zlib
from hashlib import sha256
from pathlib import Path

import pytest
from test_ledger import USAGE

from core import ledger as module
from core.ledger import Ledger, Spent

# As the first three versions of the program wrote them.
FIRST = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE sources (sha256 TEXT PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE experiments (
    number INTEGER PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('proposed', 'running', 'scored', 'audited', 'decided')),
    status TEXT CHECK (status IN ('keep', 'simplify', 'discard', 'crash', 'timeout', 'invalid')),
    tainted INTEGER NOT NULL DEFAULT 0,
    description TEXT NOT NULL,
    researcher TEXT NOT NULL,
    detail TEXT NOT NULL DEFAULT '{}',
    source_sha256 TEXT NOT NULL REFERENCES sources,
    program_sha256 TEXT NOT NULL REFERENCES sources,
    fingerprint TEXT NOT NULL,
    parent INTEGER,
    commit_sha TEXT,
    val_bpb REAL CHECK (val_bpb IS NULL OR (val_bpb > 0 AND val_bpb < 1e9)),
    best_before REAL,
    reason TEXT NOT NULL DEFAULT '',
    outcome TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    created TEXT NOT NULL,
    started TEXT,
    finished TEXT,
    undone TEXT,
    CHECK ((state = 'decided') = (status IS NOT NULL)),
    CHECK (status IS NULL OR status NOT IN ('crash', 'timeout', 'invalid') OR val_bpb IS NULL),
    CHECK (status IS NULL OR status NOT IN ('keep', 'simplify', 'discard') OR val_bpb IS NOT NULL)
);
CREATE TABLE samples (
    id INTEGER PRIMARY KEY,
    number INTEGER NOT NULL REFERENCES experiments,
    seed INTEGER NOT NULL,
    val_bpb REAL NOT NULL CHECK (val_bpb > 0 AND val_bpb < 1e9),
    tainted INTEGER NOT NULL DEFAULT 0,
    versions TEXT NOT NULL,
    created TEXT NOT NULL
);
CREATE INDEX samples_of ON samples (number);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, created TEXT NOT NULL, kind TEXT NOT NULL, number INTEGER, text TEXT NOT NULL
);
"""

SECOND = """
CREATE TABLE spending (
    id INTEGER PRIMARY KEY,
    created TEXT NOT NULL,
    number INTEGER,
    model TEXT NOT NULL,
    input_tokens INTEGER NOT NULL CHECK (input_tokens >= 0),
    output_tokens INTEGER NOT NULL CHECK (output_tokens >= 0),
    cache_read_tokens INTEGER NOT NULL CHECK (cache_read_tokens >= 0),
    cache_write_tokens INTEGER NOT NULL CHECK (cache_write_tokens >= 0),
    usd REAL CHECK (usd IS NULL OR usd >= 0)
);
CREATE INDEX spending_of ON spending (number);
"""

THIRD = """
ALTER TABLE experiments ADD COLUMN verdict TEXT NOT NULL DEFAULT '{}';
ALTER TABLE samples ADD COLUMN purpose TEXT NOT NULL DEFAULT 'verdict'
    CHECK (purpose IN ('verdict', 'control', 'confirm'));
ALTER TABLE samples ADD COLUMN outcome TEXT;
ALTER TABLE samples ADD COLUMN holdout_bpb REAL CHECK (holdout_bpb IS NULL OR (holdout_bpb > 0 AND holdout_bpb < 1e9));
ALTER TABLE samples ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
"""

SOURCE = b"A = 1\n"
WHEN = "2026-01-02T03:04:05+00:00"
EXPERIMENTS = [
    (1, "decided", "keep", 2.0, "the baseline: 2.000000", {"status": "scored", "steps": 7}),
    (2, "decided", "discard", 2.5, "worse", {"status": "scored"}),
    (3, "decided", "crash", None, "a slip", {"status": "crash", "log_tail": "Traceback"}),
    (4, "audited", None, 1.5, "", {"status": "scored", "audited": True}),
    (5, "proposed", None, None, "", None),
]


def old_ledger(path: Path, schema: int) -> Path:
    """A ledger of that schema with experiments in every state, samples, events and an account."""
    connection = sqlite3.connect(path)
    written = FIRST if schema < 3 else FIRST.replace("'keep', 'simplify', 'discard') OR", "'keep', 'simplify') OR")
    connection.executescript(written + SECOND * (schema >= 2) + THIRD * (schema >= 3))
    meta = {"schema": schema, "first": {"recipe": sha256(SOURCE).hexdigest()}, "history": [1]}
    connection.executemany("INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in meta.items()])
    key = sha256(SOURCE).hexdigest()
    connection.execute("INSERT INTO sources VALUES (?, ?)", (key, zlib.compress(SOURCE)))
    for number, state, status, bpb, reason, outcome in EXPERIMENTS:
        connection.execute(
            "INSERT INTO experiments (number, state, status, description, researcher, detail, source_sha256,"
            " program_sha256, fingerprint, val_bpb, reason, outcome, created, tainted, attempts, undone)"
            " VALUES (?, ?, ?, ?, 'me', '{\"k\": 1}', ?, ?, 'f', ?, ?, ?, ?, 1, 2, NULL)",
            (number, state, status, f"idea {number}", key, key, bpb, reason, outcome and json.dumps(outcome), WHEN),
        )
        if bpb is not None:
            for seed in (42, 42):
                connection.execute(
                    "INSERT INTO samples (number, seed, val_bpb, tainted, versions, created) VALUES (?, ?, ?, 1, ?, ?)",
                    (number, seed, bpb, '{"torch": "2"}', WHEN),
                )
    connection.execute("INSERT INTO events (created, kind, number, text) VALUES (?, 'note', 1, 'hello')", (WHEN,))
    if schema >= 2:
        connection.execute("INSERT INTO spending VALUES (1, ?, 2, 'm', 10, 5, 100, 20, 0.25)", (WHEN,))
    connection.commit()
    connection.close()
    return path


def tables(path: Path) -> dict[str, list[tuple]]:
    connection = sqlite3.connect(path)
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {name: connection.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall() for name in names}
    connection.close()
    return found


def as_it_was(path: Path, before: dict[str, list[tuple]]) -> None:
    """Every row that was there is there, its columns in their places, with the defaults of the new ones behind."""
    after = tables(path)
    for name in before.keys() - {"meta"}:
        wide = len(before[name][0]) if before[name] else 0
        assert [row[:wide] for row in after[name]] == before[name], name
    assert not [name for name in after if name.startswith("new_")]
    assert [row[-1] for row in after["experiments"]] == ["{}"] * len(EXPERIMENTS)
    assert {row[-4:] for row in after["samples"]} == {("verdict", None, None, 0)}
    assert {k: v for k, v in after["meta"] if k != "schema"} == {k: v for k, v in before["meta"] if k != "schema"}


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_an_older_ledger_becomes_the_present_one_and_loses_nothing(tmp_path, schema):
    path = old_ledger(tmp_path / "ledger.sqlite", schema)
    before = tables(path)
    opened = [Ledger.open(path), Ledger.open(path)]
    as_it_was(path, before)
    for now in opened:
        assert (now.meta("schema"), now.epoch()) == (4, 0)
        assert now.spent() == (Spent() if schema == 1 else Spent(1, 10, 5, 100, 20, 0.25))
        assert [(e.number, e.state, e.status, e.val_bpb, e.reason, e.outcome) for e in now.experiments()] == EXPERIMENTS
        assert [(s.purpose, s.outcome, s.holdout_bpb, s.epoch) for s in now.samples(1)] == [
            ("verdict", None, None, 0)
        ] * 2
        assert now.best().number == 1 and now.source(now.get(4).source_sha256) == SOURCE
    opened[0].spend(USAGE)
    assert opened[1].spent().answers == (1 if schema == 1 else 2)
    with pytest.raises(sqlite3.IntegrityError):  # rows still have to belong to an experiment
        opened[0].add_sample(9, 42, 1.0, False, {})
    opened[0].advance(4, "decided", status="discard", val_bpb=None)  # stopped early: what the old tables refused
    assert opened[1].get(4).status == "discard"
    opened[0].ablate(1, 4, b"A = 2\n")
    opened[0].add_ablation_run(opened[0].ablation(1, 4), 1042, False, {"torch": "2"}, {"val_bpb": 1.75})
    assert [(a.number, a.winner, [s.val_bpb for s in a.runs]) for a in opened[1].ablations()] == [(1, 4, [1.75])]
    with pytest.raises(sqlite3.IntegrityError):  # a change that cannot be left out says why
        opened[0].ablate(1, 4, None)
    for now in opened:
        now.close()


def test_an_older_ledger_on_a_read_only_disk_can_be_looked_at(tmp_path, monkeypatch):
    path = old_ledger(tmp_path / "ledger.sqlite", 1)
    connect = module.connect

    def read_only(path, mode):
        made = connect(path, mode)
        made.execute("PRAGMA query_only = ON")
        return made

    monkeypatch.setattr(module, "connect", read_only)
    now = Ledger.open(path)
    assert (now.ablations(), now.ablation(1, 4)) == ([], None)
    assert (now.meta("schema"), now.spent(), now.get(1).detail, now.get(1).verdict) == (1, Spent(), {"k": 1}, {})
    assert [(s.val_bpb, s.purpose, s.epoch) for s in now.samples(1)] == [(2.0, "verdict", 0)] * 2
    now.close()


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and fork are POSIX")
def test_an_upgrade_that_is_killed_is_done_whole_or_not_at_all(tmp_path):
    """The process ends before each of the upgrade's statements in turn; the next start does it again."""
    for statement in range(40):
        path = old_ledger(tmp_path / f"ledger-{statement}.sqlite", 1)
        before = tables(path)
        pid = os.fork()
        if pid == 0:
            _upgrade_until(path, statement)
        _, status = os.waitpid(pid, 0)
        done = os.WIFEXITED(status)
        if not done:
            assert os.WTERMSIG(status) == signal.SIGKILL
            assert tables(path) == before
        Ledger.open(path).close()
        as_it_was(path, before)
        if done:
            break
    assert 10 < statement < 39, "each statement of the upgrade was the last one once"


def _upgrade_until(path: Path, statements: int) -> None:
    """In a process of its own, which never returns."""
    left, connect = [statements], module.connect

    def trace(statement: str) -> None:
        if statement.split()[0] in ("CREATE", "INSERT", "DROP", "ALTER", "COMMIT"):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            left[0] -= 1

    def traced(path: Path, mode: str) -> sqlite3.Connection:
        made = connect(path, mode)
        made.set_trace_callback(trace)
        return made

    code = 1
    try:
        module.connect = traced
        Ledger.open(path)
        code = 0
    finally:
        os._exit(code)
