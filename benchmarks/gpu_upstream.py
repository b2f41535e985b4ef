"""Upstream's training for `benchmarks.gpu`: its own model and optimizer, compiled, from weights that are given."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import upstream_side
from benchmarks.gpu import Order
from benchmarks.peers import PEER_NAMES, load_peer, rates


class Tokens(Protocol):
    def next(self, rows: int, length: int) -> Tensor: ...  # (rows, length + 1) integers on the device


class Training:
    """`attention` has FlashAttention 3's signature; `weights` have upstream's names."""

    def __init__(self, order: Order, attention: Callable[..., Tensor], weights: Mapping[str, Tensor]) -> None:
        self.order, self.weights, self.done = order, {name: w.numpy() for name, w in weights.items()}, 0
        self.peer = load_peer(
            Path(order.upstream) / "train.py",
            {"fa3": SimpleNamespace(flash_attn_func=attention)},
            ("GPT", "GPTConfig", "get_lr_multiplier", "get_muon_momentum", "get_weight_decay", *PEER_NAMES),
        )
        self.peer["norm"] = upstream_side.norm
        heads = order.heads
        with torch.device("meta"):
            config = self.peer["GPTConfig"](order.context, order.vocab, order.depth, heads, heads, order.dim, "SSSL")
            self.model = self.peer["GPT"](config)
        self.model.to_empty(device=order.device)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a scaling factor
            self.model.init_weights()
            self.optimizer = self.model.setup_optimizer(**rates(self.peer))
        upstream_side.load(self.model, self.weights)
        on_card = order.device != "cpu"
        self.forward: Callable[..., Any] = torch.compile(self.model, dynamic=False) if on_card else self.model

    def __call__(self, tokens: Tokens, progress: float) -> Tensor:
        """One optimizer step; the mean loss, unread."""
        order, peer = self.order, self.peer
        total, parts = torch.zeros((), device=order.device), max(1, order.tokens // (order.rows * order.context))
        for _ in range(parts):
            batch = tokens.next(order.rows, order.context)
            with torch.autocast(torch.device(order.device).type, torch.bfloat16):
                loss = self.forward(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) / parts
            loss.backward()
            total += loss.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * peer["get_lr_multiplier"](progress)
            if group["kind"] == "muon":
                group["momentum"] = peer["get_muon_momentum"](self.done)
                group["weight_decay"] = peer["get_weight_decay"](progress)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.done += 1
        return total

    def again(self, scalar_epsilon: float) -> None:
        """From the beginning, with another epsilon for the scalars of the layers. Nothing is compiled anew."""
        upstream_side.load(self.model, self.weights)
        self.optimizer.state.clear()
        self.done = 0
        for group in self.optimizer.param_groups:
            if all(p.dim() == 1 for p in group["params"]):
                group["eps"] = scalar_epsilon
