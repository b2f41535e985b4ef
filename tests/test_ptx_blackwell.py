"""Kernels compiled for sm_100 (B200), executed without it: numbers against float64, and what must be noticed.

The bounds are those of tests/interpreted/. Single products of tcgen05: tests/test_ptx_tcgen05.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

import torch
from ptx_by_hand import fences

from benchmarks.ptx import Fault, emulated
from kernels import attention_reference, linear_relu2, muon, residual_norm, softcapped_loss
from kernels.attention import attention

CARD = 100
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = pytest.mark.parametrize("dtype", EPSILON, ids=["bf16", "f16"])
Change = Callable[[str, str], str]


def random(seed: int) -> Callable[..., Any]:
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed))


def run(function: Callable[..., Any], given: Sequence[Any], dy: Any) -> list[Any]:
    """Output and the gradients of what is given."""
    leaves = [x.detach().clone().requires_grad_(True) for x in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def wide(tensors: Sequence[Any]) -> list[Any]:
    return [x.double() for x in tensors]


def products(change: Change | None = None) -> tuple[set[str], Change]:
    """Kernels that are found to use tcgen05, filled as they run."""
    found: set[str] = set()

    def look(name: str, text: str) -> str:
        assert ".target sm_100a" in text
        if "tcgen05.mma" in text:
            found.add(name)
        assert not re.search(r"wgmma|mma\.sync", text)
        return change(name, text) if change else text

    return found, look


# --- numbers ------------------------------------------------------------------------------------


def attend(
    tokens: int, heads: tuple[int, int], channels: int, window: int, dtype: Any, change: Change | None = None
) -> set[str]:
    """Asserts that output and gradients are right; which kernels used tensor cores."""
    normal, (H, G) = random(tokens), heads
    q, k, v = (normal(1, tokens, n, channels).to(dtype) for n in (H, H // G, H // G))
    angle = torch.outer(torch.arange(tokens).float(), 10000.0 ** (-torch.arange(0, channels, 2) / channels))
    cos, sin, dy = angle.cos(), angle.sin(), normal(1, tokens, H, channels).to(dtype)
    found, look = products(change)
    with emulated(CARD, look, fences=fences(CARD)):
        ours = run(lambda *qkv: attention(*qkv, cos, sin, window), (q, k, v), dy)
    exact = run(
        lambda *qkv: attention_reference.reference(*qkv, *wide((cos, sin)), window), wide((q, k, v)), dy.double()
    )
    for part, f, w in zip(("y", "dq", "dk", "dv"), ours, exact, strict=True):
        error = ((f.double() - w).abs().max() / w.abs().max().clamp(min=3)).item()
        assert error < 12 * EPSILON[dtype], f"{part}: {error:.2e}"  # of NaN: false
    return found


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "heads", "channels", "window"),
    [(131, (2, 1), 64, 60), (150, (1, 1), 128, 10**9), (77, (2, 2), 48, 1)],
    ids=["64", "128", "48"],
)
def test_attention(tokens: int, heads: tuple[int, int], channels: int, window: int, dtype: Any) -> None:
    assert attend(tokens, heads, channels, window, dtype) == {"forward_kernel", "backward_kernel"}


def mlp(rows: int, channels: int, hidden: int, dtype: Any, change: Change | None = None) -> set[str]:
    normal = random(rows)
    x, w1, w2, dy = (
        (normal(*shape) * scale).to(dtype)
        for shape, scale in (
            ((rows, channels), 1.0),
            ((hidden, channels), channels**-0.5),
            ((channels, hidden), hidden**-0.5),
            ((rows, channels), 1.0),
        )
    )
    found, look = products(change)
    with emulated(CARD, look, fences=fences(CARD)):
        ours = run(partial(linear_relu2.mlp, by="triton"), (x, w1, w2), dy)
    exact = run(linear_relu2.reference, wide((x, w1, w2)), dy.double())
    sizes = sizes_of_sums(*wide((x, w1, w2, dy)))
    for part, f, w, size in zip(("y", "dx", "dw1", "dw2"), ours, exact, sizes, strict=True):
        error = ((f.double() - w).norm() / size.norm()).item()
        assert error < 8 * EPSILON[dtype], f"{part}: {error:.2e}"
    return found


def sizes_of_sums(x: Any, w1: Any, w2: Any, dy: Any) -> tuple[Any, ...]:
    """What rounding is relative to: the root of the sum of the terms' squares, of each result."""

    def product(a: Any, b: Any) -> Any:
        return (a.square() @ b.square()).sqrt()

    h, d = product(x, w1.mT), product(dy, w2)
    y, dh = h.square(), 2 * h * d
    return product(y, w2.mT), product(dh, w1), product(dh.mT, x), product(dy.mT, y)


@DTYPES
@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [((256, 128, 256), "_by_tma"), ((130, 72, 200), "_by_pointers"), ((7, 9, 11), "_by_pointers")],
    ids=["tma", "pointers", "few"],
)
def test_mlp(sizes: tuple[int, int, int], kernel: str, dtype: Any) -> None:
    assert mlp(*sizes, dtype) == {kernel}


@DTYPES
@pytest.mark.parametrize(
    ("shape", "transposed", "add"),
    [((1, 256, 128), False, True), ((1, 128, 64), True, False), ((2, 100, 70), False, True), ((1, 33, 47), True, True)],
    ids=["even", "transposed", "odd", "odd transposed"],
)
def test_symmetric_products(shape: tuple[int, int, int], transposed: bool, add: bool, dtype: Any) -> None:
    normal, (L, m, n) = random(shape[1]), shape
    x = normal(L, n, m).to(dtype).mT if transposed else normal(L, m, n).to(dtype)
    d = normal(L, m, m)
    d = (d + d.mT).to(dtype)
    found, look = products()
    with emulated(CARD, look, fences=fences(CARD)):
        tiles = muon.choose(muon.SYMMETRIC, x)
        ours = muon.launch_symmetric(x, d if add else None, 0.7, -1.3 if add else 0.0, tiles)
    exact = 0.7 * (x.double() @ x.double().mT) - (1.3 * d.double() if add else 0)
    assert ((ours.double() - exact).abs().max() / exact.abs().max()).item() < 2 * EPSILON[dtype] + 1e-6
    assert found == {"_symmetric"}


@DTYPES
def test_softcapped_loss(dtype: Any) -> None:
    rows, channels, vocab, cap = 33, 40, 300, 15.0
    normal = random(0)
    x, head = normal(rows, channels).to(dtype), normal(vocab, channels) * 3 * channels**-0.5
    targets = torch.arange(rows) * 7 % vocab
    one = torch.tensor(1.0)
    with emulated(CARD, fences=fences(CARD)) as launched:
        ours = run(lambda *given: softcapped_loss.softcapped_loss(*given, targets, cap), (x, head), one)
    rounded = wide((x, head.to(dtype)))
    exact = run(lambda *given: softcapped_loss.reference(*given, targets, cap), rounded, one.double())
    assert launched
    bound = 13 * EPSILON[dtype]
    assert (ours[0] - exact[0]).abs().item() < bound + 1e-5
    usual = head.norm() / (rows * vocab) ** 0.5, x.double().norm() / rows
    for part, f, w, size in zip(("dx", "dhead"), ours[1:], exact[1:], usual, strict=True):
        error = ((f.double() - w).norm() / (w.norm() + 0.1 * size)).item()
        assert error < bound, f"{part}: {error:.2e}"


@DTYPES
@pytest.mark.parametrize(("rows", "channels"), [(7, 200), (20, 768)])
def test_norms(rows: int, channels: int, dtype: Any) -> None:
    normal = random(rows)
    x, x0, dy = (normal(rows, channels).to(dtype) for _ in range(3))
    a, b = normal(2)
    with emulated(CARD, fences=fences(CARD)) as launched:
        ours = run(lambda *given: residual_norm.residual_norm(*given, a, b, dtype=dtype)[1], (x, x0), dy)
    exact = run(
        lambda *given: residual_norm.reference(*given, *wide((a, b)), dtype=torch.float64)[1],
        wide((x, x0)),
        dy.double(),
    )
    assert launched
    for part, f, w in zip(("y", "dx", "dx0"), ours, exact, strict=True):
        error = ((f.double() - w).norm() / (w.norm() + 1e-3 * w.numel() ** 0.5)).item()
        assert error < 6 * EPSILON[dtype], f"{part}: {error:.2e}"


# --- what is noticed ----------------------------------------------------------------------------

WAIT = r"mbarrier\.try_wait\S+ complete, [^;]*;"
WAITED = "setp.eq.b32 complete, 0, 0;"
DESCRIPTOR = r"(mov\.b32\s+%r\d+, )(68\d{6});"  # of an instruction, of 64 rows


def changed(pattern: str, new: str | Callable[[re.Match[str]], str], count: int = 0) -> Change:
    """Of every kernel: where the pattern stands, the first `count` times (0: always)."""

    def change(name: str, text: str) -> str:
        text, n = re.subn(pattern, new, text, count=count)
        assert n or "tcgen05.mma" not in text, f"{name} has no {pattern}"
        return text

    return change


def unordered(name: str, text: str) -> str:
    """No barrier between what threads wrote last and the first product."""
    product = text.find("tcgen05.mma")
    fence = text.rfind("fence.proxy.async", 0, product)
    between, n = re.subn(r"bar\.sync[^;]*;", ";", text[fence:product])
    assert n or product < 0
    return text[:fence] + between + text[product:]


def halved(found: re.Match[str]) -> str:
    return found[1] + str(int(found[2]) // 2)


small_mlp = partial(mlp, 70, 72, 80, torch.bfloat16)
small_attention = partial(attend, 70, (1, 1), 64, 30, torch.bfloat16)
FAULTS: dict[str, tuple[Callable[..., Any], Change, str]] = {
    "operands are written before the product was waited for": (
        small_mlp, changed(WAIT, WAITED, 1), "st.shared.*written while tensor cores or the copy engine still read it"),
    "the last product is not waited for": (
        small_mlp, changed(rf"{WAIT}(?!(.|\n)*mbarrier\.try_wait)", WAITED), "mbarrier.inval.*while copies come to it"),
    "a result is read before it was waited for": (
        small_attention, changed(WAIT, WAITED), "tcgen05.ld.*read before the product that writes it was waited for"),
    "no load is waited for": (
        small_attention, changed(r"tcgen05\.wait::ld\S+;", ";"), "while it is being loaded"),
    "no store is waited for": (
        small_attention, changed(r"tcgen05\.wait::st\S+;", ";"), "tcgen05.mma.*while it is being stored"),
    "nothing is committed": (
        small_mlp, changed(r"@%p\d+ tcgen05\.commit[^;]*;", ";"), "mbarrier.try_wait.*waits for ever: 1 arrivals"),
    "operands are not fenced": (
        small_mlp, changed(r"fence\.proxy\.async[^;]*;", ";"), "tcgen05.mma.*fence"),
    "no barrier stands between a store and a product": (
        small_mlp, unordered, "tcgen05.mma.*barrier"),
    "columns are not given back": (
        small_mlp, changed(r"@%p\d+ tcgen05\.dealloc[^;]*;", ";"), "kept 64 columns of tensor memory"),
    "too few columns are given back": (
        small_mlp, changed(r"(tcgen05\.dealloc\S+ %r\d+, )(\d+)", halved), "32 columns .* were not lent"),
    "too few columns are asked for": (
        small_mlp, changed(r"(tcgen05\.alloc\S+ \[%r\d+\], )(\d+)", halved), "columns 480 to 543 were not lent"),
    "columns are asked for too late": (
        small_mlp, lambda name, text: text.replace("cta_group::1.sync.aligned;", "cta_group::1.sync.aligned;" + AGAIN),
        "after the right to it was given up"),
    "a warp is at another's lanes": (
        small_mlp, changed(r", 6291456;", ", 0;"), "warp 1 is at lanes 0 to 15 of tensor memory; it has 32 to 63"),
}  # fmt: skip
AGAIN = "\n@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [global_smem], 32;"


@pytest.mark.parametrize("what", FAULTS)
def test_faults_are_noticed(what: str) -> None:
    kernel, change, told = FAULTS[what]
    with pytest.raises(Fault, match=told):
        kernel(change=change)


@pytest.mark.parametrize(
    ("pattern", "new"),
    [
        (r"tcgen05\.mma\.cta_group::1\.kind::f16", "tcgen05.mma.cta_group::1.kind::tf32"),
        (r"(tcgen05\.mma[^;]*), (%p\d+);", r"\1, \2, 2;"),
        (r"tcgen05\.ld\.sync\.aligned\.16x32bx2", "tcgen05.ld.sync.aligned.16x64b"),
        (r"mbarrier::arrive::one\.shared::cluster", "mbarrier::arrive::one.shared::cluster.multicast::cluster"),
        (DESCRIPTOR, lambda found: f"{found[1]}{int(found[2]) | 1 << 2};"),
    ],
    ids=["kind", "factor", "shape", "multicast", "sparse"],
)
def test_unknown_forms_are_refused_by_line(pattern: str, new: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"line \d+"):
        small_mlp(change=changed(pattern, new))


def test_a_negated_operand_shows_in_the_numbers_and_two_do_not() -> None:
    small_mlp(change=changed(DESCRIPTOR, lambda found: f"{found[1]}{int(found[2]) | 3 << 13};"))
    with pytest.raises(AssertionError, match=r"y: \d"):
        small_mlp(change=changed(DESCRIPTOR, lambda found: f"{found[1]}{int(found[2]) | 1 << 13};"))
