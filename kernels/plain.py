"""What the Triton kernels do, in torch alone, a bounded part at a time: for devices on which Triton does not run.

The equations are those of kernels/residual_norm.py, linear_relu2.py, softcapped_loss.py and muon.py, which define
them. Gradients are written out, so that nothing is kept but what each of those keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 2.0**-23  # float32's machine epsilon, added to the mean square
ROW_ELEMENTS = 2**22  # of float32 rows that exist beside the tensors themselves: 16 MiB each
LOGITS = 2**22  # float32 logits that exist at one time
FLOOR = 1e-10  # of Muon's second moment, and of a length that is divided by
POLAR_EXPRESS = (  # (a, b, c) of each iteration of Muon's: all singular values go to 1
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def parts(shape: Sequence[int], elements: int) -> Iterator[slice]:
    """Slices of the rows of a matrix that hold at most `elements` each, one row at least."""
    rows, columns = shape
    size = max(1, elements // columns)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def wide(x: Tensor) -> Tensor:
    """float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def norm(x: Tensor, x0: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, C) rows -> the weighted (or plain) sum and its RMS norm, in x's dtype."""
    out, y = torch.empty_like(x), torch.empty_like(x)
    for part in parts(x.shape, ROW_ELEMENTS):
        z = wide(x[part]) + wide(x0[part]) if a is None or b is None else a * wide(x[part]) + b * wide(x0[part])
        out[part] = z
        y[part] = z * inverse_rms(z)
    return out, y


def normed(x: Tensor, x0: Tensor | None, a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, C) rows -> the RMS norm of a x + b x0, or of x alone, in `dtype`."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    for part in parts(x.shape, ROW_ELEMENTS):
        z = wide(x[part])
        if x0 is not None and a is not None and b is not None:
            z = a * z + b * wide(x0[part])
        y[part] = z * inverse_rms(z)
    return y


def inverse_rms(z: Tensor) -> Tensor:
    """(N, C) -> (N, 1): 1 / sqrt(mean(z^2) + EPSILON)."""
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return length.square_().mul_(1 / z.size(-1)).add_(EPSILON).rsqrt_()


def scale(z: Tensor) -> Tensor:
    """(N, C) rows -> r (N,), float32: the norm of z is r z."""
    r = torch.empty(len(z), dtype=wide(z[:0]).dtype, device=z.device)
    for part in parts(z.shape, ROW_ELEMENTS):
        r[part] = inverse_rms(wide(z[part])).squeeze(-1)
    return r


def scaled_backward(d: Tensor, rdy: Tensor, z: Tensor) -> Tensor:
    for part in parts(z.shape, ROW_ELEMENTS):
        n, g = wide(z[part]), wide(rdy[part])
        n = n * inverse_rms(n)
        rdy[part] = (g - n * (g * n).mean(-1, keepdim=True)).add_(d[part])
    return rdy


def norm_backward(
    d: Tensor | None, dy: Tensor, x: Tensor, x0: Tensor | None, a: Tensor | None, b: Tensor | None, y: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dx0, (da, db); without scalars x is the sum, and dx0 is empty. The norm goes to y, which may be dy."""
    scaled = a is not None and b is not None and x0 is not None
    dx = torch.empty_like(x)
    dx0 = torch.empty_like(x) if scaled else x.new_empty(0, x.size(1))
    sums = torch.zeros(2 if scaled else 0, device=x.device, dtype=wide(x[:0]).dtype)
    for part in parts(x.shape, ROW_ELEMENTS):
        z, g = wide(x[part]), wide(dy[part])
        if a is not None and b is not None and x0 is not None:
            first, other = z, wide(x0[part])
            z = a * first + b * other
        r = inverse_rms(z)
        n = z * r
        g = (g - n * (g * n).mean(-1, keepdim=True)).mul_(r)
        if y is not None:
            y[part] = n
        if d is not None:
            g += d[part]
        if a is not None and b is not None and x0 is not None:
            sums[0] += (g * first).sum()
            sums[1] += (g * other).sum()
            dx0[part] = b * g
            g = g.mul_(a)
        dx[part] = g
    return dx, dx0, sums


def rotated(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, H, D), (T, D/2) twice -> r (B, H, T), and x^ in out, which may be x: kernels/rotated_norm.py."""
    r = torch.empty(len(x), x.size(2), x.size(1), device=x.device, dtype=wide(x[:0]).dtype)
    c, s = cos[:, None], sin[:, None]
    for given, turned, r_of_row in zip(x, out, r):
        n = wide(given)
        scale = inverse_rms(n)
        r_of_row.copy_(scale.squeeze(-1).T)
        a, b = (n * scale).chunk(2, -1)
        turned.copy_(torch.cat((a * c + b * s, b * c - a * s), -1))
    return r


def rotated_back(d: Tensor, turned: Tensor, r: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The gradient of x in out, which may be d, that of x^: (B, T, H, D)."""
    c, s = cos[:, None], sin[:, None]
    for given, n, r_of_row, found in zip(d, turned, r, out):
        n, g = wide(n), wide(given)
        u, w = (g - n * (g * n).mean(-1, keepdim=True)).chunk(2, -1)
        found.copy_(torch.cat((u * c - w * s, w * c + u * s), -1) * r_of_row.T.unsqueeze(-1))


def embedded_norm(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,), (V, C): kernels/embedded_norm.py."""
    out = torch.empty(len(tokens), table.size(1), dtype=dtype, device=table.device)
    for part in parts(out.shape, ROW_ELEMENTS):
        rows = F.embedding(tokens[part], table)
        out[part] = rows * inverse_rms(rows)
    return out


def embedded_norm_backward(dn: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
    total = torch.zeros_like(table)
    for part in parts(dn.shape, ROW_ELEMENTS):
        rows = F.embedding(tokens[part], table)
        d = norm_backward(None, dn[part], rows, None, None, None, None)[0]
        total += torch.ops.aten.embedding_dense_backward(d, tokens[part], len(table), -1, False)
    return total


def add_gated(v: Tensor, gates: Tensor, table: Tensor, tokens: Tensor) -> None:
    """(N, H, D), (N, H), (V, H D), (N,): kernels/gated_embedding.py, in place."""
    for part in parts((len(v), v[0].numel()), ROW_ELEMENTS):
        rows = F.embedding(tokens[part], table).view(v[part].shape)
        v[part] = wide(v[part]).addcmul(wide(gates[part]).unsqueeze(-1), rows)


def add_gated_backward(dv: Tensor, gates: Tensor, table: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    dg, dtable = table.new_empty(gates.shape), torch.zeros_like(table)
    for part in parts((len(dv), dv[0].numel()), ROW_ELEMENTS):
        d, rows = wide(dv[part]), F.embedding(tokens[part], table)
        dg[part] = torch.linalg.vecdot(d, rows.view(d.shape))
        drows = (d * wide(gates[part]).unsqueeze(-1)).view(rows.shape)
        dtable += torch.ops.aten.embedding_dense_backward(drows, tokens[part], len(table), -1, False)
    return dg, dtable


def before_product(x: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x (N, C) and the scale (N,) that is left for what comes after a product of torch's. float16 is scaled before it:
    sums of a stream that is not a norm might not fit."""
    if r is None or x.dtype != torch.float16:
        return x, r
    return torch.mul(x, r[:, None], out=torch.empty_like(x)), None


def relu2(x: Tensor, w: Tensor, r: Tensor | None = None) -> Tensor:
    x, r = before_product(x, r)
    h = (x @ w.T).relu_()
    return (h if r is None else h.mul_(r[:, None])).square_()


def relu2_backward(d: Tensor, w2: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
    dh = d @ w2
    for part in parts(y.shape, ROW_ELEMENTS):
        dh[part].mul_(y[part].sqrt()).mul_(2 if r is None else 2 * r[part, None])
    return dh


class SoftcappedLoss(torch.autograd.Function):
    """x (N, C), head (V, C) float32, targets (N,) -> mean nats (), the gradients made in the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, cap: float) -> Tensor:
        weight, scale = head.to(x.dtype), 256.0 if x.dtype == torch.float16 else 1.0
        losses = torch.empty(len(x), dtype=head.dtype, device=x.device)
        dx, dhead = torch.empty_like(x), torch.zeros_like(head)
        for part in parts((len(x), len(head)), LOGITS):
            capped = wide(x[part] @ weight.T).div_(cap).tanh_()
            p = (capped * cap).log_softmax(-1)
            losses[part] = -p.gather(1, targets[part, None])[:, 0]
            p.exp_().scatter_add_(1, targets[part, None], p.new_full((len(p), 1), -1.0))
            g = p.mul_(capped.square_().neg_().add_(1)).mul_(scale).to(x.dtype)
            torch.mm(g, weight, out=dx[part])
            accumulate(dhead, g.T, x[part])
        ctx.save_for_backward(dx, dhead)
        ctx.scale = scale
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dhead = ctx.saved_tensors
        by = grad / (len(dx) * ctx.scale)
        return (dx * by).to(dx.dtype), dhead * by, None, None


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, total wider than the factors, within one product on a GPU: float16 would overflow."""
    if left.is_cuda and total.dtype != left.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def orthogonalise(g: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """(L, m, n) float32 -> semi-orthogonal, about, float32.

    Lengths are float32's, so the singular values that enter are 1 at most, in any dtype. The polynomials keep them
    below 1.7, and their largest part, b A + c A^2, below 8.2: float16 cannot overflow here.
    """
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)).to(dtype)
    for a, b, c in POLAR_EXPRESS[:steps]:
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return wide(x.mT if g.size(-2) > g.size(-1) else x)


def muon_(
    weights: Tensor,
    grads: Tensor,
    momentum: Tensor,
    second: Tensor,
    rates: Tensor,
    dtype: torch.dtype,
    beta2: float,
    steps: int,
    orthogonalise: Callable[[Tensor, torch.dtype, int], Tensor] = orthogonalise,
) -> None:
    """kernels/muon.py's `muon_`, in place; `rates` (3,): learning rate, momentum, weight decay."""
    (m, n), (lr, mu, decay) = weights.shape[1:], rates.unbind()
    lr = lr * max(1.0, m / n) ** 0.5
    momentum.lerp_(grads, 1 - mu)
    g = orthogonalise(grads.lerp_(momentum, mu), dtype, steps)
    mean = g.square().mean(dim=-1 if m >= n else -2, keepdim=True)
    second.lerp_(mean, 1 - beta2)
    scale = second.clamp_min(FLOOR).rsqrt()
    length = mean.sum(dim=(-2, -1), keepdim=True).sqrt()
    rescaled = (mean * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    g *= scale * (length / rescaled.clamp_min(FLOOR))
    weights -= lr * g + lr * decay * weights * ((g * weights) >= 0)
