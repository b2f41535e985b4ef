"""The ledger: what was proposed, measured and decided. Everything that a screen shows comes from here.

An experiment goes proposed -> running -> scored -> audited -> decided. "scored" means that its outcome is
recorded, a crash's too (which has no number). Sources are kept here as well as in git, so that the lab's
repository can be rebuilt from the ledger alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from core import schema
from core.database import connect, explained
from core.errors import LabError, UserError
from core.schema import SCHEMA

STATES = ("proposed", "running", "scored", "audited", "decided")
PURPOSES = ("verdict", "control", "confirm")
UNSAMPLED = ("log_tail", "sandbox", "versions", "curve", "weights", "caches")  # of an outcome, not kept for each run
BY_HAND = "you"  # the researcher of what somebody hands in
KEPT = ("keep", "simplify")
SCORED = (*KEPT, "discard")  # these have a number, discards that were not stopped early
FAILED = ("crash", "timeout", "invalid")  # these never have one

_MOVES = {
    ("proposed", "running"),
    ("running", "proposed"),  # dropped: it will be repeated
    ("running", "scored"),
    ("scored", "audited"),
    ("scored", "decided"),
    ("audited", "decided"),
    ("audited", "proposed"),  # measured beside other programs on the card: it will be repeated
    ("scored", "proposed"),  # would be kept but was not audited: it will be repeated
    ("proposed", "decided"),  # given up without a measurement
}


@dataclass(frozen=True)
class Experiment:
    number: int
    state: str  # of STATES
    status: str | None  # keep, simplify, discard, crash, timeout, invalid; None until decided
    tainted: bool  # measured while something else used the device
    description: str
    researcher: str
    detail: dict[str, Any]
    source_sha256: str
    program_sha256: str  # of program.md at the time of the proposal
    fingerprint: str  # equal for sources that differ in comments and layout only
    parent: int | None  # number of the incumbent when this was proposed
    commit: str | None
    val_bpb: float | None
    best_before: float | None  # what it was compared with
    reason: str
    outcome: dict[str, Any] | None  # Outcome.to_dict()
    attempts: int  # how often it was started without coming to an outcome, the present start included
    created: str  # UTC, ISO 8601, like all times here
    started: str | None
    finished: str | None
    undone: str | None  # when a keep was taken back
    verdict: dict[str, Any] = field(default_factory=dict)  # what the decision was made from: effect, interval, runs, …

    @property
    def is_kept(self) -> bool:
        return self.status in KEPT and self.undone is None

    @property
    def handed_in(self) -> str:
        """The sha256 of the source as it was proposed."""
        return str((self.detail.get("reapplied") or {}).get("source") or self.source_sha256)


@dataclass(frozen=True)
class Sample:
    """One run of an experiment's recipe that has a number."""

    number: int
    seed: int
    val_bpb: float
    tainted: bool
    versions: dict[str, Any]  # what it was measured with
    created: str
    purpose: str = "verdict"  # of PURPOSES: "control" is the best again, "confirm" decides nothing
    outcome: dict[str, Any] | None = None  # Outcome.to_dict() without what `UNSAMPLED` names; None: of an older ledger
    holdout_bpb: float | None = None
    id: int = 0  # in the order in which they were recorded
    epoch: int = 0  # only runs of one epoch are comparable: a new one begins when the machine or the versions changed

    def told(self) -> dict[str, Any]:
        """The run in the record of a decision: what is left of it where the samples of a failure are dropped."""
        outcome = self.outcome or {}
        return {
            "seed": self.seed,
            "bpb": self.val_bpb,
            "seconds": (outcome.get("timings") or {}).get("total"),
            "idle": outcome.get("idle") or {},
            "tainted": self.tainted,
            "disturbed": (outcome.get("health") or {}).get("disturbed") or "",
            "epoch": self.epoch,
        }


def earlier(runs: Sequence[Mapping[str, Any]], outcome: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Of an experiment's `runs` that have a number (`Sample.told`), oldest first, those before its last run, whose
    `outcome` this is: where the last one failed, all."""
    return runs[:-1] if runs and runs[-1]["bpb"] == outcome.get("val_bpb") else runs


@dataclass(frozen=True)
class Ablation:
    """A kept change that was left out of a best."""

    id: int
    number: int  # of the experiment whose change it is
    winner: int  # of the best that it was left out of
    source_sha256: str | None  # of the recipe that results; None: it cannot be left out
    reason: str  # why it cannot, or why the recipe that results does not run; else ""
    created: str
    runs: tuple[Sample, ...] = ()  # of that recipe, on fresh seeds, oldest first; their `number` is this one's


@dataclass(frozen=True)
class Spent:
    """What answers of paid researchers took, summed."""

    answers: int = 0
    input_tokens: int = 0  # those at the full price
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    usd: float = 0.0  # of the answers whose price is known
    unpriced: int = 0  # answers whose price is not known

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens + self.cache_read_tokens + self.cache_write_tokens


@dataclass(frozen=True)
class LedgerEvent:
    id: int
    created: str
    kind: str  # "note", "refused", "undo", "remeasured", ...
    number: int | None
    text: str


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Ledger:
    """One SQLite file. Methods may be called by several threads, and by several processes at once."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.RLock()
        self._depth = 0

    # --- opening ---------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path) -> Ledger:
        ledger = cls(path, connect(path, "rwc"))
        with ledger.transaction():
            schema.create(ledger._connection)
            ledger.set_meta("schema", SCHEMA)
        return ledger

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """Raises `LabError` when it is missing, damaged or of a newer program."""
        if not path.is_file():
            raise LabError(f"the ledger {path} is missing", "restore it from a backup or make a new lab")
        ledger = cls(path, connect(path, "rw"))
        try:
            present = ledger.meta("schema")
        except LabError:
            ledger.close()
            raise
        if present in schema.UPGRADES:
            try:
                ledger._upgrade()
            except UserError as error:
                if "cannot be written" not in error.fact:  # on a read-only disk it can still be looked at
                    ledger.close()
                    raise
        elif present != SCHEMA:
            ledger.close()
            raise LabError(
                f"the ledger {path} has schema {present}; this program knows {SCHEMA}", "update autoresearch"
            )
        return ledger

    def _upgrade(self) -> None:
        """Step by step to SCHEMA, all or nothing; two processes that open it at once do it once."""
        with explained(self.path):
            self._connection.execute("PRAGMA foreign_keys = OFF")  # a table that is replaced is gone for a moment
        with self.transaction():
            while (present := self.meta("schema")) in schema.UPGRADES:
                schema.UPGRADES[present](self._connection)
                self.set_meta("schema", present + 1)
        with explained(self.path):
            self._connection.execute("PRAGMA foreign_keys = ON")

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # --- transactions ----------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, on disk when it ends. May be nested: the outermost one commits."""
        with self._lock, explained(self.path):
            if self._depth == 0:
                self._connection.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
                if self._depth == 1:
                    self._connection.execute("COMMIT")
            except BaseException:
                if self._depth == 1 and self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock, explained(self.path):
            return self._connection.execute(query, values).fetchall()

    # --- reading ---------------------------------------------------------------------------------

    def experiments(self) -> list[Experiment]:
        """Oldest first."""
        return [_experiment(row) for row in self._rows("SELECT * FROM experiments ORDER BY number")]

    def pending(self) -> list[Experiment]:
        """Proposed and not decided, oldest first."""
        return [
            _experiment(row) for row in self._rows("SELECT * FROM experiments WHERE status IS NULL ORDER BY number")
        ]

    def best(self) -> Experiment | None:
        """The incumbent. Decisions are made in the order of the numbers, so it is the last keep that stands."""
        kept = "status IN ('keep', 'simplify') AND undone IS NULL"
        rows = self._rows(f"SELECT * FROM experiments WHERE {kept} ORDER BY number DESC LIMIT 1")
        return _experiment(rows[0]) if rows else None

    def is_decided(self, source_sha256: str) -> bool:
        """Was exactly this source judged, or is it the lab's first?"""
        judged = any(e.status is not None for e in self.of_source(source_sha256))
        return judged or self.meta("first")["recipe"] == source_sha256

    def of_source(self, sha256: str) -> list[Experiment]:
        """The experiments that this very file was handed in as, oldest first: what is measured may be its change made
        to a newer best (`rebase`)."""
        return [e for e in self.experiments() if sha256 in (e.source_sha256, e.handed_in)]

    def get(self, number: int) -> Experiment:
        rows = self._rows("SELECT * FROM experiments WHERE number = ?", number)
        if not rows:
            last = self._rows("SELECT max(number) AS last FROM experiments")[0]["last"]
            raise UserError(
                f"there is no experiment {number}",
                f"`autoresearch log` lists them, 1 to {last}" if last else "`autoresearch run` makes the first",
            )
        return _experiment(rows[0])

    def source(self, sha256: str) -> bytes:
        return zlib.decompress(self._rows("SELECT content FROM sources WHERE sha256 = ?", sha256)[0]["content"])

    def knows_source(self, sha256: str) -> bool:
        return bool(self._rows("SELECT 1 FROM sources WHERE sha256 = ?", sha256))

    def samples(self, number: int, purpose: str | None = None) -> list[Sample]:
        """Those of an experiment, oldest first; only those of one purpose where it is named."""
        found = [_sample(row) for row in self._rows("SELECT * FROM samples WHERE number = ? ORDER BY id", number)]
        return [s for s in found if purpose in (None, s.purpose)]

    def all_samples(self) -> list[Sample]:
        """Those of all experiments, oldest first."""
        return [_sample(row) for row in self._rows("SELECT * FROM samples ORDER BY id")]

    def ablations(self) -> list[Ablation]:
        """Of each change and best the newest, oldest first."""
        if not self._rows("SELECT 1 FROM sqlite_master WHERE name = 'ablations'"):
            return []  # an older ledger on a read-only disk
        runs: dict[int, list[Sample]] = {}
        query = "SELECT r.*, a.number FROM ablation_runs r JOIN ablations a ON a.id = r.ablation ORDER BY r.id"
        for row in self._rows(query):
            fields = {**dict(row), "purpose": "confirm"}
            runs.setdefault(fields.pop("ablation"), []).append(_sample(fields))
        newest = "SELECT max(id) FROM ablations GROUP BY number, winner"
        rows = self._rows(f"SELECT * FROM ablations WHERE id IN ({newest}) ORDER BY id")
        return [Ablation(**dict(row), runs=tuple(runs.get(row["id"], ()))) for row in rows]

    def ablation(self, number: int, winner: int) -> Ablation | None:
        return next((a for a in self.ablations() if (a.number, a.winner) == (number, winner)), None)

    def epoch(self) -> int:
        """Which runs can be compared now: those of this epoch."""
        return int(self.meta("epoch", 0))

    def events(self, after: int = 0) -> list[LedgerEvent]:
        """Oldest first, those with a larger id than `after`."""
        return [LedgerEvent(*row) for row in self._rows("SELECT * FROM events WHERE id > ? ORDER BY id", after)]

    def spent(self, number: int | None = None) -> Spent:
        """What all answers took, or those that led to experiment `number`."""
        if not self._rows("SELECT 1 FROM sqlite_master WHERE name = 'spending'"):
            return Spent()  # an older ledger on a read-only disk
        columns = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "usd")
        sums = ", ".join(f"coalesce(sum({name}), 0)" for name in columns)
        query = f"SELECT count(*), {sums}, count(*) - count(usd) FROM spending"
        row = self._rows(f"{query} WHERE number = ?", number) if number is not None else self._rows(query)
        return Spent(*row[0])

    def meta(self, key: str, default: Any = None) -> Any:
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(rows[0]["value"]) if rows else default

    # --- writing ---------------------------------------------------------------------------------

    def set_meta(self, key: str, value: Any) -> None:
        """`value` is anything that JSON can hold."""
        with self.transaction():
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def event(self, kind: str, text: str, number: int | None = None) -> None:
        with self.transaction():
            query = "INSERT INTO events (created, kind, number, text) VALUES (?, ?, ?, ?)"
            self._connection.execute(query, (now(), kind, number, text))

    def spend(self, usage: Mapping[str, Any], number: int | None = None) -> None:
        """Put one answer on the account. `usage`: `model`, the token counts that `Spent` names, and `usd`, None where
        the price is not known. Without `number` it belongs to the next proposal that says what it cost."""
        kinds = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")
        counts = [int(usage.get(kind) or 0) for kind in kinds]
        usd = usage.get("usd")
        with self.transaction():
            self._connection.execute(
                f"INSERT INTO spending (created, number, model, {', '.join(kinds)}, usd)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (now(), number, str(usage.get("model") or "unknown"), *counts, None if usd is None else float(usd)),
            )

    def add_source(self, content: bytes) -> str:
        """Returns its sha256."""
        sha256 = hashlib.sha256(content).hexdigest()
        with self.transaction():
            self._connection.execute("INSERT OR IGNORE INTO sources VALUES (?, ?)", (sha256, zlib.compress(content)))
        return sha256

    def propose(
        self,
        *,
        source: bytes,
        program: bytes,
        fingerprint: str,
        description: str,
        researcher: str,
        detail: Mapping[str, Any] | None = None,
        parent: int | None = None,
    ) -> int:
        """The intent: from here on the candidate cannot be lost. Returns its number.

        A source that is already waiting or running keeps the number that it has.
        """
        with self.transaction():
            sha256 = self.add_source(source)
            if waiting := [e for e in self.pending() if sha256 in (e.source_sha256, e.handed_in)]:
                return waiting[0].number
            number = int(self._rows("SELECT coalesce(max(number), 0) + 1 AS next FROM experiments")[0]["next"])
            self._connection.execute(
                "INSERT INTO experiments (number, state, description, researcher, detail, source_sha256,"
                " program_sha256, fingerprint, parent, created) VALUES (?, 'proposed', ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    number,
                    description,
                    researcher,
                    json.dumps(dict(detail or {})),
                    sha256,
                    self.add_source(program),
                    fingerprint,
                    parent,
                    now(),
                ),
            )
            if "usage" in (detail or {}):  # what was asked since the last one led to this one
                self._connection.execute("UPDATE spending SET number = ? WHERE number IS NULL", (number,))
            return number

    def advance(self, number: int, state: str, **fields: Any) -> None:
        """Move an experiment to another state and set columns with it, in one transaction.

        Raises `ValueError` on a move that the life of an experiment does not have.
        """
        with self.transaction():
            present = self.get(number).state
            if (present, state) not in _MOVES:
                raise ValueError(f"experiment {number} cannot go from {present} to {state}")
            self._set(number, state=state, **fields)
            if fields.get("status") in FAILED:
                self._connection.execute("DELETE FROM samples WHERE number = ?", (number,))

    def start(self, number: int) -> None:
        """proposed -> running."""
        attempts = self.get(number).attempts + 1
        self.advance(number, "running", started=now(), attempts=attempts)

    def requeue(self, number: int, why: str, counts: bool, drop: Sequence[Sample] = ()) -> None:
        """Back to proposed: this run of it will be repeated. `counts`: as an attempt that failed.

        What the run brought is dropped, and `drop`; the experiment's other runs stay."""
        with self.transaction():
            present = self.get(number)
            attempts = present.attempts if counts else max(0, present.attempts - 1)
            ids = [sample.id for sample in drop]
            if present.val_bpb is not None:
                ids += [sample.id for sample in self.samples(number, "verdict")[-1:]]
            self._connection.executemany("DELETE FROM samples WHERE id = ?", [(i,) for i in ids])
            others = self.samples(number, "verdict")
            nothing = {} if others else {"outcome": None, "finished": None}
            if present.state != "proposed":
                self.advance(number, "proposed", attempts=attempts, started=None, val_bpb=None, tainted=0, **nothing)
            self.event("requeued", why, number)

    def rebase(self, number: int, source: bytes, fingerprint: str, parent: int) -> None:
        """What waits is made to another best, `parent`: `source` is what will be measured. What was handed in stays on
        the record; its runs, if there are any, were of something else and are dropped."""
        with self.transaction():
            e = self.get(number)
            sha256, drop = self.add_source(source), self.samples(number, "verdict")
            if drop:
                self.requeue(number, f"#{parent} is the best now; its runs were of another recipe", False, drop)
            detail = e.detail
            if sha256 != e.source_sha256:
                made_to = (detail.get("reapplied") or {}).get("from", e.parent)
                detail = {**detail, "reapplied": {"from": made_to, "to": parent, "source": e.handed_in}}
            columns = {"source_sha256": sha256, "fingerprint": fingerprint, "detail": json.dumps(detail)}
            self._set(number, parent=parent, **columns)

    def next_run(self, number: int) -> None:
        """Back to proposed: this run is on the record, and the verdict asks for another."""
        self.advance(number, "proposed", attempts=0, started=None, val_bpb=None, tainted=0)

    def record(
        self, number: int, outcome: Mapping[str, Any], seed: int, versions: Mapping[str, Any], tainted: bool = False
    ) -> None:
        """running -> scored, and on to audited if it was. A number is taken from a scored outcome only."""
        score = outcome.get("val_bpb") if outcome.get("status") == "scored" else None
        usable = isinstance(score, float) and math.isfinite(score) and score > 0
        with self.transaction():
            self.advance(
                number,
                "scored",
                outcome=json.dumps(dict(outcome)),
                val_bpb=score if usable else None,
                tainted=int(tainted),
                finished=now(),
            )
            if usable:
                self.add_sample(number, seed, float(score), tainted, versions, outcome=outcome)  # type: ignore[arg-type]
                if outcome.get("audited"):
                    self.advance(number, "audited")

    def begin_epoch(self, why: str, number: int, carry: Sequence[Sample] = ()) -> None:
        """Runs from here on, and what is carried over, are not compared with those before. `number`: the best."""
        with self.transaction():
            self.set_meta("epoch", self.epoch() + 1)
            for sample in carry:
                self._connection.execute("UPDATE samples SET epoch = ? WHERE id = ?", (self.epoch(), sample.id))
            self.event("epoch", why, number)

    def add_sample(
        self,
        number: int,
        seed: int,
        val_bpb: float,
        tainted: bool,
        versions: Mapping[str, Any],
        purpose: str = "verdict",
        outcome: Mapping[str, Any] | None = None,
    ) -> None:
        """One run's score, in the present epoch. `outcome`: Outcome.to_dict() of that run."""
        kept = {k: v for k, v in outcome.items() if k not in UNSAMPLED} if outcome else None
        holdout = outcome.get("holdout_bpb") if outcome else None
        with self.transaction():
            self._connection.execute(
                "INSERT INTO samples (number, seed, val_bpb, tainted, versions, created, purpose, outcome, holdout_bpb,"
                " epoch) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    number,
                    seed,
                    val_bpb,
                    int(tainted),
                    json.dumps(dict(versions), sort_keys=True),
                    now(),
                    purpose,
                    json.dumps(kept) if kept is not None else None,
                    holdout,
                    self.epoch(),
                ),
            )

    def ablate(self, number: int, winner: int, source: bytes | None, reason: str = "") -> None:
        """What becomes of a best without the change of experiment `number`. The same recipe again keeps its runs, and
        without a `reason` the one that it has until a run of it succeeds."""
        with self.transaction():
            sha256 = None if source is None else self.add_source(source)
            present = self.ablation(number, winner)
            if present is not None and present.source_sha256 == sha256:
                if reason:
                    self._connection.execute("UPDATE ablations SET reason = ? WHERE id = ?", (reason, present.id))
                return
            query = "INSERT INTO ablations (number, winner, source_sha256, reason, created) VALUES (?, ?, ?, ?, ?)"
            self._connection.execute(query, (number, winner, sha256, reason, now()))

    def add_ablation_run(
        self, a: Ablation, seed: int, tainted: bool, versions: Mapping[str, Any], outcome: Mapping[str, Any]
    ) -> None:
        """One run's score, in the present epoch. `outcome`: Outcome.to_dict() of that run, which is scored."""
        kept = json.dumps({k: v for k, v in outcome.items() if k not in UNSAMPLED})
        told = (json.dumps(dict(versions), sort_keys=True), now(), kept, self.epoch())
        with self.transaction():
            self._connection.execute(
                "INSERT INTO ablation_runs (ablation, seed, val_bpb, tainted, versions, created, outcome, epoch)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (a.id, seed, outcome["val_bpb"], int(tainted), *told),
            )
            self._connection.execute("UPDATE ablations SET reason = '' WHERE id = ?", (a.id,))

    def mark_undone(self, numbers: list[int]) -> None:
        with self.transaction():
            for number in numbers:
                self._set(number, undone=now())

    def _set(self, number: int, **fields: Any) -> None:
        columns = ", ".join(f"{'commit_sha' if name == 'commit' else name} = ?" for name in fields)
        self._connection.execute(f"UPDATE experiments SET {columns} WHERE number = ?", (*fields.values(), number))


def _experiment(row: sqlite3.Row) -> Experiment:
    fields = dict(row)
    fields["commit"] = fields.pop("commit_sha")
    fields["tainted"] = bool(fields["tainted"])
    fields["detail"] = json.loads(fields["detail"])
    fields["outcome"] = json.loads(fields["outcome"]) if fields["outcome"] else None
    fields["verdict"] = json.loads(fields.get("verdict") or "{}")  # not there in an older ledger on a read-only disk
    return Experiment(**fields)


def _sample(row: sqlite3.Row | dict[str, Any]) -> Sample:
    fields = dict(row)
    fields["tainted"] = bool(fields["tainted"])
    fields["versions"] = json.loads(fields["versions"])
    fields["outcome"] = json.loads(fields["outcome"]) if fields.get("outcome") else None
    return Sample(**fields)
