"""Files of a data set on the Hugging Face hub: fetched once, resumable, checked by their hashes.

The requests are made through the huggingface-hub client (its endpoint, token, proxy and offline settings hold), file
by file: one HEAD for size, hash and commit, then the body. Its own `hf_hub_download` begins a file again after a kill
(it names the partial file anew each time) and loses up to 10 MB at each cut of the line (it collects so much before
it writes; both tried with 2.4), so the body is read here, from the client's session, and written as it comes.

A fetched file has a note beside it (`.<name>.fetched`) with size, hash and commit. Where all files have theirs,
the network is not needed any more.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from core.data import file_sha256
from core.errors import DataError, UserError
from core.files import replace_file, replace_open, sync_folder

Say = Callable[[str], None]
Meter = Callable[[str, int, int], None]

HUB = "https://huggingface.co"
PLENTY = 20e6  # bytes/s of a good line, for the time that is told
ATTEMPTS = 5  # without a byte of progress
TIMEOUT = 30.0  # seconds without an answer or a byte


@dataclass(frozen=True)
class Wanted:
    """Files of a repository, and where they go."""

    repository: str
    files: tuple[str, ...]  # their paths there
    folder: Path
    expansion: float  # bytes of token shards that will be made of a byte of these files, about
    alternatives: str  # what to do without the hub


@dataclass(frozen=True)
class Remote:
    """A file as the hub describes it."""

    file: str
    url: str
    size: int
    etag: str  # SHA-256 of large files, git's blob hash of small ones
    commit: str


@dataclass(frozen=True)
class Note:
    """What is known of a fetched file."""

    size: int
    sha256: str
    etag: str
    commit: str


def endpoint() -> str:
    """The hub, or the mirror in HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def fetch(wanted: Wanted, say: Say, meter: Meter) -> list[Path]:
    """The files, fetched where they are not here yet, in order. `DataError` with what to do."""
    notes = {f: _note(wanted.folder / f) for f in wanted.files}
    lacking = [f for f in wanted.files if notes[f] is None]
    if lacking:
        commit = next((n.commit for n in notes.values() if n), "main")
        remotes = _ask(wanted, lacking, commit)
        _announce(wanted, remotes, say)
        done = 0
        for remote in remotes:
            count = partial(_report, meter, done, sum(r.size for r in remotes))
            _fetch_file(wanted, remote, count, say)
            done += remote.size
    return [wanted.folder / f for f in wanted.files]


def _report(meter: Meter, before: int, total: int, fetched: int) -> None:
    meter("fetching", before + fetched, total)


def fingerprint(wanted: Wanted) -> list[dict[str, Any]]:
    """Name, size and hash of each fetched file, read again: a file that was damaged meanwhile is given up."""
    found = []
    for file in wanted.files:
        path = wanted.folder / file
        note, sha256 = _note(path), file_sha256(path)
        if note is None or note.sha256 != sha256:
            _forget(path)
            raise DataError(
                f"{path} was damaged after it was fetched", "run the same command again: it fetches it anew"
            )
        found.append({"file": file, "bytes": note.size, "sha256": sha256})
    return found


# --- asking --------------------------------------------------------------------------------------


def _ask(wanted: Wanted, files: Sequence[str], commit: str) -> list[Remote]:
    """Size, hash and commit of each file. All are of one commit: the one that "main" was at the first answer."""
    found: list[Remote] = []
    for file in files:
        with _translated(wanted, file):
            found.append(_head(wanted.repository, file, commit))
        commit = found[-1].commit
    return found


def _head(repository: str, file: str, commit: str) -> Remote:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repository, file, repo_type="dataset", revision=commit, endpoint=endpoint())
    about = get_hf_file_metadata(url)
    if about.size is None or about.etag is None or about.commit_hash is None:
        raise DataError(
            f"{endpoint()} does not answer as a hub does: no size, hash or commit for {file}",
            "check HF_ENDPOINT and the network's login page or proxy",
        )
    return Remote(file, url, about.size, about.etag, about.commit_hash)


@contextmanager
def _translated(wanted: Wanted, file: str) -> Iterator[None]:
    """What can go wrong between here and the hub becomes a `DataError`."""
    from huggingface_hub import errors

    place = f"{endpoint()}/datasets/{wanted.repository}"
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise DataError(
            f"{file} is not here and HF_HUB_OFFLINE forbids fetching it", f"unset it, or {wanted.alternatives}"
        ) from None
    except errors.GatedRepoError:
        raise DataError(f"{place} wants a login", f"log in with `hf auth login`, or {wanted.alternatives}") from None
    except errors.RepositoryNotFoundError:
        raise DataError(f"{place} is not there", f"check HF_ENDPOINT, or {wanted.alternatives}") from None
    except errors.EntryNotFoundError:
        raise DataError(
            f"{file} is missing at {place}",
            f"ask for fewer files with --files, use another mirror, or {wanted.alternatives}",
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        first = "log in with `hf auth login`" if status in (401, 403) else "try again later"
        raise DataError(
            f"{place} answers with status {status} for {file}",
            f"{first}, set HF_ENDPOINT to a mirror, or {wanted.alternatives}",
        ) from None
    except errors.HTTPError as error:  # of the transport: no network, no name, refused, cut off
        raise _unreachable(wanted, error) from None


def _unreachable(wanted: Wanted, error: Exception) -> DataError:
    return DataError(
        f"{endpoint()} cannot be reached ({type(error).__name__}: {str(error)[:100]})",
        f"run the same command again when the network is there (what was fetched is kept), "
        f"set HF_ENDPOINT to a mirror, or {wanted.alternatives}",
    )


# --- fetching ------------------------------------------------------------------------------------


def _announce(wanted: Wanted, remotes: Sequence[Remote], say: Say) -> None:
    """Size, place and time, before a byte is fetched. `UserError` where the disk has no room for it."""
    total = sum(r.size for r in remotes)
    here = sum(_partial_size(_partial(wanted, r)) for r in remotes)
    left = total - here
    shards = int(sum(r.size for r in remotes) * wanted.expansion)
    resumed = f" ({here / 1e6:,.0f} MB of it are here already)" if here else ""
    say(
        f"fetching {len(remotes)} file{'s' * (len(remotes) != 1)}, {total / 1e6:,.1f} MB{resumed}, from "
        f"{endpoint()}/datasets/{wanted.repository} to {wanted.folder}; about {max(1, round(left / PLENTY / 60))} min "
        f"at {PLENTY / 1e6:.0f} MB/s; tokens will take {shards / 1e6:,.0f} MB more"
    )
    wanted.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(wanted.folder).free
    if left + shards > free:
        raise UserError(
            f"{wanted.repository} needs {(left + shards) / 1e6:,.1f} MB, "
            f"{free / 1e6:,.1f} MB are free in {wanted.folder}",
            "free some, move all data with AUTORESEARCH_HOME, fetch fewer files with --files, "
            f"or {wanted.alternatives}",
        )


def _fetch_file(wanted: Wanted, remote: Remote, count: Callable[[int], None], say: Say) -> None:
    """Fetch one file; a wrong hash is tried once more from the beginning."""
    target, part = wanted.folder / remote.file, _partial(wanted, remote)
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in (1, 2):
        with _translated(wanted, remote.file):
            _continue(wanted, remote, part, count)
        sha256, right = _check(part, remote)
        if right:
            note = Note(remote.size, sha256, remote.etag, remote.commit)
            replace_open(part, target)
            sync_folder(target.parent)
            replace_file(_note_file(target), json.dumps(asdict(note)).encode())
            return
        part.unlink()
        if attempt == 1:
            say(f"{remote.file}: its hash is wrong; fetching it once more from the beginning")
    raise DataError(
        f"{remote.file} came with hash {sha256[:16]}... twice, {endpoint()} promised {remote.etag[:16]}...",
        f"the copy there or the line is damaged: set HF_ENDPOINT to another mirror, or {wanted.alternatives}",
    )


def _continue(wanted: Wanted, remote: Remote, part: Path, count: Callable[[int], None]) -> None:
    """Bring the partial file to its size, however often the line is cut, as long as it still brings something."""
    part.touch()
    fruitless = 0
    while (have := part.stat().st_size) != remote.size:
        if have > remote.size:
            os.truncate(part, have := 0)
        error = _get(remote, part, have, count)
        now = part.stat().st_size
        fruitless = 0 if have < now <= remote.size else fruitless + 1
        if fruitless >= ATTEMPTS:
            raise _unreachable(wanted, error) if error else _wrong_size(wanted, remote)
        if error:
            time.sleep(0.5 * 2**fruitless)


def _get(remote: Remote, part: Path, have: int, count: Callable[[int], None]) -> Exception | None:
    """One request for what is missing; returns the error of a line that was cut, raises every other."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with get_session().stream("GET", remote.url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            # A server that knows no ranges answers 200 and sends the whole.
            _write(part, response.iter_bytes(), have if response.status_code == 206 else 0, remote.size, count)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 416:  # it has less than we do: begin again
            os.truncate(part, 0)
        elif status == 429 or status >= 500:
            return error
        else:
            raise
    except HTTPError as error:
        return error
    return None


def _write(part: Path, chunks: Iterator[bytes], at: int, size: int, count: Callable[[int], None]) -> None:
    """Put `chunks` into the file from `at` on; what came before a cut is kept. Ends soon after `size`."""
    with part.open("r+b") as f:
        f.truncate(at)
        f.seek(at)
        try:
            for chunk in chunks:
                f.write(chunk)
                at += len(chunk)
                count(at)
                if at > size:
                    return
        finally:
            f.flush()
            os.fsync(f.fileno())


def _wrong_size(wanted: Wanted, remote: Remote) -> DataError:
    return DataError(
        f"{endpoint()} sends {remote.file} in another size than the {remote.size:,} bytes that it promised",
        f"set HF_ENDPOINT to another mirror, or {wanted.alternatives}",
    )


def _check(file: Path, remote: Remote) -> tuple[str, bool]:
    """The file's SHA-256, and whether it is what the hub promised."""
    sha256 = file_sha256(file)
    if len(remote.etag) == 64:
        return sha256, sha256 == remote.etag
    blob = hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False)
    with file.open("rb") as f:
        while chunk := f.read(2**20):
            blob.update(chunk)
    return sha256, blob.hexdigest() == remote.etag


def _partial(wanted: Wanted, remote: Remote) -> Path:
    target = wanted.folder / remote.file
    return target.with_name(f".{target.name}.{remote.etag[:16]}.part")


def _partial_size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _note_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.fetched")


def _note(target: Path) -> Note | None:
    """None unless the file was fetched whole and has its size still."""
    try:
        note = Note(**json.loads(_note_file(target).read_bytes()))
        return note if target.stat().st_size == note.size else None
    except (OSError, ValueError, TypeError):
        return None


def _forget(target: Path) -> None:
    _note_file(target).unlink(missing_ok=True)
    target.unlink(missing_ok=True)
