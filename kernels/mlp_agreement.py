"""Whether what was timed computes the MLP's two products with the squared ReLU: its numbers beside exact ones.

As with attention (kernels/attention_agreement.py): trainer, scorer and auditor take the same one, so wrong numbers
would show nowhere else than in a worse score. Exact is float64, by the formula, of rows from all over the batch: of
65,536 tokens one in each tile of 128, at other places of the tiles. The rest is looked at for what is no number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import portable
from kernels.agreement import not_finite, off

ROWS = 512  # that are computed anew
PARTS = ("squared ReLU", "gradient before it")


@dataclass(frozen=True)
class Case:
    """What the MLP is asked to do."""

    tokens: int  # N, that go through the model at once
    dim: int  # C
    hidden: int  # F
    dtype: torch.dtype
    device: torch.device


def inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random x (N, C), w1 (F, C), w2 (C, F) and the output's gradient (N, C)."""
    rng = torch.Generator(case.device).manual_seed(seed)
    N, C, F = case.tokens, case.dim, case.hidden

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn(rows, columns, generator=rng, device=case.device).mul_(scale).to(case.dtype)

    return normal(N, C, 1.0), normal(F, C, C**-0.5), normal(C, F, F**-0.5), normal(N, C, 1.0)


def why_apart(name: str, case: Case) -> str:
    """What is wrong with the numbers of `name` in the case, forward and backward: "its squared ReLU is 4 % off, 3 % is
    allowed". "" where nothing is."""
    x, w1, w2, dout = inputs(case)
    rng = torch.Generator(case.device).manual_seed(1)
    r = torch.rand(case.tokens, generator=rng, device=case.device).mul_(1.5).add_(0.5)  # of the norm before, by row
    y = portable.relu2(x, w1, r, name)
    dh = portable.relu2_backward(dout, w2, y, r, name)
    if why := not_finite(PARTS, (y, dh)):
        return why
    rows = torch.linspace(0, case.tokens - 1, min(ROWS, case.tokens), device=case.device, dtype=torch.float64).long()
    given = (x[rows], w1, w2, dout[rows], r[rows])
    return off(PARTS, (y[rows], dh[rows]), exact(*(t.double() for t in given)), case.dtype)


def exact(x: Tensor, w1: Tensor, w2: Tensor, dout: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C), (F, C), (C, F), (N, C), (N,), all float64 -> max(h, 0)^2 and 2 r max(h, 0) (dout w2), both (N, F), of
    h = r (x w1^T)."""
    positive = (r[:, None] * (x @ w1.T)).clamp_(min=0.0)
    return positive.square(), 2 * r[:, None] * positive * (dout @ w2)
