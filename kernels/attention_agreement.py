"""Whether what was timed computes attention: its numbers beside exact ones, on the inputs that it is timed with.

Trainer, scorer and auditor take the same kernel, so a wrong one would show nowhere else than in a worse score. Exact is
float64, by the formula and its derivative, of the last row's last group of heads: little time, and memory for the
scores of a few queries. The rest is looked at for what is no number.

A window that is off by a token changes less than rounding may: for 1,024 of 2,048 tokens the output by 1 %. So it is
also asked whether a neighbour of the window explains what the numbers are off: most of it, which rounding never does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.agreement import not_finite, off
from kernels.attention_peers import Case
from kernels.attention_reference import reference_rotated

QUERIES = 256  # whose scores are in memory at once
PARTS = ("output", "gradient of q", "gradient of k", "gradient of v")


def inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v, which want gradients, and the cosines and sines of RoPE at base 10000."""
    rng = torch.Generator(case.device).manual_seed(seed)
    shapes = [(case.rows, case.length, h, case.head) for h in (case.heads, case.key_heads, case.key_heads)]
    q, k, v = (torch.randn(s, generator=rng, device=case.device, dtype=case.dtype).requires_grad_() for s in shapes)
    turns = 10000.0 ** (-torch.arange(0, case.head, 2, device=case.device) / case.head)
    angle = torch.outer(torch.arange(case.length, device=case.device, dtype=torch.float32), turns)
    return q, k, v, angle.cos(), angle.sin()


def why_apart(run: Callable[..., Tensor], case: Case) -> str:
    """What is wrong with `run`'s numbers of the case, forward and backward: "its output is 3.1 % off, 1 % is allowed".
    "" where nothing is."""
    q, k, v, cos, sin = inputs(case)
    dy = torch.randn(q.shape, generator=torch.Generator(case.device).manual_seed(1), device=case.device, dtype=q.dtype)
    y = run(q, k, v, cos, sin, case.window)
    whole = [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]
    if why := not_finite(PARTS, whole):
        return why
    group = case.heads // case.key_heads
    found = [x[-1, :, -heads:].double() for x, heads in zip(whole, (group, group, 1, 1), strict=True)]
    of_one = ((q, group), (k, 1), (v, 1), (dy, group))
    q1, k1, v1, dy1 = (x[-1, :, -heads:].detach().double() for x, heads in of_one)
    return _why(found, lambda window: exact(q1, k1, v1, dy1, cos, sin, window), case)


def _why(found: Sequence[Tensor], wanted: Callable[[int], Sequence[Tensor]], case: Case) -> str:
    """wanted: a window -> what it gives, in the order of PARTS."""
    window = min(case.window, case.length - 1)
    right = wanted(window)
    if why := off(PARTS, found, right, case.dtype):
        return why
    for other in (n for n in (window - 1, window + 1) if 0 <= n < case.length):
        for part, f, w, o in zip(PARTS, found, right, wanted(other), strict=True):
            if 2 * float((f - o).square().sum()) < float((f - w).square().sum()):
                return f"its {part} is closer to that of a window of {other} tokens than of {window}"
    return ""


def exact(
    q: Tensor,  # (T, G, D) float64: of one row, the G query heads of a key head
    k: Tensor,  # (T, 1, D)
    v: Tensor,  # (T, 1, D)
    dy: Tensor,  # (T, G, D)
    cos: Tensor,  # (T or more, D/2)
    sin: Tensor,
    window: int,
) -> list[Tensor]:
    """y, dq, dk and dv, a block of queries at a time. QK-norm and RoPE are differentiated by PyTorch."""
    T, scale = len(q), q.size(-1) ** -0.5
    leaves = [x[None].requires_grad_() for x in (q, k)]
    turned = [reference_rotated(x, cos, sin) for x in leaves]
    tq, tk, tv = turned[0].detach()[0], turned[1].detach()[0, :, 0], v[:, 0]
    y, dq, dk, dv = (torch.zeros_like(x) for x in (tq, tq, tk, tv))
    position = torch.arange(T, device=q.device)
    for start in range(0, T, QUERIES):
        at = slice(start, min(start + QUERIES, T))
        seen = slice(max(0, start - window), at.stop)
        distance = position[at, None] - position[seen]
        scores = torch.einsum("igd,jd->gij", tq[at], tk[seen]) * scale
        p = scores.masked_fill((distance < 0) | (distance > window), -math.inf).softmax(-1)
        y[at] = torch.einsum("gij,jd->igd", p, tv[seen])
        dp = torch.einsum("igd,jd->gij", dy[at], tv[seen])
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[at] = torch.einsum("gij,jd->igd", ds, tk[seen])
        dk[seen] += torch.einsum("gij,igd->jd", ds, tq[at])
        dv[seen] += torch.einsum("gij,igd->jd", p, dy[at])
    raw = torch.autograd.grad(turned, leaves, (dq[None], dk[None, :, None]))
    return [y, raw[0][0], raw[1][0], dv[:, None]]
