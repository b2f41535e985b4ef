"""A lab: a small git repository with the recipe, and its record outside of it, where an agent has no business.

    <lab>/train.py, program.md      what is researched, and the human's strategy; committed
    <lab>/results.tsv               view of the ledger; untracked
    <lab>/.autoresearch.json        which record belongs to this lab; untracked
    <home>/records/<id>/            ledger.sqlite, settings.json, best/, caches/, logs/, work/, run.lock

The branch `autoresearch/<tag>` is the list of improvements; every candidate stays reachable under
`refs/autoresearch/<tag>/<n>`. Both can be built again from the ledger alone, and commits are functions of the ledger's
rows, so that building them again gives the same ones.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core import locks, paths
from core.contract import Past, View
from core.data import Dataset
from core.errors import DataError, LabError
from core.files import remove, replace_file, tree_bytes
from core.gitstore import GitStore
from core.ledger import Experiment, Ledger
from core.recipe import fingerprint
from core.settings import Settings

RECIPE, PROGRAM, RESULTS, POINTER = "train.py", "program.md", "results.tsv", ".autoresearch.json"
UNTRACKED = (RESULTS, POINTER, "report.html", "report.png", ".report*")
SCHEMA = 1
RECIPE_BYTES = 2**20  # a larger train.py is not read; the guard's limit is far below
LOGS_KEPT = 300
ASK = "ask.json"
ASKS = ("pause", "resume", "stop")


class Lab:
    """An open lab. Make one with `create`, `open` or `find`."""

    def __init__(self, path: Path, record: Path, tag: str, settings: Settings, ledger: Ledger) -> None:
        self.path = path
        self.record = record
        self.tag = tag
        self.settings = settings
        self.ledger = ledger
        self.git = GitStore(path)

    # --- making and finding ------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        recipe: bytes,
        program: str,
        settings: Settings,
        message: str,
        history: Sequence[Mapping[str, Any]] | None = None,
    ) -> Lab:
        """Makes the folder, its repository and its record. Raises `LabError` where something lies there already.

        The record is made first and the pointer to it last: a half-made lab has no pointer and is no lab.
        """
        path = path.expanduser().absolute()
        if path.exists() and any(path.iterdir()):
            raise LabError(f"{path} exists and is not empty", "choose another folder for the lab")
        tag = path.name
        record = paths.records_root() / f"{tag}-{uuid.uuid4().hex[:8]}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            record.mkdir(parents=True)
        except OSError as error:
            raise LabError(f"{error.filename} cannot be made ({error.strerror})", "choose another place") from error
        replace_file(record / "settings.json", settings.to_json().encode())
        ledger = Ledger.create(record / "ledger.sqlite")
        lab = cls(path, record, tag, settings, ledger)
        lab._first_commit(recipe, program.encode(), message, list(history or ()))
        replace_file(path / PROGRAM, program.encode())
        replace_file(path / RECIPE, recipe)
        lab.write_results_tsv()
        replace_file(record / "lab.json", json.dumps({"path": str(path), "tag": tag}).encode())
        replace_file(path / POINTER, json.dumps({"schema": SCHEMA, "record": record.name, "tag": tag}).encode())
        lab._remember()
        return lab

    def _first_commit(self, recipe: bytes, program: bytes, message: str, history: list[Mapping[str, Any]]) -> None:
        when = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        self.git = GitStore.create(self.path, self.branch)
        exclude = self.path / ".git" / "info" / "exclude"
        exclude.parent.mkdir(exist_ok=True)
        replace_file(exclude, "".join(f"/{name}\n" for name in UNTRACKED).encode())
        with self.ledger.transaction():
            self.ledger.set_meta("settings_sha256", self.settings.sha256())
            self.ledger.set_meta("history", [dict(entry) for entry in history])
            first = {
                "recipe": self.ledger.add_source(recipe),
                "program": self.ledger.add_source(program),
                "message": message,
                "when": when,
            }
            self.ledger.set_meta("first", first)
            self.ledger.propose(
                source=recipe,
                program=program,
                fingerprint=fingerprint(recipe),
                description="baseline",
                researcher="init",
            )
        self.git.update_refs({self.branch_ref: self.first_commit()})
        self.git.reset_index(self.first_commit())

    @classmethod
    def open(cls, path: Path) -> Lab:
        """Raises `LabError` when there is no lab, it is damaged, or its locked settings were edited."""
        path = path.expanduser().absolute()
        if not path.is_dir():
            raise LabError(f"there is no lab at {path}", "make one: autoresearch init")
        pointer = _pointer(path)
        if pointer is None:
            raise LabError(f"{path} is not a lab: it has no {POINTER}", "name a lab, or make one: autoresearch init")
        record = paths.records_root() / str(pointer["record"])
        if not record.is_dir():
            raise LabError(
                f"the record {pointer['record']} of lab {path} is not under {paths.home()}",
                "set AUTORESEARCH_HOME to where the lab was made",
            )
        ledger = Ledger.open(record / "ledger.sqlite")
        try:
            lab = cls(path, record, str(pointer["tag"]), _locked_settings(record, ledger), ledger)
            lab._check_place()
        except LabError:
            ledger.close()
            raise
        lab._remember()
        return lab

    @classmethod
    def find(cls, given: str | None) -> tuple[Lab, str]:
        """The lab that is named, else the one that one stands in, else the last used; and which of these it was."""
        if given is not None:
            return cls.open(Path(given)), "named"
        here = Path.cwd()
        for folder in (here, *here.parents):
            if (folder / POINTER).is_file():
                return cls.open(folder), "you stand in it"
        last = _last_used()
        if last is None:
            raise LabError("there is no lab yet", "autoresearch run --demo     (or: autoresearch init)")
        return cls.open(last), "last used"

    def _check_place(self) -> None:
        """A lab that was moved keeps its record; a copy of one that is still there must not write to it."""
        facts = self.record / "lab.json"
        try:
            known = Path(json.loads(facts.read_bytes())["path"])
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        if known == self.path:
            return
        there = _pointer(known) if known is not None and known.is_dir() and not known.samefile(self.path) else None
        if there is not None and there["record"] == self.record.name:
            raise LabError(f"{self.path} is a copy of the lab {known}", "work in that one, or make a new lab")
        replace_file(facts, json.dumps({"path": str(self.path), "tag": self.tag}).encode())

    def _remember(self) -> None:
        replace_file(paths.home() / "last-lab", str(self.path).encode())

    # --- what is in it -----------------------------------------------------------------------------

    @property
    def branch(self) -> str:
        return f"autoresearch/{self.tag}"

    @property
    def branch_ref(self) -> str:
        return f"refs/heads/{self.branch}"

    def candidate_ref(self, number: int) -> str:
        return f"refs/autoresearch/{self.tag}/{number}"

    def best(self) -> Experiment | None:
        """The incumbent. Decisions are made in the order of the numbers, so it is the last that was kept."""
        return next((e for e in reversed(self.ledger.experiments()) if e.is_kept), None)

    def source(self, number: int) -> bytes:
        return self.ledger.source(self.ledger.get(number).source_sha256)

    def best_source(self) -> bytes:
        """The recipe that everything starts from: the best's, before there is one the first."""
        best = self.best()
        return self.ledger.source(best.source_sha256 if best else self.ledger.meta("first")["recipe"])

    def best_weights(self) -> Path | None:
        best = self.best()
        file = self.record / "best" / f"{best.number}.safetensors" if best else None
        return file if file is not None and file.is_file() else None

    def best_caches(self) -> Path | None:
        best = self.best()
        folder = self.record / "caches" / str(best.number) if best else None
        return folder if folder is not None and folder.is_dir() else None

    def working_source(self) -> bytes:
        """The `train.py` that lies in the lab now. Raises `LabError` when it is missing or no plain file."""
        return _read_plain(self.path / RECIPE)

    def program(self) -> bytes:
        """`program.md` as it is now; empty when it is missing."""
        file = self.path / PROGRAM
        return _read_plain(file) if file.exists() else b""

    def is_dirty(self) -> bool:
        """Does `train.py` differ from the best's? A missing one does not: nothing is lost by putting it back."""
        return (self.path / RECIPE).exists() and self.working_source() != self.best_source()

    def dataset(self) -> Dataset:
        """The prepared data, its hashes checked. Raises `DataError`."""
        dataset = Dataset.open(paths.data_root() / self.settings.data, verify="quick")
        if dataset.sha256 != self.settings.data_sha256:
            raise DataError(
                f"data set {self.settings.data} is not the one that lab {self.tag} was made with (manifest "
                f"{dataset.sha256[:12]}, locked {self.settings.data_sha256[:12]})",
                "put the old one back, or make a new lab for this one",
            )
        return dataset

    def check_settings(self) -> None:
        """The locked settings are still what they were when the lab was made. Raises `LabError`."""
        _locked_settings(self.record, self.ledger)

    def diff(self, number: int) -> str:
        """Unified diff from what experiment `number` started from to what it tried."""
        tried = self.ledger.get(number)
        before = self.ledger.get(tried.parent).source_sha256 if tried.parent else self.ledger.meta("first")["recipe"]
        old, new = (self.ledger.source(sha).decode("utf-8", "replace") for sha in (before, tried.source_sha256))
        name = f"#{tried.parent}" if tried.parent else "the first"
        lines = difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True), f"{RECIPE} ({name})", f"{RECIPE} (#{number})"
        )
        return "".join(line if line.endswith("\n") else line + "\n" for line in lines)

    def view(self, device: Mapping[str, Any]) -> View:
        """What a researcher may see."""
        best = self.best()
        decided = [e for e in self.ledger.experiments() if e.status is not None]
        return View(
            program=self.program().decode("utf-8", "replace"),
            best_source=self.best_source(),
            best_bpb=best.val_bpb if best else None,
            past=[self._past(e) for e in decided],
            device=dict(device),
            settings=json.loads(self.settings.to_json()),
            history=self.ledger.meta("history", []),
        )

    def _past(self, e: Experiment) -> Past:
        outcome = e.outcome or {}
        facts = ("steps", "tokens", "peak_memory", "params", "training_seconds", "final_loss")
        return Past(
            number=e.number,
            status=str(e.status),
            val_bpb=e.val_bpb,
            description=e.description,
            source=self.ledger.source(e.source_sha256),
            reason=e.reason,
            log_tail=str(outcome.get("log_tail", "")),
            detail=e.detail,
            facts={name: outcome[name] for name in facts if name in outcome},
        )

    # --- git ---------------------------------------------------------------------------------------

    def first_commit(self) -> str:
        first = self.ledger.meta("first")
        return self._commit(first["recipe"], first["program"], [], first["message"], first["when"])

    def commit_of(self, e: Experiment) -> str:
        """The commit of a measured experiment, written if it is missing; a function of the ledger alone."""
        parent = self.commit_of(self.ledger.get(e.parent)) if e.parent else self.first_commit()
        if e.commit and self.git.has(e.commit):
            return e.commit
        score = f"val_bpb {e.val_bpb:.6f}" if e.val_bpb is not None else "no val_bpb"
        message = f"{e.description}\n\nexperiment {e.number}, by {e.researcher}: {score}\n"
        return self._commit(e.source_sha256, e.program_sha256, [parent], message, e.finished or e.created)

    def _commit(self, recipe: str, program: str, parents: Sequence[str], message: str, when: str) -> str:
        blobs = {RECIPE: self.git.blob(self.ledger.source(recipe)), PROGRAM: self.git.blob(self.ledger.source(program))}
        return self.git.commit(self.git.tree(blobs), parents, message, when)

    def tip(self) -> str:
        """Where the branch has to be, by the ledger."""
        best = self.best()
        return self.commit_of(best) if best else self.first_commit()

    def publish(self) -> list[str]:
        """Make git and the lab's files show what the ledger says; says what had to be mended."""
        mended = []
        tip = self.tip()
        wanted = {self.branch_ref: tip}
        wanted |= {self.candidate_ref(e.number): e.commit for e in self.ledger.experiments() if e.commit}
        there = self.git.refs(self.branch_ref, f"refs/autoresearch/{self.tag}/")
        missing = {name: sha for name, sha in wanted.items() if there.get(name) != sha}
        if missing:
            for e in self.ledger.experiments():
                if e.commit and self.candidate_ref(e.number) in missing:
                    self.commit_of(e)
            self.git.update_refs(missing)
            mended = [f"set {name} to {sha[:10]}" for name, sha in missing.items()]
        if self.git.head() == self.branch_ref:
            self.git.reset_index(tip)
        self.write_results_tsv()
        return mended

    def restore_recipe(self) -> None:
        """Put the best's `train.py` back. What lies there instead is in the ledger, or is saved in git first."""
        file, best = self.path / RECIPE, self.best_source()
        if file.exists():
            present = self.working_source()
            if present == best:
                return
            if not self.ledger.knows_source(hashlib.sha256(present).hexdigest()):
                name = f"refs/autoresearch/{self.tag}/saved/{time.strftime('%Y%m%d-%H%M%S')}"
                self.git.update_refs({name: self.git.blob(present)})
                self.ledger.event("saved", f"a train.py that was never judged: git cat-file blob {name}")
        replace_file(file, best)

    def write_results_tsv(self) -> None:
        """Upstream's five columns. What failed has an empty val_bpb, not a number that would win."""
        lines = ["commit\tval_bpb\tmemory_gb\tstatus\tdescription"]
        for e in self.ledger.experiments():
            if e.status is None:
                continue
            score = f"{e.val_bpb:.6f}" if e.val_bpb is not None else ""
            memory = f"{((e.outcome or {}).get('peak_memory') or 0) / 2**30:.1f}"
            row = ((e.commit or "")[:7], score, memory, e.status, " ".join(e.description.split()))
            lines.append("\t".join(row))
        replace_file(self.path / RESULTS, ("\n".join(lines) + "\n").encode())

    # --- asking and locking ------------------------------------------------------------------------

    @contextmanager
    def lock(self, wait: float = 0.0) -> Iterator[None]:
        """One process at a time changes a lab. Raises `Busy` with the pid of the one that does."""
        action = f"see `autoresearch status {self.path}`, or end it with `autoresearch stop {self.path}`"
        with locks.hold(self.record / "run.lock", f"lab {self.tag}", action, wait):
            yield

    def ask(self, what: str) -> None:
        """Ask the running process to `pause`, `resume` or `stop`."""
        if what not in ASKS:
            raise ValueError(f"{what!r} is none of {ASKS}")
        replace_file(self.record / ASK, json.dumps({"ask": what, "at": time.time()}).encode())

    def take_ask(self) -> str | None:
        """What was asked since the last call."""
        file = self.record / ASK
        try:
            asked = json.loads(file.read_bytes()).get("ask")
        except (OSError, ValueError, AttributeError):
            return None
        file.unlink(missing_ok=True)
        return asked if asked in ASKS else None

    # --- taking back and cleaning ------------------------------------------------------------------

    def undo(self, number: int) -> list[int]:
        """Take back keep `number` and all later keeps, which build on it. Returns their numbers, oldest first."""
        with self.lock():
            kept = [e for e in self.ledger.experiments() if e.is_kept]
            if number not in [e.number for e in kept]:
                numbers = ", ".join(f"#{e.number}" for e in kept[1:]) or "none"
                raise LabError(f"experiment {number} is not a keep that stands", f"keeps that can be undone: {numbers}")
            if number == kept[0].number:
                raise LabError(f"experiment {number} is the baseline, from which all others start", "make a new lab")
            if self.is_dirty():
                raise LabError("train.py has changes that were not judged", f"{self.how_to_restore()} first")
            undone = [e.number for e in kept if e.number >= number]
            with self.ledger.transaction():
                self.ledger.mark_undone(undone)
                self.ledger.event("undo", f"taken back: {', '.join(f'#{n}' for n in undone)}", number)
            self.publish()
            self.restore_recipe()
            return undone

    def how_to_restore(self) -> str:
        return f"`autoresearch try {self.path} -m '...'` judges them, `git -C {self.path} checkout {RECIPE}` drops them"

    def clean(self, dry_run: bool) -> list[tuple[str, int]]:
        """What only takes room: (path, bytes). Frees it unless `dry_run`."""
        with self.lock():
            best = self.best()
            keep = str(best.number) if best else ""
            found = [f for f in self._folder("best") if f.name != f"{keep}.safetensors"]
            found += [f for f in self._folder("caches") if f.name != keep]
            found += [*self._folder("work"), *self._folder("tmp"), *self._folder("logs")]
            sized = [(f, tree_bytes(f)) for f in found]
            if not dry_run:
                for f, _ in sized:
                    remove(f)
            return [(str(f), size) for f, size in sized]

    def _folder(self, name: str) -> list[Path]:
        folder = self.record / name
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def keep_products(self, number: int, weights: Path | None, caches: Path | None) -> None:
        """The new best's weights and caches replace the old ones'."""
        for folder, product, name in (("best", weights, f"{number}.safetensors"), ("caches", caches, str(number))):
            (self.record / folder).mkdir(exist_ok=True)
            if product is not None and product.exists():
                remove(self.record / folder / name)
                product.replace(self.record / folder / name)
            for old in self._folder(folder):
                if old.name != name:
                    remove(old)

    def keep_logs(self, number: int, workdir: Path) -> None:
        """The children's logs, each capped by the sandbox; the oldest experiments' go."""
        logs = self.record / "logs"
        logs.mkdir(exist_ok=True)
        for log in workdir.glob("*.log"):
            shutil.copyfile(log, logs / f"{number:06d}-{log.name}")
        for old in sorted(logs.glob("[0-9]*.log"))[: -3 * LOGS_KEPT]:
            old.unlink(missing_ok=True)


def _locked_settings(record: Path, ledger: Ledger) -> Settings:
    file = record / "settings.json"
    try:
        settings = Settings.from_json(file.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise LabError(f"the settings {file} are missing or damaged", "restore the file from a backup") from error
    locked = ledger.meta("settings_sha256")
    if settings.sha256() != locked:
        raise LabError(
            f"the locked settings {file} were edited (hash {settings.sha256()[:12]}, locked {str(locked)[:12]})",
            "put them back: scores under other settings cannot be compared; for others make a new lab",
        )
    return settings


def _pointer(path: Path) -> dict[str, Any] | None:
    """The lab's pointer to its record; None where there is none that can be read."""
    try:
        found = json.loads((path / POINTER).read_bytes())
    except (OSError, ValueError):
        return None
    good = isinstance(found, dict) and all(
        isinstance(found.get(key), str) and found[key] and Path(found[key]).name == found[key]
        for key in ("record", "tag")
    )
    return found if good else None


def _last_used() -> Path | None:
    file = paths.home() / "last-lab"
    try:
        last = Path(file.read_text())
    except OSError:
        return None
    return last if (last / POINTER).is_file() else None


def _read_plain(path: Path) -> bytes:
    """A regular file that is no link and not absurdly large."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise LabError(f"{path} is missing", f"put it back: git -C {path.parent} checkout {path.name}") from None
    except OSError as error:
        raise LabError(f"{path} cannot be read ({error.strerror})", "it has to be a plain file") from error
    with os.fdopen(fd, "rb") as file:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > RECIPE_BYTES:
            raise LabError(f"{path} is no plain file of at most {RECIPE_BYTES} bytes", "put a recipe there")
        return file.read()
