"""The training file for Apple Silicon (MLX): the whole reference model and its optimizer, to be read and rewritten.

What it is: the only file that is researched. Everything in it is fair game - the constants, the model,
the optimizer, the schedules, the batch. It is measured by what the trained weights then predict.

What it is not: it holds no clock, reads and writes no files, prints nothing and scores nothing. The
program around it hands over training text (`batches`) and the used share of the time budget
(`progress`, 0..1), and it alone computes the score.

Shapes in comments: B rows, T tokens of context, N = B*T, C = model dim, H heads of D channels,
V vocabulary entries.

Where the numbers are rounded ("compute dtype" is what the device chose: bfloat16 on a GPU, float32 on a CPU):
- masters of all weights, their gradients and the optimizer's moments are float32;
- the residual stream, matrix products and attention are in the compute dtype, softmax and norms float32 inside;
- softcap, softmax and loss are float32; every norm adds float32's epsilon to the mean square.

What is particular to MLX: arrays are lazy, so one whole optimizer step is one compiled function whose state
(weights, moments) is captured as its inputs and outputs; everything that changes from step to step comes in as an
array, as a Python number would be compiled in as a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from core.contract import Batches, Spec
from kernels.qk_norm_rope import metal, qk_norm_rope

# --- constants: `# search:` gives the range that the offline search may try --------------------

DEPTH = 4  # search: 1..16; transformer layers
ASPECT_RATIO = 64  # search: 16..128; model dim = DEPTH * ASPECT_RATIO, rounded up to whole heads
HEAD_DIM = 128  # search: 32 | 64 | 128; channels of one attention head
WINDOW_PATTERN = "SSSL"  # search: L | SL | SSL | SSSL; per layer: L whole context, S half; the last is always L

TOTAL_BATCH_SIZE = 2**14  # search: 2**10..2**18 pow2; tokens of one optimizer step
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


def norm(x: mx.array) -> mx.array:
    """RMS norm over the last axis, without weights, in x's dtype; float32 inside."""
    return mx.fast.rms_norm(x, None, EPSILON)


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """x @ weight.T in x's dtype; the master weight is float32 and so is its gradient."""
    return x @ weight.astype(x.dtype).T


def rotations(length: int) -> tuple[mx.array, mx.array]:
    """cos and sin of RoPE's angles (ROPE_BASE), (length, D/2) each, float32."""
    frequency = ROPE_BASE ** (-mx.arange(0, HEAD_DIM, 2, dtype=mx.float32) / HEAD_DIM)
    angle = mx.arange(length, dtype=mx.float32)[:, None] * frequency
    return mx.cos(angle), mx.sin(angle)


def has_value_embedding(layer: int) -> bool:
    """Every second layer, and always the last."""
    return layer % 2 == (DEPTH - 1) % 2


def window_sizes(sequence_len: int) -> list[int]:
    """How many tokens each layer looks back, itself not counted."""
    sizes = [sequence_len if c == "L" else sequence_len // 2 for c in WINDOW_PATTERN.upper()]
    return [sizes[i % len(sizes)] for i in range(DEPTH - 1)] + [sequence_len]


# --- attention: no fused backward exists for it in MLX, and scores of size T^2 would fill the memory -----------

QUERY_BLOCK = 128  # queries that share one slice of keys


def blocks(length: int, window: int) -> list[tuple[slice, slice, mx.array]]:
    """Of each block of queries: its positions, those of the keys that it meets (whole blocks), and which it may see.

    A token sees itself and the `window` tokens before it. Masks are additive, float32: 0 or -inf.
    """
    found = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        first = max(0, start - window) // QUERY_BLOCK * QUERY_BLOCK
        distance = mx.arange(start, end)[:, None] - mx.arange(first, end)
        seen = (distance >= 0) & (distance <= window)
        found.append((slice(start, end), slice(first, end), mx.where(seen, 0.0, -mx.inf)))
    return found


def make_attention(length: int, window: int) -> Any:
    """Causal windowed attention of (B, H, T, D) queries, keys and values, T = length -> (B, H, T, D).

    q and k come scaled. Each block of queries meets only the slice of keys that it can see; the probabilities of these
    slices are kept for the backward, in the compute dtype.
    """
    parts = blocks(length, window)

    @mx.custom_function  # type: ignore[untyped-decorator]
    def attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, ...]:
        outputs, kept = [], []
        for queries, keys, mask in parts:
            scores = mx.addmm(mask.astype(q.dtype), q[:, :, queries], k[:, :, keys].swapaxes(-1, -2))
            kept.append(mx.softmax(scores, axis=-1, precise=True))
            outputs.append(kept[-1] @ v[:, :, keys])
        return mx.concatenate(outputs, axis=2), *kept

    @attend.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
        (q, k, v), dy, (y, *kept) = primals, cotangents[0], outputs
        shift = (dy * y).astype(mx.float32).sum(axis=-1, keepdims=True)
        dq, dk, dv = [], Blocks(length), Blocks(length)
        before: list[mx.array] = []
        for (queries, keys, _), p in zip(parts, kept, strict=True):
            d = dy[:, :, queries]
            if before:  # one block after the other, or the scores of all would exist together
                d = mx.depends([d], before)[0]
            dp = d @ v[:, :, keys].swapaxes(-1, -2)
            ds = (p * (dp - shift[:, :, queries])).astype(q.dtype)
            before = [ds @ k[:, :, keys], ds.swapaxes(-1, -2) @ q[:, :, queries], p.swapaxes(-1, -2) @ d]
            dq.append(before[0])
            dk.add(keys, before[1])
            dv.add(keys, before[2])
        return mx.concatenate(dq, axis=2), dk.whole(), dv.whole()

    return lambda q, k, v: attend(q, k, v)[0]  # type: ignore[index]


def fused_attention(q: mx.array, k: mx.array, v: mx.array, window: int) -> mx.array:
    """The same for scoring, which needs no backward: on Metal MLX's fused kernel makes no scores of size T^2."""
    T = q.shape[2]
    distance = mx.arange(T)[:, None] - mx.arange(T)
    mask = "causal" if window >= T - 1 else (distance >= 0) & (distance <= window)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)


class Blocks:
    """Sums of slices (B, H, ., D) that start and end at blocks: without a zero-filled whole for each slice."""

    def __init__(self, length: int) -> None:
        self.parts: list[mx.array | None] = [None] * -(-length // QUERY_BLOCK)

    def add(self, where: slice, x: mx.array) -> None:
        for start in range(0, x.shape[2], QUERY_BLOCK):
            i, part = (where.start + start) // QUERY_BLOCK, x[:, :, start : start + QUERY_BLOCK]
            old = self.parts[i]
            self.parts[i] = part if old is None else old + part

    def whole(self) -> mx.array:
        return mx.concatenate([part for part in self.parts if part is not None], axis=2)


# --- weights and layers -----------------------------------------------------------------------------


def initial_weights(vocab_size: int, dim: int, seed: int) -> dict[str, mx.array]:
    """All weights, float32, under upstream's names. What writes into the stream, and all gates, start at zero."""
    reach = INIT_SCALE * (3 / dim) ** 0.5  # of a uniform distribution; without the scale its variance is 1/dim
    keys = iter(mx.random.split(mx.random.key(seed), 2 + 6 * DEPTH))

    def uniform(*shape: int) -> mx.array:
        return mx.random.uniform(-reach, reach, shape, key=next(keys))

    weights = {
        "transformer.wte.weight": mx.random.normal((vocab_size, dim), key=next(keys)),
        "lm_head.weight": 0.001 * mx.random.normal((vocab_size, dim), key=next(keys)),
        "resid_lambdas": mx.ones(DEPTH),
        "x0_lambdas": mx.full(DEPTH, X0_INIT),
    }
    for i in range(DEPTH):
        layer = f"transformer.h.{i}."
        for name in ("c_q", "c_k", "c_v"):
            weights[f"{layer}attn.{name}.weight"] = uniform(dim, dim)
        weights[f"{layer}attn.c_proj.weight"] = mx.zeros((dim, dim))
        weights[f"{layer}mlp.c_fc.weight"] = uniform(4 * dim, dim)
        weights[f"{layer}mlp.c_proj.weight"] = mx.zeros((dim, 4 * dim))
        if has_value_embedding(i):
            weights[f"{layer}attn.ve_gate.weight"] = mx.zeros((dim // HEAD_DIM, VE_GATE_CHANNELS))
            weights[f"value_embeds.{i}.weight"] = uniform(vocab_size, dim)
    return weights


class GPT:
    """The reference model: functions of a dictionary of weights."""

    def __init__(self, spec: Spec) -> None:
        self.dtype = getattr(mx, spec.dtype)
        self.heads = -(-DEPTH * ASPECT_RATIO // HEAD_DIM)
        self.dim = self.heads * HEAD_DIM
        self.windows = window_sizes(spec.sequence_len)
        self.fused = spec.device == "gpu" and metal()  # attention, where no gradient is asked for
        self.streams = [mx.default_stream(mx.default_device())]
        if spec.device == "cpu":
            self.streams += [mx.new_stream(mx.cpu) for _ in range(CPU_STREAMS - 1)]
        self.softcapped_loss = make_loss(self.streams)
        self.tables: dict[int, tuple[mx.array, mx.array]] = {}  # of rotations, by length
        self.attentions: dict[tuple[int, int], Any] = {}  # by length and window
        self.prepare(spec.sequence_len)

    def prepare(self, length: int) -> None:
        """What depends on the length of the rows only."""
        if length not in self.tables:
            self.tables[length] = rotations(length)
            self.attentions.update({(length, window): make_attention(length, window) for window in set(self.windows)})

    def attention(self, w: Mapping[str, mx.array], x: mx.array, layer: int, tokens: mx.array, fused: bool) -> mx.array:
        """(B, T, C) -> same."""
        B, T, C = x.shape
        name = f"transformer.h.{layer}.attn."
        qkv = linear(x, mx.concatenate([w[f"{name}{n}.weight"] for n in ("c_q", "c_k", "c_v")]))
        q, k, v = mx.split(qkv.reshape(B, T, 3 * self.heads, HEAD_DIM), 3, axis=2)
        if has_value_embedding(layer):  # value residual: the token's own vector, gated per head by the stream
            gate = 2 * mx.sigmoid(linear(x[..., :VE_GATE_CHANNELS], w[f"{name}ve_gate.weight"]))
            v = v + gate[..., None] * w[f"value_embeds.{layer}.weight"][tokens].astype(x.dtype).reshape(v.shape)
        cos, sin = self.tables[T]
        q, k = qk_norm_rope(q, cos, sin, EPSILON), qk_norm_rope(k, cos, sin, EPSILON)  # (B, H, T, D)
        v, window = v.swapaxes(1, 2), self.windows[layer]
        y = fused_attention(q, k, v, window) if fused else self.attentions[T, window](q, k, v)
        return linear(y.swapaxes(1, 2).reshape(B, T, C), w[f"{name}c_proj.weight"])

    def mlp(self, w: Mapping[str, mx.array], x: mx.array, layer: int) -> mx.array:
        """(B, T, C) -> same."""
        name = f"transformer.h.{layer}.mlp."
        return linear(mx.square(mx.maximum(linear(x, w[f"{name}c_fc.weight"]), 0)), w[f"{name}c_proj.weight"])

    def stream(self, w: Mapping[str, mx.array], tokens: mx.array, fused: bool = False) -> mx.array:
        """(B, T) integers -> (B, T, C): the last state of each position, in the compute dtype."""
        self.prepare(tokens.shape[1])
        x = x0 = norm(w["transformer.wte.weight"][tokens].astype(self.dtype))
        resid, skip = w["resid_lambdas"].astype(self.dtype), w["x0_lambdas"].astype(self.dtype)
        for i in range(DEPTH):
            x = resid[i] * x + skip[i] * x0
            x = x + self.attention(w, norm(x), i, tokens, fused)
            x = x + self.mlp(w, norm(x), i)
        return norm(x)

    def logits(self, w: Mapping[str, mx.array], tokens: mx.array) -> mx.array:
        """(B, T) -> (B, T, V) float32 logits within -SOFTCAP..SOFTCAP."""
        x, head = self.stream(w, tokens, self.fused), w["lm_head.weight"]
        found, share = [], -(-len(x) // len(self.streams))
        for start in range(0, len(x), share):
            with mx.stream(self.streams[start // share]):
                found.append(2 * SOFTCAP * squash(linear(x[start : start + share], head)) - SOFTCAP)
        return mx.concatenate(found)

    def loss(self, w: Mapping[str, mx.array], tokens: mx.array) -> mx.array:
        """(B, T + 1) -> mean nats per token."""
        x = self.stream(w, tokens[:, :-1]).reshape(-1, self.dim)
        loss: mx.array = self.softcapped_loss(x, w["lm_head.weight"], tokens[:, 1:].reshape(-1))
        return loss


# --- loss -------------------------------------------------------------------------------------

LOGITS_BYTES = 2**24  # memory that one part of the float32 logits may take
CPU_STREAMS = 2  # MLX gives each stream of a CPU one thread, which exponentials keep busy; a GPU needs one only


def squash(u: mx.array) -> mx.array:
    """sigmoid(2u / SOFTCAP), float32: SOFTCAP * tanh(u / SOFTCAP) = 2 * SOFTCAP * squash(u) - SOFTCAP, but faster."""
    return 1 / (1 + mx.exp(u.astype(mx.float32) * (-2 / SOFTCAP)))


def make_loss(streams: list[mx.Stream]) -> Any:
    """Softcapped cross-entropy with its gradients, a part of the rows at a time; parts take turns on the streams."""

    @mx.custom_function  # type: ignore[untyped-decorator]
    def softcapped_loss(x: mx.array, head: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Mean loss, and its gradients by x and head.

        x (N, C), head (V, C) float32, targets (N,). All N*V logits never exist. With s = squash(u) the logits
        SOFTCAP * tanh(u/SOFTCAP) are z = 2*SOFTCAP*(s - 1) up to a constant, which a softmax ignores; as z lies in
        -2*SOFTCAP..0, exp(z) needs no maximum taken off: p = exp(z) / sum, loss = -log p[target] and
        d loss/du = 4 * (p - onehot) * s * (1 - s). What divides a whole row, and the one hot column, are applied to the
        products with C columns instead of the V of the logits.
        """
        count, weight = len(x), head.astype(x.dtype)
        rows = max(1, LOGITS_BYTES // (4 * len(head)))
        losses, dx, dhead = [], [], [mx.zeros_like(head) for _ in streams]
        for turn, start in enumerate(range(0, count, rows)):
            at = turn % len(streams)
            with mx.stream(streams[at]):
                part, target = x[start : start + rows], targets[start : start + rows]
                s = squash(part @ weight.T)
                e = mx.exp(2 * SOFTCAP * (s - 1))
                sums, hit = e.sum(axis=-1, keepdims=True), mx.take_along_axis(s, target[:, None], axis=-1)  # (rows, 1)
                losses.append((mx.log(sums) - 2 * SOFTCAP * (hit - 1)).sum())
                du = (e * s * (1 - s)).astype(x.dtype)  # times sums * count / 4, and without the one hot column
                share, own = (((4 / count) * y).astype(x.dtype) for y in (1 / sums, hit * (1 - hit)))
                dx.append((du @ weight) * share - weight[target] * own)
                dhead[at] = dhead[at] + (du.T @ (part * share)).astype(mx.float32)
                dhead[at] = dhead[at].at[target].add(-(part * own).astype(mx.float32))
        return mx.stack(losses).sum() / count, mx.concatenate(dx), sum(dhead[1:], dhead[0])

    @softcapped_loss.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
        grad, (_, dx, dhead) = cotangents[0], outputs
        return dx * grad.astype(dx.dtype), dhead * grad, mx.zeros_like(primals[2])

    return lambda x, head, targets: softcapped_loss(x, head, targets)[0]  # type: ignore[index]


# --- optimizer --------------------------------------------------------------------------------

POLAR_EXPRESS = (  # (a, b, c) of each iteration X <- aX + (bA + cA^2)X, A = XX^T: all singular values go to 1
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(g: mx.array, dtype: Any) -> mx.array:
    """The nearest semi-orthogonal matrices, about, of a stack (L, m, n); float32 in and out."""
    x = g.swapaxes(-1, -2) if g.shape[-2] > g.shape[-1] else g  # the small side first: A is as small as can be
    length = mx.sqrt(mx.square(x).sum(axis=(-2, -1), keepdims=True))
    x = (x / (length * 1.02 + 1e-6)).astype(dtype)
    for a, b, c in POLAR_EXPRESS[:MUON_STEPS]:
        A = x @ x.swapaxes(-1, -2)
        x = a * x + (b * A + c * (A @ A)) @ x
    return (x.swapaxes(-1, -2) if g.shape[-2] > g.shape[-1] else x).astype(mx.float32)


class Muon:
    """Muon over all matrices of one shape (m, n), stacked, with NorMuon's scaling and cautious decay.

    Momentum (Nesterov) -> orthogonalise -> divide each row (column of a wide matrix) by its running RMS
    and restore the length of the whole -> decay only entries that the update already shrinks.
    """

    def __init__(self, names: list[str], shape: tuple[int, int], dtype: Any) -> None:
        m, n = shape
        self.names, self.dtype = names, dtype
        self.axis = -1 if m >= n else -2  # the axis that the second moment averages over
        self.boost = max(1.0, m / n) ** 0.5  # tall matrices take longer steps
        self.state = {
            "momentum": mx.zeros((len(names), m, n)),
            "second": mx.zeros((len(names), m, 1) if m >= n else (len(names), 1, n)),
        }

    def step(self, weights: dict[str, mx.array], grads: Mapping[str, mx.array], rates: Mapping[str, mx.array]) -> None:
        lr, state = rates["matrix"] * self.boost, self.state
        g = mx.stack([grads[name] for name in self.names])
        state["momentum"] = state["momentum"] + (g - state["momentum"]) * (1 - rates["momentum"])
        g = orthogonalise(g + (state["momentum"] - g) * rates["momentum"], self.dtype)

        mean = mx.square(g).mean(axis=self.axis, keepdims=True)
        state["second"] = state["second"] + (mean - state["second"]) * (1 - MUON_BETA2)
        scale = mx.rsqrt(mx.maximum(state["second"], 1e-10))
        length = mx.sqrt(mean.sum(axis=(-2, -1), keepdims=True))
        rescaled = mx.sqrt((mean * mx.square(scale)).sum(axis=(-2, -1), keepdims=True))
        g = g * scale * (length / mx.maximum(rescaled, 1e-10))

        w = mx.stack([weights[name] for name in self.names])
        w = w - (lr * g + lr * rates["decay"] * w * (g * w >= 0))
        weights.update(zip(self.names, w, strict=True))


class AdamW:
    """Adam with decoupled decay (Loshchilov & Hutter 2019) over weights of one rate."""

    def __init__(
        self,
        weights: Mapping[str, mx.array],
        names: list[str],
        lr: float,
        betas: tuple[float, float],
        decay: float,
        eps: float = ADAM_EPSILON,
    ) -> None:
        self.names, self.lr, self.betas, self.decay, self.eps = names, lr, betas, decay, eps
        self.state = {
            kind: {name: mx.zeros_like(weights[name]) for name in names} for kind in ("first moment", "second moment")
        }

    def step(self, weights: dict[str, mx.array], grads: Mapping[str, mx.array], rates: Mapping[str, mx.array]) -> None:
        beta1, beta2 = self.betas
        size = rates["adam"] * self.lr / (1 - beta1 ** rates["step"])
        correction = mx.rsqrt(1 - beta2 ** rates["step"])
        first, second = self.state["first moment"], self.state["second moment"]
        for name in self.names:
            g = grads[name]
            first[name] = first[name] + (g - first[name]) * (1 - beta1)
            second[name] = beta2 * second[name] + (1 - beta2) * mx.square(g)
            update = size * first[name] / (mx.sqrt(second[name]) * correction + self.eps)
            weights[name] = weights[name] * (1 - rates["adam"] * (self.lr * self.decay)) - update


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


class MlxTraining:
    """See core.contract.Training for what each method promises."""

    def __init__(self, spec: Spec) -> None:
        self.sequence_len = spec.sequence_len
        self.model = model = GPT(spec)
        self.steps = 0
        self.w = w = initial_weights(spec.vocab_size, model.dim, spec.seed)
        self.optimizers = optimizers(w, model)
        self.state = [self.w, [o.state for o in self.optimizers]]
        mx.eval(self.state)
        self.compiled = mx.compile(self.whole_step, inputs=self.state, outputs=self.state)

    def step(self, batches: Batches, progress: float) -> mx.array:
        rows = max(1, TOTAL_BATCH_SIZE // self.sequence_len)
        loss: mx.array = self.compiled(batches.next(rows, self.sequence_len), self.rates(progress))
        mx.async_eval(loss, self.state)  # the device works on it while the next step is prepared
        self.steps += 1
        return loss

    def rates(self, progress: float) -> dict[str, mx.array]:
        """All that differs from step to step, as arrays."""
        rate = lr_multiplier(progress)
        found = {
            "adam": rate,
            "matrix": MATRIX_LR * rate,
            "momentum": muon_momentum(self.steps),
            "decay": weight_decay(progress),
            "step": float(self.steps + 1),
        }
        return {name: mx.array(value) for name, value in found.items()}

    def whole_step(self, tokens: mx.array, rates: Mapping[str, mx.array]) -> mx.array:
        """(rows, T + 1), rates -> mean loss; weights and moments are replaced."""
        loss, grads = self.gradient(tokens)
        for optimizer in self.optimizers:
            optimizer.step(self.w, grads, rates)
        return loss

    def gradient(self, tokens: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        """Mean loss of all rows and its gradients, DEVICE_BATCH_SIZE rows at a time."""
        loss, grads = mx.array(0.0), {name: mx.zeros_like(w) for name, w in self.w.items()}
        for first in range(0, len(tokens), DEVICE_BATCH_SIZE):
            part = tokens[first : first + DEVICE_BATCH_SIZE]
            share = len(part) / len(tokens)
            if first:  # the next part starts when this one is done, or the activations of all would exist together
                part = mx.depends([part], list(grads.values()))[0]
            part_loss, found = mx.value_and_grad(self.model.loss)(self.w, part)
            loss = loss + part_loss * share
            grads = (
                {name: old + found[name] * share for name, old in grads.items()} if len(part) < len(tokens) else found
            )
        return loss, grads

    def logits(self, tokens: mx.array) -> mx.array:
        return self.model.logits(self.w, tokens)

    def gradients(self, tokens: mx.array) -> dict[str, np.ndarray]:
        """(B, T + 1) integers -> d(mean loss)/d(weight) of each weight, float32. For tests of parity."""
        found = mx.grad(self.model.loss)(self.w, tokens)
        return {name: np.array(g) for name, g in found.items()}

    def weights(self) -> dict[str, np.ndarray]:
        return {name: np.array(w) for name, w in self.w.items()}

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        if self.w.keys() != weights.keys():
            raise ValueError(f"these weights are missing or unknown: {sorted(self.w.keys() ^ weights.keys())[:5]}")
        for name, old in self.w.items():
            if old.shape != weights[name].shape:
                raise ValueError(f"{name} has shape {weights[name].shape}, the model's is {old.shape}")
            self.w[name] = mx.array(np.asarray(weights[name], dtype=np.float32))

    def describe(self) -> dict[str, Any]:
        """FLOPs as upstream counts them: 6 per matrix weight, 12 per channel and key of each layer's window."""
        matrices = sum(w.size for n, w in self.w.items() if n.startswith(("transformer.h.", "lm_head")))
        keys = sum(min(window, self.sequence_len) for window in self.model.windows)
        return {
            "depth": DEPTH,
            "dim": self.model.dim,
            "heads": self.model.heads,
            "windows": list(self.model.windows),
            "tokens_per_step": max(1, TOTAL_BATCH_SIZE // self.sequence_len) * self.sequence_len,
            "flops_per_token": 6 * matrices + 12 * self.model.dim * keys,
        }


def optimizers(w: Mapping[str, mx.array], model: GPT) -> list[AdamW | Muon]:
    narrow = (model.dim / 768) ** -0.5  # AdamW's rates were tuned at dim 768
    values = [name for name in w if "value_embeds" in name]
    adam = [
        AdamW(w, ["lm_head.weight"], UNEMBEDDING_LR * narrow, ADAM_BETAS, UNEMBEDDING_DECAY),
        AdamW(w, ["transformer.wte.weight"], EMBEDDING_LR * narrow, ADAM_BETAS, EMBEDDING_DECAY),
        AdamW(w, values, EMBEDDING_LR * narrow, ADAM_BETAS, VALUE_DECAY),
        AdamW(w, ["resid_lambdas"], SCALAR_LR * 0.01, ADAM_BETAS, 0.0, SCALAR_EPSILON),
        AdamW(w, ["x0_lambdas"], SCALAR_LR, (0.96, 0.95), 0.0, SCALAR_EPSILON),
    ]
    shapes: dict[Any, list[str]] = {}
    for name, p in w.items():
        if name.startswith("transformer.h."):
            shapes.setdefault(p.shape, []).append(name)
    return [*adam, *(Muon(names, shape, model.dtype) for shape, names in shapes.items())]


def build(spec: Spec) -> MlxTraining:
    return MlxTraining(spec)
