"""From a corpus to a data set: survey, split, tokenizer, token shards, manifest. Streaming, resumable, atomic.

Everything is written into a hidden folder beside the data set's final place and moved there in one step, so a data
set is whole or absent. After a kill the next start goes on in that folder: finished steps are kept, and the token
shards are cut back to the last checkpoint, which names the documents that are surely in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from core.data import MANIFEST, ORIGIN, PARTS, SCHEMA, Dataset, file_sha256, token_dtype
from core.documents import Corpus, document_key
from core.errors import DataError
from core.files import remove_unfinished, replace_file, replace_open, sync_folder
from core.tokenizer import SPLIT_PATTERN, Tokenizer, train

SHARD_TOKENS = 2**26
BATCH_BYTES = 2**22  # text that is encoded in one go
CHECKPOINT_SECONDS = 5.0
TOKENIZER_BYTES = 2**28  # text that merges are learned from at most; more changes next to nothing
TOKENIZER_DOCUMENT = 10_000  # characters of one document for that, so that no single one dominates
BUCKETS = 2**16

Say = Callable[[str], None]
Meter = Callable[[str, int, int], None]  # what, done bytes, all bytes


# --- split ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Shares of the text. Validation holds at least `floor` bytes where that is no more than `most` of the text.

    2^17 tokens are what a CPU scores; no English text at a vocabulary of 8,192 or less has more than 5 bytes to a
    token, so 5 x 2^17 bytes are enough. Of a large text a share of 5 % would be more than anybody scores.
    """

    share: float = 0.05  # of validation, and of the holdout
    floor: int = 5 * 2**17  # bytes of validation
    most: float = 0.15  # share of validation, however small the text
    ceiling: int = 160 * 10**6  # bytes of validation, and of the holdout: some 40M tokens


@dataclass(frozen=True)
class Cut:
    """Documents whose hash lies in a bucket below `val` are validation, from `holdout` on holdout, else training."""

    val: int
    holdout: int

    def part(self, key: int) -> str:
        bucket = key >> 48
        return "val" if bucket < self.val else "holdout" if bucket >= self.holdout else "train"


@dataclass
class Survey:
    """One reading of the corpus."""

    documents: int
    bytes: int
    digest: str  # of all documents in order
    buckets: np.ndarray  # (BUCKETS,) bytes of the documents by the first 16 bits of their hash

    def cut(self, split: Split, name: str) -> Cut:
        """`DataError` where the documents are too few or too uneven to be divided."""
        filled = np.flatnonzero(self.buckets)
        if len(filled) < 3:
            same = "" if len(filled) == self.documents else f", {len(filled)} of them different"
            raise DataError(
                f"{name} has {self.documents:,} document{'s' * (self.documents != 1)}{same}; training, validation "
                "and holdout need 3 different ones at least",
                "give more documents (one a line or row), or one long text as a .txt, which is cut at blank lines",
            )
        val_goal = min(max(split.share * self.bytes, min(split.floor, split.most * self.bytes)), split.ceiling)
        holdout_goal = min(split.share * self.bytes, split.ceiling)
        sizes = self.buckets[filled]
        vals = min(int(np.searchsorted(np.cumsum(sizes), val_goal)) + 1, len(filled) - 2)
        holdouts = min(int(np.searchsorted(np.cumsum(sizes[::-1]), holdout_goal)) + 1, len(filled) - vals - 1)
        training = int(sizes[vals : len(filled) - holdouts].sum())
        if training * 2 < self.bytes:
            raise DataError(
                f"{name} cannot be divided: {training / self.bytes:.0%} of its {self.bytes:,} bytes would be left for "
                f"training (the largest of its {self.documents:,} documents has up to {int(sizes.max()):,})",
                "cut long documents into shorter ones, or give the text as a .txt, which is cut at blank lines",
            )
        return Cut(int(filled[vals]), int(filled[len(filled) - holdouts]))


def survey(corpus: Corpus, meter: Meter) -> Survey:
    digest = hashlib.sha256()
    buckets = np.zeros(BUCKETS, dtype=np.int64)
    documents = total = 0
    for document in corpus.documents():
        key, size = document_key(document), len(document.encode("utf-8"))
        digest.update(key.to_bytes(8, "big"))
        buckets[key >> 48] += size
        documents, total = documents + 1, total + size
        if documents % 4096 == 0:
            meter("reading", total, 0)
    if documents == 0:
        raise DataError(f"{corpus.name} has no text: every document is empty", "give a text with something in it")
    return Survey(documents, total, digest.hexdigest(), buckets)


# --- building ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is to be built; everything that decides the result."""

    corpus: Corpus
    vocab_size: int
    command: list[str]  # that makes it again
    split: Split = Split()
    pattern: str = SPLIT_PATTERN

    def identity(self) -> str:
        """8 hex digits that differ where the data set would."""
        facts = [SCHEMA, self.corpus.name, self.vocab_size, self.pattern, asdict(self.split), self.corpus.facts]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]

    def folder(self) -> str:
        return f"{self.corpus.name}-v{self.vocab_size}-{self.identity()}"


def build(plan: Plan, root: Path, say: Say, meter: Meter) -> Dataset:
    """Build the data set in `root` and return it, opened. The caller holds its lock.

    On an error that trying again cannot mend (`DataError`) nothing is left behind; on any other end, a kill
    included, the work done so far waits for the next start.
    """
    final, work = root / plan.folder(), root / f".{plan.folder()}.partial"
    for left in root.glob(f".{plan.corpus.name}-v{plan.vocab_size}-*.partial"):
        if left != work:  # of a text that has changed since
            shutil.rmtree(left, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    try:
        if not (work / MANIFEST).exists():  # else it was finished, and killed before it was moved
            _build(plan, work, say, meter)
    except DataError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _put(work, final)
    return Dataset.open(final)


def _build(plan: Plan, work: Path, say: Say, meter: Meter) -> None:
    say(f"reading {plan.corpus.name}")
    surveyed = _survey_once(plan, work, meter)
    cut = surveyed.cut(plan.split, plan.corpus.name)
    tokenizer = _tokenizer_once(plan, work, surveyed, cut, say, meter)
    say(f"encoding {surveyed.documents:,} documents ({surveyed.bytes / 1e6:,.1f} MB)")
    state = Encoder(plan.corpus, work, tokenizer, cut, surveyed, meter).run()
    _seal(plan, work, tokenizer, surveyed, state)


def _survey_once(plan: Plan, work: Path, meter: Meter) -> Survey:
    file = work / "survey.json"
    if (kept := _read_json(file)) is not None:
        return Survey(**{**kept, "buckets": np.array(kept["buckets"], dtype=np.int64)})
    surveyed = survey(plan.corpus, meter)
    _write_json(file, {**asdict(surveyed), "buckets": surveyed.buckets.tolist()})
    return surveyed


def _tokenizer_once(plan: Plan, work: Path, surveyed: Survey, cut: Cut, say: Say, meter: Meter) -> Tokenizer:
    file = work / "tokenizer.tiktoken"
    if file.exists():
        return Tokenizer.load(file, plan.pattern)
    say(f"learning a vocabulary of {plan.vocab_size:,} from the training part")
    texts = _training_texts(plan.corpus, cut, surveyed.bytes, meter)
    tokenizer = train(texts, plan.vocab_size, plan.pattern)
    replace_file(file, tokenizer.dumps())
    return tokenizer


def _training_texts(corpus: Corpus, cut: Cut, all_bytes: int, meter: Meter) -> Iterator[str]:
    learned = 0
    meter("learning", 0, min(all_bytes, TOKENIZER_BYTES))
    for number, document in enumerate(corpus.documents(), start=1):
        if cut.part(document_key(document)) != "train":
            continue
        text = document[:TOKENIZER_DOCUMENT]
        learned += len(text)
        yield text
        if learned >= TOKENIZER_BYTES:
            return
        if number % 4096 == 0:
            meter("learning", learned, min(all_bytes, TOKENIZER_BYTES))


@dataclass
class Progress:
    """A checkpoint: what the token shards surely hold."""

    read: int = 0  # documents of the corpus
    read_bytes: int = 0
    digest: str = ""  # of the survey that it belongs to
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))


class Encoder:
    """Writes the token shards of all parts, with checkpoints."""

    def __init__(
        self, corpus: Corpus, work: Path, tokenizer: Tokenizer, cut: Cut, surveyed: Survey, meter: Meter
    ) -> None:
        self._corpus, self._work, self._tokenizer = corpus, work, tokenizer
        self._cut, self._survey, self._meter = cut, surveyed, meter
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._threads = os.cpu_count() or 1
        kept = _read_json(work / "progress.json")
        known = kept is not None and kept["digest"] == surveyed.digest
        self.state = Progress(**kept) if kept and known else Progress(digest=surveyed.digest)
        self._digest = hashlib.sha256()
        self._writers = {part: _Writer(work, part, self._dtype, self.state.tokens[part]) for part in PARTS}

    def run(self) -> Progress:
        try:
            return self._run()
        finally:  # Windows removes no open file
            for writer in self._writers.values():
                writer.give_up()

    def _run(self) -> Progress:
        documents = self._corpus.documents()
        for skipped in islice(documents, self.state.read):
            self._digest.update(document_key(skipped).to_bytes(8, "big"))
        last = time.monotonic()
        for batch in _batches(documents):
            self._add(batch)
            self._meter("encoding", self.state.read_bytes, self._survey.bytes)
            if time.monotonic() - last > CHECKPOINT_SECONDS:
                self._checkpoint()
                last = time.monotonic()
        if self._digest.hexdigest() != self._survey.digest:
            raise DataError(
                f"the text of {self._corpus.name} changed while it was prepared", "run the same command again"
            )
        self._checkpoint()
        for writer in self._writers.values():
            writer.close()
        return self.state

    def _add(self, batch: list[str]) -> None:
        state = self.state
        for text, ids in zip(batch, self._tokenizer.encode_batch(batch, self._threads), strict=True):
            key, size = document_key(text), len(text.encode("utf-8"))
            part = self._cut.part(key)
            self._digest.update(key.to_bytes(8, "big"))
            self._writers[part].add(np.array([self._tokenizer.bos_id, *ids], dtype=self._dtype))
            state.tokens[part] += len(ids) + 1
            state.bytes[part] += size
            state.documents[part] += 1
            state.read += 1
            state.read_bytes += size

    def _checkpoint(self) -> None:
        for writer in self._writers.values():
            writer.flush()
        _write_json(self._work / "progress.json", asdict(self.state))


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Shards of one part, `SHARD_TOKENS` tokens each, continued after `tokens` of them."""

    def __init__(self, work: Path, part: str, dtype: np.dtype, tokens: int) -> None:
        self._work, self._part, self._dtype, self._tokens = work, part, dtype, tokens
        for file in sorted(work.glob(f"{part}-*.bin")):  # what came after the checkpoint
            index = int(file.stem.rpartition("-")[2])
            keep = min(max(tokens - index * SHARD_TOKENS, 0), SHARD_TOKENS)
            if keep:
                os.truncate(file, keep * dtype.itemsize)
            else:
                file.unlink()
        self._file = self._open()

    def _open(self) -> Any:
        return (self._work / f"{self._part}-{self._tokens // SHARD_TOKENS:05d}.bin").open("ab", buffering=2**20)

    def add(self, ids: np.ndarray) -> None:
        while len(ids):
            room = SHARD_TOKENS - self._tokens % SHARD_TOKENS
            self._file.write(ids[:room].tobytes())
            self._tokens += len(ids[:room])
            ids = ids[room:]
            if self._tokens % SHARD_TOKENS == 0:
                self.close()
                self._file = self._open()

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()

    def give_up(self) -> None:
        """Close it, if it is not; what was written after the checkpoint does not matter."""
        with suppress(OSError):
            self._file.close()


# --- sealing -------------------------------------------------------------------------------------


def _seal(plan: Plan, work: Path, tokenizer: Tokenizer, surveyed: Survey, state: Progress) -> None:
    """Hashes, counts and the manifest, which comes last: where it is, all the rest is."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    parts: dict[str, Any] = {}
    for part in PARTS:
        shards, occurring = _seal_part(work, part, tokenizer, state.bytes[part])
        counts += occurring if part == "train" else 0
        parts[part] = {
            "tokens": sum(s["tokens"] for s in shards),
            "bytes": state.bytes[part],
            "documents": state.documents[part],
            "shards": shards,
        }
    replace_file(work / "counts.bin", counts.astype("<i8").tobytes())
    _write_json(work / ORIGIN, {"command": plan.command})
    manifest = {
        "schema": SCHEMA,
        "name": plan.corpus.name,
        "source": {**plan.corpus.facts, "documents_sha256": surveyed.digest},
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "pattern": tokenizer.pattern,
        "parts": parts,
        "tokenizer": _entry(work / "tokenizer.tiktoken"),
        "counts": _entry(work / "counts.bin"),
    }
    _write_json(work / MANIFEST, manifest)


def _seal_part(work: Path, part: str, tokenizer: Tokenizer, expected: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The shards as the manifest has them, and counts (V,); checks that the tokens have exactly the text's bytes."""
    dtype = token_dtype(tokenizer.vocab_size)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    shards = []
    for file in sorted(work.glob(f"{part}-*.bin")):
        if file.stat().st_size == 0:  # opened for more, which did not come
            file.unlink()
            continue
        counts += _count(file, dtype, tokenizer.vocab_size)
        shards.append({"file": file.name, "tokens": file.stat().st_size // dtype.itemsize, "sha256": file_sha256(file)})
    found = int(counts @ tokenizer.token_bytes.astype(np.int64))
    if found != expected:
        raise DataError(
            f"the tokens of {part} have {found:,} bytes, its documents {expected:,}: a file was damaged meanwhile",
            "run the same command again",
        )
    return shards, counts


def _count(file: Path, dtype: np.dtype, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    with file.open("rb") as f:
        while chunk := f.read(2**24):
            counts += np.bincount(np.frombuffer(chunk, dtype=dtype), minlength=vocab_size)
    return counts


def _entry(file: Path) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _put(work: Path, final: Path) -> None:
    """Move the finished folder to its place; a damaged data set there is set aside first, then removed."""
    for name in ("survey.json", "progress.json"):
        (work / name).unlink(missing_ok=True)
    remove_unfinished(work, "survey.json", "progress.json", "tokenizer.tiktoken", "counts.bin", ORIGIN, MANIFEST)
    sync_folder(work)
    aside = final.parent / f".{final.name}.damaged"
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        replace_open(final, aside)
    replace_open(work, final)
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    replace_file(file, json.dumps(content, indent=1, sort_keys=True).encode())


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
