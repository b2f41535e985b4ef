"""Prepared data sets: reading, and the proof that they are what `prepare` wrote.

A data set is a folder `<name>-v<vocab>-<8 hex>`:

    manifest.json        what is below, and the hash of every file; its own SHA-256 is the data set's identity
    tokenizer.tiktoken   merge ranks
    counts.bin           int64 (V,): how often each token occurs in the training part
    train-00000.bin ...  token ids (uint16; uint32 above 65,536 entries): BOS + document + BOS + document ...
    val-00000.bin ...    validation: what `val_bpb` is counted on
    holdout-00000.bin    seen by no decision
    origin.json          the command that made it; not hashed, for messages only

Shapes: V vocabulary entries, N rows, T tokens of context.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.errors import DataError
from core.files import replace_open
from core.stream import Text, TokenStream
from core.tokenizer import Tokenizer

__all__ = ["PARTS", "SCHEMA", "Dataset", "PartInfo", "TokenStream", "Tokenizer", "file_sha256", "token_dtype"]

SCHEMA = 1
PARTS = ("train", "val", "holdout")
MANIFEST = "manifest.json"
ORIGIN = "origin.json"
CHECKED = "checked.json"  # which files were hashed, by their size, inode and times
_LARGEST_MANIFEST = 16 * 2**20  # bytes; a shard's entry has about 120


@dataclass(frozen=True)
class FileInfo:
    """A file of a data set as the manifest has it."""

    file: str
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class PartInfo:
    """Training, validation or holdout."""

    tokens: int  # with one BOS for each document
    bytes: int  # UTF-8, of the documents
    documents: int
    shards: tuple[FileInfo, ...]


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype of token ids on disk, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def repair_command(path: Path) -> str:
    """The command that makes the data set in `path` again, from what is still readable there."""
    try:
        words = json.loads((path / ORIGIN).read_text("utf-8"))["command"]
        return shlex.join(str(w) for w in words)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    named = re.fullmatch(r"(.+)-v(\d+)-[0-9a-f]{8}", path.name)
    return f"autoresearch prepare {named[1]} --vocab {named[2]}" if named else "autoresearch prepare"


@dataclass(frozen=True)
class Dataset:
    """A prepared data set that was checked when it was opened."""

    path: Path
    name: str
    vocab_size: int
    bos_id: int
    sha256: str  # of manifest.json
    parts: Mapping[str, PartInfo]
    pattern: str
    source: Mapping[str, Any]
    files: Mapping[str, FileInfo]  # "tokenizer" and "counts"

    @classmethod
    def open(cls, path: Path, verify: Literal["full", "quick"] = "full") -> Dataset:
        """Check and open the data set in the folder `path`.

        "full" hashes every file. "quick" compares sizes and hashes only files whose size, inode or times differ
        from those that were hashed last. Raises `DataError` with the file, the numbers and the command that repairs.
        """
        path = Path(path)
        dataset = _read_manifest(path)
        _verify(dataset, quick=verify == "quick")
        dataset.tokenizer()  # a well-hashed file of another kind ends here too
        return dataset

    @property
    def token_dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    def part(self, part: str) -> PartInfo:
        """Numbers of "train", "val" or "holdout"."""
        return self.parts[part]

    def shards(self, part: str) -> list[Path]:
        return [self.path / s.file for s in self.parts[part].shards]

    def open_files(self, part: str) -> list[int]:
        """Read-only descriptors of the part's shards, in order. The caller closes them."""
        found: list[int] = []
        try:
            for info in self.parts[part].shards:
                found.append(self._open(info))
        except (DataError, OSError):
            for fd in found:
                os.close(fd)
            raise
        return found

    def _open(self, info: FileInfo) -> int:
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            fd = os.open(self.path / info.file, flags)
        except FileNotFoundError:
            raise _damage(self.path, f"{self.path / info.file} is missing") from None
        if (size := os.fstat(fd).st_size) != info.size:
            os.close(fd)
            raise _wrong_size(self.path, info, size)
        return fd

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        file = self.path / self.files["tokenizer"].file
        try:
            tokenizer = Tokenizer.load(file, self.pattern)
        except DataError as error:
            raise _damage(self.path, error.fact) from None
        if (tokenizer.vocab_size, tokenizer.bos_id) != (self.vocab_size, self.bos_id):
            raise _damage(
                self.path,
                f"{file} has {tokenizer.vocab_size:,} entries with BOS, the manifest says {self.vocab_size:,}",
            )
        return tokenizer

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(V,) int32: UTF-8 bytes of each token, from the merge table; BOS 0."""
        return self.tokenizer().token_bytes

    @cached_property
    def unigram_nats(self) -> np.ndarray:
        """(V,) float32: -log p of each token, by how often it occurs in the training part, one added to each count."""
        counts = np.fromfile(self.path / self.files["counts"].file, dtype="<i8").astype(np.float64) + 1
        return (np.log(counts.sum()) - np.log(counts)).astype(np.float32)

    def text(self, part: str) -> Text:
        """The tokens of a part as one text, memory-mapped."""
        fds = self.open_files(part)
        try:
            return Text(fds, self.token_dtype)
        finally:
            for fd in fds:
                os.close(fd)

    def rows(self, part: str, sequence_len: int, at_least_tokens: int) -> np.ndarray:
        """(N, T + 1) int32: rows of a part to be scored; neighbours share one token, so every target counts once.

        All rows, or ceil(`at_least_tokens` / T) of them at equal distances: spread over the whole part, not random.
        The last row of the part is filled with BOS, which has no bytes and counts for nothing. `DataError` where
        the part is shorter than one row.
        """
        text = self.text(part)
        if text.tokens < sequence_len + 1:
            raise DataError(
                f"the {part} part of {self.path.name} has {text.tokens:,} tokens, a row needs {sequence_len + 1:,}",
                "choose a shorter context or prepare more text",
            )
        there = -(-(text.tokens - 1) // sequence_len)
        wanted = min(there, max(1, -(-at_least_tokens // sequence_len)))
        chosen = np.arange(wanted, dtype=np.int64) * there // wanted
        rows = np.full((wanted, sequence_len + 1), self.bos_id, dtype=np.int32)
        whole = chosen * sequence_len + sequence_len < text.tokens
        rows[whole] = text.windows(chosen[whole] * sequence_len, sequence_len)
        if not whole[-1]:
            tail = text.span(int(chosen[-1]) * sequence_len, text.tokens)
            rows[-1, : len(tail)] = tail
        return rows


def _damage(path: Path, fact: str) -> DataError:
    return DataError(fact, f"repair it with: {repair_command(path)}")


def _wrong_size(path: Path, info: FileInfo, found: int) -> DataError:
    return _damage(path, f"{path / info.file} has {found:,} bytes, {info.size:,} expected")


def _read_manifest(path: Path) -> Dataset:
    file = path / MANIFEST
    try:
        with file.open("rb") as f:
            data = f.read(_LARGEST_MANIFEST)
    except FileNotFoundError:
        raise _damage(path, f"{file} is missing") from None
    except OSError as error:
        raise _damage(path, f"{file} cannot be read: {error.strerror}") from None
    try:
        manifest = json.loads(data)
        schema = manifest["schema"]
        if schema == SCHEMA:
            return _from_manifest(path, manifest, hashlib.sha256(data).hexdigest())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damage(path, f"{file} is damaged ({len(data):,} bytes; {type(error).__name__}: {error})") from None
    raise _damage(path, f"{file} is of schema {schema}, this version reads {SCHEMA}")


def _from_manifest(path: Path, manifest: Mapping[str, Any], sha256: str) -> Dataset:
    width = token_dtype(int(manifest["vocab_size"])).itemsize
    parts = {}
    for part in PARTS:
        entry = manifest["parts"][part]
        shards = tuple(_file_info(s, int(s["tokens"]) * width) for s in entry["shards"])
        parts[part] = PartInfo(int(entry["tokens"]), int(entry["bytes"]), int(entry["documents"]), shards)
        if sum(s.size for s in shards) != parts[part].tokens * width:
            raise ValueError(f"the shards of {part} do not add up to its {parts[part].tokens:,} tokens")
    return Dataset(
        path=path,
        name=str(manifest["name"]),
        vocab_size=int(manifest["vocab_size"]),
        bos_id=int(manifest["bos_id"]),
        sha256=sha256,
        parts=parts,
        pattern=str(manifest["pattern"]),
        source=dict(manifest["source"]),
        files={kind: _file_info(manifest[kind], int(manifest[kind]["bytes"])) for kind in ("tokenizer", "counts")},
    )


def _file_info(entry: Mapping[str, Any], size: int) -> FileInfo:
    name = str(entry["file"])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} is not the name of a file of this folder")
    return FileInfo(name, str(entry["sha256"]), size)


def _verify(dataset: Dataset, quick: bool) -> None:
    """Sizes of all files, then their hashes; remembers what was hashed."""
    infos: Sequence[FileInfo] = [*dataset.files.values(), *(s for p in dataset.parts.values() for s in p.shards)]
    stamps: dict[str, list[Any]] = {}
    for info in infos:
        try:
            stat = (dataset.path / info.file).stat()
        except FileNotFoundError:
            raise _damage(dataset.path, f"{dataset.path / info.file} is missing") from None
        if stat.st_size != info.size:
            raise _wrong_size(dataset.path, info, stat.st_size)
        # Changing a file moves its ctime, which cannot be set back by hand. Windows has the time of creation there, so
        # that an edit can be hidden: `Lab.dataset` takes "full" there.
        stamps[info.file] = [info.sha256, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    known = _read_checked(dataset.path)
    for info in infos:
        if quick and known.get(info.file) == stamps[info.file]:
            continue
        if (found := file_sha256(dataset.path / info.file)) != info.sha256:
            raise _damage(
                dataset.path,
                f"{dataset.path / info.file} was changed: SHA-256 {found[:16]}..., {info.sha256[:16]}... expected",
            )
    if known != stamps:
        _write_checked(dataset.path, stamps)


def _read_checked(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / CHECKED).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_checked(path: Path, stamps: Mapping[str, Any]) -> None:
    temporary = path / f"{CHECKED}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(stamps), "utf-8")
        replace_open(temporary, path / CHECKED)
    except OSError:
        with contextlib.suppress(OSError):  # a read-only data set is hashed again each time
            temporary.unlink()
