"""Every kernel against its float64 reference on the same device: the section `correctness` of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import RESTART, Order
from kernels import tolerance
from kernels.agreement import apart
from kernels.errors import out_of_memory

Row = dict[str, Any]
TOLERANCE = {getattr(torch, name): share for name, share in tolerance.TOLERANCE.items()}
# As in benchmarks/kernel_cases.py, which needs more packages than are here.
MUON_TOLERANCE = {torch.bfloat16: 0.06, torch.float16: 0.06, torch.float32: 5e-3}
RATES = (1.0, 0.9, 0.5)  # Muon's learning rate, momentum and weight decay: each of them shows in one step
OTHER_HEAD = 64  # channels of a head, beside the order's own
GATE = 32  # channels of the norm that a value embedding's gate looks at, as in the recipes
NO_MEMORY = "out of memory"


def correctness(order: Order) -> Iterator[Row]:
    """Every kernel, forward and backward, in the compute dtype of the recipes and in float16.

    After an access that a card does not allow it serves the process no more, and no check behind would say anything:
    the row tells how many are done, and `benchmarks.gpu` starts another process for the rest.
    """
    for done, (name, check, dtype) in enumerate(checks(order), 1):
        if done > order.skip:
            row = attempt(name, check, dtype)
            if lost := "failed" in row and not alive():
                row[RESTART] = done
            yield row
            if lost:
                return


def alive() -> bool:
    """Whether the card still serves this process; where there is none, nothing was lost."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def checks(
    order: Order, first: torch.dtype | None = None
) -> Iterator[tuple[str, Callable[[], Row], torch.dtype | None]]:
    """Name, check, and the dtype that it is of: `first`, by default bfloat16 on a card, and float16."""
    on_card = torch.device(order.device).type == "cuda"
    first = first or (torch.bfloat16 if on_card else torch.float32)  # the interpreter multiplies bfloat16 wrongly
    T = order.context
    for dtype, windows in ((first, (T, T // 2, 37)), (torch.float16, (T // 2,))):
        for head, window in [*((order.head_dim, w) for w in windows), (OTHER_HEAD, T // 2)]:
            name = f"attention, heads of {head}, window {window} of {T}"
            yield name, partial(attention, name, order, dtype, window, head), dtype
        others: list[tuple[str, Callable[[str, Order, torch.dtype], Row]]] = [
            ("mlp", partial(mlp, by="triton")),
            ("mlp, products of torch", partial(mlp, by="torch")),
            ("residual_norm", partial(residual_norm, scaled=True)),
            ("residual_norm, no scalars", partial(residual_norm, scaled=False)),
            ("project", partial(project, gated=False)),
            ("project, value embeddings", partial(project, gated=True)),
            ("attend, value embeddings", partial(attend, by=None, window=T // 2)),
            ("attend, attention of torch", partial(attend, by="flash", window=T)),
            *((f"attend, {name}", partial(attend, by=name, window=T)) for name in also_at_hand(order, dtype)),
            ("feed", partial(feed, by="triton", keep_hidden=True)),
            ("feed, hidden made again", partial(feed, by="triton", keep_hidden=False)),
            ("feed, products of torch", partial(feed, by="torch", keep_hidden=True)),
            ("last_norm", last_norm),
            ("softcapped_loss", softcapped_loss),
            ("muon, X X^T", symmetric),
        ]
        C = order.dim
        for L, m, n in ((4, C, C), (2, 4 * C, C), (2, C, 4 * C)):
            others.append((f"muon, {L} of {m} x {n}", partial(muon, of=(L, m, n))))
        for name, check in others:
            yield name, partial(check, name, order, dtype), dtype
    if torch.cuda.is_available():
        for name, beside in (("pinned slots", slots), ("loss read one step later", late_reading)):
            yield name, partial(beside, name, order), None


def also_at_hand(order: Order, dtype: torch.dtype) -> list[str]:
    """Attentions beside torch's flash attention that a layer can have within and that can do the order's case."""
    from kernels.attention_choice import Case, available
    from kernels.attention_cores import CORES

    heads, T = order.heads, order.context
    can = available(Case(2, T, heads, heads, order.head_dim, T, dtype, torch.device(order.device)))
    return [name for name in CORES if name != "flash" and not can[name]]


def attempt(name: str, check: Callable[[], Row], dtype: torch.dtype | None = None) -> Row:
    """What the check finds; where it cannot end, a row that says why, and the checks behind it still run."""
    row: Row = {"kernel": name} | ({"dtype": str(dtype)[6:]} if dtype else {})
    try:
        return check()
    except NotMeasured as why:
        return row | {"not measured": str(why)}
    except Exception as error:  # noqa: BLE001 - Triton's, the driver's and torch's own share no base but this
        return row | {"failed": first_line(error), "passed": False}


def first_line(error: Exception) -> str:
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}"[:300]


class NotMeasured(Exception):
    """What ours is held against does not fit into the card, or nobody uses it there: that says nothing about ours."""


def can_multiply(device: torch.device) -> None:
    """NotMeasured where Triton's attention is not used: on cards whose tensor cores it does not know."""
    from kernels import portable

    if not portable.products(device):
        raise NotMeasured(portable.told(device))


@contextmanager
def of_a_reference() -> Iterator[None]:
    """In it a reference or a peer computes. NotMeasured where it runs out of memory; ours, outside of it, fails so."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise NotMeasured(f"{NO_MEMORY}, of what it is held against: {first_line(error)}") from error


# --- kernels ----------------------------------------------------------------------------------


def attention(name: str, order: Order, dtype: torch.dtype, window: int, head: int) -> Row:
    from kernels.attention import attention
    from kernels.attention_choice import Case, inputs
    from kernels.attention_reference import reference

    case = Case(2, order.context, order.heads, order.heads // 2, head, window, dtype, torch.device(order.device))
    can_multiply(case.device)
    q, k, v, cos, sin = inputs(case)
    dy = output_gradient(q)  # whose shape the output has
    found = gradients(attention, (q, k, v), cos, sin, window, dy=dy)
    wanted = references(reference, (q, k, v), cos.double(), sin.double(), window, dy=dy)
    return compare(name, found, wanted, dtype)


def mlp(name: str, order: Order, dtype: torch.dtype, by: str) -> Row:
    from kernels import linear_relu2

    C, normal = order.dim, source(order)
    given = (
        normal(rows(order), C, dtype=dtype),
        normal(4 * C, C, scale=C**-0.5, dtype=dtype),
        normal(C, 4 * C, scale=C**-0.5, dtype=dtype),
    )
    dy = output_gradient(given[0])  # whose shape the output has
    found = gradients(linear_relu2.mlp, given, by, dy=dy)
    return compare(name, found, references(linear_relu2.reference, given, dy=dy), dtype)


def residual_norm(name: str, order: Order, dtype: torch.dtype, scaled: bool) -> Row:
    """The norm, with scalars as in front of a layer's halves, and without as between them.

    The scalars' gradients are sums over all elements. The output's gradient goes with x0, or their terms would cancel
    and rounding be large beside what is left.
    """
    from kernels import residual_norm as kernel

    def norm_of(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda *given: function(*given)[1]

    normal = source(order)
    x, x0 = (normal(rows(order), order.dim, dtype=dtype) for _ in range(2))
    scalars = [torch.tensor([value], device=order.device) for value in (0.9, 0.2)] if scaled else []
    dy = x0 + normal(rows(order), order.dim, dtype=dtype)
    given = (x, x0, *scalars)
    found = gradients(norm_of(kernel.residual_norm), given, dy=dy)
    return compare(name, found, references(norm_of(kernel.reference), given, dy=dy), dtype)


def project(name: str, order: Order, dtype: torch.dtype, gated: bool) -> Row:
    """The first half of a layer: both outputs, and all gradients, of value embeddings too. The stream's gradient goes
    with x and x0, for the sake of the scalars' as in `residual_norm`."""
    from kernels import lean

    normal, n, C = source(order), rows(order), order.dim
    x, x0 = uneven(order, dtype), normal(n, C, dtype=dtype)
    scalars = [torch.tensor([value], device=order.device) for value in (0.9, 0.2)]
    given: tuple[Tensor, ...] = (x, x0, *scalars, normal(3 * C, C, scale=C**-0.5, dtype=dtype))
    if gated:
        gate = normal(order.heads, min(GATE, C), scale=min(GATE, C) ** -0.5, dtype=dtype)
        given = (*given, gate, normal(order.vocab, C))
    tokens = torch.randint(order.vocab, (n,), device=order.device)
    dy = (x + x0 + normal(n, C, dtype=dtype), normal(n, 3 * C, dtype=dtype))

    def ours(
        x: Tensor, x0: Tensor, a: Tensor, b: Tensor, w: Tensor, gate: Tensor | None = None, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return lean.project(x, x0, a, b, w, gate, table, tokens)

    found = gradients(ours, given, dy=dy)
    return compare(name, found, references(project_reference, given, tokens=tokens, heads=order.heads, dy=dy), dtype)


def attend(name: str, order: Order, dtype: torch.dtype, by: str | None, window: int) -> Row:
    """The first half of a layer with attention in it that uses up q and k: Triton's, or another's on turned ones."""
    from kernels import lean
    from kernels.attention_choice import Case, available, inputs
    from kernels.attention_reference import reference

    normal, C, heads, T = source(order), order.dim, order.heads, order.context
    case = Case(2, T, heads, heads, order.head_dim, window, dtype, torch.device(order.device))
    if by is None:
        can_multiply(case.device)
    elif why := available(case)[by]:
        raise NotMeasured(f"{by}: {why}")
    *_, cos, sin = inputs(case)
    x, x0 = (t.view(2, T, C) for t in (uneven(order, dtype, 2 * T), normal(2 * T, C, dtype=dtype)))
    scalars = [torch.tensor([value], device=order.device) for value in (0.9, 0.2)]
    weights = (normal(3 * C, C, scale=C**-0.5, dtype=dtype), normal(heads, min(GATE, C), scale=0.2, dtype=dtype))
    given = (x, x0, *scalars, *weights, normal(order.vocab, C))
    tokens = torch.randint(order.vocab, (2, T), device=order.device)
    dy = (x + x0 + normal(2, T, C, dtype=dtype), normal(2, T, C, dtype=dtype))

    def in_plain_torch(x: Tensor, x0: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        out, qkv = project_reference(x.flatten(0, 1), x0.flatten(0, 1), *rest, tokens=tokens.flatten(), heads=heads)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in qkv.view(2, T, 3 * C).chunk(3, dim=-1))
        return out.view_as(x), reference(q, k, v, cos.to(x), sin.to(x), window).flatten(2)

    found = gradients(lean.attend, given, tokens, cos, sin, window, by, dy=dy)
    return compare(name, found, references(in_plain_torch, given, dy=dy), dtype)


def project_reference(
    x: Tensor,  # (N, C)
    x0: Tensor,  # (N, C)
    a: Tensor,  # (1,)
    b: Tensor,  # (1,)
    w: Tensor,  # (3C, C)
    gate: Tensor | None = None,  # (H, channels of the gate)
    table: Tensor | None = None,  # (V, C)
    *,
    tokens: Tensor,  # (N,)
    heads: int,
) -> tuple[Tensor, Tensor]:
    """kernels/lean.py's `project` in plain torch, any dtype -> (N, C), (N, 3C)."""
    out = a * x + b * x0
    n = normed(out)
    q, k, v = (n @ w.T).chunk(3, dim=-1)
    if gate is not None and table is not None:
        g = 2 * torch.sigmoid(n[:, : gate.size(1)] @ gate.T)
        v = v + (g[..., None] * table[tokens].unflatten(-1, (heads, -1))).flatten(1)
    return out, torch.cat((q, k, v), dim=-1)


def feed(name: str, order: Order, dtype: torch.dtype, by: str, keep_hidden: bool) -> Row:
    """The second half of a layer, whose products have the norm's scale in them."""
    from kernels import lean

    normal, C = source(order), order.dim
    given = (
        uneven(order, dtype),
        normal(rows(order), C, dtype=dtype),
        normal(C, C, scale=C**-0.5, dtype=dtype),
        normal(4 * C, C, scale=C**-0.5, dtype=dtype),
        normal(C, 4 * C, scale=C**-0.5, dtype=dtype),
    )
    dy = normal(rows(order), C, dtype=dtype)
    found = gradients(lean.feed, given, keep_hidden, by, dy=dy)
    return compare(name, found, references(feed_reference, given, dy=dy), dtype)


def feed_reference(x: Tensor, u: Tensor, wu: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """kernels/lean.py's `feed` in plain torch, any dtype: (N, C), (N, C), (C, C), (F, C), (C, F) -> (N, C)."""
    z = x + u @ wu.T
    return z + (normed(z) @ w1.T).relu().square() @ w2.T


def last_norm(name: str, order: Order, dtype: torch.dtype) -> Row:
    from kernels import lean

    given, dy = (uneven(order, dtype),), source(order)(rows(order), order.dim, dtype=dtype)
    return compare(name, gradients(lean.last_norm, given, dy=dy), references(normed, given, dy=dy), dtype)


def normed(z: Tensor) -> Tensor:
    from kernels.residual_norm import EPSILON

    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPSILON)


def uneven(order: Order, dtype: torch.dtype, count: int = 0) -> Tensor:
    """(N, C), some rows four times as long as others: whoever takes another row's norm for a row's is far off."""
    x = source(order)(count or rows(order), order.dim)
    lengths = torch.linspace(0.5, 2.0, len(x), device=x.device)[torch.randperm(len(x), device=x.device)]
    return x.mul_(lengths[:, None]).to(dtype)


def softcapped_loss(name: str, order: Order, dtype: torch.dtype) -> Row:
    """The gradient of a mean over N rows, N times: float16 keeps none that is smaller, and has a scaler for that."""
    from kernels import softcapped_loss as kernel

    normal, n = source(order), rows(order)
    x, head = normal(n, order.dim, dtype=dtype), normal(order.vocab, order.dim, scale=0.3)
    targets = torch.randint(order.vocab, (n,), device=order.device)
    scale = torch.tensor(float(n), device=order.device)
    found = gradients(kernel.softcapped_loss, (x, head), targets, 15.0, dy=scale)
    wanted = references(kernel.reference, (x, head), targets, 15.0, dy=scale)
    return compare(name, found, wanted, dtype)


def symmetric(name: str, order: Order, dtype: torch.dtype) -> Row:
    """Muon's symmetric product alone, of which only one triangle is computed."""
    from kernels import muon as kernel
    from kernels.targets import choose

    x = source(order)(2, order.dim, 4 * order.dim, dtype=dtype)
    product = kernel.launch_symmetric(x, None, 1 / order.dim, 0.0, choose(kernel.SYMMETRIC, x))
    with of_a_reference():
        wanted = x.double() @ x.double().mT / order.dim
    return compare(name, [product], [wanted], dtype)


def muon(name: str, order: Order, dtype: torch.dtype, of: tuple[int, int, int]) -> Row:
    """A step of a stack. Beside it how far the plain reference is in the same dtype: the rounding that it cannot
    avoid, which five iterations multiply, and so what the tolerance is there for."""
    from kernels import muon as kernel

    (L, m, n), normal = of, source(order)
    rates = torch.tensor(RATES, device=order.device)
    state = [normal(L, m, n, scale=s) for s in (max(m, n) ** -0.5, 1.0, 0.1)]
    ours = [*state, normal(*((L, m, 1) if m >= n else (L, 1, n))).square_().add_(0.1).div_(max(m, n))]
    with of_a_reference():
        plain, wide = [t.clone() for t in ours], [t.double() for t in ours]
        kernel.reference(wide[0], wide[1], wide[2], wide[3], rates.double(), torch.float64)
        kernel.reference(plain[0], plain[1], plain[2], plain[3], rates, dtype)
    kernel.muon_(*ours, rates, dtype)
    found, rounded, wanted = ([t[0], t[2], t[3]] for t in (ours, plain, wide))  # the gradients are used up
    row = compare(name, found, wanted, dtype, MUON_TOLERANCE)
    with of_a_reference():
        return row | {"plain reference": largest_error(rounded, wanted)}


# --- what comes and goes beside the card's work -----------------------------------------------------


def slots(name: str, order: Order) -> Row:
    """Batches sent one after another while the card is busy arrive as they were: no buffer is written too early."""
    from kernels.pinned import PinnedSlots

    sender, busy = PinnedSlots(torch.device(order.device)), torch.randn(8192, 8192, device=order.device)
    sent = [np.random.default_rng(i).integers(0, order.vocab, (64, 2049), dtype=np.int32) for i in range(12)]
    arrived = []
    for x in sent:
        busy = torch.mm(busy, busy) * 1e-4
        arrived.append(sender.send(x))
    right = all(np.array_equal(a.cpu().numpy(), x) for a, x in zip(arrived, sent, strict=True))
    return {"kernel": name, "passed": right}


def late_reading(name: str, order: Order) -> Row:
    """A loss that is read while the next step is queued is the old one, and is there before that step has ended."""
    from kernels.pinned import later

    busy, loss = torch.randn(8192, 8192, device=order.device), torch.zeros((), device=order.device)
    torch.mm(busy, busy)
    right = early = True
    for step in range(8):
        loss.fill_(step)  # the recipe's next step writes where the last one did
        read = later(loss)
        for _ in range(8):
            torch.mm(busy, busy)
        ended = torch.cuda.Event()
        ended.record()
        loss.fill_(-1.0)
        right = right and float(read()) == step
        early = early and not ended.query()
        torch.cuda.synchronize()
    return {"kernel": name, "passed": right and early, "right": right, "before its end": early}


# --- comparing --------------------------------------------------------------------------------


def rows(order: Order) -> int:
    """N of what is computed row by row."""
    return order.rows * order.context // 8


def source(order: Order) -> Callable[..., Tensor]:
    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, device=order.device) * scale).to(dtype)

    return normal


Gradient = Tensor | tuple[Tensor, ...] | None


def gradients(
    function: Callable[..., Any], leaves: tuple[Tensor, ...], *rest: Any, dy: Gradient = None, **more: Any
) -> list[Tensor]:
    """Output, or outputs, and gradients for `dy`, the gradient of each; by default one of its own shape."""
    wanted = [x.detach().requires_grad_(x.is_floating_point()) for x in leaves]
    y = function(*wanted, *rest, **more)
    outputs = y if isinstance(y, tuple) else (y,)
    given = [output_gradient(out) for out in outputs] if dy is None else dy
    found = torch.autograd.grad(outputs, [x for x in wanted if x.requires_grad], given)
    return [*(out.detach() for out in outputs), *found]


def references(
    function: Callable[..., Any], leaves: tuple[Tensor, ...], *rest: Any, dy: Gradient = None, **more: Any
) -> list[Tensor]:
    """`gradients` of a reference, of leaves in float64. NotMeasured where it runs out of memory."""
    with of_a_reference():
        return gradients(function, tuple(x.detach().double() for x in leaves), *rest, dy=double(dy), **more)


def output_gradient(y: Tensor) -> Tensor | None:
    """From -1 to 1 over all elements; None for a scalar. Of large outputs it takes as long as a kernel: whoever times
    makes it once.

    Counted in float64: in float16 the count of elements itself overflows beyond 65,504, and most were no numbers.
    """
    if not y.dim():
        return None
    return torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).to(y.dtype).view(y.shape)


def double(dy: Gradient) -> Gradient:
    """The rounded one for the reference too: its rounding is no error of a kernel's."""
    if isinstance(dy, tuple):
        return tuple(d.double() for d in dy)
    return None if dy is None else dy.double()


def error(found: Tensor, wanted: Tensor) -> float:
    """How far apart these are (kernels/agreement.py). Where zeros are wanted, as on a card that computes
    nothing, equal zeros are no proof: 1. Where something is no number, infinite: a comparison with NaN is false, and
    the largest of several errors, one of them NaN, may be any of them."""
    return apart(found, wanted) if bool(wanted.any()) else 1.0


def compare(
    name: str,
    found: Sequence[Tensor],
    wanted: Sequence[Tensor],
    dtype: torch.dtype,
    tolerance: dict[torch.dtype, float] = TOLERANCE,
) -> Row:
    with of_a_reference():  # both are made float64 here
        worst = largest_error(found, wanted)
    return {"kernel": name, "dtype": str(dtype)[6:], "error": worst, "passed": worst <= tolerance[dtype]}


def largest_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(error(f, w) for f, w in zip(found, wanted, strict=True))
