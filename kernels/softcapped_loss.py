"""The head, its soft cap and the cross-entropy, a chunk of rows at a time, with gradients made in the forward.

With x (N, C), W (V, C), targets t (N,), and the cap s:

    z = x W^T    l = s tanh(z / s)    loss = mean over rows of (log sum_j exp(l_j) - l_t)    in nats
    dl/dz = 1 - tanh(z / s)^2         g = dloss/dz = (softmax(l) - onehot(t)) dl/dz / N      dx = g W    dW = g^T x

All N V logits are never in memory: z of a chunk is made by a matrix product, a kernel turns it into N g in place, and
two more products use that up (the order of Liger-Kernel's and of the cpu recipe's loss). The kernel needs no running
maximum, since l is at most s. It works with q = 1 / (1 + exp(2 z / s)), a sigmoid:

    l = s - 2 s q    exp(l - s) = exp(-2 s q)    dl/dz = 4 q (1 - q)

1/N is left to the backward, which multiplies by the incoming gradient: in float16 g / N would be lost, and what scales
the loss (a gradient scaler) comes in there. For the same reason float16's N g carries a factor of 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.targets import choose

CHUNK_BYTES = 64 * 2**20  # of logits that exist at one time; a multiple of 256 rows, or fewer where V is very large


@dataclass(frozen=True)
class Row:
    """One program works on one row of logits."""

    held: int  # a row of up to so many logits stays in registers: one read, one write
    block: int  # a longer one goes through in such blocks, twice: the second read finds it in the cache
    per_warp: int = 512  # logits of a block per warp


ROWS = {
    75: Row(held=8192, block=4096),
    80: Row(held=16384, block=4096),
    86: Row(held=16384, block=4096),
    89: Row(held=16384, block=4096),
    90: Row(held=16384, block=4096),
    100: Row(held=16384, block=4096),
    120: Row(held=16384, block=4096),
}


@triton.jit
def _bounded(z, cap):
    """q and exp(l - cap) of the module's docstring."""
    q = 1.0 / (1.0 + tl.exp(z * (2.0 / cap)))
    return q, tl.exp(-2.0 * cap * q)


@triton.jit
def _chunk(
    Z,
    TARGETS,
    LOSSES,
    cap,
    V: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):
    """Z (rows, V): logits before the cap -> SCALE * d(sum of losses)/dz, in place. LOSSES (rows,) float32."""
    row = tl.program_id(0).to(tl.int64)
    z = Z + row * V
    target = tl.load(TARGETS + row)
    columns = tl.arange(0, BLOCK)
    if HELD:
        inside = columns < V
        q, e = _bounded(tl.load(z + columns, mask=inside, other=0.0).to(ACC), cap)
        total = tl.sum(tl.where(inside, e, 0.0))
        inverse = 1.0 / total
        hit = columns == target.to(tl.int32)  # as int64 the columns would take registers twice
        picked = tl.sum(tl.where(hit, q, 0.0))
        g = (e * inverse - tl.where(hit, 1.0, 0.0)) * (4.0 * SCALE) * q * (1.0 - q)
        tl.store(z + columns, g.to(Z.dtype.element_ty), mask=inside)
    else:
        sums = tl.zeros((BLOCK,), dtype=ACC)
        for start in range(0, V, BLOCK):
            inside = columns < V - start
            _, e = _bounded(tl.load(z + start + columns, mask=inside, other=0.0).to(ACC), cap)
            sums += tl.where(inside, e, 0.0)
        total = tl.sum(sums)
        inverse = 1.0 / total
        found = tl.zeros((BLOCK,), dtype=ACC)
        for start in range(0, V, BLOCK):
            inside = columns < V - start
            q, e = _bounded(tl.load(z + start + columns, mask=inside, other=0.0).to(ACC), cap)
            hit = columns == target - start
            found += tl.where(hit, q, 0.0)
            g = (e * inverse - tl.where(hit, 1.0, 0.0)) * (4.0 * SCALE) * q * (1.0 - q)
            tl.store(z + start + columns, g.to(Z.dtype.element_ty), mask=inside)
        picked = tl.sum(found)
    tl.store(LOSSES + row, (tl.log(total) + 2.0 * cap * picked).to(LOSSES.dtype.element_ty))


def shape(vocab: int, row: Row) -> tuple[int, bool, int]:
    """Logits of a block, whether it holds a whole row, and warps."""
    held = row.held >= vocab
    block = triton.next_power_of_2(vocab) if held else row.block
    return block, held, min(32, max(1, block // row.per_warp))


def launch(z: Tensor, targets: Tensor, losses: Tensor, cap: float, row: Row) -> None:
    """z (rows, V) becomes its gradient, times `scale_of(z.dtype)`; losses (rows,) are written."""
    block, held, warps = shape(z.shape[1], row)
    kind = {"SCALE": scale_of(z.dtype), "ACC": tl.float64 if z.dtype == torch.float64 else tl.float32}
    _chunk[(len(z),)](
        z, targets, losses, cap, V=z.shape[1], **kind, BLOCK=block, HELD=held, num_warps=warps, num_stages=2
    )


def scale_of(dtype: torch.dtype) -> float:
    """The factor that keeps probabilities of one in a million apart in float16."""
    return 256.0 if dtype == torch.float16 else 1.0


def chunk_rows(vocab: int, bytes_each: int) -> int:
    """Rows of logits that exist at one time."""
    rows = CHUNK_BYTES // (vocab * bytes_each)
    return rows // 256 * 256 if rows >= 256 else max(1, rows)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, total wider than the factors: on a GPU within one product."""
    if left.is_cuda and total.dtype != left.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


@torch.library.custom_op("autoresearch::softcapped_loss", mutates_args=())
def _loss(x: Tensor, head: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> mean loss (), N dx (N, C) in x's dtype, N dW (V, C) in head's; both times `scale_of(x.dtype)`."""
    N, V = len(x), len(head)
    weight = head.to(x.dtype)
    losses = torch.empty(N, dtype=head.dtype, device=x.device)
    dx, dhead = torch.empty_like(x), torch.zeros_like(head)
    size = min(N, chunk_rows(V, x.element_size()))
    logits = torch.empty(size, V, dtype=x.dtype, device=x.device)
    row = choose(ROWS, x) or ROWS[75]
    for start in range(0, N, size):
        part = slice(start, start + size)
        z = torch.mm(x[part], weight.T, out=logits[: len(x[part])])
        launch(z, targets[part], losses[part], cap, row)
        torch.mm(z, weight, out=dx[part])
        accumulate(dhead, z.T, x[part])
    return losses.mean(), dx, dhead


@_loss.register_fake
def _(x: Tensor, head: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    return head.new_empty(()), torch.empty_like(x), torch.empty_like(head)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, dhead = ctx.saved_tensors
    scale = dloss / (len(dx) * scale_of(dx.dtype))
    return (dx * scale).to(dx.dtype), dhead * scale, None, None


_loss.register_autograd(_gradients, setup_context=_keep)


def softcapped_loss(x: Tensor, head: Tensor, targets: Tensor, cap: float) -> Tensor:
    """x (..., C) bfloat16 or float16, head (V, C) float32, targets (...) integers below V -> mean nats, float32 ().

    The gradient of head is float32, summed over the chunks as such. The products use head in x's dtype.
    """
    if not x.numel():
        raise ValueError("softcapped_loss got no rows")
    loss, _, _ = _loss(x.reshape(-1, x.shape[-1]).contiguous(), head.contiguous(), targets.flatten(), float(cap))
    return loss


def reference(x: Tensor, head: Tensor, targets: Tensor, cap: float) -> Tensor:
    """The same in plain torch, any dtype."""
    logits = cap * torch.tanh(x.flatten(0, -2) @ head.T / cap)
    return torch.nn.functional.cross_entropy(logits, targets.flatten())
