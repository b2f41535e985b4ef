"""A lab: a small git repository with the recipe, and its record outside of it, where an agent has no business.

    <lab>/train.py, program.md      what is researched, and the human's strategy; committed
    <lab>/results.tsv               view of the ledger; untracked
    <lab>/.autoresearch.json        which record belongs to this lab; untracked
    <home>/records/<id>/            ledger.sqlite, settings.json, run.lock, live.json and what core.keeping lists

The branch `autoresearch/<tag>` is the list of improvements; every candidate stays reachable under
`refs/autoresearch/<tag>/<n>`. Both can be built again from the ledger alone, and commits are functions of the ledger's
rows, so that building them again gives the same ones.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import stat
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from core import importable, locks, paths
from core.commands import quoted
from core.contract import Past, View
from core.data import Dataset
from core.errors import DataError, LabError
from core.files import move_into_place, remove, remove_unfinished, replace_file
from core.gitstore import GitStore
from core.keeping import Products
from core.ledger import Experiment, Ledger, Sample, earlier
from core.pointer import POINTER, last_used, pointer_of
from core.recipe import fingerprint
from core.recovery import refs_to_set, wanted_refs
from core.settings import Settings, locked_hash

RECIPE, PROGRAM, RESULTS = "train.py", "program.md", "results.tsv"
UNTRACKED = (RESULTS, POINTER, "report.html", "report.png", "report.md", ".report*")
SCHEMA = 1
RECIPE_BYTES = 2**20  # a larger train.py is not read; the guard's limit is far below
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
        self.products = Products(record)
        self._first_commit: str | None = None
        self._hashed = False  # was the data hashed by this process?

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

        The lab is made beside its place and moved there as a whole: a kill leaves no half-made lab.
        """
        path = path.expanduser().absolute()
        _check_free(path)
        tag = _tag(path.name)
        name = f"{tag}-{uuid.uuid4().hex[:8]}"
        record, beside = paths.records_root() / name, path.with_name(f".{name}.new")
        try:
            beside.mkdir(parents=True)
            record.mkdir(parents=True)
            lab = cls(beside, record, tag, settings, Ledger.create(record / "ledger.sqlite"))
            lab._fill(recipe, program.encode(), message, list(history or ()))
            replace_file(record / "lab.json", json.dumps({"path": str(path), "tag": tag}).encode())
            move_into_place(beside, path, last=POINTER)
        except BaseException as error:
            remove(beside)
            remove(record)
            if isinstance(error, OSError):
                place = error.filename or path
                raise LabError(f"{place} cannot be made ({error.strerror})", "choose another place") from error
            raise
        lab.path, lab.git = path, GitStore(path)
        lab._remember()
        return lab

    def _fill(self, recipe: bytes, program: bytes, message: str, history: list[Mapping[str, Any]]) -> None:
        """Settings, the first rows of the ledger, the first commit, the lab's files; the pointer last."""
        replace_file(self.record / "settings.json", self.settings.to_json().encode())
        when = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
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
            self.ledger.set_meta("put there", first["recipe"])
            self.propose_baseline()
        self.make_repository()
        self.publish()
        self.write_results_tsv()
        replace_file(self.path / PROGRAM, program)
        replace_file(self.path / RECIPE, recipe)
        pointer = {"schema": SCHEMA, "record": self.record.name, "tag": self.tag}
        replace_file(self.path / POINTER, json.dumps(pointer).encode())

    def propose_baseline(self) -> int:
        """The first recipe as an experiment. Returns its number."""
        first = self.ledger.meta("first")
        recipe = self.ledger.source(first["recipe"])
        return self.ledger.propose(
            source=recipe,
            program=self.ledger.source(first["program"]),
            fingerprint=fingerprint(recipe),
            description="baseline",
            researcher="init",
        )

    def make_repository(self) -> None:
        """A repository without commits; in one that lost files, the missing ones."""
        self.git = GitStore.create(self.path, self.branch)
        lines = "".join(f"/{name}\n" for name in UNTRACKED)
        replace_file(self.path / ".git" / "info" / "exclude", lines.encode())

    @classmethod
    def open(cls, path: Path, used: bool = True) -> Lab:
        """Raises `LabError` when there is no lab, it is damaged, or its locked settings were edited. `used`: whether it
        is the last used one from now on."""
        path = path.expanduser().absolute()
        if not path.is_dir():
            raise LabError(f"there is no lab at {path}", "make one: autoresearch init")
        pointer = pointer_of(path)
        if pointer is None:
            raise LabError(f"{path} is not a lab: it has no {POINTER}", "name a lab, or make one: autoresearch init")
        if (path / ".git").is_symlink() or (path / ".git").is_file():
            raise LabError(f"{path / '.git'} leads to another repository", "remove it: the lab's is made again")
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
        if used:
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
        last = last_used()
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
        there = pointer_of(known) if known is not None and known.is_dir() and not known.samefile(self.path) else None
        if there is not None and there["record"] == self.record.name:
            raise LabError(f"{self.path} is a copy of the lab {known}", "work in that one, or make a new lab")
        with suppress(OSError):  # on a read-only disk a moved lab can still be looked at
            replace_file(facts, json.dumps({"path": str(self.path), "tag": self.tag}).encode())

    def _remember(self) -> None:
        """The last used lab is the one that verbs without LAB mean; a read-only home only loses that."""
        with suppress(OSError):
            replace_file(paths.home() / "last-lab", str(self.path).encode())

    # --- what is in it -----------------------------------------------------------------------------

    @property
    def branch(self) -> str:
        return f"autoresearch/{self.tag}"

    @property
    def branch_ref(self) -> str:
        return f"refs/heads/{self.branch}"

    def candidate_ref(self, number: int | str) -> str:
        return f"refs/autoresearch/{self.tag}/{number}"

    def best(self) -> Experiment | None:
        return self.ledger.best()

    def source(self, number: int) -> bytes:
        return self.ledger.source(self.ledger.get(number).source_sha256)

    def best_source(self) -> bytes:
        """The recipe that everything starts from: the best's, before there is one the first."""
        best = self.best()
        return self.ledger.source(best.source_sha256) if best else self.first_source()

    def first_source(self) -> bytes:
        """The recipe that the lab was made with."""
        return self.ledger.source(self.ledger.meta("first")["recipe"])

    def put_there(self) -> str | None:
        """The sha256 of the `train.py` that this program put into the lab last; None in a lab of an earlier version."""
        found = self.ledger.meta("put there")
        return str(found) if found else None

    def best_weights(self) -> Path | None:
        best = self.best()
        return self.products.weights(best.number) if best else None

    def best_caches(self) -> Path | None:
        best = self.best()
        return self.products.caches(best.number) if best else None

    def best_samples(self) -> list[float]:
        """The incumbent's scores in bits per byte, of its newest epoch and versions only: older ones say nothing beside
        them. Disturbed ones only where there are no others. Empty before there is a best."""
        best = self.best()
        if best is None:
            return []
        last = self.last_run(best)
        runs = [s for s in self.ledger.samples(best.number) if s.purpose != "confirm"]
        now = [s for s in runs if (s.epoch, s.versions) == (last.epoch, last.versions)]
        return [s.val_bpb for s in [s for s in now if not s.tainted] or now]

    def last_run(self, kept: Experiment) -> Sample:
        """The newest run of a kept experiment that verdicts may rest on."""
        return [s for s in self.ledger.samples(kept.number) if s.purpose != "confirm"][-1]

    def best_bpb(self) -> float | None:
        samples = self.best_samples()
        return sum(samples) / len(samples) if samples else None

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
        """The prepared data, its hashes checked: on Windows all of them, once in a process. Raises `DataError`."""
        whole = sys.platform == "win32" and not self._hashed  # no time of a file is out of a user's reach there
        dataset = Dataset.open(paths.data_root() / self.settings.data, verify="full" if whole else "quick")
        self._hashed = True
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
        decided = [e for e in self.ledger.experiments() if e.status is not None]
        best = self.best_source()
        return View(
            program=self.program().decode("utf-8", "replace"),
            best_source=best,
            best_bpb=self.best_bpb(),
            past=[self._past(e) for e in decided],
            device=dict(device),
            settings=json.loads(self.settings.to_json()),
            history=self.ledger.meta("history", []),
            notes=self._refusals(decided),
            lab=str(self.path),
            importable=importable.told(best),
        )

    def _refusals(self, decided: Sequence[Experiment]) -> list[str]:
        """What was refused since the last decision."""
        last = max((e.finished or "" for e in decided), default="")
        return [event.text for event in self.ledger.events() if event.kind == "refused" and event.created >= last]

    def _past(self, e: Experiment) -> Past:
        outcome = dict(e.outcome or {})
        before = [run.get("seconds") or 0.0 for run in earlier(e.verdict.get("all_runs") or (), outcome)]
        outcome["seconds"] = sum(before, (outcome.get("timings") or {}).get("total") or 0.0)  # of the device, all runs
        told = ("steps", "tokens", "peak_memory", "params", "training_seconds", "final_loss", "seconds")
        early = {"stopped_early": outcome["stopped_early"]} if outcome.get("stopped_early") else {}
        return Past(
            number=e.number,
            status=str(e.status),
            val_bpb=e.val_bpb,
            description=e.description,
            source=self.ledger.source(e.source_sha256),
            reason=e.reason,
            log_tail=str(outcome.get("log_tail", "")),
            detail=e.detail,
            facts={**{name: outcome[name] for name in told if name in outcome}, **early},
            tainted=e.tainted,
            best_before=e.best_before,
            parent=e.parent,
            undone=e.undone is not None,
            fingerprint=e.fingerprint,
        )

    # --- git ---------------------------------------------------------------------------------------

    def first_commit(self) -> str:
        if self._first_commit is None:
            first = self.ledger.meta("first")
            self._first_commit = self._commit(first["recipe"], first["program"], [], first["message"], first["when"])
        return self._first_commit

    def commit_of(self, e: Experiment) -> str:
        """The commit of a measured experiment, written if it is missing; a function of the ledger alone."""
        if e.commit and self.git.has(e.commit):
            return e.commit
        parent = self.commit_of(self.ledger.get(e.parent)) if e.parent else self.first_commit()
        score = f"val_bpb {e.val_bpb:.6f}" if e.val_bpb is not None else "no val_bpb"
        message = f"{e.description}\n\nexperiment {e.number}, by {e.researcher}: {score}\n"
        return self._commit(e.source_sha256, e.program_sha256, [parent], message, e.finished or e.created)

    def _commit(self, recipe: str, program: str, parents: Sequence[str], message: str, when: str) -> str:
        blobs = {RECIPE: self.git.blob(self.ledger.source(recipe)), PROGRAM: self.git.blob(self.ledger.source(program))}
        return self.git.commit(self.git.tree(blobs), parents, message, when)

    def clear_leftovers(self) -> list[str]:
        """What killed processes of ours left: half-written files, locks of refs. Returns the locks' names."""
        remove_unfinished(self.path, RECIPE, PROGRAM, RESULTS, POINTER)
        remove_unfinished(self.record, "lab.json", "settings.json", ASK)
        return self.git.clear_stale_locks([self.branch_ref, self.candidate_ref("").rstrip("/")])

    def publish(self) -> list[str]:
        """Make refs and index show what the ledger says; tells what had to be mended."""
        experiments, prefix = self.ledger.experiments(), self.candidate_ref("")
        first = self._rebuild(experiments)
        differ = refs_to_set(experiments, self.git.refs(self.branch_ref, prefix), self.branch_ref, prefix, first)
        gone = self.git.missing(list(differ.values()))  # a foreign commit whose objects are lost cannot be saved
        differ = {name: sha for name, sha in differ.items() if sha not in gone}
        if differ:
            self.git.update_refs(differ)
        tip = wanted_refs(experiments, self.branch_ref, prefix, first)[self.branch_ref]
        if self.git.head() == self.branch_ref:
            self.git.reset_index(tip)
        return [self._mended(name, sha) for name, sha in differ.items()]

    def _mended(self, name: str, sha: str) -> str:
        if name.startswith(self.candidate_ref("saved/")):
            return f"your commit {sha[:10]} was taken off the branch; it is kept as {name}"
        if name == self.branch_ref:
            return f"branch {self.branch} is at the best again, {sha[:10]}"
        return f"set {name} to {sha[:10]}"

    def _rebuild(self, experiments: Sequence[Experiment]) -> str:
        """Write again every commit that the ledger knows and git has lost. Returns the first commit."""
        first = self.first_commit()
        lost = self.git.missing([first, *(e.commit for e in experiments if e.commit)])
        if first in lost:
            self._first_commit = None
            first = self.first_commit()
        for e in experiments:
            if e.commit in lost and self.commit_of(e) != e.commit:
                raise LabError(
                    f"commit {e.commit} of experiment {e.number} is lost",
                    f"`autoresearch show {e.number}` has what it tried",
                )
        return first

    def restore_recipe(self) -> None:
        """Put the best's `train.py` back. What lies there instead is in the ledger, or is saved in git first."""
        file, best = self.path / RECIPE, self.best_source()
        present = self.working_source() if file.exists() else None
        if present != best:
            if present is not None:
                self.set_aside(present)
            replace_file(file, best)
        if self.put_there() != (sha256 := hashlib.sha256(best).hexdigest()):
            self.ledger.set_meta("put there", sha256)

    def set_aside(self, recipe: bytes) -> str:
        """Save a recipe that was never judged in git. Returns the command that prints it, "" for one of the ledger."""
        if self.ledger.knows_source(hashlib.sha256(recipe).hexdigest()):
            return ""
        blob = self.git.blob(recipe)
        name = self.candidate_ref(f"saved/{blob}")
        self.git.update_refs({name: blob})
        self.ledger.event("saved", f"a train.py that was never judged: git cat-file blob {name}")
        return f"git -C {quoted(self.path)} cat-file blob {name}"

    def write_results_tsv(self) -> str:
        """Upstream's five columns. What failed has an empty val_bpb, not a number that would win.

        Returns why it was not written, "" when it was: it is a view, and no reason to end a night, and Windows replaces
        no file that a spreadsheet holds open.
        """
        lines = ["commit\tval_bpb\tmemory_gb\tstatus\tdescription"]
        for e in self.ledger.experiments():
            if e.status is None:
                continue
            score = f"{e.val_bpb:.6f}" if e.val_bpb is not None else ""
            memory = f"{((e.outcome or {}).get('peak_memory') or 0) / 2**30:.1f}"
            status = "discard" if e.undone else e.status  # what was taken back is no keep for whoever reads this
            row = ((e.commit or "")[:7], score, memory, status, " ".join(e.description.split()))
            lines.append("\t".join(row))
        try:
            replace_file(self.path / RESULTS, ("\n".join(lines) + "\n").encode())
        except PermissionError:
            if sys.platform != "win32":  # a folder that is read-only, which stops everything else too
                raise
            return f"{RESULTS} is open elsewhere; it is written with the next experiment"
        return ""

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
            self.git.keep_bytes()  # else the user's own `git checkout` would leave it changed
            if self.is_dirty():
                raise LabError("train.py has changes that were not judged", f"{self.how_to_restore()} first")
            undone = [e.number for e in kept if e.number >= number]
            with self.ledger.transaction():
                self.ledger.mark_undone(undone)
                self.ledger.event("undo", f"taken back: {', '.join(f'#{n}' for n in undone)}", number)
            self.publish()
            if late := self.write_results_tsv():
                self.ledger.event("note", late)
            self.restore_recipe()
            best = self.best()
            self.products.forget_others(best.number if best else None)
            return undone

    def how_to_restore(self) -> str:
        judge = f"autoresearch try {quoted(self.path)} -m '...'"
        return f"`{judge}` judges them, `{_put_back(self.path)}` drops them (and says where they are kept)"

    def clean(self, dry_run: bool) -> list[tuple[str, int]]:
        """What only takes room: (path, bytes). Frees it unless `dry_run`."""
        with self.lock():
            best = self.best()
            found = self.products.freeable(best.number if best else None)
            if not dry_run:
                for path, _ in found:
                    remove(path)
            return [(str(path), size) for path, size in found]


def _check_free(path: Path) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise LabError(f"{path} is a file", "choose another folder for the lab")
    if (path / ".git").exists():
        raise LabError(f"{path} is a git repository already", "a lab is one of its own: choose a new folder")
    entries = len(list(path.iterdir()))
    if entries:
        raise LabError(f"{path} is not empty: {entries} entries", "choose a new folder for the lab")


def _tag(name: str) -> str:
    """A folder's name as a part of git refs."""
    plain = re.sub(r"[^A-Za-z0-9._-]+|\.\.+", "-", name).strip(".-").removesuffix(".lock")
    if not plain:
        raise LabError(f"{name!r} cannot name a lab", "use letters, digits, '-', '_' and '.'")
    return plain


def _locked_settings(record: Path, ledger: Ledger) -> Settings:
    file = record / "settings.json"
    try:
        text = file.read_text("utf-8")
        settings, present = Settings.from_json(text), locked_hash(text)
    except (OSError, ValueError, TypeError) as error:
        raise LabError(f"the settings {file} are missing or damaged", "restore the file from a backup") from error
    locked = ledger.meta("settings_sha256")
    if present != locked:
        raise LabError(
            f"the locked settings {file} were edited (hash {present[:12]}, locked {str(locked)[:12]})",
            "put them back: scores under other settings cannot be compared; for others make a new lab",
        )
    return settings


def _put_back(lab: Path) -> str:
    """A command of ours: agents are told to keep off `git checkout`, and it would lose what was edited."""
    return f"autoresearch best {quoted(lab)} --source --out {quoted(lab / RECIPE)}"


def _read_plain(path: Path) -> bytes:
    """A regular file that is no link and not absurdly large."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise LabError(f"{path} is missing", f"put it back: {_put_back(path.parent)}") from None
    except OSError as error:
        raise LabError(f"{path} cannot be read ({error.strerror})", "it has to be a plain file") from error
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > RECIPE_BYTES:
        os.close(fd)
        raise LabError(f"{path} is no plain file of at most {RECIPE_BYTES} bytes", "put a recipe there")
    with os.fdopen(fd, "rb") as file:
        return file.read()
