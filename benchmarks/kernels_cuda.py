"""The cases of `bench kernels` for NVIDIA cards: what the recipes call (Triton's kernels, torch's where it has none),
against every attention that is installed, torch.compile of the plain formula, and the plain formula.

With TRITON_INTERPRET=1 it runs on a CPU: that shows that it works, and its times mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernel_cases as cases
from benchmarks.kernel_cases import Case, Shape, Side
from benchmarks.kernels_torch import (
    ADAM_BETAS,
    ADAM_EPSILON,
    ADAM_LR,
    BETA2,
    CAP,
    MUON_STEPS,
    RATES,
    Source,
    TorchClock,
    adam_case,
    both_ways,
    head_inputs,
    loss_case,
    muon_case,
    plain_loss,
    plain_muon,
    stacks,
)
from kernels import plain, portable
from kernels.attention_choice import inputs as attention_inputs
from kernels.attention_peers import PEERS
from kernels.attention_peers import Case as Asked
from kernels.attention_reference import reference as attention_reference


def cuda_cases(shape: Shape, clock: TorchClock) -> Iterator[Case]:
    dtype = getattr(torch, clock.dtype)
    yield from _attention(shape, clock, dtype)
    yield from _mlp(shape, clock, dtype)
    yield _head(shape, clock, dtype)
    yield _muon(shape, clock, dtype)
    yield _adam(shape, clock)


def compiled(function: Callable[..., Any], clock: TorchClock) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False) if clock.device.type == "cuda" else function


def ours_named(device: torch.device) -> str:
    """What the recipes use here: "recipe (triton)"."""
    return f"recipe ({portable.told(device).partition(':')[0]})"


def _attention(shape: Shape, clock: TorchClock, dtype: torch.dtype) -> Iterator[Case]:
    """QK-norm, RoPE and causal windowed attention: whoever lacks the first two gets them in one compiled pass."""
    for window in cases.windows(shape):

        def asked(of: Shape, window: int = window) -> Asked:
            return Asked(of.rows, of.context, of.heads, of.heads, of.head_dim, window, dtype, clock.device)

        def make(seed: int, of: Shape, asked: Callable[[Shape], Asked] = asked) -> tuple[Any, ...]:
            q, k, v, cos, sin = attention_inputs(asked(of), seed)
            dy = Source(seed, clock.device).normal(*q.shape, dtype=dtype)
            return q.detach(), k.detach(), v.detach(), cos, sin, dy

        def windowed(function: Callable[..., Tensor], window: int = window) -> Callable[..., Tensor]:
            return lambda q, k, v, cos, sin: function(q, k, v, cos, sin, window)

        sides: dict[str, Callable[..., Tensor]] = {ours_named(clock.device): windowed(portable.attention)}
        refused: dict[str, str] = {}
        for name, peer in ((n, p) for n, p in PEERS.items() if n != "triton"):
            if why := peer.why_not(asked(shape)):
                refused[name] = why
            else:
                sides[name] = windowed(peer.make(asked(shape)))

        def work(both: bool, window: int = window) -> cases.Work:
            return cases.attention_work(shape, window, dtype.itemsize, both)

        what, formula = cases.attention_text(shape, window), windowed(attention_reference)
        yield from both_ways("attention", what, shape, work, make, sides, formula, 3, refused)


def plain_mlp(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """relu(x w1^T)^2 w2^T, all in one dtype."""
    return F.linear(F.relu(F.linear(x, w1)).square(), w2)


class OurMlp(torch.autograd.Function):
    """The recipes' MLP: of the hidden units only the squared ones are kept (kernels/linear_relu2.py)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, by: str) -> Tensor:
        ctx.by = by
        y = portable.relu2(x, w1, by=by)
        ctx.save_for_backward(x, w1, w2, y)
        return F.linear(y, w2)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w1, w2, y = ctx.saved_tensors
        dh = portable.relu2_backward(d, w2, y, by=ctx.by)
        return dh @ w1, dh.T @ x, d.T @ y, None


def _mlp(shape: Shape, clock: TorchClock, dtype: torch.dtype) -> Iterator[Case]:
    C = shape.dim

    def make(seed: int, of: Shape) -> tuple[Any, ...]:
        source = Source(seed, clock.device)
        w1, w2 = (source.normal(*s, scale=C**-0.5, dtype=dtype) for s in ((4 * C, C), (C, 4 * C)))
        x, dy = (source.normal(of.tokens, C, dtype=dtype) for _ in range(2))
        return x, w1, w2, dy

    sides: dict[str, Callable[..., Tensor]] = {
        ours_named(clock.device): lambda x, w1, w2: OurMlp.apply(x, w1, w2, "triton"),
        "recipe (products of torch)": lambda x, w1, w2: OurMlp.apply(x, w1, w2, "torch"),
        "torch.compile": compiled(plain_mlp, clock),
        "plain PyTorch": plain_mlp,
    }

    def work(both: bool) -> cases.Work:
        return cases.mlp_work(shape, dtype.itemsize, both)

    yield from both_ways("mlp", cases.mlp_text(shape), shape, work, make, sides, plain_mlp, 3)


def _head(shape: Shape, clock: TorchClock, dtype: torch.dtype) -> Case:
    sides: dict[str, Callable[..., Tensor]] = {
        ours_named(clock.device): lambda x, head, targets: portable.softcapped_loss(x, head, targets, CAP),
        "torch.compile": compiled(plain_loss, clock),
        "plain PyTorch": plain_loss,
    }
    return loss_case(shape, head_inputs(shape, dtype, clock.device), sides, dtype.itemsize, {})


def _muon(shape: Shape, clock: TorchClock, dtype: torch.dtype) -> Case:
    rates = torch.tensor(RATES, device=clock.device)

    def make(seed: int, of: Shape) -> tuple[Any, ...]:
        return (stacks(of, seed, clock.device),)

    def stepped(function: Callable[..., None]) -> Callable[..., list[Tensor]]:
        def run(given: list[tuple[Tensor, ...]]) -> list[Tensor]:
            with torch.no_grad():
                for weights, grads, momentum, second in given:
                    function(weights, grads.clone(), momentum, second, rates, dtype, BETA2, MUON_STEPS)
            return [weights for weights, *_ in given]

        return run

    sides = [
        Side(ours_named(clock.device), stepped(portable.muon_), True),
        Side("torch.compile", stepped(compiled(plain.muon_, clock))),
        Side("plain PyTorch, stacks", lambda given: plain_muon(given, dtype)),
    ]
    return muon_case(shape, make, sides)


def _adam(shape: Shape, clock: TorchClock) -> Case:
    def fused(params: list[Tensor]) -> Any:
        return torch.optim.AdamW(params, ADAM_LR, ADAM_BETAS, ADAM_EPSILON, weight_decay=0.0, fused=True)

    return adam_case(shape, clock.device, {"fused, as in the recipe": fused})
