"""A short budgeted run through trainer, scorer and auditor: the section `run` of `benchmarks.gpu`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import ROOT, Order
from core.tokenizer import SMALLEST_VOCABULARY

if TYPE_CHECKING:
    from core.data import Dataset
    from core.outcome import Outcome

SECONDS = 15.0  # of training on a card
WARMUP_CAP = 180.0  # seconds at most: a child compiles in one thread what the sections before have not
BESIDE = 60.0  # seconds for all that is not the warm-up, of what the section has
SCORED = 2**20  # tokens


def run(order: Order) -> Iterator[dict[str, Any]]:
    """One audited experiment with the shipped recipe, on `--data` or, without it, on our own sources as text."""
    with tempfile.TemporaryDirectory(prefix="autoresearch-") as folder:
        os.environ["AUTORESEARCH_HOME"] = folder  # this process is the section's own
        try:
            dataset = data(order, Path(folder))
            outcome = experiment(order, dataset, Path(folder) / "work")
        except ModuleNotFoundError as error:
            yield {"not measured": f"{error.name} is not installed"}
            return
    row = {"status": outcome.status, "reason": outcome.reason, "passed": outcome.status == "scored"}
    if outcome.status != "scored":
        yield row | {"log": outcome.log_tail[-400:]}
        return
    rate = outcome.tokens / outcome.training_seconds
    peak = (outcome.peak_memory or 0) / 2**30  # what the allocator holds, more than what is in use
    yield row | {"val_bpb": outcome.val_bpb, "steps": outcome.steps, "tokens_per_second": rate, "mfu": outcome.mfu}
    yield {"scored tokens": outcome.scored_tokens, "reserved_gib": peak, **outcome.timings}
    if dataset.vocab_size == SMALLEST_VOCABULARY:
        yield {"setting": "vocabulary", "value": "single bytes: rustbpe, which learns merges, is not installed"}
    for name, value in outcome.describe.items():
        if name.startswith(("attention", "mlp", "rows", "scored", "peak", "dtype")):
            yield {"setting": name, "value": value}


def data(order: Order, folder: Path) -> Dataset:
    from core.data import Dataset
    from core.documents import from_path
    from core.shards import Plan, build

    if order.data:
        return Dataset.open(Path(order.data), verify="quick")
    texts, root = folder / "texts", folder / "data"
    for place in (texts, root):
        place.mkdir()
    for file in sorted([*ROOT.glob("*/*.py"), *ROOT.glob("docs/*.md")]):
        (texts / f"{file.parent.name}-{file.stem}.txt").write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    vocab = min(order.vocab, 2048) if order.device != "cpu" else 512  # a megabyte teaches no more merges than that
    if find_spec("rustbpe") is None:
        vocab = SMALLEST_VOCABULARY
    return build(Plan(from_path(texts), vocab, []), root, print_nothing, print_nothing)


def print_nothing(*_: object) -> None:
    """What a section prints are its rows."""


def experiment(order: Order, dataset: Dataset, workdir: Path) -> Outcome:
    """On a card the recipe of the step's section; on a CPU, where `--smoke` runs, a small one of the cpu backend."""
    import backends
    from core.outcome import Request
    from core.recipe import replace
    from core.referee import execute
    from core.settings import Settings

    on_cpu = order.device == "cpu"
    name = "cpu" if on_cpu else "cuda"
    constants: dict[str, Any] = {"DEPTH": 2, "ASPECT_RATIO": 32, "HEAD_DIM": 32, "TOTAL_BATCH_SIZE": 2**10}
    if not on_cpu:
        constants = shape(order) | dict(order.told)
        if not order.caches or not any(Path(order.caches, "xdg").glob("attention-*.json")):
            constants["ATTENTION"] = (
                "triton"  # no section before has timed the others, which takes longer than this run
            )
    source = replace(backends.load(name).recipe().decode("utf-8"), constants)
    settings = Settings(
        backend=name,
        profile="benchmark",
        data=dataset.path.name,
        data_sha256=dataset.sha256,
        vocab_size=dataset.vocab_size,
        sequence_len=order.context,
        bos_id=dataset.bos_id,
        budget=2.0 if on_cpu else SECONDS,
        warmup_cap=max(30.0, min(WARMUP_CAP, order.limit - BESIDE)) if order.limit else WARMUP_CAP,
        eval_tokens=2**12 if on_cpu else SCORED,
        dtype="float32" if on_cpu else "bfloat16",
        device=order.device,
        audit_points=64 if on_cpu else 1024,
    )
    return execute(
        Request(
            source.encode(),
            settings,
            dataset,
            settings.seed,
            "benchmark",
            workdir=workdir,
            caches=Path(order.caches) if order.caches else None,
            audit="always",
        )
    )


def shape(order: Order) -> dict[str, Any]:
    """The order's model and batch, as the recipe spells them."""
    return {
        "DEPTH": order.depth,
        "ASPECT_RATIO": order.dim // order.depth,
        "HEAD_DIM": order.head_dim,
        "TOTAL_BATCH_SIZE": order.tokens,
        "DEVICE_BATCH_SIZE": order.rows,
    }
