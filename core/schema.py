"""The ledger's tables, and how those of an earlier version of the program become the present ones.

Version 1 knew no account of what researchers cost, version 2 one run per experiment, version 3 no ablations.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

SCHEMA = 4

_META = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE sources (sha256 TEXT PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, created TEXT NOT NULL, kind TEXT NOT NULL, number INTEGER, text TEXT NOT NULL
);
"""

# A discard has no number where its run was stopped early. `verdict`: what the decision was made from, as JSON.
_EXPERIMENTS = """
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
    verdict TEXT NOT NULL DEFAULT '{}',
    CHECK ((state = 'decided') = (status IS NOT NULL)),
    CHECK (status IS NULL OR status NOT IN ('crash', 'timeout', 'invalid') OR val_bpb IS NULL),
    CHECK (status IS NULL OR status NOT IN ('keep', 'simplify') OR val_bpb IS NOT NULL)
);
"""

# One row for each run that has a number. `outcome`: of that run, as JSON; `epoch`: since when it can be compared.
_SAMPLES = """
CREATE TABLE samples (
    id INTEGER PRIMARY KEY,
    number INTEGER NOT NULL REFERENCES experiments,
    seed INTEGER NOT NULL,
    val_bpb REAL NOT NULL CHECK (val_bpb > 0 AND val_bpb < 1e9),
    tainted INTEGER NOT NULL DEFAULT 0,
    versions TEXT NOT NULL,
    created TEXT NOT NULL,
    purpose TEXT NOT NULL DEFAULT 'verdict' CHECK (purpose IN ('verdict', 'control', 'confirm')),
    outcome TEXT,
    holdout_bpb REAL CHECK (holdout_bpb IS NULL OR (holdout_bpb > 0 AND holdout_bpb < 1e9)),
    epoch INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX samples_of ON samples (number);
"""

# Tokens that researchers bought, a row for each answer. `number`: the experiment that came of it, once there is one.
_SPENDING = """
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

# Kept changes left out of a best. `reason`: why it cannot be (then there is no source), or why the recipe does not run.
# Its runs stand beside `samples` because the recipe is no experiment: nothing that judges experiments sees them.
_ABLATIONS = """
CREATE TABLE ablations (
    id INTEGER PRIMARY KEY,
    number INTEGER NOT NULL REFERENCES experiments,
    winner INTEGER NOT NULL REFERENCES experiments,
    source_sha256 TEXT REFERENCES sources,
    reason TEXT NOT NULL DEFAULT '',
    created TEXT NOT NULL,
    CHECK (source_sha256 IS NOT NULL OR reason != '')
);
CREATE TABLE ablation_runs (
    id INTEGER PRIMARY KEY,
    ablation INTEGER NOT NULL REFERENCES ablations,
    seed INTEGER NOT NULL,
    val_bpb REAL NOT NULL CHECK (val_bpb > 0 AND val_bpb < 1e9),
    tainted INTEGER NOT NULL DEFAULT 0,
    versions TEXT NOT NULL,
    created TEXT NOT NULL,
    outcome TEXT,
    epoch INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX ablation_runs_of ON ablation_runs (ablation);
"""


def create(connection: sqlite3.Connection) -> None:
    """All tables of the present version, empty; within the caller's transaction."""
    _execute(connection, _META + _EXPERIMENTS + _SAMPLES + _SPENDING + _ABLATIONS)


def _to_2(connection: sqlite3.Connection) -> None:
    _execute(connection, _SPENDING)


def _to_3(connection: sqlite3.Connection) -> None:
    """SQLite cannot change a CHECK: both tables are made again beside the old ones and take their place and rows."""
    for table, present in (("experiments", _EXPERIMENTS), ("samples", _SAMPLES)):
        columns = ", ".join(row[1] for row in connection.execute(f"PRAGMA table_info({table})"))
        create_table, *indices = [s for s in present.split(";\n") if s.strip()]
        connection.execute(create_table.replace(f"TABLE {table} ", f"TABLE new_{table} "))
        connection.execute(f"INSERT INTO new_{table} ({columns}) SELECT {columns} FROM {table}")
        connection.execute(f"DROP TABLE {table}")
        connection.execute(f"ALTER TABLE new_{table} RENAME TO {table}")
        for index in indices:
            connection.execute(index)
    broken = connection.execute("PRAGMA foreign_key_check").fetchall()
    if broken:
        raise sqlite3.DatabaseError(f"malformed: {len(broken)} rows refer to others that are not there")


def _to_4(connection: sqlite3.Connection) -> None:
    _execute(connection, _ABLATIONS)


UPGRADES: dict[int, Callable[[sqlite3.Connection], None]] = {1: _to_2, 2: _to_3, 3: _to_4}  # schema -> to the next


def _execute(connection: sqlite3.Connection, statements: str) -> None:
    for statement in statements.split(";\n"):
        connection.execute(statement)
