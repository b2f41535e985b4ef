"""Host time of a training batch: our loader against best-fit packing as upstream does it.

    python -m benchmarks.loader                                  kjv, 128 rows of 2048
    python -m benchmarks.loader --text book.txt --rows 64 --length 1024
    python -m benchmarks.loader --peer ~/autoresearch            the packing of your own clone of upstream

The peer fills each row with the longest documents of a buffer of 1,000 that still fit, crops the shortest where none
does, and tokenizes as it goes. Both sides get the same text, one after the other in one process. Time is CPU time of
all threads of the process, so that nothing hides in a thread; the wait is what a training step would notice.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from core.data import Dataset, Tokenizer, TokenStream
from core.errors import DataError, UserError
from prepare import prepare

Batch = Callable[[], Any]


# --- the peer ------------------------------------------------------------------------------------


def documents(dataset: Dataset) -> list[list[int]]:
    """The training documents as lists of ids, BOS first, as packing wants them."""
    text = dataset.text("train")
    tokens = text.span(0, text.tokens)
    return [d.tolist() for d in np.split(tokens, np.flatnonzero(tokens == dataset.bos_id)) if len(d)]


def packing(source: Iterator[list[list[int]]], rows: int, length: int, buffer: int = 1000) -> Iterator[np.ndarray]:
    """Best-fit packing: (rows, length + 1) int64, every row begins with BOS, no padding.

    Written for this comparison after the description of upstream's loader; same work for each row: a search of the
    whole buffer for each document that is placed.
    """
    waiting: list[list[int]] = []
    while True:
        out = np.empty((rows, length + 1), dtype=np.int64)
        for row in out:
            at = 0
            while at <= length:
                while len(waiting) < buffer:
                    waiting.extend(next(source))
                at = _place(row, at, waiting)
        yield out


def _place(row: np.ndarray, at: int, waiting: list[list[int]]) -> int:
    """Put the longest document that fits at `at`, or the head of the shortest; returns where it ends."""
    room = len(row) - at
    best, best_length = -1, 0
    for index, document in enumerate(waiting):
        if best_length < len(document) <= room:
            best, best_length = index, len(document)
    if best < 0:
        best = min(range(len(waiting)), key=lambda i: len(waiting[i]))
    placed = waiting.pop(best)[:room]
    row[at : at + len(placed)] = placed
    return at + len(placed)


def _again(documents: list[Any], at_once: int = 128) -> Iterator[list[Any]]:
    while True:
        for start in range(0, len(documents), at_once):
            yield documents[start : start + at_once]


def _tokenizing(texts: list[str], tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    for batch in _again(texts):
        yield [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(batch, threads=8)]


# --- a clone of upstream -------------------------------------------------------------------------


class _UpstreamTokenizer:
    """The two methods that upstream's loader calls."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def get_bos_token_id(self) -> int:
        return self._tokenizer.bos_id

    def encode(self, texts: list[str], prepend: int | None = None, num_threads: int = 8) -> list[list[int]]:
        head = [] if prepend is None else [prepend]
        return [head + ids for ids in self._tokenizer.encode_batch(texts, num_threads)]


class _HostTorch:
    """`torch` for a module that wants a GPU for its buffers: on a machine without one they are plain memory."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def empty(self, *args: Any, **options: Any) -> Any:
        options.pop("pin_memory", None)
        options.pop("device", None)
        return self._torch.empty(*args, **options)


def upstream(folder: Path, texts: list[str], tokenizer: Tokenizer, rows: int, length: int) -> Iterator[Any]:
    """`make_dataloader` of `folder`/prepare.py, fed with our text and our tokenizer."""
    file = folder.expanduser() / "prepare.py"
    spec = importlib.util.spec_from_file_location("upstream_prepare", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UserError(f"{file} is missing", "give --peer the folder of a clone of upstream")
    module: Any = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"{file} cannot be imported: {error}", "install what it needs into this environment") from None
    if not module.torch.cuda.is_available():
        module.torch = _HostTorch(module.torch)
    module._document_batches = lambda split: ((batch, 1) for batch in _again(texts))
    return module.make_dataloader(_UpstreamTokenizer(tokenizer), rows, length, "train")


# --- measuring -----------------------------------------------------------------------------------


def measure(batch: Batch, count: int) -> dict[str, float]:
    """Median milliseconds of one call: CPU time of the process, and time on the clock."""
    batch()  # fills buffers and caches
    cpu, clock = [], []
    for _ in range(count):
        cpu_start, start = time.process_time(), time.perf_counter()
        batch()
        cpu.append((time.process_time() - cpu_start) * 1e3)
        clock.append((time.perf_counter() - start) * 1e3)
    return {"cpu_ms": statistics.median(cpu), "clock_ms": statistics.median(clock)}


def measure_wait(dataset: Dataset, rows: int, length: int, count: int, step_ms: float) -> float:
    """Median milliseconds that `next` takes with the thread ahead, beside steps of `step_ms` that do nothing."""
    waits = []
    with _stream(dataset, prefetch=True) as stream:
        for _ in range(count):
            start = time.perf_counter()
            stream.next(rows, length)
            waits.append((time.perf_counter() - start) * 1e3)
            time.sleep(step_ms / 1e3)
    return statistics.median(waits)


def _stream(dataset: Dataset, prefetch: bool) -> TokenStream:
    fds = dataset.open_files("train")
    try:
        return TokenStream(fds, dataset.token_dtype, 1, lambda x: x, prefetch)
    finally:
        for fd in fds:
            os.close(fd)


def compare(dataset: Dataset, rows: int, length: int, count: int, peer: Path | None) -> dict[str, Any]:
    """All figures for one data set."""
    packed, tokenizer = documents(dataset), dataset.tokenizer()
    texts = [tokenizer.decode(d) for d in packed]
    with _stream(dataset, prefetch=False) as stream:
        ours = measure(lambda: stream.next(rows, length), max(count, 20))
    pack = packing(_again(packed), rows, length)
    whole = packing(_tokenizing(texts, tokenizer), rows, length)
    peers = {
        "packing alone": measure(lambda: next(pack), count),
        "packing and tokenizing": measure(lambda: next(whole), count),
    }
    if peer is not None:
        clone = upstream(peer, texts, tokenizer, rows, length)
        peers[f"{peer}"] = measure(lambda: next(clone), count)
    return {
        "data": dataset.path.name,
        "documents": len(packed),
        "tokens": dataset.part("train").tokens,
        "rows": rows,
        "length": length,
        "ours": {**ours, "wait_ms": measure_wait(dataset, rows, length, 20, step_ms=max(5.0, 2 * ours["clock_ms"]))},
        "peers": {name: {**p, "ours_to_peer": ours["cpu_ms"] / p["cpu_ms"]} for name, p in peers.items()},
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", default="kjv", show_default=True, help="A data set that `prepare` knows.")
@click.option("--text", type=click.Path(path_type=Path), help="A text of your own instead.")
@click.option("--vocab", type=int, help="Entries of the vocabulary.")
@click.option("--rows", default=128, show_default=True)
@click.option("--length", default=2048, show_default=True)
@click.option("--batches", default=7, show_default=True, help="Batches of the peer that are timed.")
@click.option("--peer", type=click.Path(path_type=Path), help="A clone of upstream, to be measured too.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(
    data: str,
    text: Path | None,
    vocab: int | None,
    rows: int,
    length: int,
    batches: int,
    peer: Path | None,
    as_json: bool,
) -> None:
    """Host time of a training batch: our loader against best-fit packing."""
    try:
        dataset = prepare(data, text=text, vocab_size=vocab)
        found = compare(dataset, rows, length, batches, peer)
    except (UserError, DataError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(found, indent=1) if as_json else _table(found))


def _table(found: dict[str, Any]) -> str:
    ours = found["ours"]
    lines = [
        f"{found['data']}: {found['documents']:,} documents, {found['tokens']:,} tokens; "
        f"batches of {found['rows']} x {found['length']}, medians, CPU time of all threads",
        f"  {'ours':30} {ours['cpu_ms']:9.3f} ms   (with the thread ahead, a step waits {ours['wait_ms']:.3f} ms)",
    ]
    for name, peer in found["peers"].items():
        lines.append(f"  {name:30} {peer['cpu_ms']:9.3f} ms   ours is {peer['ours_to_peer']:.4f} of it")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
