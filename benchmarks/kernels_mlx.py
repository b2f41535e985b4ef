"""The cases of `bench kernels` for MLX: the recipe's own operations against plain MLX and MLX's fused ones.

Everything is compiled by `mx.compile`, on both sides. The reference is the plain formula in float32, MLX's widest type
on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import kernel_cases as cases
from benchmarks.kernel_cases import Case, Shape, Side

STREAM_BYTES = 2**24
CAP = 15.0
RATES = {"matrix": 1.0, "momentum": 0.9, "decay": 0.5}
BETA2, MUON_STEPS, FLOOR = 0.95, 5, 1e-10
ADAM_LR, ADAM_BETAS, ADAM_EPSILON = 0.1, (0.8, 0.95), 1e-10


@dataclass(frozen=True)
class MlxClock:
    """See `kernel_cases.Clock`."""

    name: str  # "gpu" or "cpu"
    dtype: str
    where: str

    def wait(self, results: Any) -> None:
        mx.eval(results)

    def seconds(self, call: Callable[[], Any]) -> float:
        return cases.by_the_host(self, call)

    def array(self, result: mx.array) -> np.ndarray:
        return np.array(result.astype(mx.float32)).astype(np.float64)

    def size(self, inputs: tuple[Any, ...]) -> int:
        return sum(x.nbytes for x in arrays(inputs))

    def cache(self) -> int:
        return cases.linux_cache()  # a Mac tells of none: its system-level cache is 8 to 96 MiB

    def product_sizes(self) -> Sequence[int]:
        return (2048, 4096) if self.name == "gpu" else (512, 1024)

    def product(self, size: int) -> Callable[[], Any]:
        a, b = (mx.random.normal((size, size)).astype(getattr(mx, self.dtype)) for _ in range(2))
        mx.eval(a, b)
        return lambda: a @ b

    def streams(self, size: int) -> dict[str, tuple[int, Callable[[], Any]]]:
        """A part at a time: a result of the whole size would be fresh memory each time, and page faults be timed."""
        whole = [mx.ones(STREAM_BYTES // 4) for _ in range(max(2, size // STREAM_BYTES))]
        mx.eval(whole)
        moved = len(whole) * STREAM_BYTES

        def copies() -> None:
            for part in whole:
                mx.eval(-part)

        def sums() -> None:
            for a, b in pairwise(whole):
                mx.eval(a + b)

        return {"copy": (2 * moved, copies), "sum of two arrays": (3 * (moved - STREAM_BYTES), sums)}


def arrays(x: Any) -> Iterator[mx.array]:
    if isinstance(x, mx.array):
        yield x
    elif isinstance(x, list | tuple):
        for item in x:
            yield from arrays(item)


def mlx_cases(shape: Shape, clock: MlxClock) -> Iterator[Case]:
    recipe, dtype = cases.recipe_at("mlx", shape), getattr(mx, clock.dtype)
    yield from _attention(shape, recipe, dtype)
    yield from _mlp(shape, recipe, dtype)
    yield _head(shape, recipe, dtype, clock.name)
    yield _muon(shape, recipe, dtype)
    yield _adam(shape, recipe)


class Source:
    """Seeded random arrays."""

    def __init__(self, seed: int) -> None:
        self.key = mx.random.key(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: Any = mx.float32) -> mx.array:
        self.key, own = mx.random.split(self.key)
        return (scale * mx.random.normal(shape, key=own)).astype(dtype)

    def integers(self, count: int, below: int) -> mx.array:
        self.key, own = mx.random.split(self.key)
        return mx.random.randint(0, below, (count,), key=own)


def evaluated(*given: Any) -> tuple[Any, ...]:
    mx.eval(given)
    return given


def widened(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same in float32."""

    def wide(x: Any) -> Any:
        return x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x

    return lambda *given: run(*(wide(x) for x in given))


def forward_only(function: Callable[..., mx.array]) -> Callable[..., list[mx.array]]:
    """Without the output's gradient that the inputs end with."""
    return lambda *given: [function(*given[:-1])]


def differentiated(function: Callable[..., mx.array]) -> Callable[..., list[mx.array]]:
    """`function` and its gradients by all inputs but the last, which is the output's gradient."""

    def run(*given: mx.array) -> list[mx.array]:
        outputs, gradients = mx.vjp(function, list(given[:-1]), [given[-1]])
        return [outputs[0], *gradients]

    return run


def both_ways(
    kernel: str,
    what: str,
    shape: Shape,
    works: Sequence[cases.Work],
    make: Callable[[int, Shape], tuple[Any, ...]],
    sides: dict[str, Callable[..., mx.array]],  # the first is ours
    reference: Callable[..., mx.array],
) -> Iterator[Case]:
    """A case for the forward alone and one for forward and backward."""
    ways: list[tuple[cases.Direction, Any, cases.Work]] = [
        ("forward", forward_only, works[0]),
        ("both", differentiated, works[1]),
    ]
    for way, wrap, work in ways:
        named = [Side(name, mx.compile(wrap(function)), i == 0) for i, (name, function) in enumerate(sides.items())]
        yield Case(kernel, what, way, work, shape, make, named, widened(wrap(reference)))


# --- attention, MLP, head -------------------------------------------------------------------------


def _attention(shape: Shape, recipe: ModuleType, dtype: Any) -> Iterator[Case]:
    H, T, D = shape.heads, shape.context, shape.head_dim
    distance = mx.arange(T)[:, None] - mx.arange(T)

    def make(seed: int, of: Shape) -> tuple[Any, ...]:
        source = Source(seed)
        q, k, v, dy = (source.normal(of.rows, H, T, D, dtype=dtype) for _ in range(4))
        return evaluated(q * D**-0.5, k, v, dy)

    for window in cases.windows(shape):
        dense = mx.where((distance >= 0) & (distance <= window), 0.0, -mx.inf)
        mask = dense.astype(dtype)

        def fused(q: mx.array, k: mx.array, v: mx.array, mask: mx.array = mask) -> mx.array:
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)

        def formula(q: mx.array, k: mx.array, v: mx.array, dense: mx.array = dense) -> mx.array:
            scores = q @ k.swapaxes(-1, -2) + dense.astype(q.dtype)
            return mx.softmax(scores, axis=-1, precise=True) @ v

        works = [cases.attention_work(shape, window, dtype.size, back) for back in (False, True)]
        ours = recipe.make_attention(T, window)
        sides = {"recipe (key slices)": ours, "MLX SDPA, dense mask": fused, "plain MLX": formula}
        yield from both_ways("attention", cases.attention_text(shape, window), shape, works, make, sides, formula)


def _mlp(shape: Shape, recipe: ModuleType, dtype: Any) -> Iterator[Case]:
    C = shape.dim

    def make(seed: int, of: Shape) -> tuple[Any, ...]:
        source = Source(seed)
        w1, w2 = (source.normal(*s, scale=C**-0.5) for s in ((4 * C, C), (C, 4 * C)))
        x, dy = (source.normal(of.tokens, C, dtype=dtype) for _ in range(2))
        return evaluated(x, w1, w2, dy)

    def ours(x: mx.array, w1: mx.array, w2: mx.array) -> mx.array:
        return recipe.linear(mx.square(mx.maximum(recipe.linear(x, w1), 0)), w2)

    def formula(x: mx.array, w1: mx.array, w2: mx.array) -> mx.array:
        hidden = x @ w1.astype(x.dtype).T
        return (mx.where(hidden > 0, hidden, 0) ** 2) @ w2.astype(x.dtype).T

    works = [cases.mlp_work(shape, dtype.size, back) for back in (False, True)]
    sides = {"recipe": ours, "plain MLX": formula}
    yield from both_ways("mlp", cases.mlp_text(shape), shape, works, make, sides, formula)


def plain_loss(x: mx.array, head: mx.array, targets: mx.array) -> mx.array:
    """Mean softcapped cross-entropy with all logits in memory, float32."""
    logits = CAP * mx.tanh((x @ head.astype(x.dtype).T).astype(mx.float32) / CAP)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (mx.logsumexp(logits, axis=-1) - picked).mean()


def _head(shape: Shape, recipe: ModuleType, dtype: Any, device: str) -> Case:
    streams = [mx.default_stream(mx.default_device())]
    if device == "cpu":  # as the recipe's model does
        streams += [mx.new_stream(mx.cpu) for _ in range(recipe.CPU_STREAMS - 1)]

    def make(seed: int, of: Shape) -> tuple[Any, ...]:
        source = Source(seed)
        x, head = source.normal(of.tokens, of.dim, dtype=dtype), source.normal(of.vocab, of.dim, scale=0.1)
        return evaluated(x, head, source.integers(of.tokens, of.vocab))

    def wrap(function: Callable[..., mx.array]) -> Callable[..., list[mx.array]]:
        def run(x: mx.array, head: mx.array, targets: mx.array) -> list[mx.array]:
            loss, gradients = mx.value_and_grad(lambda x, head: function(x, head, targets), argnums=(0, 1))(x, head)
            return [loss, *gradients]

        return run

    ours = Side("recipe (a few rows at a time)", mx.compile(wrap(recipe.make_loss(streams))), True)
    sides = [ours, Side("plain MLX", mx.compile(wrap(plain_loss)))]
    what, work = cases.head_text(shape), cases.head_work(shape, dtype.size, True)
    return Case("head", what, "both", work, shape, make, sides, widened(wrap(plain_loss)))


# --- optimizers -----------------------------------------------------------------------------------


def _flat(given: Sequence[Any]) -> list[tuple[mx.array, ...]]:
    """Four arrays a stack: weights, gradients, momentum, second moment."""
    return [tuple(given[i : i + 4]) for i in range(0, len(given), 4)]


def single_muon(orthogonalise: Callable[[mx.array], mx.array]) -> Callable[..., list[mx.array]]:
    """NorMuon one matrix after the other; the new weights of each stack."""

    def matrix(w: mx.array, g: mx.array, momentum: mx.array, second: mx.array) -> mx.array:
        m, n = w.shape
        momentum = RATES["momentum"] * momentum + (1 - RATES["momentum"]) * g
        g = orthogonalise((1 - RATES["momentum"]) * g + RATES["momentum"] * momentum)
        mean = mx.square(g).mean(axis=-1 if m >= n else -2, keepdims=True)
        second = BETA2 * second + (1 - BETA2) * mean
        scale = mx.rsqrt(mx.maximum(second, FLOOR))
        length, rescaled = mx.sqrt(mean.sum()), mx.sqrt((mean * mx.square(scale)).sum())
        g = g * scale * (length / mx.maximum(rescaled, FLOOR))
        lr = RATES["matrix"] * max(1.0, m / n) ** 0.5
        return w - (lr * g + lr * RATES["decay"] * w * (g * w >= 0))

    def run(*given: mx.array) -> list[mx.array]:
        return [mx.stack([matrix(*(x[i] for x in s)) for i in range(len(s[0]))]) for s in _flat(given)]

    return run


def _muon(shape: Shape, recipe: ModuleType, dtype: Any) -> Case:
    of = cases.muon_stacks(shape)

    def make(seed: int, _: Shape) -> tuple[Any, ...]:
        source, found = Source(seed), []
        for L, m, n in of:
            found += [source.normal(L, m, n, scale=s) for s in (max(m, n) ** -0.5, 1.0, 0.1)]
            spread = source.normal(*((L, m, 1) if m >= n else (L, 1, n)))
            found.append((mx.square(spread) + 0.1) / max(m, n))
        return evaluated(*found)

    def ours(*given: mx.array) -> list[mx.array]:
        rates = {name: mx.array(value) for name, value in RATES.items()}
        new: list[mx.array] = []
        for weights, grads, momentum, second in _flat(given):
            names = [str(i) for i in range(len(weights))]
            muon = recipe.Muon(names, weights.shape[1:], dtype)
            muon.state = {"momentum": momentum, "second": second}
            held = dict(zip(names, weights, strict=True))
            muon.step(held, dict(zip(names, grads, strict=True)), rates)
            new.append(mx.stack([held[name] for name in names]))
        return new

    narrow = single_muon(lambda g: recipe.orthogonalise(g[None], dtype)[0])
    wide = single_muon(lambda g: recipe.orthogonalise(g[None], mx.float32)[0])
    sides = [
        Side("recipe (stacks)", mx.compile(ours), True),
        Side("plain MLX, a matrix at a time", mx.compile(narrow)),
    ]
    works = [cases.muon_work(L, m, n, MUON_STEPS) for L, m, n in of]
    work = cases.Work(sum(w.flops for w in works), sum(w.bytes for w in works))
    return Case(
        "optimizer", cases.muon_text(shape), "step", work, shape, make, sides, wide, tolerance=cases.MUON_TOLERANCE
    )


def _adam(shape: Shape, recipe: ModuleType) -> Case:
    """The third step from given moments: of the whole state only weights and moments are results."""
    from mlx import optimizers

    count, step = 2 + -(-shape.depth // 2), 3
    names = [str(i) for i in range(count)]

    def make(seed: int, _: Shape) -> tuple[Any, ...]:
        source = Source(seed)
        found = []
        for _name in names:
            w, g, first = (source.normal(shape.vocab, shape.dim) for _ in range(3))
            found += [w, g, first, mx.square(source.normal(shape.vocab, shape.dim)) + 0.1]
        return evaluated(*found)

    def ours(*given: mx.array) -> list[mx.array]:
        held = _flat(given)
        weights = {name: s[0] for name, s in zip(names, held, strict=True)}
        adam = recipe.AdamW(weights, names, ADAM_LR, ADAM_BETAS, 0.0)
        for i, kind in ((2, "first moment"), (3, "second moment")):
            adam.state[kind] = {name: s[i] for name, s in zip(names, held, strict=True)}
        grads = {name: s[1] for name, s in zip(names, held, strict=True)}
        adam.step(weights, grads, {"adam": mx.array(1.0), "step": mx.array(float(step))})
        return [weights[name] for name in names] + [adam.state[k][n] for k in adam.state for n in names]

    def mlxs(*given: mx.array) -> list[mx.array]:
        adam = optimizers.AdamW(ADAM_LR, list(ADAM_BETAS), ADAM_EPSILON, weight_decay=0.0, bias_correction=True)
        held = dict(zip(names, _flat(given), strict=True))
        adam.state["step"] = mx.array(step - 1, mx.uint64)
        for name in names:
            adam.state[name] = {"m": held[name][2], "v": held[name][3]}
        adam._initialized = True
        new = adam.apply_gradients({n: held[n][1] for n in names}, {n: held[n][0] for n in names})
        moments = [adam.state[n][kind] for kind in ("m", "v") for n in names]
        return [new[name] for name in names] + moments

    def reference(*given: mx.array) -> list[mx.array]:
        (b1, b2), new, firsts, seconds = ADAM_BETAS, [], [], []
        for w, g, first, second in _flat(given):
            firsts.append(b1 * first + (1 - b1) * g)
            seconds.append(b2 * second + (1 - b2) * mx.square(g))
            size = (firsts[-1] / (1 - b1**step)) / (mx.sqrt(seconds[-1] / (1 - b2**step)) + ADAM_EPSILON)
            new.append(w - ADAM_LR * size)
        return [*new, *firsts, *seconds]

    sides = [Side("recipe", mx.compile(ours), True), Side("mlx.optimizers.AdamW", mx.compile(mlxs))]
    size = count * shape.vocab * shape.dim
    work = cases.Work(12.0 * size, 7.0 * 4 * size)
    return Case("optimizer", f"AdamW, {size / 1e6:.1f}M parameters", "step", work, shape, make, sides, reference)
