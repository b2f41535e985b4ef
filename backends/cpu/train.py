"""The training file for a CPU: the whole reference model and its optimizer, to be read and rewritten.

What it is: the only file that is researched. Everything in it is fair game - the constants, the model,
the optimizer, the schedules, the batch. It is measured by what the trained weights then predict.

What it is not: it holds no clock, reads and writes no files, prints nothing and scores nothing. The
program around it hands over training text (`batches`) and the used share of the time budget
(`progress`, 0..1), and it alone computes the score.

Shapes in comments: B rows, T tokens of context, N = B*T, C = model dim, H heads of D channels,
V vocabulary entries.

Where the numbers are rounded ("compute dtype" is what the device chose, bfloat16 or float32):
- masters of all weights, gradients, moments, the residual stream, norms and RoPE are float32;
- matrix products take compute-dtype inputs and give compute-dtype outputs; attention scores and
  probabilities are such outputs (the softmax between them runs in float32);
- softcap, softmax and loss are float32; every norm adds float32's epsilon to the mean square.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.contract import Batches, Spec

# --- constants: `# search:` gives the range that the offline search may try --------------------

DEPTH = 4  # search: 1..12; transformer layers
ASPECT_RATIO = 32  # search: 16..128; model dim = DEPTH * ASPECT_RATIO, rounded up to whole heads
HEAD_DIM = 128  # search: 32 | 64 | 128; channels of one attention head
WINDOW_PATTERN = "SSSL"  # search: L | SL | SSL | SSSL; per layer: L whole context, S half; the last is always L

TOTAL_BATCH_SIZE = 2**12  # search: 2**9..2**16 pow2; tokens of one optimizer step
DEVICE_BATCH_SIZE = 16  # rows that go through the model at once; more of them only cost memory
EMBEDDING_LR = 0.6  # search: 0.05..4 log; token and value embeddings (AdamW)
UNEMBEDDING_LR = 0.004  # search: 0.0005..0.05 log; lm_head (AdamW)
MATRIX_LR = 0.04  # search: 0.005..0.2 log; all matrices of the layers (Muon)
SCALAR_LR = 0.5  # search: 0.05..2 log; per-layer scalars (AdamW)
WEIGHT_DECAY = 0.2  # search: 0..0.5; cautious, matrices only, falls to 0 with progress
EMBEDDING_DECAY = 0.0  # AdamW's weight decay, times the rate: of token embeddings
VALUE_DECAY = 0.0  # search: 0..0.02; of value embeddings
UNEMBEDDING_DECAY = 0.0  # of lm_head
ADAM_BETAS = (0.8, 0.95)
WARMUP_RATIO = 0.0  # search: 0..0.2; share of the budget in which learning rates rise from 0
WARMDOWN_RATIO = 0.5  # search: 0.1..1; share of the budget in which they fall to FINAL_LR_FRAC
FINAL_LR_FRAC = 0.0  # search: 0..0.2
MOMENTUM_STEPS = 300  # in which Muon's momentum rises from 0.85 to 0.95
INIT_SCALE = 1.0  # search: 0.3..1.5; of the uniform distributions that weights are drawn from
X0_INIT = 0.1  # search: 0..0.3; what x0_lambdas start from
ROPE_BASE = 10000.0  # search: 1000..500000 log; of RoPE's slowest turn

SOFTCAP = 15.0  # logits stay within -15..15
ADAM_EPSILON = 1e-10
SCALAR_EPSILON = 1e-10  # of layers' scalars: their first gradients are rounding errors, which 1e-5 leaves small
MUON_BETA2 = 0.95  # decay of NorMuon's second moment
MUON_STEPS = 5  # iterations of the orthogonalisation, at most 5
VE_GATE_CHANNELS = 32  # the first channels of the stream, which set the gates of value embeddings

# --- model ------------------------------------------------------------------------------------


EPSILON = 2.0**-23  # added to the mean square by every norm: float32's machine epsilon


def inverse_rms(x: Tensor) -> Tensor:
    """(..., D) float32 -> (..., 1): 1 / sqrt(mean(x^2) + EPSILON)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # one pass, without a tensor of squares
    return length.square_().mul_(1 / x.size(-1)).add_(EPSILON).rsqrt_()


class Norm(torch.autograd.Function):
    """RMS norm over the last axis, without weights: y = x * r, r = 1 / sqrt(mean(x^2) + EPSILON).

    dx = r * (dy - y * mean(dy * y)). x float32, y in `dtype`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        r = inverse_rms(x)
        y = x * r
        ctx.save_for_backward(y, r)
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, r = ctx.saved_tensors
        dy = dy.float()
        return torch.addcmul(dy, y, (dy * y).mean(dim=-1, keepdim=True), value=-1).mul_(r), None


class RotatedNorm(torch.autograd.Function):
    """RMS norm, then RoPE, of queries and keys; D^-0.25 is in cos and sin, so that q.k comes out divided by sqrt(D).

    RoPE pairs the halves of a head: channel i turns together with channel i + D/2. Its gradient turns back. Turning
    changes no length, so the norm may come first, as here, or last.
    (B, T, 2H, D), queries first -> q, k (B*H, T, D) each, in x's dtype; float32 in between. cos, sin (T, 2H, D).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        B, T, _, D = x.shape
        y = x.float()
        r = inverse_rms(y)
        y = y * r  # not in place: a float32 x is its own float()
        ctx.save_for_backward(y, r, cos, sin)
        out = torch.empty(2, B, x.size(2) // 2, T, D, dtype=x.dtype)
        out.copy_(rotate(y, cos, sin).view(B, T, 2, -1, D).permute(2, 0, 3, 1, 4))
        return tuple(out.view(2, -1, T, D).unbind(0))

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, None, None]:
        y, r, cos, sin = ctx.saved_tensors
        B, T, _, D = y.shape
        dy = torch.empty(B, T, 2, y.size(2) // 2, D)
        for i, d in enumerate((dq, dk)):
            dy[:, :, i] = d.view(B, -1, T, D).transpose(1, 2)
        dy = rotate(dy.view_as(y), cos, sin, -1.0)
        dx = torch.addcmul(dy, y, (dy * y).mean(dim=-1, keepdim=True), value=-1).mul_(r)
        return dx.to(dq.dtype), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float = 1.0) -> Tensor:
    """(B, T, 2H, D) turned by the angles of each position, forth or back (-1.0)."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos).addcmul_(torch.cat((b, a), dim=-1), sin, value=direction)


class SquaredReLU(torch.autograd.Function):
    """y = max(h, 0)^2, dh = 2 * max(h, 0) * dy. Overwrites h."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        h.relu_()
        ctx.save_for_backward(h)
        return h * h

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return (dy * h).mul_(2)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in x's dtype; the master weight is float32 and so is its gradient."""
    return F.linear(x, weight.to(x.dtype))


def rotations(length: int, heads: int) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles (ROPE_BASE), times D^-0.25, as `rotate` wants them: (length, heads, D), float32.

    Written out for every head and both halves, the sign of the second half included: a product of long rows is
    faster than one of many short rows.
    """
    frequency = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)[:, None, :].repeat(1, heads, 1)
    cos, sin = angle.cos() * HEAD_DIM**-0.25, angle.sin() * HEAD_DIM**-0.25
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


def has_value_embedding(layer: int) -> bool:
    """Every second layer, and always the last."""
    return layer % 2 == (DEPTH - 1) % 2


def window_sizes(sequence_len: int) -> list[int]:
    """How many tokens each layer looks back, itself not counted."""
    sizes = [sequence_len if c == "L" else sequence_len // 2 for c in WINDOW_PATTERN.upper()]
    return [sizes[i % len(sizes)] for i in range(DEPTH - 1)] + [sequence_len]


QUERY_BLOCK = 128  # queries that share one slice of keys


def band(window: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (QUERY_BLOCK, window + QUERY_BLOCK): 0 where 0 <= query - key <= window, else -inf.

    Query r of a block stands at column window + r.
    """
    distance = window + torch.arange(QUERY_BLOCK)[:, None] - torch.arange(window + QUERY_BLOCK)
    return torch.zeros(distance.shape, dtype=dtype).masked_fill_((distance < 0) | (distance > window), -torch.inf)


class Attention(torch.autograd.Function):
    """Causal attention in which a token sees itself and the `window` tokens before it. (B*H, T, D) each.

    q and k come scaled. Each block of queries meets only the slice of keys that it can see.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor) -> Tensor:
        ctx.window, probabilities = window, []
        y = torch.empty_like(v)
        for block, seen in blocks(q.size(1), window):
            offset = window - (block.start - seen.start)
            bias = mask[: block.stop - block.start, offset : offset + seen.stop - seen.start]
            p = torch.bmm(q[:, block], k[:, seen].mT).add_(bias)
            torch.softmax(p, dim=-1, out=p)
            probabilities.append(p)
            y[:, block] = torch.bmm(p, v[:, seen])
        ctx.save_for_backward(q, k, v, *probabilities)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (block, seen), p in zip(blocks(q.size(1), ctx.window), probabilities):
            dv[:, seen] += p.mT @ dy[:, block]
            dp = torch.bmm(dy[:, block], v[:, seen].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dp)
            dq[:, block] = ds @ k[:, seen]
            dk[:, seen] += ds.mT @ q[:, block]
        return dq, dk, dv, None, None


def blocks(length: int, window: int) -> list[tuple[slice, slice]]:
    """Of each block of queries: its positions, and those of the keys that it can see."""
    ends = [(i, min(i + QUERY_BLOCK, length)) for i in range(0, length, QUERY_BLOCK)]
    return [(slice(start, end), slice(max(0, start - window), end)) for start, end in ends]


def initial_weights(vocab_size: int, dim: int, seed: int) -> dict[str, Tensor]:
    """All weights, float32, under upstream's names. What writes into the stream, and all gates, start at zero."""
    rng = torch.Generator().manual_seed(seed)
    reach = INIT_SCALE * (3 / dim) ** 0.5  # of a uniform distribution; without the scale its variance is 1/dim

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-reach, reach, generator=rng)

    weights = {
        "transformer.wte.weight": torch.empty(vocab_size, dim).normal_(generator=rng),
        "lm_head.weight": torch.empty(vocab_size, dim).normal_(std=0.001, generator=rng),
        "resid_lambdas": torch.ones(DEPTH),
        "x0_lambdas": torch.full((DEPTH,), X0_INIT),
    }
    for i in range(DEPTH):
        layer = f"transformer.h.{i}."
        for name in ("c_q", "c_k", "c_v"):
            weights[f"{layer}attn.{name}.weight"] = uniform(dim, dim)
        weights[f"{layer}attn.c_proj.weight"] = torch.zeros(dim, dim)
        weights[f"{layer}mlp.c_fc.weight"] = uniform(4 * dim, dim)
        weights[f"{layer}mlp.c_proj.weight"] = torch.zeros(dim, 4 * dim)
        if has_value_embedding(i):
            weights[f"{layer}attn.ve_gate.weight"] = torch.zeros(dim // HEAD_DIM, VE_GATE_CHANNELS)
            weights[f"value_embeds.{i}.weight"] = uniform(vocab_size, dim)
    return {name: w.requires_grad_() for name, w in weights.items()}


class GPT:
    """The reference model."""

    def __init__(self, spec: Spec) -> None:
        self.dtype = getattr(torch, spec.dtype)
        self.heads = -(-DEPTH * ASPECT_RATIO // HEAD_DIM)
        self.dim = self.heads * HEAD_DIM
        self.weights = initial_weights(spec.vocab_size, self.dim, spec.seed)
        self.windows = window_sizes(spec.sequence_len)
        self.masks = {window: band(window, self.dtype) for window in set(self.windows)}
        self.cos, self.sin = rotations(spec.sequence_len, 2 * self.heads)

    def attention(self, x: Tensor, layer: int, tokens: Tensor) -> Tensor:
        """(B, T, C) in the compute dtype -> same."""
        B, T, C = x.shape
        w = {k: self.weights[f"transformer.h.{layer}.attn.{k}.weight"] for k in ("c_q", "c_k", "c_v", "c_proj")}
        qkv = linear(x, torch.cat((w["c_q"], w["c_k"], w["c_v"]))).view(B, T, 3 * self.heads, HEAD_DIM)
        qk, v = qkv.split((2 * self.heads, self.heads), dim=2)
        if has_value_embedding(layer):  # value residual: the token's own vector, gated per head by the stream
            gate = linear(x[..., :VE_GATE_CHANNELS], self.weights[f"transformer.h.{layer}.attn.ve_gate.weight"])
            ve = F.embedding(tokens, self.weights[f"value_embeds.{layer}.weight"]).view(v.shape)
            v = (v + 2 * torch.sigmoid(gate.float()).unsqueeze(-1) * ve).to(x.dtype)
        q, k = RotatedNorm.apply(qk, self.cos[:T], self.sin[:T])
        v = v.transpose(1, 2).reshape(q.shape)
        y = Attention.apply(q, k, v, self.windows[layer], self.masks[self.windows[layer]])
        return linear(y.view(B, -1, T, HEAD_DIM).transpose(1, 2).reshape(B, T, C), w["c_proj"])

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        """(B, T, C) in the compute dtype -> same."""
        name = f"transformer.h.{layer}.mlp."
        hidden = SquaredReLU.apply(linear(x, self.weights[name + "c_fc.weight"]))
        return linear(hidden, self.weights[name + "c_proj.weight"])

    def stream(self, tokens: Tensor) -> Tensor:
        """(B, T) integers -> (B, T, C): the last state of each position, in the compute dtype."""
        if tokens.size(1) > len(self.cos):
            self.cos, self.sin = rotations(tokens.size(1), 2 * self.heads)
        resid, skip = self.weights["resid_lambdas"].unbind(), self.weights["x0_lambdas"].unbind()
        x = x0 = Norm.apply(F.embedding(tokens, self.weights["transformer.wte.weight"]), torch.float32)
        for i in range(DEPTH):
            x = resid[i] * x + skip[i] * x0
            x = x + self.attention(Norm.apply(x, self.dtype), i, tokens)
            x = x + self.mlp(Norm.apply(x, self.dtype), i)
        return Norm.apply(x, self.dtype)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) float32 logits within -SOFTCAP..SOFTCAP."""
        x, head = self.stream(tokens).flatten(0, 1), head_weight(self.weights["lm_head.weight"], self.dtype)
        found = torch.empty(len(x), len(head))
        for rows, out in zip(x.split(HEAD_ROWS), found.split(HEAD_ROWS)):
            out.copy_(F.linear(rows, head)).sigmoid_().mul_(2 * SOFTCAP).sub_(SOFTCAP)
        return found.view(*tokens.shape, -1)

    def loss(self, tokens: Tensor) -> Tensor:
        """(B, T + 1) -> mean nats per token."""
        x = self.stream(tokens[:, :-1]).flatten(0, 1)
        return SoftcappedLoss.apply(x, self.weights["lm_head.weight"], tokens[:, 1:].flatten())


# --- loss -------------------------------------------------------------------------------------


def head_weight(head: Tensor, dtype: torch.dtype) -> Tensor:
    """The head in the compute dtype, times 2/SOFTCAP: the softcap is computed as

    SOFTCAP * tanh(z / SOFTCAP) = 2 * SOFTCAP * sigmoid(u) - SOFTCAP with u = 2z / SOFTCAP,
    because a sigmoid is six times as fast as a tanh here.
    """
    return (head * (2 / SOFTCAP)).to(dtype)


HEAD_ROWS = 512  # tokens whose logits exist at one time: enough for fast matrix products
LOSS_LOGITS = 2**20  # logits that are worked on at one time: fewer cost more in calls than they gain in cache


class SoftcappedLoss(torch.autograd.Function):
    """Mean cross-entropy of the softcapped logits, with its gradients, a few rows at a time.

    All N*V logits never exist: those of HEAD_ROWS tokens are made, and LOSS_LOGITS of them at a time go through
    the softmax. With s = sigmoid(u) the logits are 2*SOFTCAP*s up to a constant, which a softmax ignores:
    p = softmax(2*SOFTCAP*s), loss = -log p[target], d loss/du = 2*SOFTCAP * (p - onehot) * s * (1 - s).
    Logits span 30 at most, so p[target] > e^-30/V: its logarithm is safe in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """x (N, C), head (V, C) float32, targets (N,)."""
        weight = head_weight(head, x.dtype)
        across = weight.T.contiguous()
        picked = torch.empty(len(x), 1)  # probability of each target
        dx, dhead = torch.empty_like(x), torch.zeros_like(head)
        logits = torch.empty(min(HEAD_ROWS, len(x)), len(head), dtype=x.dtype)
        s, p = torch.empty(2, max(1, LOSS_LOGITS // len(head)), len(head))
        minus_one = torch.full((len(s), 1), -1.0)
        for start in range(0, len(x), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            u = torch.mm(x[part], across, out=logits[: len(x[part])])  # becomes d loss/du, in place
            for rows, target, found in zip(*(y.split(len(s)) for y in (u, targets[part, None], picked[part]))):
                n = len(rows)
                torch.mul(s[:n].copy_(rows).sigmoid_(), 2 * SOFTCAP, out=p[:n])
                torch.softmax(p[:n], dim=-1, out=p[:n])
                torch.gather(p[:n], 1, target, out=found)
                p[:n].scatter_add_(1, target, minus_one[:n])
                rows.copy_(torch.ops.aten.sigmoid_backward(p[:n], s[:n], grad_input=p[:n]))
            torch.mm(u, weight, out=dx[part])
            dhead += u.T @ x[part]
        scale = 2 * SOFTCAP / len(x)
        ctx.save_for_backward(dx.mul_(scale), dhead.mul_(scale * 2 / SOFTCAP))
        return picked.log_().mean().neg_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dhead = ctx.saved_tensors
        return dx * grad, dhead * grad, None


# --- optimizer --------------------------------------------------------------------------------

POLAR_EXPRESS = (  # (a, b, c) of each iteration X <- aX + (bA + cA^2)X, A = XX^T: all singular values go to 1
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(g: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrices, about, of a stack (L, m, n); float32 in and out."""
    x = g.mT if g.size(-2) > g.size(-1) else g  # the small side first: A is as small as can be
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)).to(dtype)
    for a, b, c in POLAR_EXPRESS[:MUON_STEPS]:
        A = x @ x.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        x = torch.baddbmm(x, B, x, beta=a)
    return (x.mT if g.size(-2) > g.size(-1) else x).float()


class Muon:
    """Muon over all matrices of one shape (m, n), stacked, with NorMuon's scaling and cautious decay.

    Momentum (Nesterov) -> orthogonalise -> divide each row (column of a wide matrix) by its running RMS
    and restore the length of the whole -> decay only entries that the update already shrinks.
    """

    def __init__(self, params: list[Tensor], dtype: torch.dtype) -> None:
        self.params = params
        self.dtype = dtype
        m, n = params[0].shape
        self.axis = -1 if m >= n else -2  # the axis that the second moment averages over
        self.boost = max(1.0, m / n) ** 0.5  # tall matrices take longer steps
        self.momentum = torch.zeros(len(params), m, n)
        self.second = torch.zeros((len(params), m, 1) if m >= n else (len(params), 1, n))

    def step(self, lr: float, momentum: float, weight_decay: float) -> None:
        lr *= self.boost
        grads = torch.stack([p.grad for p in self.params if p.grad is not None])
        self.momentum.lerp_(grads, 1 - momentum)
        g = orthogonalise(grads.lerp_(self.momentum, momentum), self.dtype)

        mean = g.square().mean(dim=self.axis, keepdim=True)
        self.second.lerp_(mean, 1 - MUON_BETA2)
        scale = self.second.clamp_min(1e-10).rsqrt()
        length = mean.sum(dim=(-2, -1), keepdim=True).sqrt()
        rescaled = (mean * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
        g *= scale * (length / rescaled.clamp_min(1e-10))

        weights = torch.stack([p.data for p in self.params])
        shrinks = (g * weights) >= 0
        weights -= lr * g + lr * weight_decay * weights * shrinks
        torch._foreach_copy_([p.data for p in self.params], list(weights.unbind(0)))


class AdamW:
    """Adam with decoupled decay, fused (Loshchilov & Hutter 2019). torch.optim loads torch's compiler: a second."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.groups = groups
        for group in groups:
            group["moments"] = [(torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())) for p in group["params"]]

    def step(self) -> None:
        for group in self.groups:
            first, second, steps = (list(kind) for kind in zip(*group["moments"]))
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                [p.data for p in group["params"]],
                [p.grad for p in group["params"]],
                first,
                second,
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["decay"],
                eps=group.get("eps", ADAM_EPSILON),
                amsgrad=False,
                maximize=False,
            )


# --- schedules: functions of progress, the used share of the budget ----------------------------


def lr_multiplier(progress: float) -> float:
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    if progress <= 1.0 - WARMDOWN_RATIO:
        return 1.0
    left = (1.0 - progress) / WARMDOWN_RATIO
    return left + (1.0 - left) * FINAL_LR_FRAC


def muon_momentum(step: int) -> float:
    """0.85 rising to 0.95 over the first MOMENTUM_STEPS."""
    return 0.85 + 0.10 * min(step / MOMENTUM_STEPS, 1.0)


def weight_decay(progress: float) -> float:
    return WEIGHT_DECAY * (1.0 - progress)


# --- training ---------------------------------------------------------------------------------


class CpuTraining:
    """See core.contract.Training for what each method promises."""

    def __init__(self, spec: Spec) -> None:
        self.sequence_len = spec.sequence_len
        self.model = model = GPT(spec)
        self.steps = 0
        w = model.weights
        narrow = (model.dim / 768) ** -0.5  # AdamW's rates were tuned at dim 768
        head, wte = [w["lm_head.weight"]], [w["transformer.wte.weight"]]
        values = [p for name, p in w.items() if "value_embeds" in name]
        embed, unembed = EMBEDDING_LR * narrow, UNEMBEDDING_LR * narrow
        scalar = {"decay": 0.0, "eps": SCALAR_EPSILON}
        self.adam = AdamW(
            [
                {"params": head, "lr": unembed, "betas": ADAM_BETAS, "decay": UNEMBEDDING_DECAY},
                {"params": wte, "lr": embed, "betas": ADAM_BETAS, "decay": EMBEDDING_DECAY},
                {"params": values, "lr": embed, "betas": ADAM_BETAS, "decay": VALUE_DECAY},
                {"params": [w["resid_lambdas"]], "lr": SCALAR_LR * 0.01, "betas": ADAM_BETAS, **scalar},
                {"params": [w["x0_lambdas"]], "lr": SCALAR_LR, "betas": (0.96, 0.95), **scalar},
            ]
        )
        self.adam_rates = [group["lr"] for group in self.adam.groups]
        shapes: dict[torch.Size, list[Tensor]] = {}
        for name, p in w.items():
            if name.startswith("transformer.h."):
                shapes.setdefault(p.shape, []).append(p)
        self.muons = [Muon(params, model.dtype) for params in shapes.values()]

    def step(self, batches: Batches, progress: float) -> Tensor:
        rows = max(1, TOTAL_BATCH_SIZE // self.sequence_len)
        loss = torch.zeros(())
        for first in range(0, rows, DEVICE_BATCH_SIZE):
            part = min(DEVICE_BATCH_SIZE, rows - first)
            part_loss = self.model.loss(batches.next(part, self.sequence_len)) * (part / rows)
            part_loss.backward()
            loss += part_loss.detach()
        self.update(progress)
        return loss

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """One optimizer step from the gradients at hand, which are then dropped."""
        rate = lr_multiplier(progress)
        for group, base in zip(self.adam.groups, self.adam_rates, strict=True):
            group["lr"] = base * rate
        self.adam.step()
        for muon in self.muons:
            muon.step(MATRIX_LR * rate, muon_momentum(self.steps), weight_decay(progress))
        self.drop_gradients()
        self.steps += 1

    def drop_gradients(self) -> None:
        for p in self.model.weights.values():
            p.grad = None

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        return self.model.logits(tokens)

    def gradients(self, tokens: Tensor) -> dict[str, np.ndarray]:
        """(B, T + 1) integers -> d(mean loss)/d(weight) of each weight, float32. For tests of parity."""
        self.drop_gradients()
        self.model.loss(tokens).backward()
        found = {name: p.grad.numpy() for name, p in self.model.weights.items() if p.grad is not None}
        self.drop_gradients()
        return found

    def weights(self) -> dict[str, np.ndarray]:
        return {name: p.detach().numpy().copy() for name, p in self.model.weights.items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        own = self.model.weights
        if own.keys() != weights.keys():
            raise ValueError(f"these weights are missing or unknown: {sorted(own.keys() ^ weights.keys())[:5]}")
        for name, p in own.items():
            if p.shape != weights[name].shape:
                raise ValueError(f"{name} has shape {weights[name].shape}, the model's is {tuple(p.shape)}")
            p.copy_(torch.from_numpy(np.array(weights[name], dtype=np.float32)))

    def describe(self) -> dict[str, Any]:
        """FLOPs as upstream counts them: 6 per matrix weight, 12 per channel and key of each layer's window."""
        matrices = sum(p.numel() for n, p in self.model.weights.items() if n.startswith(("transformer.h.", "lm_head")))
        keys = sum(min(window, self.sequence_len) for window in self.model.windows)
        return {
            "depth": DEPTH,
            "dim": self.model.dim,
            "heads": self.model.heads,
            "windows": list(self.model.windows),
            "tokens_per_step": max(1, TOTAL_BATCH_SIZE // self.sequence_len) * self.sequence_len,
            "flops_per_token": 6 * matrices + 12 * self.model.dim * keys,
        }


def build(spec: Spec) -> CpuTraining:
    return CpuTraining(spec)
