"""The fixed work of a bench: profiles, the text, the weights that every backend starts from, and its hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.reference import NUMBERS
from benchmarks.results import Work
from core.data import Dataset
from core.errors import UserError
from core.hardware import Hardware
from core.stream import TokenStream

VERSION = 2  # counted up when what is timed, or how, changes: results of different versions are not compared
SEED = 1  # of the weights and of the order of the text


@dataclass(frozen=True)
class BenchProfile:
    """A size of work. Fixed: a machine that finds it small is to be seen as fast, not given other work."""

    name: str
    about: str
    data: str  # a name that `prepare` knows
    vocab_size: int
    context: int
    batch_tokens: int  # of one optimizer step
    micro_rows: int
    model: Mapping[str, str | int | float]
    fixed_steps: int
    scored_tokens: int
    budget: float  # seconds of training for val_bpb
    warm_steps: int = 4  # not timed: they compile

    @property
    def rows(self) -> int:
        return self.batch_tokens // self.context

    def constants(self) -> dict[str, Any]:
        """As a recipe spells them."""
        batch = {"TOTAL_BATCH_SIZE": self.batch_tokens, "DEVICE_BATCH_SIZE": self.micro_rows}
        return {**self.model, **batch}


def _model(depth: int, aspect: int, head_dim: int) -> dict[str, str | int | float]:
    return {"DEPTH": depth, "ASPECT_RATIO": aspect, "HEAD_DIM": head_dim, "WINDOW_PATTERN": "SSSL", "WEIGHT_DECAY": 0.2}


PROFILES: Mapping[str, BenchProfile] = {
    p.name: p
    for p in (
        BenchProfile(
            name="tiny",
            about="1.8M parameters; two cores do it in minutes",
            data="kjv",
            vocab_size=2048,
            context=256,
            batch_tokens=2**11,
            micro_rows=8,
            model=_model(4, 32, 64),
            fixed_steps=16,
            scored_tokens=2**15,
            budget=6.0,
        ),
        BenchProfile(
            name="small",
            about="38M parameters; for a Mac or a gaming PC",
            data="kjv",
            vocab_size=4096,
            context=512,
            batch_tokens=2**14,
            micro_rows=16,
            model=_model(8, 64, 128),
            fixed_steps=64,
            scored_tokens=2**17,
            budget=60.0,
        ),
        BenchProfile(
            name="gpu",
            about="upstream's model, 50M parameters, 2048 tokens of context; for a data-centre GPU",
            data="tinystories",
            vocab_size=8192,
            context=2048,
            batch_tokens=2**18,
            micro_rows=64,
            model=_model(8, 64, 128),
            fixed_steps=100,
            scored_tokens=2**21,
            budget=300.0,
        ),
    )
}


def profile(name: str | None, hardware: Hardware, chosen: str, quick: bool) -> BenchProfile:
    """The profile of this name, or what fits the machine: `tiny` for a CPU and for --quick. `chosen`: the backend."""
    if name is None:
        by_backend = {"cuda": "gpu", "rtx": "small", "mlx": "small" if hardware.chip else "tiny"}
        name = "tiny" if quick else by_backend.get(chosen, "tiny")
    if name not in PROFILES:
        raise UserError(f"there is no bench profile {name!r}", f"known are: {', '.join(PROFILES)}")
    return PROFILES[name]


def describe(chosen: BenchProfile, dataset: Dataset) -> Work:
    """The work with its hashes; parameters are counted from the shapes of the weights."""
    return Work(
        profile=chosen.name,
        version=VERSION,
        data=chosen.data,
        text=_text_hash(dataset),
        tokenizer=dataset.files["tokenizer"].sha256,
        reference=hashlib.sha256(NUMBERS.read_bytes()).hexdigest(),
        vocab_size=dataset.vocab_size,
        context=chosen.context,
        batch_tokens=chosen.batch_tokens,
        micro_rows=chosen.micro_rows,
        model=dict(chosen.model),
        params=sum(int(np.prod(shape)) for shape in shapes(chosen).values()),
        fixed_steps=chosen.fixed_steps,
        scored_tokens=chosen.scored_tokens,
        budget=chosen.budget,
    )


def _text_hash(dataset: Dataset) -> str:
    """Over the hashes of the shards that are trained on and scored: the manifest also names versions and places."""
    digest = hashlib.sha256()
    for part in ("train", "val"):
        for shard in dataset.part(part).shards:
            digest.update(f"{part} {shard.size} {shard.sha256}\n".encode())
    return digest.hexdigest()


# --- weights and batches -----------------------------------------------------------------------


def shapes(chosen: BenchProfile) -> dict[str, tuple[int, ...]]:
    """Shapes of the reference model's weights, under upstream's names."""
    depth, head_dim = int(chosen.model["DEPTH"]), int(chosen.model["HEAD_DIM"])
    heads = -(-depth * int(chosen.model["ASPECT_RATIO"]) // head_dim)
    dim, vocab = heads * head_dim, chosen.vocab_size
    found: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, dim),
        "lm_head.weight": (vocab, dim),
        "resid_lambdas": (depth,),
        "x0_lambdas": (depth,),
    }
    for i in range(depth):
        layer = f"transformer.h.{i}."
        found.update({f"{layer}attn.{name}.weight": (dim, dim) for name in ("c_q", "c_k", "c_v", "c_proj")})
        found[f"{layer}mlp.c_fc.weight"] = (4 * dim, dim)
        found[f"{layer}mlp.c_proj.weight"] = (dim, 4 * dim)
        if i % 2 == (depth - 1) % 2:
            found[f"{layer}attn.ve_gate.weight"] = (heads, min(32, dim))
            found[f"value_embeds.{i}.weight"] = (vocab, dim)
    return found


def initial(given: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Upstream's initial weights of these shapes, float32, drawn by numpy: the same for every backend."""
    rng = np.random.default_rng(SEED)
    found = {}
    for name, shape in sorted(given.items()):
        reach = (3 / shape[-1]) ** 0.5 if len(shape) > 1 else 0.0
        if name in ("resid_lambdas", "x0_lambdas"):
            w = np.full(shape, 1.0 if name.startswith("resid") else 0.1)
        elif "c_proj" in name or "ve_gate" in name:
            w = np.zeros(shape)
        elif "wte" in name or "lm_head" in name:
            w = rng.normal(0.0, 1.0 if "wte" in name else 0.001, shape)
        else:
            w = rng.uniform(-reach, reach, shape)
        found[name] = w.astype(np.float32)
    return found


def write_batches(chosen: BenchProfile, dataset: Dataset, file: Path) -> None:
    """The batches of the fixed steps: (steps, rows, T + 1) int32, as the trainer's own stream would serve them."""
    fds = dataset.open_files("train")
    out = np.lib.format.open_memmap(
        file, mode="w+", dtype=np.int32, shape=(chosen.fixed_steps, chosen.rows, chosen.context + 1)
    )
    with TokenStream(fds, dataset.token_dtype, SEED, lambda x: x, prefetch=False) as stream:
        for step in range(chosen.fixed_steps):
            out[step] = stream.next(chosen.rows, chosen.context)
    out.flush()
    for fd in fds:
        os.close(fd)
