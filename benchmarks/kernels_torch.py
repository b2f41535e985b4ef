"""The cases of `bench kernels` for PyTorch: on a CPU the recipe's own operations, on an NVIDIA card the Triton kernels.

Peers are plain PyTorch, PyTorch's own fused operations and, where they are installed, others' kernels; on a card also
the plain formula under torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import card_time
from benchmarks import kernel_cases as cases
from benchmarks.kernel_cases import Case, Shape, Side
from kernels import plain

CAP = 15.0
RATES = (1.0, 0.9, 0.5)  # learning rate, momentum, weight decay of the optimizer's case: each of them shows in one step
BETA2, MUON_STEPS = 0.95, 5
ADAM_LR, ADAM_BETAS, ADAM_EPSILON = 0.1, (0.8, 0.95), 1e-10


@dataclass(frozen=True)
class TorchClock:
    """See `kernel_cases.Clock`."""

    device: torch.device
    dtype: str
    where: str

    def wait(self, results: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            return card_time.seconds(call, self.device)
        return cases.by_the_host(self, call)

    def array(self, result: Tensor) -> np.ndarray:
        found: np.ndarray = result.detach().double().cpu().numpy()
        return found

    def size(self, inputs: tuple[Any, ...]) -> int:
        return sum(x.numel() * x.element_size() for x in tensors(inputs))

    def cache(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        return cases.linux_cache()

    def product_sizes(self) -> Sequence[int]:
        return (4096, 8192) if self.device.type == "cuda" else (1024, 2048)

    def product(self, size: int) -> Callable[[], Any]:
        a, b = (torch.randn(size, size, device=self.device).to(getattr(torch, self.dtype)) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    def streams(self, size: int) -> dict[str, tuple[int, Callable[[], Any]]]:
        a, b = torch.ones(size // 4, device=self.device), torch.ones(size // 4, device=self.device)
        return {"copy": (2 * size, lambda: b.copy_(a)), "sum in place": (3 * size, lambda: b.add_(a))}


def tensors(x: Any) -> Iterator[Tensor]:
    """All tensors in a structure of tuples, lists and objects."""
    if isinstance(x, Tensor):
        yield x
        if x.grad is not None:
            yield x.grad
    elif isinstance(x, list | tuple):
        for item in x:
            yield from tensors(item)
    elif hasattr(x, "__dict__"):
        yield from tensors(list(vars(x).values()))


def differentiated(function: Callable[..., Tensor], leaves: int) -> Callable[..., list[Tensor]]:
    """`function` and its gradients by the first `leaves` inputs; the last input is the output's gradient."""

    def run(*given: Any) -> list[Tensor]:
        wanted = [x.detach().requires_grad_() for x in given[:leaves]]
        rest = given[leaves:]
        y = function(*wanted, *rest[:-1])
        return [y.detach(), *torch.autograd.grad(y, wanted, rest[-1])]

    return run


def forward_only(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """Without the output's gradient that the inputs end with."""

    def run(*given: Any) -> list[Tensor]:
        with torch.no_grad():
            return [function(*given[:-1])]

    return run


def widened(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same in float64."""
    return lambda *given: run(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given))


def both_ways(
    kernel: str,
    what: str,
    shape: Shape,
    work: Callable[[bool], cases.Work],  # of the forward (False), of both
    make: Callable[[int, Shape], tuple[Any, ...]],
    sides: Mapping[str, Callable[..., Tensor]],  # the first is ours
    reference: Callable[..., Tensor],
    leaves: int,
    refused: Mapping[str, str] | None = None,
) -> Iterator[Case]:
    """A case for the forward alone and one for forward and backward."""
    ways: list[tuple[cases.Direction, Callable[[Callable[..., Tensor]], Callable[..., list[Tensor]]], cases.Work]] = [
        ("forward", forward_only, work(False)),
        ("both", lambda f: differentiated(f, leaves), work(True)),
    ]
    for way, wrap, needed in ways:
        named = [Side(name, wrap(function), i == 0) for i, (name, function) in enumerate(sides.items())]
        yield Case(kernel, what, way, needed, shape, make, named, widened(wrap(reference)), refused or {})


class Source:
    """Seeded random tensors on a device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.rng, self.device = torch.Generator().manual_seed(seed), device

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape).normal_(std=scale, generator=self.rng).to(self.device, dtype)

    def targets(self, count: int, vocab: int) -> Tensor:
        return torch.randint(vocab, (count,), generator=self.rng).to(self.device)


# --- the CPU recipe -------------------------------------------------------------------------------


def cpu_cases(shape: Shape, clock: TorchClock) -> Iterator[Case]:
    recipe, dtype = cases.recipe_at("cpu", shape), getattr(torch, clock.dtype)
    yield from _cpu_attention(shape, recipe, dtype)
    yield from _cpu_mlp(shape, recipe, dtype)
    yield _cpu_head(shape, recipe, dtype)
    yield _cpu_muon(shape, recipe, dtype)
    yield _cpu_adam(shape, recipe)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """(B*H, T, D) queries (scaled), keys, values; seen (T, T): the formula, with all scores in memory."""
    scores = (q @ k.mT).masked_fill(~seen, -torch.inf)
    return scores.softmax(dim=-1) @ v


def _cpu_attention(shape: Shape, recipe: ModuleType, dtype: torch.dtype) -> Iterator[Case]:
    H, T, D = shape.heads, shape.context, shape.head_dim
    distance = torch.arange(T)[:, None] - torch.arange(T)

    def make(seed: int, of: Shape) -> tuple[Any, ...]:
        source = Source(seed, torch.device("cpu"))
        q, k, v, dy = (source.normal(of.rows * H, T, D, dtype=dtype) for _ in range(4))
        return q * D**-0.5, k, v, dy

    for window in cases.windows(shape):
        mask, seen = recipe.band(window, dtype), (distance >= 0) & (distance <= window)

        def ours(q: Tensor, k: Tensor, v: Tensor, window: int = window, mask: Tensor = mask) -> Tensor:
            return recipe.Attention.apply(q, k, v, window, mask)  # type: ignore[no-any-return]

        def sdpa(q: Tensor, k: Tensor, v: Tensor, window: int = window, seen: Tensor = seen) -> Tensor:
            q, k, v = (x.view(-1, H, T, D) for x in (q, k, v))
            how: dict[str, Any] = {"is_causal": True} if window >= T else {"attn_mask": seen}
            return F.scaled_dot_product_attention(q, k, v, scale=1.0, **how).view(-1, T, D)

        def formula(q: Tensor, k: Tensor, v: Tensor, seen: Tensor = seen) -> Tensor:
            return plain_attention(q, k, v, seen)

        def work(both: bool, window: int = window) -> cases.Work:
            return cases.attention_work(shape, window, dtype.itemsize, both)

        sides: dict[str, Callable[..., Tensor]] = {
            "recipe (key slices)": ours,
            "PyTorch SDPA": sdpa,
            "plain PyTorch": formula,
        }
        yield from both_ways("attention", cases.attention_text(shape, window), shape, work, make, sides, formula, 3)


def plain_mlp(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """relu(x w1^T)^2 w2^T in x's dtype."""
    return F.linear(F.relu(F.linear(x, w1.to(x.dtype))).square(), w2.to(x.dtype))


def _mlp_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, weights: torch.dtype) -> Any:
    C = shape.dim

    def make(seed: int, of: Shape) -> tuple[Any, ...]:
        source, N = Source(seed, device), of.tokens
        w1, w2 = (source.normal(*s, scale=C**-0.5, dtype=weights) for s in ((4 * C, C), (C, 4 * C)))
        return source.normal(N, C, dtype=dtype), w1, w2, source.normal(N, C, dtype=dtype)

    return make


def _cpu_mlp(shape: Shape, recipe: ModuleType, dtype: torch.dtype) -> Iterator[Case]:
    def ours(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return recipe.linear(recipe.SquaredReLU.apply(recipe.linear(x, w1)), w2)  # type: ignore[no-any-return]

    def work(both: bool) -> cases.Work:
        return cases.mlp_work(shape, dtype.itemsize, both)

    make = _mlp_inputs(shape, dtype, torch.device("cpu"), torch.float32)
    sides: dict[str, Callable[..., Tensor]] = {"recipe (own backward)": ours, "plain PyTorch": plain_mlp}
    yield from both_ways("mlp", cases.mlp_text(shape), shape, work, make, sides, plain_mlp, 3)


def plain_loss(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean softcapped cross-entropy with all logits in memory, float32 (float64 for float64)."""
    logits = plain.wide(F.linear(x, head.to(x.dtype)))
    return F.cross_entropy(CAP * torch.tanh(logits / CAP), targets)


def head_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    def make(seed: int, of: Shape) -> tuple[Any, ...]:
        source = Source(seed, device)
        head = source.normal(of.vocab, of.dim, scale=0.1)
        return source.normal(of.tokens, of.dim, dtype=dtype), head, source.targets(of.tokens, of.vocab)

    return make


def loss_case(
    shape: Shape,
    make: Callable[[int, Shape], tuple[Any, ...]],
    sides: dict[str, Callable[..., Tensor]],
    width: int,
    refused: dict[str, str],
) -> Case:
    """Forward and backward only: who writes the gradients in the forward has no forward alone."""

    def wrap(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        def run(x: Tensor, head: Tensor, targets: Tensor) -> list[Tensor]:
            x, head = x.detach().requires_grad_(), head.detach().requires_grad_()
            loss = function(x, head, targets)
            return [loss.detach(), *torch.autograd.grad(loss, (x, head))]

        return run

    named = [Side(name, wrap(function), i == 0) for i, (name, function) in enumerate(sides.items())]
    what, work = cases.head_text(shape), cases.head_work(shape, width, True)
    return Case("head", what, "both", work, shape, make, named, widened(wrap(plain_loss)), refused)


def _cpu_head(shape: Shape, recipe: ModuleType, dtype: torch.dtype) -> Case:
    def ours(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return recipe.SoftcappedLoss.apply(x, head, targets)  # type: ignore[no-any-return]

    sides = {"recipe (a few rows at a time)": ours, "plain PyTorch": plain_loss}
    return loss_case(shape, head_inputs(shape, dtype, torch.device("cpu")), sides, dtype.itemsize, {})


# --- optimizers -----------------------------------------------------------------------------------


def stacks(shape: Shape, seed: int, device: torch.device) -> list[tuple[Tensor, ...]]:
    """(weights, gradients, momentum, second moment) of each stack of matrices."""
    source, found = Source(seed, device), []
    for L, m, n in cases.muon_stacks(shape):
        second = source.normal(*((L, m, 1) if m >= n else (L, 1, n))).square_().add_(0.1).div_(max(m, n))
        found.append((*(source.normal(L, m, n, scale=s) for s in (max(m, n) ** -0.5, 1.0, 0.1)), second))
    return found


def plain_muon(given: Sequence[tuple[Tensor, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Each stack at once, in place; the weights. Leaves the gradients as they are."""
    rates = torch.tensor(RATES, device=given[0][0].device, dtype=given[0][0].dtype)
    with torch.no_grad():
        for weights, grads, momentum, second in given:
            plain.muon_(weights, grads.clone(), momentum, second, rates, dtype, BETA2, MUON_STEPS)
    return [weights for weights, *_ in given]


def single_muon(given: Sequence[tuple[Tensor, ...]], dtype: torch.dtype) -> list[Tensor]:
    """The same, one matrix after the other, as optimizers usually loop over parameters."""
    for stack in given:
        for i in range(len(stack[0])):
            plain_muon([tuple(x[i : i + 1] for x in stack)], dtype)
    return [weights for weights, *_ in given]


def wide_muon(given: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    return plain_muon([tuple(x.double() for x in stack) for stack in given], torch.float64)


def muon_case(shape: Shape, make: Callable[[int, Shape], tuple[Any, ...]], sides: Sequence[Side]) -> Case:
    of = cases.muon_stacks(shape)
    works = [cases.muon_work(L, m, n, MUON_STEPS) for L, m, n in of]
    work = cases.Work(sum(w.flops for w in works), sum(w.bytes for w in works))
    what = cases.muon_text(shape)
    return Case("optimizer", what, "step", work, shape, make, sides, wide_muon, tolerance=cases.MUON_TOLERANCE)


def _cpu_muon(shape: Shape, recipe: ModuleType, dtype: torch.dtype) -> Case:
    device = torch.device("cpu")

    def make(seed: int, of: Shape) -> tuple[Any, ...]:
        return (stacks(of, seed, device),)

    def ours(given: list[tuple[Tensor, ...]]) -> list[Tensor]:
        with torch.no_grad():
            for weights, grads, momentum, second in given:
                params = list(weights.unbind(0))
                for p, g in zip(params, grads.unbind(0)):
                    p.grad = g
                muon = recipe.Muon.__new__(recipe.Muon)
                m, n = weights.shape[1:]
                muon.params, muon.dtype, muon.axis = params, dtype, -1 if m >= n else -2
                muon.boost, muon.momentum, muon.second = max(1.0, m / n) ** 0.5, momentum, second
                muon.step(*RATES)
        return [weights for weights, *_ in given]

    sides = [
        Side("recipe (stacks)", ours, True),
        Side("plain PyTorch, a matrix at a time", lambda given: single_muon(given, dtype)),
    ]
    return muon_case(shape, make, sides)


def adam_parameters(shape: Shape) -> list[tuple[int, int]]:
    """Head, token embedding, and the value embedding of every second layer."""
    return [(shape.vocab, shape.dim)] * (2 + -(-shape.depth // 2))


def plain_adam(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The first step of Adam without decay, from moments of zero; the new weights."""
    beta1, beta2 = ADAM_BETAS
    found = []
    for p, g in zip(params, grads, strict=True):
        first, second = g * (1 - beta1), g.square() * (1 - beta2)
        step = (first / (1 - beta1)) / ((second / (1 - beta2)).sqrt() + ADAM_EPSILON)
        found.append(p - ADAM_LR * step)
    return found


class Optimized:
    """Parameters with gradients, and one optimizer over them."""

    def __init__(self, make: Callable[[list[Tensor]], Any], shape: Shape, seed: int, device: torch.device) -> None:
        source = Source(seed, device)
        self.params = [source.normal(*s).requires_grad_() for s in adam_parameters(shape)]
        for p in self.params:
            p.grad = source.normal(*p.shape)
        self.optimizer = make(self.params)


def _cpu_adam(shape: Shape, recipe: ModuleType) -> Case:
    device = torch.device("cpu")

    def recipes(params: list[Tensor]) -> Any:
        return recipe.AdamW([{"params": params, "lr": ADAM_LR, "betas": ADAM_BETAS, "decay": 0.0}])

    return adam_case(shape, device, {"recipe (fused)": recipes})


def adam_case(shape: Shape, device: torch.device, ours: dict[str, Callable[[list[Tensor]], Any]]) -> Case:
    """Every side has its own parameters, equal at the start: an optimizer holds the moments of its own."""

    def torchs(params: list[Tensor]) -> Any:
        return torch.optim.AdamW(params, ADAM_LR, ADAM_BETAS, ADAM_EPSILON, weight_decay=0.0, foreach=True)

    makers = {**ours, "torch.optim.AdamW (foreach)": torchs}

    def make(seed: int, of: Shape) -> tuple[Any, ...]:
        return tuple(Optimized(maker, of, seed, device) for maker in makers.values())

    def run(at: int) -> Callable[..., list[Tensor]]:
        def step(*given: Optimized) -> list[Tensor]:
            given[at].optimizer.step()
            return [p.detach() for p in given[at].params]

        return step

    def reference(*given: Optimized) -> list[Tensor]:
        params = [p.detach().double() for p in given[0].params]
        return plain_adam(params, [p.grad.double() for p in given[0].params if p.grad is not None])

    count = sum(rows * columns for rows, columns in adam_parameters(shape))
    work = cases.Work(12.0 * count, 7.0 * 4 * count)
    sides = [Side(name, run(i), name in ours) for i, name in enumerate(makers)]
    return Case("optimizer", f"AdamW, {count / 1e6:.1f}M parameters", "step", work, shape, make, sides, reference)
