"""train: one experiment without a verdict, and the export of what it trained."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console import places
from console.awake import awake
from console.display import Ticker
from console.output import Screen
from console.signals import ends
from console.words import bpb, count, duration, size
from core.errors import UserError

if TYPE_CHECKING:
    from core.data import Dataset
    from core.lab import Lab
    from core.referee import Outcome
    from core.sharing import SharedCard


def train_verb(screen: Screen, given: str | None, recipe: Path | None, budget: float | None, out: Path | None) -> int:
    lab = places.find(screen, given)
    target = _empty(out) if out else None
    source, name = _source(lab, recipe)
    seconds = budget or lab.settings.budget
    screen.say(f"training {name} for {duration(seconds)} on {places.scale(lab).data}; no verdict, nothing is recorded")
    dataset = lab.dataset()
    with tempfile.TemporaryDirectory(prefix="train-", dir=_scratch(lab)) as scratch:
        with awake(), Ticker(screen, heartbeat=15.0, events=True) as ticker:
            ticker.begin("")
            stop = threading.Event()
            began = time.monotonic()
            with ends(stop.set) as asked:
                outcome = _execute(lab, dataset, source, seconds, Path(scratch), ticker, stop)
            total = time.monotonic() - began
        if target and outcome.weights and outcome.status == "scored":
            _export(target, lab, dataset, source, name, outcome, seconds)
    exported = target if target and outcome.status == "scored" else None
    screen.line({"event": "trained", "lab": places.about(lab), "recipe": name, "outcome": _plain(outcome),
                 "out": exported})  # fmt: skip
    if not screen.as_json:
        _summary(screen, lab, outcome, total, seconds)
        if exported:
            screen.say(f"exported to {exported}: weights.safetensors, tokenizer.tiktoken, train.py, README.md")
    return asked.status or (0 if outcome.status == "scored" else 1)


def _empty(out: Path) -> Path:
    folder = out.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder", "give --out a new or empty one")
    folder.mkdir(parents=True, exist_ok=True)  # an unwritable place must be known before hours of training
    return folder


def _source(lab: Lab, recipe: Path | None) -> tuple[bytes, str]:
    if recipe is not None:
        if not recipe.is_file():
            raise UserError(f"there is no file {recipe}", "give --recipe a train.py")
        return recipe.read_bytes(), str(recipe)
    best = lab.best()
    if best is None:
        return lab.best_source(), "the recipe of the lab (no best yet)"
    return lab.best_source(), f"the best (#{best.number}, {bpb(best.val_bpb)})"


def _scratch(lab: Lab) -> Path:
    folder = lab.record / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _execute(
    lab: Lab, dataset: Dataset, source: bytes, budget: float, scratch: Path, ticker: Ticker, stop: threading.Event
) -> Outcome:
    from core import locks, referee

    request = referee.Request(
        source=source,
        settings=lab.settings,
        dataset=dataset,
        seed=lab.settings.seed,
        experiment=f"{lab.tag}-train",
        workdir=scratch,
        budget=budget,
        audit="never",
    )
    with locks.hold_device(lab.settings.device):
        return referee.execute(request, ticker.feed, stop, _sharing(lab, ticker, stop))


def _sharing(lab: Lab, ticker: Ticker, stop: threading.Event) -> SharedCard | None:
    """Of a card, which is not waited for at the beginning; but what hours have trained is not lost where others have
    taken it when it is to be scored. None for a processor."""
    from core.nvml import Nvml
    from core.outcome import Event
    from core.sharing import SharedCard

    if not lab.settings.device.startswith("cuda"):
        return None
    card = SharedCard(lab.settings.device, Nvml(), lambda text: ticker.feed(Event("phase", {"phase": text})), stop)
    card.look()
    return card


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {k: v for k, v in outcome.to_dict().items() if k not in ("weights", "caches")}


def _summary(screen: Screen, lab: Lab, outcome: Outcome, total: float, budget: float) -> None:
    """Upstream's block, so that what reads its output reads ours."""
    if outcome.status != "scored" or outcome.val_bpb is None:
        screen.say(f"{outcome.status}: {outcome.reason}")
        for line in (outcome.log_tail or "").strip().splitlines()[-12:]:
            screen.say(f"  | {line[:110]}")
        return
    described = outcome.describe or {}
    figures = [
        ("val_bpb", f"{outcome.val_bpb:.6f}"),
        ("training_seconds", f"{outcome.training_seconds:.1f}"),
        ("total_seconds", f"{total:.1f}"),
        ("peak_vram_mb", f"{(outcome.peak_memory or 0) / 2**20:.1f}"),
        ("mfu_percent", f"{100 * (outcome.mfu or 0.0):.2f}"),
        ("total_tokens_M", f"{(outcome.tokens or 0) / 1e6:.1f}"),
        ("num_steps", str(outcome.steps)),
        ("num_params_M", f"{(outcome.params or 0) / 1e6:.1f}"),
        ("depth", str(described.get("depth", "-"))),
    ]
    scale = places.scale(lab)
    screen.say(
        f"val_bpb on {scale.data}, {scale.context} tokens of context, {duration(budget)} of training; lower is better"
    )
    screen.say("---")
    for name, figure in figures:
        screen.say(f"{name + ':':<17} {figure}")


# --- export ------------------------------------------------------------------------------------


def _export(out: Path, lab: Lab, dataset: Dataset, source: bytes, name: str, outcome: Outcome, budget: float) -> None:
    """Weights, tokenizer, recipe and a page that says what they are."""
    assert outcome.weights is not None  # the caller looked
    shutil.copyfile(outcome.weights, out / "weights.safetensors")
    shutil.copyfile(dataset.path / "tokenizer.tiktoken", out / "tokenizer.tiktoken")
    (out / "train.py").write_bytes(source)
    (out / "settings.json").write_text(lab.settings.to_json() + "\n", encoding="utf-8")
    (out / "outcome.json").write_text(json.dumps(_plain(outcome), indent=1, default=str) + "\n", encoding="utf-8")
    (out / "README.md").write_text(_readme(lab, dataset, name, outcome, budget), encoding="utf-8")


def _readme(lab: Lab, dataset: Dataset, name: str, outcome: Outcome, budget: float) -> str:
    s = lab.settings
    rows = [
        ("validation bits per byte", f"{outcome.val_bpb:.6f}"),
        ("data", f"{places.scale(lab).data} ({count(dataset.part('train').tokens)} training tokens)"),
        ("context", f"{s.sequence_len} tokens"),
        ("vocabulary", f"{s.vocab_size} tokens, the BOS id is {s.bos_id}"),
        ("training", f"{duration(outcome.training_seconds)} of {duration(budget)}, {outcome.steps} steps, "
                     f"{count(outcome.tokens)} tokens, {outcome.passes:.2f} passes over the text"),
        ("parameters", count(outcome.params)),
        ("peak memory", size(outcome.peak_memory)),
        ("device", f"{s.device}, {s.dtype}, backend {s.backend}"),
    ]  # fmt: skip
    table = "\n".join(f"| {what} | {figure} |" for what, figure in rows)
    return f"""# {lab.tag}

Trained from {name} by autoresearch.

| what | figure |
| --- | --- |
{table}

- `weights.safetensors`: float32, matrices as (out, in), under the names that `train.py` gives them
- `tokenizer.tiktoken`: plain merge ranks (base64 token, rank), as tiktoken's own files
- `train.py`: the recipe; `build(spec).load_weights(weights)`, then `logits(tokens)`
- `settings.json`, `outcome.json`: all settings and measurements
"""
