"""Elements whose number does not fit into 32 bits: a micro-batch of 2^21 rows of 1,024 channels has such.

Tensors of 4 GB each, of which the system hands out what is touched: the last programs of a launch run, the rest of the
memory is never used. What they compute is compared, and an address outside of the arguments is an error (watched.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants TRITON_INTERPRET=1", allow_module_level=True)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from interpreted.watched import far

from kernels import (
    attention_reference,
    attention_tiles,
    embedded_norm,
    gated_embedding,
    linear_relu2,
    residual_norm,
)
from kernels.attention import attention_backward, attention_forward

C, ROWS = 1024, 2**21 + 5
LAST = 3  # rows that are looked at
Grid = tuple[int, int, int]


def last_of_all(grid: Grid) -> Iterable[Grid]:
    """The last programs along the first axis, all along the second: blocks of rows, and heads."""
    return [(x, y, 0) for x in range(max(0, grid[0] - LAST), grid[0]) for y in range(grid[1])]


def last_head(grid: Grid) -> Iterable[Grid]:
    """All programs of the last head of the last sequence."""
    return [(x, grid[1] - 1, 0) for x in range(grid[0])]


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random in the last rows; elsewhere what the system hands out, which is not to be touched."""
    x = torch.empty(shape, dtype=dtype)
    x[-LAST:] = torch.randn(LAST, *shape[1:]).to(dtype)
    return x


def close(found: torch.Tensor, wanted: torch.Tensor, within: float = 2.0**-7) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=within, atol=within)


@triton.jit
def in_32_bits(X, Y, C, ROWS: tl.constexpr):
    at = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None] * C + tl.arange(0, 1024)[None, :]
    tl.store(Y + at, tl.load(X + at))


def test_a_kernel_that_counts_in_32_bits_is_found() -> None:
    with far(last_of_all), pytest.raises(Exception, match="lies in none of"):
        in_32_bits[(ROWS // 4,)](rows(ROWS, C), torch.empty(ROWS, C, dtype=torch.bfloat16), C, 4)


@pytest.mark.parametrize("scaled", [True, False])
def test_norms(scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_norm, "processors", lambda device: 2**21)  # each program has one block of rows
    x, x0, d, dy = (rows(ROWS, C) for _ in range(4))
    a, b = (torch.tensor([1.25]), torch.tensor([0.5])) if scaled else (None, None)
    out, y = torch.empty_like(x), torch.empty_like(x)
    with far(last_of_all) as watch:
        residual_norm._launch(x, x0, a, b, out, y)
        total = x if scaled else out
        dx, dx0, _ = residual_norm._residual_norm_backward(d, dy, total, x0 if scaled else None, a, b, x.dtype)
    assert watch.launches == 2 and watch.accesses
    leaves = [t[-LAST:].double().requires_grad_() for t in (x, x0)]
    wanted = residual_norm.reference(*leaves, *(None if t is None else t.double() for t in (a, b)))
    gradients = torch.autograd.grad(wanted, leaves, [t[-LAST:].double() for t in (d, dy)])
    close(out[-LAST:], wanted[0], 2.0**-6)
    close(y[-LAST:], wanted[1], 2.0**-6)
    close(dx[-LAST:], gradients[0], 2.0**-5)
    if scaled:
        close(dx0[-LAST:], gradients[1], 2.0**-5)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("backward", [False, True])
def test_products(backward: bool, target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_relu2, "processors", lambda device: 2**31 - 1)
    M, N, K = 2**19 + 3, 4096, 64
    a, w, y = rows(M, K), torch.randn(N, K).bfloat16() / 8, rows(M, N) if backward else None
    b = w.T.contiguous() if backward else w
    if y is not None:
        y[-LAST:].abs_()
    tiles = (linear_relu2.BACKWARD if backward else linear_relu2.FORWARD)[target]
    with far(last_of_all) as watch:
        found = linear_relu2.launch(a, b, y, tiles)[-LAST:, -tiles.n :].double()
    assert watch.launches == 1
    product = a[-LAST:].double() @ w.double().T
    wanted = product.relu().square() if y is None else 2 * product * y[-LAST:].double().sqrt()
    close(found, wanted[:, -tiles.n :], 2.0**-5)


@pytest.mark.parametrize("backward", [False, True])
def test_the_pass_over_a_product_of_torchs(backward: bool) -> None:
    M, N = 2**19 + 3, 4096
    found, y = rows(M, N), rows(M, N) if backward else None
    if y is not None:
        y[-LAST:].abs_()
    before, scale = found[-LAST:].double(), torch.rand(M) + 0.5
    with far(last_of_all) as watch:
        linear_relu2.pass_over(found, y, scale)
    assert watch.launches == 1
    before *= scale[-LAST:, None]
    wanted = before.relu().square() if y is None else 2 * before * y[-LAST:].double().sqrt()
    close(found[-1:, -linear_relu2.FLAT :], wanted[-1:, -linear_relu2.FLAT :], 2.0**-6)


def test_the_norm_of_an_embedding() -> None:
    table, tokens = torch.randn(7, C), torch.randint(7, (ROWS,))
    dn = rows(ROWS, C)
    dn[-64:-LAST] = 0  # what the last programs add, too
    with far(last_of_all):
        found = embedded_norm.embedded_norm(tokens, table, torch.bfloat16)[-LAST:]
        dtable = embedded_norm.embedded_norm_backward(dn, tokens, table)
    leaf = table.double().requires_grad_()
    e = F.embedding(tokens[-LAST:], leaf)
    wanted = e * torch.rsqrt(e.square().mean(-1, keepdim=True) + residual_norm.EPSILON)
    close(found, wanted.detach(), 2.0**-6)
    close(dtable, torch.autograd.grad(wanted, leaf, dn[-LAST:].double())[0], 1e-5)


def test_value_embeddings() -> None:
    H, D, V = 8, 128, 7
    v, dv = rows(ROWS, H, D), rows(ROWS, H, D)
    dv[-64:-LAST] = 0
    before = v[-LAST:].double()
    gates, table, tokens = torch.rand(ROWS, H).bfloat16(), torch.randn(V, H * D), torch.randint(V, (ROWS,))
    with far(last_of_all):
        gated_embedding.add_gated(v, gates, table, tokens)
        dg, dtable = gated_embedding.add_gated_backward(dv, gates, table, tokens)
    leaves = [gates[-LAST:].double().requires_grad_(), table.double().requires_grad_()]
    added = leaves[0].unsqueeze(-1) * F.embedding(tokens[-LAST:], leaves[1]).view(LAST, H, D)
    wanted = torch.autograd.grad(added, leaves, dv[-LAST:].double())
    close(v[-LAST:], before + added.detach(), 2.0**-6)
    close(dg[-LAST:], wanted[0], 1e-4)
    close(dtable, wanted[1], 1e-4)


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last head of the last of 2,049 sequences of 512 tokens, 16 heads of 128 channels."""
    monkeypatch.setattr(attention_tiles, "INTERPRETED", attention_tiles.Tile(32, 32, 1, 1))
    B, T, H, D, window, scale = 2049, 512, 16, 128, 40, 128**-0.5
    q, k, v, dy = (torch.empty(B, T, H, D, dtype=torch.float16) for _ in range(4))
    small = [torch.randn(1, T, 1, D).half() for _ in range(4)]
    for x, part in zip((q, k, v, dy), small):
        x[-1:, :, -1:] = part
    angle = torch.outer(torch.arange(T).float(), 10000.0 ** (-torch.arange(0, D, 2) / D))
    cos, sin = angle.cos(), angle.sin()
    with far(last_head) as watch:
        y, *beside, turned, keys = attention_forward(q, k, v, cos, sin, window, scale)
        gradients = attention_backward(dy, turned, keys, v, cos, sin, y, *beside, window, scale)
    assert watch.launches == 5
    leaves = [x.double().requires_grad_() for x in small[:3]]
    wanted = attention_reference.reference(*leaves, cos.double(), sin.double(), window)
    close(y[-1:, :, -1:], wanted.detach(), 2.0**-7)
    for found, of in zip(gradients, torch.autograd.grad(wanted, leaves, small[3].double())):
        close(found[-1:, :, -1:], of, 2.0**-5)
