"""torch.compile takes a block with the kernels in it, loss and gradients too, as one graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.linear_relu2 import mlp
from kernels.muon import muon_
from kernels.residual_norm import residual_norm
from kernels.softcapped_loss import softcapped_loss

C, F, V, N = 16, 64, 40, 12


def block(
    x: Tensor, x0: Tensor, scalars: Tensor, w1: Tensor, w2: Tensor, head: Tensor, targets: Tensor, by: str
) -> Tensor:
    """A weighted sum, its norm, an MLP on that, a plain sum, and the loss."""
    stream, y = residual_norm(x, x0, scalars[0], scalars[1], dtype=torch.bfloat16)
    out = mlp(y, w1.to(torch.bfloat16), w2.to(torch.bfloat16), by=by)
    _, y = residual_norm(stream, out, dtype=torch.bfloat16)
    return softcapped_loss(y, head, targets, 15.0)


@pytest.mark.parametrize("by", ["triton", "torch"])
def test_a_block_compiles_whole_and_agrees_with_itself_in_eager(by):
    sizes = [(3, 4, C), (3, 4, C), (2,), (F, C), (C, F), (V, C)]
    leaves = [torch.randn(s).mul_(0.3).requires_grad_(True) for s in sizes]
    targets = torch.randint(V, (3, 4))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(function(*leaves, targets, by), leaves) for function in (compiled, block)]
    for f, w in zip(*found):
        assert f.dtype == torch.float32
        torch.testing.assert_close(f, w)


def test_changing_rates_compile_once():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=count, fullgraph=True)
    def step(weights, grads, momentum, second, rates):
        muon_(weights, grads, momentum, second, rates, torch.float32)

    state = torch.randn(2, 8, 16), torch.randn(2, 8, 16), torch.zeros(2, 8, 16), torch.zeros(2, 1, 16)
    before = state[0].clone()
    for lr in (0.1, 0.05, 0.01):
        step(*state, torch.tensor([lr, 0.9, 0.1]))
    assert len(graphs) == 1 and not torch.equal(before, state[0])
