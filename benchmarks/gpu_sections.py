"""The sections of `benchmarks.gpu`, each run in a process of its own: `-m benchmarks.gpu_sections NAME ORDER`."""

from __future__ import annotations

import gc
import json
import math
import os
import runpy
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import blank_card, card_state, gpu_fit, gpu_profile, gpu_rtx, gpu_upstream
from benchmarks.gpu import ALIKE, ALLOCATOR, CONSTANTS, ROOT, Order
from benchmarks.gpu_correctness import (
    TOLERANCE,
    NotMeasured,
    Row,
    attempt,
    correctness,
    error,
    first_line,
    gradients,
    of_a_reference,
    output_gradient,
)
from benchmarks.gpu_run import run, shape
from benchmarks.gpu_sides import copies, milliseconds, sides
from benchmarks.leaving import leave
from benchmarks.upstream_attention import standing
from core.allocator import cap, margin
from core.contract import Spec
from core.recipe import replace
from kernels import attention_choice
from kernels.attention_choice import Case, Choice
from kernels.errors import out_of_memory
from kernels.pinned import PinnedSlots, later

BATCHES = 50  # of the loader
REPEATED = 'with ATTENTION = "triton"'
MARKS = (10, 50, 100, 150)  # steps after which there is a row, beside the last
AGREEING = 50  # of those with which both sides have the same constants
EPSILON = 1e-5  # of the layers' scalars then, or rounding errors would decide on which way they go at first
LEARNT, LEARNT_AFTER = 0.9, 50  # share of a uniform guess's loss, below which text brings it within so many steps
FIXED = "expandable_segments:False"  # of PyTorch's allocator
SPARE = 10.0  # seconds of the section left when it makes no further step


# --- measuring --------------------------------------------------------------------------------


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compiled(function: Callable[..., Any], order: Order) -> Callable[..., Any]:
    """The peer: the plain reference under torch.compile, on a card."""
    return torch.compile(function, dynamic=False) if order.device != "cpu" else function


# --- sections ---------------------------------------------------------------------------------


def facts(order: Order) -> Iterator[Row]:
    import triton

    row: Row = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        row |= {"card": card.name, "capability": f"{card.major}.{card.minor}", "memory_gib": card.total_memory / 2**30}
        row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if blank_card.within():
        row["blank"] = "no kernel was run: numbers are zeros and times mean nothing"
    yield row
    if order.device != "cpu" and torch.cuda.is_available():
        yield from segments()
        free, total = torch.cuda.mem_get_info()  # with this process's context, as every section has one
        yield gpu_fit.fit(order, cap(free, total, margin()))


def segments() -> Iterator[Row]:
    """A row where the driver gives no memory to segments that grow, but does without: all later sections, which would
    fail at their first tensor, are set so."""
    try:
        torch.ones(1, device="cuda")
    except RuntimeError as refused:
        torch.cuda.memory._set_allocator_settings(FIXED)
        torch.ones(1, device="cuda")
        yield {"setting": ALLOCATOR, "value": FIXED, "reason": first_line(refused)}


def chosen(case: Case) -> Choice:
    """The choice, left for the recipe of the next sections. Where one of those that are timed, of which it is not told
    which, does not fit into the card, Triton's alone: if that does not fit, it fails here."""
    try:
        choice = attention_choice.choose(case)
    except RuntimeError as failure:
        if not out_of_memory(failure):
            raise
        said = first_line(failure)
    else:
        attention_choice.keep(case, choice)
        return choice
    gc.collect()
    ours = attention_choice.choose(case, "triton")
    ms = attention_choice.milliseconds(ours.run, case)
    return Choice(ours.name, ours.run, "the others were not timed", {ours.name: ms}, {"the others": said})


def attention(order: Order) -> Iterator[Row]:
    """Forward and backward with norm and RoPE, of everything that is installed behind the one signature."""
    for window in (order.context, order.context // 2, order.context // 8):
        case = Case(
            order.rows, order.context, order.heads, order.heads, order.head_dim, window, torch.bfloat16,
            torch.device(order.device),
        )  # fmt: skip
        choice = chosen(case)
        seen = sum(min(i, window) + 1 for i in range(order.context))
        flops = 3.5 * 4 * order.rows * order.heads * order.head_dim * seen
        ours = choice.milliseconds.get("triton")
        for name, ms in choice.milliseconds.items():
            row: Row = {"window": window, "attention": name, "ms": ms, "tflops": flops / ms / 1e9}
            yield row | ({"times triton's": ms / ours} if ours else {})
        for name, why in choice.refused.items():
            yield {"window": window, "attention": name, "not measured": why}
        yield {"window": window, "attention": choice.name, "chosen": choice.reason}


def mlp(order: Order) -> Iterator[Row]:
    """The two products with the squared ReLU, by each that the recipe chooses from; then the whole of it."""
    from kernels import linear_relu2, mlp_choice

    N, C = order.rows * order.context, order.dim
    case = mlp_choice.Case(N, C, 4 * C, torch.bfloat16, torch.device(order.device))
    choice = mlp_choice.choose(case)
    mlp_choice.keep(case, choice)  # for the recipe of the next sections
    for name, ms in choice.milliseconds.items():
        flops = 2 * 2 * min(N, mlp_choice.TIMED_TOKENS) * C * 4 * C
        yield {"products": name, "ms": ms, "tflops": flops / ms / 1e9}
    for name, why in choice.refused.items():
        yield {"products": name, "not measured": why}
    yield {"products": choice.name, "chosen": choice.reason}

    def make() -> tuple[Tensor, ...]:
        shapes = ((N, C), (4 * C, C), (C, 4 * C))
        return tuple(torch.randn(s, device=order.device).mul_(0.05).to(torch.bfloat16) for s in shapes)

    other = {"ours, products of torch": partial(linear_relu2.mlp, by="torch")}
    flops = 3 * 2 * 2 * N * C * 4 * C
    yield from against(order, linear_relu2.mlp, linear_relu2.reference, copies(make), flops, other)


def head(order: Order) -> Iterator[Row]:
    from kernels import softcapped_loss

    N, C = order.rows * order.context, order.dim

    def make() -> tuple[Tensor, ...]:
        x = torch.randn(N, C, device=order.device).to(torch.bfloat16)
        return x, torch.randn(order.vocab, C, device=order.device).mul_(0.02)

    targets = torch.randint(order.vocab, (N,), device=order.device)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return softcapped_loss.softcapped_loss(x, w, targets, 15.0)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        logits = 15.0 * torch.tanh(F.linear(x, w.to(x.dtype)).float() / 15.0)
        return F.cross_entropy(logits, targets)

    yield from against(order, ours, plain, copies(make), 3 * 2 * N * C * order.vocab)


def against(
    order: Order,
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[tuple[Tensor, ...]],
    flops: int,
    others: Mapping[str, Callable[..., Tensor]] = MappingProxyType({}),
) -> Iterator[Row]:
    """Forward and backward of a kernel, of others of ours by name, and of its peer: time, rate, memory over inputs."""
    dy = output_gradient(ours(*inputs[0]))

    def measured(function: Callable[..., Tensor]) -> Row:
        def both(*leaves: Tensor) -> None:
            gradients(function, leaves, dy=dy)

        both(*inputs[0])
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        ms = milliseconds(both, inputs)
        row: Row = {"ms": ms, "tflops": flops / ms / 1e9}
        beyond = {"mib": (torch.cuda.max_memory_allocated() - held) / 2**20} if torch.cuda.is_available() else {}
        return row | beyond

    peer = compiled(plain, order)
    more = [(name, partial(measured, function)) for name, function in others.items()]
    yield from sides(("ours", partial(measured, ours)), ("torch.compile", partial(measured, peer)), more)


def muon(order: Order) -> Iterator[Row]:
    from kernels import muon as kernel

    rates_ = torch.tensor([0.02, 0.9, 0.1], device=order.device)

    def measured(function: Callable[..., None]) -> Row:
        total = 0.0
        for L, m, n in ((4 * order.depth, order.dim, order.dim), (order.depth, 4 * order.dim, order.dim)):

            def make(L: int = L, m: int = m, n: int = n) -> tuple[Tensor, ...]:
                return (
                    *(torch.randn(L, m, n, device=order.device) for _ in range(3)),
                    torch.ones(L, m, 1, device=order.device),
                )

            inputs = [make() for _ in range(2)]

            def step(*tensors: Tensor) -> None:
                with torch.no_grad():
                    function(*tensors, rates_, torch.bfloat16)

            total += milliseconds(step, inputs)
        return {"ms": total}

    peer = compiled(kernel.reference, order)
    yield from sides(("ours", partial(measured, kernel.muon_)), ("torch.compile", partial(measured, peer)))


def fp8(order: Order) -> Iterator[Row]:
    """The MLP's first product and its gradients: bfloat16 against FP8 with a scale per token, both compiled."""
    from kernels import fp8 as kernel

    N, C = order.rows * order.context, max(kernel.MULTIPLE, order.dim)

    def make() -> tuple[Tensor, ...]:
        shapes = ((N, C), (4 * C, C))
        return tuple(torch.randn(s, device=order.device).mul_(0.05).to(torch.bfloat16) for s in shapes)

    if why := kernel.obstacle(*make()):
        yield {"not measured": why}
        return
    dy = output_gradient(F.linear(*make()))

    def measured(function: Callable[..., Tensor]) -> Row:
        ready = compiled(function, order)

        def both(*leaves: Tensor) -> None:
            gradients(ready, leaves, dy=dy)

        ms = milliseconds(both, copies(make))
        return {"ms": ms, "tflops": 3 * 2 * N * C * 4 * C / ms / 1e9}

    yield from sides(("fp8", partial(measured, kernel.linear)), ("bfloat16", partial(measured, F.linear)))
    yield attempt("fp8 linear", partial(_fp8_right, kernel.linear, kernel.reference, *make()))


def _fp8_right(linear: Callable[..., Tensor], reference: Callable[..., Tensor], x: Tensor, w: Tensor) -> Row:
    found = linear(x, w)
    with of_a_reference():
        difference = error(found, reference(x.double(), w.double()))
    return {"kernel": "fp8 linear", "error": difference, "passed": difference <= TOLERANCE[torch.bfloat16]}


# --- whole steps ------------------------------------------------------------------------------


class Tokens:
    """The same batches for both sides: rows of a prepared data set's first shard, in order, or random ones."""

    def __init__(self, order: Order) -> None:
        self.order, self.at = order, order.text
        file = next(iter(sorted(Path(order.data).glob("train-*.bin"))), None) if order.data else None
        wide = np.uint16 if order.vocab <= 2**16 else np.uint32
        self.stream = np.memmap(file, dtype=wide, mode="r") if file else None
        self.random = np.random.default_rng(0)
        # From pinned memory, as the trainer sends them: a plain copy would wait for all that the card has to do.
        self.send: Callable[[np.ndarray], Tensor] = torch.from_numpy
        if order.device != "cpu":
            self.send = PinnedSlots(torch.device(order.device)).send

    def next(self, rows: int, length: int) -> Tensor:
        count = rows * length
        if self.stream is None:
            found = self.random.integers(0, self.order.vocab, (rows, length + 1), dtype=np.int64)
        else:
            self.at = 0 if self.at + count + 1 > len(self.stream) else self.at
            part = self.stream[self.at : self.at + count + 1].astype(np.int64)
            found = np.lib.stride_tricks.sliding_window_view(part, length + 1)[::length].copy()
            self.at += count
        return self.send(found)


def recipe(order: Order, **constants: Any) -> ModuleType:
    """The shipped one, or the order's own, at the order's shape."""
    file = Path(order.recipe) if order.recipe else ROOT / "backends" / "cuda" / "train.py"
    source = file.read_text(encoding="utf-8")
    own = {"ATTENTION": "triton"} if blank_card.within() else {}  # its zeros are refused of every attention
    source = replace(source, shape(order) | dict(order.told) | own | constants)
    sys.modules["train"] = module = ModuleType("train")  # torch.compile looks it up by its name
    exec(compile(source, "train.py", "exec"), module.__dict__)
    return module


def step(order: Order) -> Iterator[Row]:
    """Our recipe: time of a step, peak memory, loss along equal steps. Where it fails with the attention that was
    chosen, that is told, and Triton's own, which needs no package, has the rest of the time."""
    ms, failed = 0.0, ""
    try:
        for row in our_steps(order):
            ms = row.get("ms", ms)
            yield row
    except Exception as error:  # noqa: BLE001 - Triton's, the packages' and the driver's own share no base but this
        failed = first_line(error)
    if failed:
        gc.collect()  # the error is gone, and with it the frames that held the training
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield {"failed": failed, "passed": False, "repeated": REPEATED}
        for row in our_steps(order, ATTENTION="triton"):
            ms = row.get("ms", ms)
            yield row | {"repeated": REPEATED}
    if order.data:
        yield loader(order, ms)


def learning() -> dict[str, Any]:
    """The constants that an H100 learns most by. By the file's path: the package around it wants psutil, which may not
    be there."""
    found: dict[str, Any] = runpy.run_path(str(ROOT / "backends" / "cuda" / "learning.py"))["LEARNING"]
    return found


def our_steps(order: Order, **constants: Any) -> Iterator[Row]:
    """With the constants that an H100 learns most by, at upstream's shapes. Then some with upstream's own, but for
    `EPSILON`, which have to lead to upstream's losses: where they do, all kernels together are right. The launches stay
    the same."""
    module = recipe(order, **constants)
    fitted = learning()
    shipped = {name: getattr(module, name) for name in fitted}
    vars(module).update(fitted)
    training = module.build(spec(order))
    told = False
    for row in steps(order, training.step):
        yield row
        if not told:  # with the first row, for one that is cut; rows are settled in the first step
            yield from settings(training.describe())
            told = True
    yield from profiled(order, training.step)
    del training  # there may be no room for two
    gc.collect()
    vars(module).update(shipped, SCALAR_EPSILON=EPSILON)
    training = module.build(spec(order))
    for row in steps(order, training.step, AGREEING):
        yield row | {CONSTANTS: ALIKE}


def profiled(order: Order, one: Callable[[Tokens, float], Tensor]) -> Iterator[Row]:
    """Kernel by kernel, of steps whose rates are zero: in what a section has left when it makes no further one."""
    tokens = Tokens(order)
    yield from gpu_profile.kernels(order.device, lambda: one(tokens, 1.0))


def settings(described: Mapping[str, Any]) -> Iterator[Row]:
    """What attention each window got, what the MLP, and why; how many rows go through the model at once."""
    for name, value in described.items():
        if name.startswith(("attention over", "mlp", "rows_")):
            yield {"setting": name, "value": value}


def loader(order: Order, ms: float) -> Row:
    """What the trainer's own loader takes for the batches of a step of `ms` when nothing runs beside it: in a training
    its thread works while the card does, and the host waits for less than this."""
    try:
        from core.data import Dataset, TokenStream
    except ModuleNotFoundError as error:
        return {"not measured": f"{error.name} is not installed"}
    dataset = Dataset.open(Path(order.data), verify="quick")
    files = dataset.open_files("train")
    try:
        stream = TokenStream(files, dataset.token_dtype, order.seed, put=lambda x: x)
    finally:
        for file in files:
            os.close(file)
    with stream:
        stream.next(order.rows, order.context)  # the first maps the files and starts the thread
        began = time.perf_counter()
        for _ in range(BATCHES):
            stream.next(order.rows, order.context)
        seconds = time.perf_counter() - began
    parts = max(1, order.tokens // (order.rows * order.context))
    row: Row = {"loader_batches": BATCHES, "loader_seconds": seconds}
    return row | {"loader_share": 1e3 * seconds / BATCHES * parts / ms}


def spec(order: Order) -> Spec:
    dtype = "float32" if order.device == "cpu" else "bfloat16"
    return Spec(order.vocab, order.context, order.vocab - 1, order.device, dtype, order.seed, 0)


def rtx(order: Order) -> Iterator[Row]:
    """The recipe for gaming cards, held to the memory of a small one, against the usual path of ports."""
    yield from gpu_rtx.small() if order.device == "cpu" else gpu_rtx.on_card(order.limit_gb)


def upstream(order: Order) -> Iterator[Row]:
    """Upstream's model and optimizer as they stand, compiled, with the fastest attention at hand in place of its own,
    which every row of its steps names. Then some steps with `EPSILON`, as ours make them."""
    attention = standing(order)
    yield from attention.rows
    try:
        with of_a_reference():
            one = upstream_step(order, attention.call)
            for row in steps(order, one):
                yield row | {"attention": attention.name}
            yield from profiled(order, one)
            one.again(EPSILON)
            for row in steps(order, one, AGREEING):
                yield row | {CONSTANTS: ALIKE, "attention": attention.name}
    except NotMeasured as why:
        yield {"not measured": str(why), "attention": attention.name}


def upstream_step(order: Order, attention: Callable[..., Tensor]) -> gpu_upstream.Training:
    """A whole optimizer step of upstream's training, from our weights: losses after equal steps say something only
    where both sides start from the same."""
    weights = recipe(order).initial_weights(order.vocab, order.dim, order.seed)
    return gpu_upstream.Training(order, attention, weights)


def steps(order: Order, one: Callable[[Tokens, float], Tensor], most: int | None = None) -> Iterator[Row]:
    """What there is after some of the steps and after the last: a section that is cut leaves the rows before. It stops
    by itself when its time ends, or after `most`; the schedule is that of all steps nonetheless, so that sides which
    made different counts of them can be compared where both were.

    The first step compiles what the sections before have not, and is told apart. As in a trainer a loss is read when
    the next step is queued, and waits for its own step alone; so do the rows. The last row is of the card, from the
    second step on.
    """
    tell: Callable[[], Row] = dict
    tokens, marks, reads = Tokens(order), [time.perf_counter()], deque[Callable[[], np.ndarray]]()
    count = min(order.steps, most or order.steps)
    for i in range(count):
        reads.append(later(one(tokens, i / order.steps)))
        if i == 1:
            tell = card_state.watch(order.device)
        if i:
            loss = float(reads.popleft()())
        marks.append(time.perf_counter())
        if i in MARKS and i < count - 1:
            yield after(order, i, marks[: i + 1], loss)
        if order.ends and time.time() > order.ends - SPARE:
            break
    loss = float(reads.popleft()())
    synchronize()
    yield after(order, len(marks) - 1, marks, loss)
    if card := tell():
        yield card


def after(order: Order, done: int, marks: list[float], loss: float) -> Row:
    """The row after so many steps, begun and ended at `marks`; `loss` is the last one's."""
    seconds = np.diff(marks)
    median = float(np.median(seconds[len(seconds) // 2 :]))
    row: Row = {
        "steps": done,
        "of": order.steps,
        "ms": 1e3 * median,
        "tokens_per_second": order.tokens / median,
        "first_seconds": float(seconds[0]),
    }
    if torch.cuda.is_available():
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    row["loss"] = loss
    if not math.isfinite(loss):
        return row | {"passed": False, "reason": "the loss is no number"}
    most = LEARNT * math.log(order.vocab)
    if order.data and done >= LEARNT_AFTER and loss >= most:
        return row | {"passed": False, "reason": f"of text it should have learnt more: a loss below {most:.2f}"}
    return row


SECTIONS: dict[str, Callable[[Order], Iterator[Row]]] = {
    "facts": facts,
    "correctness": correctness,
    "attention": attention,
    "mlp": mlp,
    "head": head,
    "muon": muon,
    "fp8": fp8,
    "step": step,
    "run": run,
    "rtx": rtx,
    "upstream": upstream,
}


def main() -> None:
    name, order = sys.argv[1], Order(**json.loads(sys.argv[2]))
    for row in SECTIONS[name](order):
        print(json.dumps(row), flush=True)
    leave()


if __name__ == "__main__":
    main()
