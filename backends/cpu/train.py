"""The recipe: one small language model and how it is trained, for a machine without a GPU.

This file is what is researched. Everything in it is fair game: the model, the optimizer, the schedules, the batch.
It holds no clock, no data and no score; those belong to the referee, which calls `build(spec)` and then
`step(batches, progress)` until the budget is used up, and later `logits(tokens)` to score what was learned.
It is not a framework: no options beyond the constants below, one path through the code.

The model is the reference model that the recipes of all backends share (karpathy/autoresearch at 228791f), with the
same names for the same weights. What is different here is how it is computed, because a CPU has caches where a GPU has
bandwidth: weights are cast once per step, attention slices its keys per block of queries, and the head never holds
more than a few hundred rows of logits.

Shapes: B rows, T tokens, C model width, H heads, D head size, V vocabulary, L layers, N = B * T.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from core.contract import Batches, Spec

# --- Hyperparameters: edit these first. `search:` gives the range that the offline search may vary. -----------------

# Model
DEPTH = 4  # search: 2..8
ASPECT_RATIO = 32  # search: 16..96  model width is DEPTH * ASPECT_RATIO, rounded up to whole heads
HEAD_DIM = 128  # search: 32 | 64 | 128
WINDOW_PATTERN = "SSSL"  # search: L | SL | SSL | SSSL  S: half the context, L: all of it; the last layer is always L

# Batch
TOTAL_BATCH_SIZE = 4096  # search: 1024..16384 pow2  tokens per optimizer step
DEVICE_BATCH_SIZE = 16  # rows of one forward pass; more rows in a step are accumulated

# Optimization
EMBEDDING_LR = 0.6  # search: 0.05..2.0 log  token and value embeddings (AdamW)
UNEMBEDDING_LR = 0.004  # search: 0.0005..0.05 log  lm_head (AdamW)
MATRIX_LR = 0.04  # search: 0.005..0.2 log  matrices of the blocks (Muon)
SCALAR_LR = 0.5  # search: 0.05..2.0 log  per-layer scalars (AdamW)
WEIGHT_DECAY = 0.2  # search: 0.0..0.6  cautious, on the matrices; falls to 0 over the budget
ADAM_BETAS = (0.8, 0.95)
MUON_MOMENTUM = 0.95  # search: 0.8..0.98
MOMENTUM_STEPS = 300  # steps over which Muon's momentum rises from 0.85
WARMUP_RATIO = 0.0  # search: 0.0..0.2  share of the budget in which the rates rise
WARMDOWN_RATIO = 0.5  # search: 0.2..1.0  share of the budget in which they fall
FINAL_LR_FRAC = 0.0  # search: 0.0..0.2  what is left of them at the end

# --- How it is computed --------------------------------------------------------------------------------------------

SOFTCAP = 15.0  # logits are softly bounded to +-SOFTCAP
QUERY_BLOCK = 64  # queries that share one slice of keys
HEAD_CHUNK = 128  # rows of logits alive at a time: 128 * 8192 * 4 B = 4 MiB, which stays in cache
GATE_CHANNELS = 32  # channels of x that decide how much of a value embedding is mixed in


def norm(x):
    """RMS norm over the last axis, without weights."""
    return F.rms_norm(x, (x.size(-1),))


def rope(x, cos, sin):
    """Rotary positions on (B, T, H, D), halves rotated against each other (Su et al. 2021)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class WindowedAttention(torch.autograd.Function):
    """Causal softmax(q k^T / sqrt(D)) v over the last `window` keys and the query's own, exact.

    A block of queries needs only a slice of the keys, so what lies outside the window is never computed. The weights
    of all slices are kept for the backward pass: at these lengths that is cheaper than computing them again.
    """

    @staticmethod
    def forward(ctx, q, k, v, window):  # each (B, H, T, D)
        ctx.window, ctx.scale = window, q.size(-1) ** -0.5
        q = q * ctx.scale
        out, kept = torch.empty_like(q), []
        for rows, keys, mask in blocks(q.size(2), window, q.dtype):
            p = torch.matmul(q[:, :, rows], k[:, :, keys].mT).add_(mask).softmax(-1)
            out[:, :, rows] = torch.matmul(p, v[:, :, keys])
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, (rows, keys, _) in zip(kept, blocks(q.size(2), ctx.window, q.dtype)):
            g = grad[:, :, rows]
            dv[:, :, keys] += torch.matmul(p.mT, g)
            dp = torch.matmul(g, v[:, :, keys].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, rows] = torch.matmul(ds, k[:, :, keys])
            dk[:, :, keys] += torch.matmul(ds.mT, q[:, :, rows])
        return dq * ctx.scale, dk, dv, None


def blocks(length, window, dtype):
    """Slices of queries and of the keys that they may see, with an additive mask for the slice's two edges."""
    for start in range(0, length, QUERY_BLOCK):
        end, first = min(start + QUERY_BLOCK, length), max(0, start - window)
        distance = torch.arange(start, end)[:, None] - torch.arange(first, end)[None, :]
        mask = torch.zeros(distance.shape, dtype=dtype)
        yield slice(start, end), slice(first, end), mask.masked_fill_((distance < 0) | (distance > window), -math.inf)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of s = SOFTCAP * tanh(x W^T / SOFTCAP) in chunks of rows; gradients made in the forward.

    With e = exp(s): loss = log(sum e) - s[target], ds = e / sum e - onehot, dz = ds * (1 - tanh^2).
    No maximum is subtracted: s <= SOFTCAP, so e <= exp(15) = 3.3e6 and the sum stays far inside float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):  # (N, C), (V, C), (N,) -> mean nats
        n, dx, dweight = x.size(0), torch.empty_like(x), torch.zeros(weight.shape, dtype=torch.float32)
        scaled, total = weight * (2 / SOFTCAP), torch.zeros(())
        for i in range(0, n, HEAD_CHUNK):
            rows, wanted = x[i : i + HEAD_CHUNK], targets[i : i + HEAD_CHUNK, None]
            # tanh(z) = 1 - 2 / (1 + exp(2 z)): one exp is three times faster than a tanh here.
            t = torch.matmul(rows, scaled.mT).float().exp_().add_(1).reciprocal_().mul_(-2).add_(1)
            p = (t * SOFTCAP).exp_()
            norms = p.sum(1, keepdim=True)
            total += (norms.log() - SOFTCAP * t.gather(1, wanted)).sum()
            p.mul_(1 / (n * norms)).scatter_add_(1, wanted, torch.full_like(norms, -1 / n))
            dz = p.addcmul_(p * t, t, value=-1).to(x.dtype)
            dx[i : i + HEAD_CHUNK] = torch.matmul(dz, weight)
            dweight += torch.matmul(dz.mT, rows)
        ctx.save_for_backward(dx, dweight.to(weight.dtype))
        return total / n

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dweight * grad.to(dweight.dtype), None


# --- Model -----------------------------------------------------------------------------------------------------------


class Model:
    """The weights, float32, stored stacked over layers of one shape so that the optimizer works on whole stacks."""

    def __init__(self, spec: Spec) -> None:
        self.dtype = getattr(torch, spec.dtype)
        self.sequence_len, self.vocab_size = spec.sequence_len, spec.vocab_size
        self.heads = max(1, math.ceil(DEPTH * ASPECT_RATIO / HEAD_DIM))
        self.width = self.heads * HEAD_DIM
        self.gated = [i for i in range(DEPTH) if i % 2 == (DEPTH - 1) % 2]  # layers with a value embedding
        pattern = [WINDOW_PATTERN[i % len(WINDOW_PATTERN)] for i in range(DEPTH - 1)] + ["L"]
        self.windows = [spec.sequence_len // 2 if kind == "S" else spec.sequence_len for kind in pattern]
        self.cos, self.sin = self.rotary(4 * spec.sequence_len)
        self.init(torch.Generator().manual_seed(spec.seed))

    def init(self, rng) -> None:
        """Uniform matrices of variance 1/C, zero output projections: every block starts as the identity."""
        c, v, n = self.width, self.vocab_size, len(self.gated)
        bound = math.sqrt(3 / c)

        def uniform(*shape):
            return torch.empty(shape).uniform_(-bound, bound, generator=rng)

        self.params = {
            "wte": torch.empty(v, c).normal_(generator=rng),
            "lm_head": torch.empty(v, c).normal_(std=0.001, generator=rng),
            "qkv": uniform(3 * DEPTH, c, c),  # q, k, v of layer 0, of layer 1, ...
            "proj": torch.zeros(DEPTH, c, c),
            "fc": uniform(DEPTH, 4 * c, c),
            "fc_proj": torch.zeros(DEPTH, c, 4 * c),
            "gate": torch.zeros(n, self.heads, GATE_CHANNELS),
            "value_embeds": uniform(n, v, c),
            "resid": torch.ones(DEPTH),
            "x0": torch.full((DEPTH,), 0.1),
        }
        for p in self.params.values():
            p.requires_grad_()

    def rotary(self, length):
        """cos and sin of every position and frequency, (T, 1, D / 2)."""
        frequency = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angle = torch.outer(torch.arange(length).float(), frequency)[:, None, :]
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def cast(self):
        """The matrices in the compute dtype, once per step: name -> one tensor per layer."""
        stacks = {k: self.params[k].to(self.dtype) for k in ("qkv", "proj", "fc", "fc_proj", "gate", "lm_head")}
        stacks["qkv"] = stacks["qkv"].view(DEPTH, 3 * self.width, self.width)
        return {k: w if k == "lm_head" else w.unbind(0) for k, w in stacks.items()}

    def trunk(self, tokens, w):
        """(B, T) -> (B, T, C): everything before the head."""
        embed = self.params["value_embeds"]
        x = x0 = norm(F.embedding(tokens, self.params["wte"]).to(self.dtype))
        resid, skip = self.params["resid"].to(self.dtype), self.params["x0"].to(self.dtype)
        for i in range(DEPTH):
            x = resid[i] * x + skip[i] * x0
            ve = F.embedding(tokens, embed[self.gated.index(i)]).to(self.dtype) if i in self.gated else None
            x = x + self.attention(norm(x), i, ve, w)
            x = x + F.linear(F.relu(F.linear(norm(x), w["fc"][i])).square(), w["fc_proj"][i])
        return norm(x)

    def attention(self, x, i, ve, w):
        """Attention with QK-norm and, in every other layer, a gated value embedding (ResFormer). (B, T, C) -> same."""
        b, t, c = x.shape
        q, k, v = F.linear(x, w["qkv"][i]).view(b, t, 3, self.heads, HEAD_DIM).unbind(2)
        if ve is not None:
            gate = 2 * torch.sigmoid(F.linear(x[..., :GATE_CHANNELS], w["gate"][self.gated.index(i)]))
            v = v + gate.unsqueeze(-1) * ve.view(b, t, self.heads, HEAD_DIM)
        cos, sin = self.cos[:t], self.sin[:t]
        q, k = norm(rope(q, cos, sin)), norm(rope(k, cos, sin))
        y = WindowedAttention.apply(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.windows[i])
        return F.linear(y.transpose(1, 2).reshape(b, t, c), w["proj"][i])

    def loss(self, inputs, targets, w):
        x = self.trunk(inputs, w)
        return HeadLoss.apply(x.view(-1, self.width), w["lm_head"], targets.reshape(-1))

    def logits(self, tokens, w):
        z = F.linear(self.trunk(tokens, w), w["lm_head"]).float()
        return z.mul_(1 / SOFTCAP).tanh_().mul_(SOFTCAP)


# --- Optimizer -------------------------------------------------------------------------------------------------------

# Polar Express (Amsel et al. 2025): five steps of x <- a x + (b A + c A A) x, A = x x^T, towards orthogonal x.
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g):
    """(L, m, n) stack -> nearest stack of (semi-)orthogonal matrices, roughly; float32 in and out."""
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR:
        s = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if g.size(-2) > g.size(-1) else x


class Muon:
    """Momentum, orthogonalized (Jordan et al. 2024), row-normalized (NorMuon) with cautious weight decay, on stacks."""

    def __init__(self, stacks):  # each (L, m, n)
        self.stacks = stacks
        self.momentum = [torch.zeros_like(p) for p in stacks]
        self.axes = [-1 if p.size(-2) >= p.size(-1) else -2 for p in stacks]  # the shorter rows or columns
        self.second = [torch.zeros_like(p.mean(axis, keepdim=True)) for p, axis in zip(stacks, self.axes)]

    @torch.no_grad()
    def step(self, lr, momentum, weight_decay, beta2=0.95):
        for p, m, v, axis in zip(self.stacks, self.momentum, self.second, self.axes):
            m.lerp_(p.grad, 1 - momentum)
            g = orthogonalize(torch.lerp(p.grad, m, momentum))  # Nesterov
            # NorMuon (Li et al. 2025): divide by the running scale of each row, keep the norm of the matrix.
            square = g.square().mean(axis, keepdim=True)
            v.lerp_(square, 1 - beta2)
            scale = v.clamp_min(1e-10).rsqrt_()
            before = square.sum((-2, -1), keepdim=True)
            after = (square * scale.square()).sum((-2, -1), keepdim=True)
            g.mul_(scale * (before / after.clamp_min(1e-20)).sqrt_())
            # Decay only where it agrees with the update.
            rate = lr * max(1.0, p.size(-2) / p.size(-1)) ** 0.5
            g.addcmul_(p, (g * p) >= 0, value=weight_decay)
            p.sub_(g, alpha=rate)


class Training:
    """What `build` returns: see core/contract.py."""

    def __init__(self, spec: Spec) -> None:
        self.model = Model(spec)
        p, scale = self.model.params, (self.model.width / 768) ** -0.5  # AdamW rates were tuned at width 768
        self.muon = Muon([p[k] for k in ("qkv", "proj", "fc", "fc_proj", "gate")])
        groups = [
            {"params": [p["lm_head"]], "lr": UNEMBEDDING_LR * scale},
            {"params": [p["wte"], p["value_embeds"]], "lr": EMBEDDING_LR * scale},
            {"params": [p["resid"]], "lr": SCALAR_LR * 0.01},
            {"params": [p["x0"]], "lr": SCALAR_LR, "betas": (0.96, 0.95)},
        ]
        self.adamw = torch.optim.AdamW(groups, betas=ADAM_BETAS, eps=1e-10, weight_decay=0.0, fused=True)
        self.rates = [group["lr"] for group in self.adamw.param_groups]
        self.steps = 0

    def step(self, batches: Batches, progress: float):
        """One optimizer step on TOTAL_BATCH_SIZE tokens. Returns the mean loss, not read."""
        length = self.model.sequence_len
        rows = max(1, TOTAL_BATCH_SIZE // length)
        loss, weights = torch.zeros(()), self.model.cast()
        for start in range(0, rows, DEVICE_BATCH_SIZE):
            share = min(DEVICE_BATCH_SIZE, rows - start)
            tokens = batches.next(share, length)
            part = self.model.loss(tokens[:, :-1], tokens[:, 1:], weights) * (share / rows)
            part.backward(retain_graph=start + share < rows)
            loss += part.detach()
        self.update(progress)
        return loss

    def update(self, progress: float) -> None:
        """Apply the gradients at the rates of this moment."""
        rate = rate_at(progress)
        for group, base in zip(self.adamw.param_groups, self.rates):
            group["lr"] = base * rate
        rise = min(self.steps / MOMENTUM_STEPS, 1.0)
        momentum = 0.85 + rise * (MUON_MOMENTUM - 0.85)
        self.muon.step(MATRIX_LR * rate, momentum, WEIGHT_DECAY * (1 - progress))
        self.adamw.step()
        for p in self.model.params.values():
            p.grad = None
        self.steps += 1

    @torch.no_grad()
    def logits(self, tokens):
        """(B, T) -> (B, T, V) float32."""
        return self.model.logits(tokens, self.model.cast())

    def weights(self) -> dict[str, np.ndarray]:
        """Under the reference's names, one array per matrix, (out, in)."""
        return {name: w.detach().numpy().copy() for name, w in self.named(self.model.params).items()}

    @torch.no_grad()
    def load_weights(self, weights) -> None:
        for name, w in self.named(self.model.params).items():
            w.copy_(torch.from_numpy(np.array(weights[name])))

    def gradients(self, tokens) -> dict[str, np.ndarray]:
        """(B, T + 1) tokens -> gradient of the mean loss, in the names and layout of `weights`; for parity tests."""
        self.model.loss(tokens[:, :-1], tokens[:, 1:], self.model.cast()).backward()
        found = {k: p.grad for k, p in self.model.params.items()}
        for p in self.model.params.values():
            p.grad = None
        return {name: g.numpy().copy() for name, g in self.named(found).items()}

    def named(self, stacks):
        """Views into stacks of weights or gradients, by the reference's names."""
        views = {
            "transformer.wte.weight": stacks["wte"],
            "lm_head.weight": stacks["lm_head"],
            "resid_lambdas": stacks["resid"],
            "x0_lambdas": stacks["x0"],
        }
        for i in range(DEPTH):
            layer = f"transformer.h.{i}."
            for j, name in enumerate(("c_q", "c_k", "c_v")):
                views[f"{layer}attn.{name}.weight"] = stacks["qkv"][3 * i + j]
            views[f"{layer}attn.c_proj.weight"] = stacks["proj"][i]
            views[f"{layer}mlp.c_fc.weight"] = stacks["fc"][i]
            views[f"{layer}mlp.c_proj.weight"] = stacks["fc_proj"][i]
        for j, i in enumerate(self.model.gated):
            views[f"transformer.h.{i}.attn.ve_gate.weight"] = stacks["gate"][j]
            views[f"value_embeds.{i}.weight"] = stacks["value_embeds"][j]
        return views

    def describe(self) -> dict[str, float]:
        """FLOPs per token of forward and backward: 6 per weight of a matrix, 12 C per key that attention looks at."""
        p, t, c = self.model.params, self.model.sequence_len, self.model.width
        matrices = sum(p[k].numel() for k in ("qkv", "proj", "fc", "fc_proj", "gate", "lm_head"))
        keys = sum(min(w, t) * (1 - min(w, t) / (2 * t)) for w in self.model.windows)  # mean over the positions
        return {
            "depth": DEPTH,
            "width": c,
            "heads": self.model.heads,
            "tokens_per_step": max(1, TOTAL_BATCH_SIZE // t) * t,
            "flops_per_token": 6 * matrices + 12 * c * keys,
        }


def rate_at(progress: float) -> float:
    """Learning-rate multiplier: up over WARMUP_RATIO, flat, down over WARMDOWN_RATIO."""
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    left = min(1.0, (1.0 - progress) / WARMDOWN_RATIO) if WARMDOWN_RATIO > 0 else 1.0
    return left + (1 - left) * FINAL_LR_FRAC


def build(spec: Spec) -> Training:
    return Training(spec)
