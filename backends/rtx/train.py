"""The training file for a GeForce or RTX card: the whole reference model and optimizer, to be read and rewritten.

What it is: the only file that is researched. Everything in it is fair game - the constants, the model,
the optimizer, the schedules, the batch. It is measured by what the trained weights then predict.

What it is not: it holds no clock, reads and writes no files, prints nothing and scores nothing. The
program around it hands over training text (`batches`) and the used share of the time budget
(`progress`, 0..1), and it alone computes the score.

Shapes in comments: B rows, T tokens of context, N = B*T, C = model dim, H heads of D channels,
V vocabulary entries, L matrices of one shape.

Where the numbers are rounded ("compute dtype" is bfloat16, on Turing float16):
- masters of all weights, their gradients and the optimizer's moments are float32, embeddings are looked up in float32;
- the residual stream, matrix products and attention are in the compute dtype, softmax and norms float32 inside;
- softcap, softmax and loss are float32; every norm adds float32's epsilon to the mean square.
In float16 the loss is scaled up before backward; a step whose gradients are not finite changes nothing and halves the
scale. All of that stays on the card: the host never waits to know.

What is particular here: memory. The two halves of a layer (kernels/lean.py) keep ten numbers per channel and token for
backward; RECOMPUTE and RECOMPUTE_MORE trade time for less, layer by layer. Nothing is compiled as a whole: what is kept
is what is written here, on every system. Where the card is out of memory in spite of it, fewer rows go through the
model at once from then on; with one row left, more is made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core.contract import Batches, Spec
from kernels import mlp_choice, portable
from kernels.errors import out_of_memory
from kernels.lean import attend, feed, last_norm
from kernels.recomputed import embedded_norm

# --- constants: `# search:` gives the range that the offline search may try --------------------

DEPTH = 6  # search: 2..20; transformer layers
ASPECT_RATIO = 64  # search: 32..128; model dim = DEPTH * ASPECT_RATIO, rounded up to whole heads
HEAD_DIM = 64  # search: 64 | 128; channels of one attention head
WINDOW_PATTERN = "SSSL"  # search: L | SL | SSL | SSSL; per layer: L whole context, S half; the last is always L

TOTAL_BATCH_SIZE = 2**15  # search: 2**12..2**18 pow2; tokens of one optimizer step
DEVICE_BATCH_SIZE = 32  # rows that go through the model at once; more of them only cost memory
MLP = "auto"  # the faster here, or triton | torch: the two products beside the squared ReLU
RECOMPUTE = "nothing"  # or "hidden": the MLP's inside, or "layer": all but the stream, made again in backward
RECOMPUTE_MORE = 0  # so many of the first layers go one step further: nothing -> hidden -> layer
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

LOSS_SCALE = 2.0**15  # float16 only: the first one; it doubles after LOSS_SCALE_STEPS good steps in a row
LOSS_SCALE_STEPS = 200

# --- model ------------------------------------------------------------------------------------

AGAIN = ("nothing", "hidden", "layer")  # made again in backward, from the fastest to the leanest
HEAD_ROWS = 4096  # tokens whose logits exist in the compute dtype at one time


def rotations(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles (ROPE_BASE), (length, D/2) each, float32."""
    frequency = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32, device=device) / HEAD_DIM)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


def has_value_embedding(layer: int) -> bool:
    """Every second layer, and always the last."""
    return layer % 2 == (DEPTH - 1) % 2


def window_sizes(sequence_len: int) -> list[int]:
    """How many tokens each layer looks back, itself not counted."""
    sizes = [sequence_len if c == "L" else sequence_len // 2 for c in WINDOW_PATTERN.upper()]
    return [sizes[i % len(sizes)] for i in range(DEPTH - 1)] + [sequence_len]


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

    def all_gradients(self) -> list[Tensor]:
        return [w.grad for w in (*self.singles.values(), *self.stacks.values()) if w.grad is not None]

    def drop_gradients(self) -> None:
        for w in (*self.singles.values(), *self.stacks.values()):
            w.grad = None


class GPT:
    """The reference model."""

    def __init__(self, spec: Spec) -> None:
        self.device, self.dtype = torch.device(spec.device), getattr(torch, spec.dtype)
        self.heads = -(-DEPTH * ASPECT_RATIO // HEAD_DIM)
        self.dim = self.heads * HEAD_DIM
        self.weights = Weights(initial_weights(spec.vocab_size, self.dim, spec.seed), self.device)
        self.windows = window_sizes(spec.sequence_len)
        self.cos, self.sin = rotations(spec.sequence_len, self.device)
        self.recompute, self.recompute_more = RECOMPUTE, RECOMPUTE_MORE
        rows = max(1, min(DEVICE_BATCH_SIZE, TOTAL_BATCH_SIZE // spec.sequence_len))
        products = mlp_choice.Case(rows * spec.sequence_len, self.dim, 4 * self.dim, self.dtype, self.device)
        self.mlp = mlp_choice.settled(products, forced=None if MLP == "auto" else MLP)  # the same in every process

    def made_again(self, i: int) -> str:
        """What layer i makes again in backward. More of it in the first layers: their backward comes last, when what
        the others kept is gone."""
        step = AGAIN.index(self.recompute) + (i < self.recompute_more)
        return AGAIN[min(step, len(AGAIN) - 1)]

    def make_more_again(self) -> None:
        """In a quarter of the layers more, until all make all again."""
        self.recompute_more += -(-DEPTH // 4)
        if self.recompute_more >= DEPTH:
            self.recompute, self.recompute_more = self.made_again(DEPTH - 1), 0

    def layer(self, w: Mapping[str, Tensor], i: int, x: Tensor, x0: Tensor, tokens: Tensor) -> Tensor:
        """x, x0 (N, C), tokens (B, T) -> (N, C). `w` is one `by_name` for all layers: the gradient through a view is
        as large as its whole stack, made once for all views that were taken together."""
        name = f"transformer.h.{i}."
        qkv_weight = torch.cat([w[f"{name}attn.{n}.weight"].to(x.dtype) for n in ("c_q", "c_k", "c_v")])
        gate = table = None  # value residual: the token's own vector joins v, gated per head by the stream
        if has_value_embedding(i):
            gate, table = w[f"{name}attn.ve_gate.weight"].to(x.dtype), w[f"value_embeds.{i}.weight"]
        scale, window = (w["resid_lambdas"][i], w["x0_lambdas"][i]), self.windows[i]
        by = portable.beside(self.device)  # None: Triton's kernels, within
        x, attended = attend(x, x0, *scale, qkv_weight, gate, table, tokens, self.cos, self.sin, window, by)
        out, up, down = (w[f"{name}{n}.weight"].to(x.dtype) for n in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
        keep_hidden = self.made_again(i) != "hidden"  # a whole layer made again is done with it at once
        return feed(x, attended, out, up, down, keep_hidden, by=self.mlp.name)

    def stream(self, tokens: Tensor) -> Tensor:
        """(B, T) integers -> (N, C): the last state of each position, in the compute dtype."""
        x = x0 = embedded_norm(tokens.flatten(), self.weights.singles["transformer.wte.weight"], self.dtype)
        w = self.weights.by_name()
        for i in range(DEPTH):
            if self.made_again(i) == "layer" and torch.is_grad_enabled():
                x = checkpoint(self.layer, w, i, x, x0, tokens, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.layer(w, i, x, x0, tokens)
        return last_norm(x)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) float32 logits within -SOFTCAP..SOFTCAP."""
        if tokens.size(1) > len(self.cos):
            self.cos, self.sin = rotations(tokens.size(1), self.device)
        x, head = self.stream(tokens), self.weights.singles["lm_head.weight"].to(self.dtype)
        found = torch.empty(len(x), len(head), device=self.device)
        for rows, out in zip(x.split(HEAD_ROWS), found.split(HEAD_ROWS)):  # one float32 tensor of them, not three
            out.copy_(F.linear(rows, head)).div_(SOFTCAP).tanh_().mul_(SOFTCAP)
        return found.view(*tokens.shape, -1)

    def loss(self, tokens: Tensor) -> Tensor:
        """(B, T + 1) -> mean nats per token. All N*V logits never exist."""
        x = self.stream(tokens[:, :-1])
        return portable.softcapped_loss(x, self.weights.singles["lm_head.weight"], tokens[:, 1:].flatten(), SOFTCAP)


# --- optimizer --------------------------------------------------------------------------------


class Muon:
    """Muon over one stack of matrices, with NorMuon's scaling and cautious decay (kernels/muon.py)."""

    def __init__(self, stack: Tensor, dtype: torch.dtype) -> None:
        L, m, n = stack.shape
        self.stack, self.dtype = stack, dtype
        self.momentum = torch.zeros_like(stack)
        self.still = torch.tensor([0.0, 1.0, 0.0], device=stack.device)  # rates that change nothing
        self.second = torch.zeros((L, m, 1) if m >= n else (L, 1, n), device=stack.device)

    def step(self, rates: Tensor) -> None:
        """`rates` (3,) on the device: learning rate, momentum, weight decay."""
        assert self.stack.grad is not None
        grads = self.stack.grad.contiguous()
        portable.muon_(self.stack.data, grads, self.momentum, self.second, rates, self.dtype, MUON_BETA2, MUON_STEPS)

    def step_if(self, good: Tensor, rates: Tensor) -> None:
        """The same where `good`, a bool on the device; else nothing changes: gradients are zeros then, a momentum of
        1 leaves the moment alone and a rate of 0 the weights."""
        before = self.second.clone()
        self.step(torch.where(good, rates, self.still))
        self.second.copy_(torch.where(good, self.second, before))


class AdamW:
    """Adam with decoupled decay, fused over all parameters of a group (Loshchilov & Hutter 2019)."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.groups = groups
        for group in groups:
            device = group["params"][0].device
            group["moments"] = [
                (torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=device)) for p in group["params"]
            ]

    def step(self, bad: Tensor | None = None) -> None:
        """`bad`: 1.0 on the device where this step must change nothing."""
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
                found_inf=bad,
            )
            if bad is not None:
                torch._foreach_sub_(steps, [bad] * len(steps))


class LossScale:
    """float16's gradients below 6e-8 are zero: the loss is scaled up before backward, and they down after it.

    Micikevicius et al. 2018. The scale and the count of good steps live on the device and are never read here.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), LOSS_SCALE, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)

    def unscale(self, grads: list[Tensor]) -> Tensor:
        """Divides the gradients, in place. Returns whether all are finite; if not, they are all zero then."""
        torch._foreach_mul_(grads, 1 / self.scale)
        good = torch.stack([torch.isfinite(norm) for norm in torch._foreach_norm(grads)]).all()
        for g in grads:
            g.copy_(torch.where(good, g, 0.0))
        return good

    def follow(self, good: Tensor) -> None:
        """The next scale: half after a bad step, double after enough good ones."""
        self.good_steps = torch.where(good, self.good_steps + 1, 0.0)
        grows = self.good_steps >= LOSS_SCALE_STEPS
        self.scale = torch.where(good, torch.where(grows, self.scale * 2, self.scale), self.scale / 2)
        self.good_steps = torch.where(grows, 0.0, self.good_steps)
        self.skipped += (~good).float()


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


class RtxTraining:
    """See core.contract.Training for what each method promises."""

    def __init__(self, spec: Spec) -> None:
        self.sequence_len = spec.sequence_len
        self.model = model = GPT(spec)
        self.steps = 0
        self.pinned: dict[str, Any] = {"pin_memory": True} if model.device.type == "cuda" else {}
        self.rows_at_once = DEVICE_BATCH_SIZE
        self.scale = LossScale(model.device) if model.dtype == torch.float16 else None
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
        tokens = batches.next(max(1, TOTAL_BATCH_SIZE // self.sequence_len), self.sequence_len)
        while (loss := self.accumulate(tokens)) is None:  # out of memory: the same rows again, fewer at once
            self.model.weights.drop_gradients()
            self.back_off()
        self.update(progress)
        return loss

    def accumulate(self, tokens: Tensor) -> Tensor | None:
        """The mean loss of the rows, and its gradients; None when memory ran out on the way."""
        loss = torch.zeros((), device=self.model.device)
        try:
            for part in tokens.split(self.rows_at_once):
                part_loss = self.model.loss(part) * (len(part) / len(tokens))
                (part_loss if self.scale is None else part_loss * self.scale.scale).backward()
                loss += part_loss.detach()
        except RuntimeError as error:
            leanest = self.rows_at_once == 1 and self.model.made_again(DEPTH - 1) == "layer"
            if leanest or not out_of_memory(error):
                raise
            return None
        return loss

    def back_off(self) -> None:
        """Half the rows at once; with one row left, layer by layer, more is made again in backward."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.rows_at_once > 1:
            self.rows_at_once = min(self.rows_at_once, max(1, TOTAL_BATCH_SIZE // self.sequence_len)) // 2 or 1
        else:
            self.model.make_more_again()

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """One optimizer step from the gradients at hand, which are then dropped."""
        rate = lr_multiplier(progress)
        for group, base in zip(self.adam.groups, self.adam_rates, strict=True):
            group["lr"] = base * rate
        rates = torch.tensor([MATRIX_LR * rate, muon_momentum(self.steps), weight_decay(progress)], **self.pinned)
        rates = rates.to(self.model.device, non_blocking=True)  # from pinned memory, or the host would wait
        if self.scale is None:
            self.adam.step()
            for muon in self.muons:
                muon.step(rates)
        else:
            good = self.scale.unscale(self.model.weights.all_gradients())
            self.adam.step((~good).float())
            for muon in self.muons:
                muon.step_if(good, rates)
            self.scale.follow(good)
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
        """FLOPs as upstream counts them: 6 per matrix weight, 12 per channel and key of each layer's window."""
        by_name = self.model.weights.by_name()
        matrices = sum(p.numel() for n, p in by_name.items() if n.startswith(("transformer.h.", "lm_head")))
        keys = sum(min(window, self.sequence_len) for window in self.model.windows)
        return {
            "depth": DEPTH,
            "dim": self.model.dim,
            "heads": self.model.heads,
            "windows": list(self.model.windows),
            "tokens_per_step": max(1, TOTAL_BATCH_SIZE // self.sequence_len) * self.sequence_len,
            "flops_per_token": 6 * matrices + 12 * self.model.dim * keys,
            "rows_at_once": self.rows_at_once,
            "recompute": self.model.recompute,
            "recompute_more": self.model.recompute_more,
            "kernels": portable.told(self.model.device),
            "mlp": self.model.mlp.told,
            "skipped_steps": int(self.scale.skipped) if self.scale else 0,
        }


def build(spec: Spec) -> RtxTraining:
    return RtxTraining(spec)
