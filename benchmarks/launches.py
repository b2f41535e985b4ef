"""Every launch of a step on a blank card, with the bytes that it must move and the FLOPs of its products.

    with recorded() as found: step()
    found.launches(), found.missing()

Three doors lead to the card, and each is watched: PyTorch's operators, ours included (a dispatch mode, which sees what
compiled code calls, too), Triton kernels that are launched by themselves, and those that torch.compile made. What went
through is held against what the card itself counted meanwhile; a launch that no door saw would be `missing`.

Bytes are of each tensor once, read or written, as far as the launch needs it: what Inductor says of its own kernels
(`kernel_num_gb`, for which `torch._inductor.config.benchmark_kernel` must be on when they are made), what WRITTEN says
of ours, an operator's arguments and results by its schema. (Of slices that it puts together Inductor counts too much:
0.1 GB of 500 at upstream's shapes.) A row that is gathered counts once for each time that it is asked for, or the whole
table where that is less. FLOPs are those of matrix products and of attention.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import blank_card

COUNTED = ("launches", "products", "on card")  # of the card's own kinds
PRODUCT, IN_TRITON = "products", "products in Triton"
FORWARD, BACKWARD, PASS = "attention forward", "attention backward", "passes over memory"
KINDS = (PRODUCT, IN_TRITON, FORWARD, BACKWARD, PASS)

# Of our kernels what each writes; "+": after it read it. It reads all the other tensors that it gets.
WRITTEN = {
    "residual_norm._forward": "OUT Y R",
    "residual_norm._backward": "DX DX0 SUMS Y",
    "embedded_norm._forward": "OUT",
    "embedded_norm._backward": "+DTABLE",
    "gated_embedding._add": "+V",
    "gated_embedding._backward": "DG +DTABLE",
    "linear_relu2._by_tma": "OUT",
    "linear_relu2._by_pointers": "OUT",
    "linear_relu2._squared": "+H",
    "linear_relu2._times_root": "+D",
    "rotated_norm.rotated_kernel": "Out R",
    "rotated_norm.rotated_back_kernel": "Out",
    "attention.forward_kernel": "Out R Y Lse",
    "attention_backward.delta_kernel": "Delta",
    "attention_backward.backward_kernel": "+Dq Dk Dv",
    "attention_backward.rotate_back_kernel": "Out",
    "softcapped_loss._chunk": "+Z LOSSES",
    "muon._momentum": "+G +M SQUARES",
    "muon._symmetric": "OUT",
    "muon._means": "MEANS +SECOND",
    "muon._length": "LENGTHS",
    "muon._update": "+W",
}
TABLES = ("TABLE", "DTABLE")  # of which the rows of TOKENS are asked for
FRESH = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")  # write their first argument and do not read it
SHAPE_ONLY = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full")


@dataclass(frozen=True)
class Launch:
    name: str
    phase: str  # forward, backward, optimizer
    kind: str  # of KINDS
    times: int  # launches, products and copies on the card
    bytes: int
    flops: int
    shape: str


Told = tuple[str, int, int]  # kind, FLOPs, bytes


# --- bytes and FLOPs ----------------------------------------------------------------------------


def size(x: Tensor) -> int:
    """Bytes of the elements that x shows; one that it shows many times counts once."""
    count = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        count *= length if stride or not length else 1
    return count


def moved(read: list[Tensor], written: list[Tensor]) -> int:
    """Bytes of both, of what is given twice once."""
    return sum(sum({_place(x): size(x) for x in side}.values()) for side in (read, written))


def _place(x: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return x.data_ptr(), tuple(x.shape), tuple(x.stride())


def pairs(length: int, window: int) -> int:
    """Of queries and keys, of one head: the query at i sees min(i, window) keys and its own."""
    reach = min(window, length - 1)
    return length * (reach + 1) - reach * (reach + 1) // 2


def attention_flops(q: Tensor, window: int, products: int) -> int:
    """q (B, T, H, D). Products of a tile: 2 forward, 5 backward."""
    B, T, H, D = q.shape
    return 2 * products * D * B * H * pairs(T, window)


# PyTorch's attention for cards without tensor cores in Triton, and under masks: what it is, and the products of a tile.
EFFICIENT = {
    "aten::_scaled_dot_product_efficient_attention": (FORWARD, 2),
    "aten::_scaled_dot_product_efficient_attention_backward": (BACKWARD, 5),
}


def efficient_flops(func: Any, args: tuple[Any, ...], products: int) -> int:
    """Of q (B, H, T, D) and k (B, H, S, D): all pairs, as a mask spares none; or those that causality leaves."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args)}
    (B, H, T, D), S = given["query"].shape, given["key"].size(2)
    return 2 * products * D * B * H * (pairs(T, T) if given.get("is_causal") else T * S)


def of_kernel(name: str, given: Mapping[str, Any]) -> Told:
    """Of one of our kernels by the arguments that it got."""
    if name not in WRITTEN:
        raise LookupError(f"the kernel {name} is not known; say in WRITTEN ({__file__}) what it writes")
    tensors = {n: found[0] for n, x in given.items() if (found := _tensors(x))}
    writes = WRITTEN[name].split()
    unread = [w.lstrip("+") for w in writes]
    if name.startswith("linear_relu2._by_") and not given["BACKWARD"]:
        unread.append("Y")  # the hidden units, of which the forward has none
    read = [x for n, x in tensors.items() if n not in unread]
    count = moved(read, [tensors[w.lstrip("+")] for w in writes if tensors.get(w.lstrip("+")) is not None])
    count += sum(size(tensors[w[1:]]) for w in writes if w[0] == "+")
    for table in (tensors[n] for n in TABLES if n in tensors):  # fewer rows of it than there are
        rows = tensors["TOKENS"].numel()
        spared = size(table) - min(size(table), rows * table.size(1) * table.element_size())
        count -= spared * (1 + (table is tensors.get("DTABLE")))
    return *_products_of(name, given, tensors), count


def _products_of(name: str, given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    if name.startswith("linear_relu2._by_"):
        return IN_TRITON, 2 * given["M"] * given["N"] * given["K"]
    if name == "muon._symmetric":
        (L, m, n), side = tensors["X"].shape, given["SIDE"]
        down = -(-m // side)
        return IN_TRITON, 2 * L * down * (down + 1) // 2 * side * side * n
    if name == "attention.forward_kernel":
        return FORWARD, attention_flops(tensors["Q"], given["window"], 2)
    if name == "attention_backward.backward_kernel":
        return BACKWARD, attention_flops(tensors["Q"], given["window"], 5)
    return PASS, 0


def of_operator(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes by an operator's schema: what it takes and does not change, what it changes, what it returns."""
    read: list[Tensor] = []
    written = [] if any(r.alias_info for r in func._schema.returns) else _tensors(out)
    name = func._schema.name.removeprefix("aten::")
    again = 0
    for i, argument in enumerate(func._schema.arguments):
        given = _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        info = argument.alias_info
        if name == "_fused_adamw_" and argument.name == "grads":
            read += given  # in the schema they are changed, as a gradient scaler would have it
        elif info is not None and info.is_write:
            written += given
            again += 0 if argument.name == "out" or name in FRESH else sum(size(x) for x in given)
        elif name not in SHAPE_ONLY:
            read += given
    return moved(read, written) + again


def _tensors(x: Any) -> list[Tensor]:
    """On a card, in nested arguments; of a descriptor its tensor."""
    x = x.base if isinstance(x, TensorDescriptor) else x
    if isinstance(x, Tensor):
        return [x] if x.is_cuda else []
    return [t for y in x for t in _tensors(y)] if isinstance(x, list | tuple) else []


def product_flops(args: tuple[Any, ...], out: Tensor) -> int:
    """mm, addmm, bmm, baddbmm, matmul, in place or not: the factors are the last two tensors."""
    left = [x for x in args if isinstance(x, Tensor)][-2]
    return 2 * out.numel() * left.size(-1)


def _shapes(x: Any) -> str:
    """Of the first four; never the arguments' own text, which would show numbers and so wait for the card."""
    return " ".join("x".join(map(str, t.shape)) or "1" for t in _tensors(list(x))[:4])


# --- what stands for FlashAttention 3 (benchmarks/memory_side.py) launches nothing, and is told as it would be ---


def _flash3(phase: str, args: tuple[Any, ...], out: Any) -> Launch:
    q, k, v, window = args
    return Launch(
        "flash3", phase, FORWARD, 1, moved([q, k, v], list(out)), attention_flops(q, window, 2), _shapes(args)
    )


def _flash3_backward(phase: str, args: tuple[Any, ...], out: Any) -> Launch:
    """Three launches: one of dy and y before it, one that turns the sums of dq, float32, into dq."""
    dy, q, k, v, y, lse, *into, window = args
    sums = 2 * 2 * q.numel() * 4 - 2 * q.numel() * q.element_size()  # added to and read again; the zeros are seen
    count = moved([dy, q, k, v, y, lse], into or list(out)) + size(dy) + sums
    return Launch("flash3_backward", phase, BACKWARD, 3, count, attention_flops(q, window, 5), _shapes(args))


STANDS_FOR = {
    "blank::flash3": _flash3,
    "blank::flash3_backward": _flash3_backward,
    "blank::flash3_gradients": _flash3_backward,
}


# --- watching -----------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded() -> Iterator[Recorder]:
    """What is launched within, on this process's blank card."""
    recorder = Recorder()
    blank_card.reset()
    with _watched(CachingAutotuner, recorder.of_inductor), _watched(JITFunction, recorder.of_ours), recorder:
        yield recorder
    recorder.counts = blank_card.counts()


@contextlib.contextmanager
def _watched(kind: Any, door: Callable[..., Any]) -> Iterator[None]:
    run = kind.run
    kind.run = lambda kernel, *args, **kwargs: door(kernel, run, args, kwargs)
    try:
        yield
    finally:
        kind.run = run


def tell(recorder: Recorder, **more: Any) -> None:
    """A line of JSON for each launch; then one of what the card counted, what was not seen, the torch, and more."""
    for launch in recorder.launches():
        print(json.dumps(asdict(launch)))
    counted = {kind: recorder.counts.times(kind) for kind in recorder.accounted}
    print(json.dumps({"counted": counted, "missing": recorder.missing(), "torch": torch.__version__, **more}))


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Launch] = []
        self.accounted: Counter[str] = Counter()  # of what the card counted, by its kinds
        self.counts = blank_card.Counts()  # the card's, once the watch is over

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # else torch.compile would leave the functions under it as they stand

    def launches(self) -> list[Launch]:
        """All of them, in order. What comes after the last backward is the optimizer's."""
        last = max((i for i, launch in enumerate(self.found) if launch.phase == "backward"), default=-1)
        return [*self.found[: last + 1], *(replace(launch, phase="optimizer") for launch in self.found[last + 1 :])]

    def missing(self) -> dict[str, int]:
        """Of what the card counted, what went through none of the doors."""
        return {kind: self.counts.times(kind) - self.accounted[kind] for kind in COUNTED}

    # - the doors -

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        own = OPDEFS.get(name)

        def call() -> Any:
            if own is None:
                return func(*args, **kwargs)
            with self:  # as it is ours, what is in it is told by itself
                return own._init_fn(*args, **kwargs)

        def told(out: Any, products: int) -> Told:
            count = of_operator(func, args, kwargs, out)
            if name in EFFICIENT:
                kind, of_a_tile = EFFICIENT[name]
                return kind, efficient_flops(func, args, of_a_tile), count
            return PRODUCT if products else PASS, product_flops(args, out) if products else 0, count

        out = self._around(name, call, told, args)
        if name in STANDS_FOR:
            self.found.append(STANDS_FOR[name](self._phase(), args, out))
        return out

    def of_inductor(self, kernel: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        def told(out: Any, products: int) -> Told:
            return PASS, 0, round(1e9 * kernel.inductor_meta["kernel_num_gb"])

        return self._around(kernel.fn.__name__, lambda: run(kernel, *args, **kwargs), told, args)

    def of_ours(self, kernel: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"

        def told(out: Any, products: int) -> Told:
            return of_kernel(name, {**dict(zip(kernel.arg_names, args)), **kwargs})

        return self._around(name, lambda: run(kernel, *args, **kwargs), told, args)

    def _around(self, name: str, call: Callable[[], Any], told: Callable[[Any, int], Told], args: Any) -> Any:
        """call(), and a row of what it launched that no row within it has told of."""
        before, had = self._counted(), Counter(self.accounted)
        out = call()
        made = self._counted() - before - (self.accounted - had)
        if made:
            self.accounted += made
            kind, flops, count = told(out, made["products"])
            self.found.append(Launch(name, self._phase(), kind, made.total(), count, flops, _shapes(args)))
        return out

    @staticmethod
    def _counted() -> Counter[str]:
        counts = blank_card.counts()
        return Counter({kind: counts.times(kind) for kind in COUNTED})

    @staticmethod
    def _phase() -> str:
        """A card's backwards run in threads of autograd's own."""
        return "forward" if threading.current_thread() is threading.main_thread() else "backward"
