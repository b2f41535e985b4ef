"""What `bench kernels` times: the work of a case, whoever does it, and how one backend's sides take turns.

Every side of a case does the same work and is held to the same reference, in the same run and on the same inputs,
before its time counts. FLOPs and bytes are those that the work needs, whatever a side really does: products computed
again in a backward are not counted, nor is traffic of what need not be in memory. So the rates of two sides are their
times put differently, and the share of the roofline (Williams, Waterman and Patterson 2009) says how much is left.

Inputs take turns and are together larger than the last-level cache: a step of training does not find its inputs there
either. This module loads neither torch nor mlx.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np

from benchmarks.results import KernelResult, Peak
from benchmarks.work import BenchProfile
from core.paths import project_root
from core.recipe import replace as replace_constants
from kernels.tolerance import TOLERANCE

Direction = Literal["forward", "both", "step"]  # both: forward and backward; step: of an optimizer
# The orthogonalisation multiplies the smallest singular values a thousandfold, and the roundings in them.
MUON_TOLERANCE = {"float32": 5e-3, "bfloat16": 0.06, "float16": 0.06}
LAST_LEVEL_CACHE = 32 * 2**20  # bytes, where the system does not tell
MOST_INPUTS = 12  # sets of inputs; smaller cases than that fit a cache whatever is done
LEAST_ROUNDS = 3  # whatever time they take
WARM = 2  # calls of each side before the first that counts: compilation, first touch of memory


@dataclass(frozen=True)
class Shape:
    """Of the model whose kernels are timed. The names are those of the bench profiles."""

    name: str
    rows: int  # B
    context: int  # T
    heads: int
    head_dim: int
    depth: int
    vocab: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.rows * self.context


@dataclass(frozen=True)
class Work:
    """What one call of a case needs: FLOPs, and bytes that must be read or written once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Side:
    """One way to do a case. `run` returns its results, unread; the first is the output, gradients follow."""

    name: str
    run: Callable[..., Any]
    ours: bool = False


@dataclass(frozen=True)
class Case:
    """One piece of work and everybody who does it. `make(seed, shape)` gives the inputs of one call.

    A reference holds what the sides avoid holding, in numbers of eight bytes: it gets an eighth of the rows.
    """

    kernel: str  # attention, mlp, head, optimizer
    what: str  # "B 16, T 256, H 1, D 128, window 128"
    direction: Direction
    work: Work
    shape: Shape
    make: Callable[[int, Shape], tuple[Any, ...]]
    sides: Sequence[Side]
    reference: Callable[..., Any]  # the same results in the widest dtype that is there
    refused: Mapping[str, str] = field(default_factory=dict)  # name -> why it cannot do the case
    tolerance: Mapping[str, float] = field(default_factory=lambda: TOLERANCE)  # by compute dtype


class Clock(Protocol):
    """What a backend must offer to be timed."""

    @property
    def dtype(self) -> str: ...

    @property
    def where(self) -> str:
        """The number of threads, or the card's name."""

    def wait(self, results: Any) -> None:
        """Return when these are computed."""

    def seconds(self, call: Callable[[], Any]) -> float:
        """What the device takes for it."""

    def array(self, result: Any) -> np.ndarray:
        """-> float64 on the host."""

    def size(self, inputs: tuple[Any, ...]) -> int:
        """Bytes of the arrays in these inputs."""

    def cache(self) -> int:
        """Bytes of the last-level cache."""

    def product(self, size: int) -> Callable[[], Any]:
        """One product of two matrices of this side in the compute dtype."""

    def streams(self, size: int) -> dict[str, tuple[int, Callable[[], Any]]]:
        """What -> bytes read and written by one call, and the call, over arrays of `size` bytes."""

    def product_sizes(self) -> Sequence[int]: ...


# --- the roofline ---------------------------------------------------------------------------------


def measured_peak(clock: Clock, seconds: float) -> Peak:
    """The fastest of square products of several sizes, and of passes over memory far beyond the last-level cache."""
    sizes, rates = clock.product_sizes(), {}
    for size in sizes:
        rates[size] = 2 * size**3 / _fastest(clock, clock.product(size), seconds / 2 / len(sizes))
    best = max(rates, key=rates.__getitem__)
    count = max(4 * clock.cache(), 2**26)
    passes = clock.streams(count)
    traffic = {what: moved / _fastest(clock, call, seconds / 2 / len(passes)) for what, (moved, call) in passes.items()}
    fastest = max(traffic, key=traffic.__getitem__)
    return Peak(
        rates[best],
        f"measured: fastest {clock.dtype} product of {best} x {best} matrices, {clock.where}",
        traffic[fastest],
        f"measured: fastest {fastest} over {count / 2**20:.0f} MiB, what is read and what is written counted",
    )


def higher(one: Peak | None, other: Peak) -> Peak:
    """Of two measurements of one device the better of each: what else the machine did can only have lowered them."""
    if one is None:
        return other
    flops, moved = max((one, other), key=lambda p: p.flops), max((one, other), key=lambda p: p.bandwidth)
    return Peak(flops.flops, flops.flops_source, moved.bandwidth, moved.bandwidth_source)


def _fastest(clock: Clock, call: Callable[[], Any], seconds: float) -> float:
    best, end = math.inf, time.perf_counter() + seconds
    clock.wait(call())
    while time.perf_counter() < end or best == math.inf:
        best = min(best, clock.seconds(call))
    return best


def by_the_host(clock: Clock, call: Callable[[], Any]) -> float:
    """Seconds until its result is there: on a processor, and where a device has no clock that can be read."""
    start = time.perf_counter()
    clock.wait(call())
    return time.perf_counter() - start


# --- one case -------------------------------------------------------------------------------------


def measure(backend: str, case: Case, clock: Clock, seconds: float) -> list[KernelResult]:
    """Every side of the case: first held to the reference, then timed in turns for about `seconds` each."""
    tolerance, refused = case.tolerance[clock.dtype], dict(case.refused)
    errors: dict[str, float] = {}
    for name, tried in checked(case, clock).items():
        if isinstance(tried, str):
            refused[name] = tried
        else:
            errors[name] = tried
    sets, able = rotated(case, clock), []
    for side in (s for s in case.sides if errors.get(s.name, math.inf) <= tolerance):
        if why := obstacle(lambda side=side: clock.wait(side.run(*sets[0]))):  # type: ignore[misc]
            refused[side.name] = f"with all rows: {why}"
            del errors[side.name]
        else:
            able.append(side)
    times = timed(able, sets, clock, seconds)
    ours = {side.name for side in case.sides if side.ours}

    def line(name: str, **found: Any) -> KernelResult:
        given: dict[str, Any] = {"seconds": [], "error": None, "passed": False, **found}
        return KernelResult(
            case.kernel, name, backend, case.direction, clock.dtype, case.what, flops=case.work.flops,
            bytes=case.work.bytes, tolerance=tolerance, ours=name in ours, **given,
        )  # fmt: skip

    lines = []
    for name, error in errors.items():
        finite = error if math.isfinite(error) else None
        if name in times:
            lines.append(line(name, seconds=times[name], error=finite, passed=True, inputs=len(sets)))
        else:
            why = f"it does not compute the same: {error:.2g} away, {tolerance:.2g} allowed"
            lines.append(line(name, error=finite, note=why))
    return lines + [line(name, note=why) for name, why in refused.items()]


def checked(case: Case, clock: Clock) -> dict[str, float | str]:
    """Side -> how far it is from the reference, or why it cannot do the case at all."""
    small = replace(case.shape, rows=max(1, case.shape.rows // 8))
    wanted = [clock.array(x) for x in case.reference(*case.make(0, small))]
    found: dict[str, float | str] = {}
    for side in case.sides:

        def check(side: Side = side) -> None:
            found[side.name] = worst(clock, side.run(*case.make(0, small)), wanted)

        if why := obstacle(check):
            found[side.name] = why
    return found


def obstacle(call: Callable[[], None]) -> str:
    """Why it fails, in one line; empty where it does not."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - compilers' and peers' errors, and no memory left, share no base but this
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return ""


def rotated(case: Case, clock: Clock) -> list[tuple[Any, ...]]:
    """As many sets of inputs as are together twice the last-level cache: at least two, MOST_INPUTS at most."""
    first = case.make(0, case.shape)
    wanted = -(-2 * clock.cache() // max(1, clock.size(first)))
    return [first, *(case.make(seed, case.shape) for seed in range(1, max(2, min(MOST_INPUTS, wanted))))]


def worst(clock: Clock, found: Any, wanted: Sequence[np.ndarray]) -> float:
    """The largest error over all results. Infinite where one is not finite or of another shape."""
    errors = []
    for got, want in zip(map(clock.array, found), wanted, strict=True):
        if got.shape != want.shape or not np.isfinite(got).all():
            return math.inf
        scale = math.sqrt(float(np.square(want).mean())) or 1.0
        errors.append(math.sqrt(float(np.square(got - want).mean())) / scale)
    return max(errors)


def timed(
    sides: Sequence[Side], sets: Sequence[tuple[Any, ...]], clock: Clock, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each call. One call of every side a round, each round begun by another side: what else the machine
    does hits all of them alike."""
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for side in sides:
        for turn in range(WARM):
            clock.wait(side.run(*sets[turn % len(sets)]))
    end, turn = time.perf_counter() + seconds * len(sides), 0
    while sides and (turn < LEAST_ROUNDS or time.perf_counter() < end):
        shift = turn % len(sides)
        for side in (*sides[shift:], *sides[:shift]):
            given = sets[turn % len(sets)]
            times[side.name].append(clock.seconds(partial(side.run, *given)))
        turn += 1
    return times


# --- what the work of each kernel is ----------------------------------------------------------------


def attention_work(shape: Shape, window: int, width: int, backward: bool) -> Work:
    """Scores and their product with v: 4 D FLOPs for each pair of a query and a key that it sees; the backward needs
    twice that. (Papers count 2.5 times, as their kernels make the scores again.) `width`: bytes of a number."""
    pairs = sum(min(i, window) + 1 for i in range(shape.context))
    flops = 4 * shape.rows * shape.heads * shape.head_dim * pairs
    one = shape.tokens * shape.dim * width
    return Work(3.0 * flops, 8.0 * one) if backward else Work(1.0 * flops, 4.0 * one)


def mlp_work(shape: Shape, width: int, backward: bool) -> Work:
    """Two products of N x C x 4C. Weights are float32."""
    N, C = shape.tokens, shape.dim
    flops, stream, weights = 2 * 2 * N * C * 4 * C, N * C * width, 2 * 4 * C * C * 4
    return Work(3.0 * flops, 4.0 * stream + 2.0 * weights) if backward else Work(1.0 * flops, 2.0 * stream + weights)


def head_work(shape: Shape, width: int, backward: bool) -> Work:
    """One product of N x C x V; the logits need not be in memory. The head is float32."""
    N, C, V = shape.tokens, shape.dim, shape.vocab
    flops, stream, weights = 2 * N * C * V, N * C * width, V * C * 4
    return Work(3.0 * flops, 2.0 * stream + 2.0 * weights) if backward else Work(1.0 * flops, 1.0 * stream + weights)


def muon_work(count: int, m: int, n: int, steps: int) -> Work:
    """Each iteration of the orthogonalisation: X X^T, A A and B X; of its m <= n. Weights, gradients and momentum are
    float32; weights and momentum are written as well."""
    small, large = min(m, n), max(m, n)
    flops = steps * (2 * 2 * small * small * large + 2 * small**3)
    return Work(1.0 * count * flops, 5.0 * 4 * count * m * n)


def recipe_at(backend: str, shape: Shape) -> ModuleType:
    """The shipped recipe of a backend at this shape."""
    source = (project_root() / "backends" / backend / "train.py").read_text(encoding="utf-8")
    constants = {"DEPTH": shape.depth, "HEAD_DIM": shape.head_dim, "ASPECT_RATIO": -(-shape.dim // shape.depth)}
    module = ModuleType("train")
    exec(compile(replace_constants(source, constants), "train.py", "exec"), module.__dict__)
    return module


def muon_stacks(shape: Shape) -> list[tuple[int, int, int]]:
    """(matrices, m, n): attention's four of each layer, and the MLP's two, one of them wide."""
    C = shape.dim
    return [(4 * shape.depth, C, C), (shape.depth, 4 * C, C), (shape.depth, C, 4 * C)]


def windows(shape: Shape) -> list[int]:
    """Those of a pattern of S and L."""
    return [shape.context, shape.context // 2]


def attention_text(shape: Shape, window: int) -> str:
    return f"B {shape.rows}, T {shape.context}, H {shape.heads}, D {shape.head_dim}, window {window}"


def mlp_text(shape: Shape) -> str:
    return f"N {shape.tokens}, C {shape.dim}, hidden {4 * shape.dim}"


def head_text(shape: Shape) -> str:
    return f"N {shape.tokens}, C {shape.dim}, V {shape.vocab}"


def muon_text(shape: Shape) -> str:
    return f"Muon, {sum(count for count, _, _ in muon_stacks(shape))} matrices of {shape.dim}"


def linux_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache that Linux tells of; LAST_LEVEL_CACHE where it tells of none."""
    found = []
    for file in folder.glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        found.append(int(text.rstrip("KMG")) * unit)
    return max(found, default=LAST_LEVEL_CACHE)


def shape_of(profile: BenchProfile) -> Shape:
    """The bench's model, and the rows that go through it at once."""
    depth, aspect, head = (int(profile.model[name]) for name in ("DEPTH", "ASPECT_RATIO", "HEAD_DIM"))
    heads = -(-depth * aspect // head)
    return Shape(profile.name, profile.micro_rows, profile.context, heads, head, depth, profile.vocab_size)
