"""The training file for a data-centre NVIDIA card: the whole reference model and optimizer, to be read and rewritten.

What it is: the only file that is researched. Everything in it is fair game - the constants, the model,
the optimizer, the schedules, the batch. It is measured by what the trained weights then predict.

What it is not: it holds no clock, reads and writes no files, prints nothing and scores nothing. The
program around it hands over training text (`batches`) and the used share of the time budget
(`progress`, 0..1), and it alone computes the score.

Shapes in comments: B rows, T tokens of context, N = B*T, C = model dim, H heads of D channels,
V vocabulary entries, L matrices of one shape.

Where the numbers are rounded ("compute dtype" is bfloat16):
- masters of all weights, their gradients and the optimizer's moments are float32;
- the residual stream, matrix products and attention are in the compute dtype, softmax and norms float32 inside;
- softcap, softmax and loss are float32; every norm adds float32's epsilon to the mean square.

What is particular here: forward and backward are one compiled graph around the fused kernels of `kernels/` (each with
its equation and a plain reference); matrices of one shape are one tensor, so that Muon works on them in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.contract import Batches, Spec
from kernels import mlp_choice
from kernels.attention_choice import Case, Choice, settled
from kernels.compiling import compiled
from kernels.lean import attend, feed, last_norm
from kernels.memory import fitted_rows
from kernels.muon import muon_
from kernels.recomputed import embedded_norm
from kernels.softcapped_loss import softcapped_loss

# --- constants: `# search:` gives the range that the offline search may try --------------------

DEPTH = 8  # search: 2..20; transformer layers
ASPECT_RATIO = 64  # search: 32..128; model dim = DEPTH * ASPECT_RATIO, rounded up to whole heads
HEAD_DIM = 128  # search: 64 | 128; channels of one attention head
WINDOW_PATTERN = "SSSL"  # search: L | SL | SSL | SSSL | SSSSL; by layer: L whole context, S short; last always L
SHORT_WINDOW = 2  # search: 2..16 pow2; an S layer sees one part in so many of the context
ATTENTION = "auto"  # the fastest here, or triton | fa3 | cudnn | flash | flex | reference
MLP = "auto"  # the faster here, or triton | torch: the two products beside the squared ReLU

TOTAL_BATCH_SIZE = 2**19  # search: 2**15..2**20 pow2; tokens of one optimizer step
DEVICE_BATCH_SIZE = 128  # rows that go through the model at once, fewer where memory ends; they only cost memory
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

Pair = tuple[Tensor, Tensor]
measured_rows: dict[tuple[int, ...], tuple[int, str]] = {}  # of a shape: rows at once and why, as measured here before

# --- model ------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in x's dtype; the master weight is float32 and so is its gradient."""
    return F.linear(x, weight.to(x.dtype))


def rotations(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles (ROPE_BASE), (length, D/2) each, float32."""
    frequency = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32, device=device) / HEAD_DIM)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


def scalars(vector: Tensor) -> tuple[Tensor, ...]:
    """(L,) -> L scalars, 16 bytes apart: what the compiler makes with an unaligned tensor it takes for unaligned."""
    return F.pad(vector[:, None], (0, 3))[:, 0].unbind()


def has_value_embedding(layer: int) -> bool:
    """Every second layer, and always the last."""
    return layer % 2 == (DEPTH - 1) % 2


def window_sizes(sequence_len: int) -> list[int]:
    """How many tokens each layer looks back, itself not counted."""
    sizes = [sequence_len if c == "L" else sequence_len // SHORT_WINDOW for c in WINDOW_PATTERN.upper()]
    return [sizes[i % len(sizes)] for i in range(DEPTH - 1)] + [sequence_len]


def mean_keys(length: int, window: int) -> float:
    """How many keys a query sees on average: the query at i sees min(i, window) and its own."""
    reach = min(window, length - 1)
    return reach + 1 - reach * (reach + 1) / (2 * length)


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
    return weights


class Weights:
    """The parameters: matrices of one shape lie in one (L, m, n) tensor, everything else by itself."""

    def __init__(self, initial: Mapping[str, Tensor], device: torch.device) -> None:
        self.singles: dict[str, Tensor] = {}
        self.stacks: dict[torch.Size, Tensor] = {}
        self.names: dict[torch.Size, list[str]] = {}  # of the matrices in each stack
        for name, w in initial.items():
            if name.startswith("transformer.h."):
                self.names.setdefault(w.shape, []).append(name)
            else:
                self.singles[name] = w.to(device).requires_grad_()
        for shape, names in self.names.items():
            self.stacks[shape] = torch.stack([initial[name] for name in names]).to(device).requires_grad_()

    def by_name(self) -> dict[str, Tensor]:
        """Every weight; matrices as views, through which gradients reach their stack."""
        views = {n: w for shape, names in self.names.items() for n, w in zip(names, self.stacks[shape].unbind())}
        return {**self.singles, **views}

    def gradients(self) -> dict[str, Tensor]:
        found = {name: w.grad for name, w in self.singles.items()}
        for shape, names in self.names.items():
            stack = self.stacks[shape].grad
            found.update({name: None if stack is None else stack[i] for i, name in enumerate(names)})
        return {name: g for name, g in found.items() if g is not None}

    def drop_gradients(self) -> None:
        for w in (*self.singles.values(), *self.stacks.values()):
            w.grad = None


class GPT:
    """The reference model."""

    def __init__(self, spec: Spec) -> None:
        if HEAD_DIM % 2:
            raise ValueError(f"HEAD_DIM = {HEAD_DIM} is odd, and RoPE turns pairs of channels; give 64 or 128")
        self.device, self.dtype = torch.device(spec.device), getattr(torch, spec.dtype)
        self.heads = -(-DEPTH * ASPECT_RATIO // HEAD_DIM)
        self.dim = self.heads * HEAD_DIM
        self.weights = Weights(initial_weights(spec.vocab_size, self.dim, spec.seed), self.device)
        self.windows = window_sizes(spec.sequence_len)
        self.cos, self.sin = rotations(spec.sequence_len, self.device)
        self.chosen = {window: self.choice(spec.sequence_len, window) for window in dict.fromkeys(self.windows)}
        rows = max(1, min(DEVICE_BATCH_SIZE, TOTAL_BATCH_SIZE // spec.sequence_len))
        products = mlp_choice.Case(rows * spec.sequence_len, self.dim, 4 * self.dim, self.dtype, self.device)
        self.mlp = mlp_choice.settled(products, forced=None if MLP == "auto" else MLP)  # as with attention

    def choice(self, length: int, window: int) -> Choice:
        """What computes attention over this window: measured before the clock starts, the same in every process."""
        case = Case(DEVICE_BATCH_SIZE, length, self.heads, self.heads, HEAD_DIM, window, self.dtype, self.device)
        return settled(case, forced=None if ATTENTION == "auto" else ATTENTION)

    def layer(self, w: Mapping[str, Tensor], i: int, x: Tensor, x0: Tensor, scale: Pair, tokens: Tensor) -> Tensor:
        """x, x0 (B, T, C), which are weighed by `scale`, and tokens (B, T) -> (B, T, C)."""
        w = {n.removeprefix(f"transformer.h.{i}."): weight for n, weight in w.items()}
        qkv_weight = torch.cat([w[f"attn.{n}.weight"] for n in ("c_q", "c_k", "c_v")]).to(x.dtype)
        gate = table = None
        if has_value_embedding(i):  # value residual: v + 2 sigmoid(gate n[:32]) table[token], per head
            gate, table = w["attn.ve_gate.weight"].to(x.dtype), w[f"value_embeds.{i}.weight"]
        window = self.windows[i]
        by = self.chosen[window].beside  # None: Triton's kernels, within
        x, attended = attend(x, x0, *scale, qkv_weight, gate, table, tokens, self.cos, self.sin, window, by)
        out, up, down = (w[f"{n}.weight"].to(x.dtype) for n in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
        return feed(x, attended, out, up, down, by=self.mlp.name)

    def stream(self, tokens: Tensor) -> Tensor:
        """(B, T) integers -> (B, T, C): the norm of each position's last state, in the compute dtype."""
        w = self.weights.by_name()
        resid, skip = scalars(w["resid_lambdas"]), scalars(w["x0_lambdas"])
        x = x0 = embedded_norm(tokens, w["transformer.wte.weight"], self.dtype)
        for i in range(DEPTH):
            x = self.layer(w, i, x, x0, (resid[i], skip[i]), tokens)
        return last_norm(x)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) float32 logits within -SOFTCAP..SOFTCAP."""
        if tokens.size(1) > len(self.cos):
            self.cos, self.sin = rotations(tokens.size(1), self.device)
        z = linear(self.stream(tokens), self.weights.singles["lm_head.weight"])
        return SOFTCAP * torch.tanh(z.float() / SOFTCAP)

    def loss(self, tokens: Tensor) -> Tensor:
        """(B, T + 1) -> mean nats per token. All N*V logits never exist (kernels/softcapped_loss.py)."""
        x = self.stream(tokens[:, :-1])
        return softcapped_loss(x, self.weights.singles["lm_head.weight"], tokens[:, 1:], SOFTCAP)


# --- optimizer --------------------------------------------------------------------------------


class Muon:
    """Muon over one stack of matrices, with NorMuon's scaling and cautious decay (kernels/muon.py)."""

    def __init__(self, stack: Tensor, dtype: torch.dtype) -> None:
        L, m, n = stack.shape
        self.stack, self.dtype = stack, dtype
        self.momentum = torch.zeros_like(stack)
        self.second = torch.zeros((L, m, 1) if m >= n else (L, 1, n), device=stack.device)

    def step(self, rates: Tensor) -> None:
        """`rates` (3,) on the device: learning rate, momentum, weight decay."""
        assert self.stack.grad is not None
        grads = self.stack.grad.contiguous()
        muon_(self.stack.data, grads, self.momentum, self.second, rates, self.dtype, MUON_BETA2, MUON_STEPS)


class AdamW:
    """Adam with decoupled decay, fused over all parameters of a group (Loshchilov & Hutter 2019)."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.groups = groups
        for group in groups:
            device = group["params"][0].device
            group["moments"] = [
                (torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=device)) for p in group["params"]
            ]

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


class CudaTraining:
    """See core.contract.Training for what each method promises."""

    def __init__(self, spec: Spec) -> None:
        self.sequence_len = spec.sequence_len
        self.model = model = GPT(spec)
        self.steps = 0
        on_card = model.device.type == "cuda"  # elsewhere, as in tests, nothing is compiled
        whole = all(choice.whole for choice in model.chosen.values())
        self.loss = compiled(model.loss, whole) if on_card else model.loss
        self.rows, self.rows_reason = DEVICE_BATCH_SIZE, "" if on_card else "as the recipe says"  # "": to be measured
        self.pinned: dict[str, Any] = {"pin_memory": True} if on_card else {}
        w = model.weights.singles
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
        self.muons = [Muon(stack, model.dtype) for stack in model.weights.stacks.values()]

    def step(self, batches: Batches, progress: float) -> Tensor:
        rows = max(1, TOTAL_BATCH_SIZE // self.sequence_len)
        if not self.rows_reason:
            self.rows, self.rows_reason = self.fitted(min(DEVICE_BATCH_SIZE, rows))
        loss = torch.zeros((), device=self.model.device)
        for first in range(0, rows, self.rows):
            part = min(self.rows, rows - first)
            part_loss = self.loss(batches.next(part, self.sequence_len)) * (part / rows)
            part_loss.backward()
            loss += part_loss.detach()
        self.update(progress)
        return loss

    def fitted(self, wanted: int) -> tuple[int, str]:
        """Rows that go through the model at once, and why. The second build, on the clock, takes those of the first."""
        shape = (wanted, self.sequence_len, *self.model.weights.singles["lm_head.weight"].shape)
        if shape not in measured_rows:
            measured_rows[shape] = fitted_rows(self.trial, wanted, self.model.device)
        return measured_rows[shape]

    def trial(self, rows: int) -> None:
        """A forward and backward that leaves nothing behind."""
        shape = (rows, self.sequence_len + 1)
        try:
            self.model.loss(torch.zeros(shape, dtype=torch.int64, device=self.model.device)).backward()
        finally:
            self.model.weights.drop_gradients()

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """One optimizer step from the gradients at hand, which are then dropped."""
        rate = lr_multiplier(progress)
        for group, base in zip(self.adam.groups, self.adam_rates, strict=True):
            group["lr"] = base * rate
        self.adam.step()
        rates = torch.tensor([MATRIX_LR * rate, muon_momentum(self.steps), weight_decay(progress)], **self.pinned)
        rates = rates.to(self.model.device, non_blocking=True)  # from pinned memory, or the host would wait
        for muon in self.muons:
            muon.step(rates)
        self.model.weights.drop_gradients()
        self.steps += 1

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        return self.model.logits(tokens)

    def gradients(self, tokens: Tensor) -> dict[str, np.ndarray]:
        """(B, T + 1) integers -> d(mean loss)/d(weight) of each weight, float32. For tests of parity."""
        self.model.weights.drop_gradients()
        self.model.loss(tokens).backward()
        found = {name: g.cpu().numpy().copy() for name, g in self.model.weights.gradients().items()}
        self.model.weights.drop_gradients()
        return found

    @torch.no_grad()
    def weights(self) -> dict[str, np.ndarray]:
        return {name: w.detach().cpu().numpy().copy() for name, w in self.model.weights.by_name().items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        own = self.model.weights.by_name()
        if own.keys() != weights.keys():
            raise ValueError(f"these weights are missing or unknown: {sorted(own.keys() ^ weights.keys())[:5]}")
        for name, p in own.items():
            if p.shape != weights[name].shape:
                raise ValueError(f"{name} has shape {weights[name].shape}, the model's is {tuple(p.shape)}")
            p.copy_(torch.from_numpy(np.array(weights[name], dtype=np.float32)))

    def describe(self) -> dict[str, Any]:
        """FLOPs: 6 per matrix weight; in attention 12 per channel and key that a query sees, the mean over queries."""
        by_name = self.model.weights.by_name()
        matrices = sum(p.numel() for n, p in by_name.items() if n.startswith(("transformer.h.", "lm_head")))
        keys = sum(mean_keys(self.sequence_len, window) for window in self.model.windows)
        attention = {
            f"attention over {window}": f"{choice.name}: {choice.reason}"
            for window, choice in self.model.chosen.items()
        }
        return {
            "depth": DEPTH,
            "dim": self.model.dim,
            "heads": self.model.heads,
            "windows": " ".join(map(str, self.model.windows)),
            "tokens_per_step": max(1, TOTAL_BATCH_SIZE // self.sequence_len) * self.sequence_len,
            "flops_per_token": 6 * matrices + 12 * self.model.dim * keys,
            "rows_at_once": self.rows,
            "rows_reason": self.rows_reason,
            **attention,
            "mlp": self.model.mlp.told,
        }


def build(spec: Spec) -> CudaTraining:
    return CudaTraining(spec)
