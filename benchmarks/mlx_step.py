"""The sides of `benchmarks.step --backend mlx`: our MLX recipe, and the model and optimizer of an MLX port.

The peer (a clone of trevin-creator/autoresearch-mlx or a fork) is run as its own loop runs it: not compiled, bfloat16
weights; with `dtype="float32"` its weights are cast once at the start.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.peers import PEER_NAMES, load_peer, rates
from benchmarks.shapes import Shapes, Side


def our_side(shapes: Shapes, dtype: str = "") -> Side:
    """The shipped recipe with these shapes, in the device's own dtype or another."""
    import mlx.core as mx

    from backends.mlx.device import open_device
    from core.contract import Spec

    recipe: Any = importlib.import_module("backends.mlx.train")
    for name, value in shapes.constants().items():
        setattr(recipe, name, value)
    device = open_device()
    training = recipe.build(
        Spec(shapes.vocab, shapes.context, shapes.vocab - 1, device.name, dtype or device.dtype.value, 42, 0)
    )
    shapes.require_dim(training.model.dim)

    def step(tokens: np.ndarray) -> float:
        batch = device.from_numpy(tokens)
        loss = training.step(SimpleNamespace(next=lambda rows, length: batch), 0.0)
        mx.eval(loss, training.state)
        return float(loss.item())

    return Side(step, lambda: int(mx.get_peak_memory()))


def peer_side(shapes: Shapes, folder: Path, dtype: str = "") -> Side:
    """Model, loss and optimizer of the peer's train.py, stepped and waited for as its loop does."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map

    peer = load_peer(folder / "train.py", {}, ("GPT", "GPTConfig", "AdamW", *PEER_NAMES))
    heads = shapes.dim // shapes.head_dim
    mx.random.seed(42)
    model = peer["GPT"](
        peer["GPTConfig"](shapes.context, shapes.vocab, shapes.depth, heads, heads, shapes.dim, shapes.window_pattern)
    )
    model.init_weights()
    if dtype:
        model.update(tree_map(lambda w: w.astype(getattr(mx, dtype)), model.parameters()))
    mx.eval(model.parameters())
    optimizer = peer["AdamW"](
        model,
        **rates(peer),
    )
    loss_and_grad = nn.value_and_grad(model, lambda model, inputs, targets: model(inputs, targets=targets))

    def step(tokens: np.ndarray) -> float:
        inputs, targets = mx.array(tokens[:, :-1].astype(np.int32)), mx.array(tokens[:, 1:].astype(np.int32))
        loss, grads = loss_and_grad(model, inputs, targets)
        mx.eval(loss, grads)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), *optimizer.state)
        return float(loss.item())

    return Side(step, lambda: int(mx.get_peak_memory()))
