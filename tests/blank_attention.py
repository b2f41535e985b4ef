"""Whether kernels/attention_peers.py calls what PyTorch takes for scaled_dot_product_attention where sdpa_kernel names
the way, forward and backward, in a child that has a blank card: JSON, one line a case.

Traced, not run: cuDNN is not stood in for.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import attention_peers
from kernels.attention_choice import Case, inputs
from kernels.attention_reference import reference_rotated

WAYS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SCALE = 0.125


def public(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (reference_rotated(q, cos, sin), reference_rotated(k, cos, sin), v))
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))
        return y.transpose(1, 2)

    return run


def graph(run: Callable[..., Tensor], case: Case, gradients: bool) -> list[tuple[str, str]]:
    """Each node's target, and the rest of it."""

    def both(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_(gradients) for x in (q, k, v)]
        y = run(*leaves, cos, sin, case.window, SCALE)
        return (y, *(torch.autograd.grad(y, leaves, torch.ones_like(y)) if gradients else ()))

    traced = make_fx(both, tracing_mode="fake")(*inputs(case))
    return [(str(node.target), f"{node} {node.args} {node.kwargs}") for node in traced.graph.nodes]


def main() -> None:
    attention_peers._turning = lambda case: reference_rotated  # not compiled by itself: the graph is asked for
    for (name, backend), key_heads, gradients in itertools.product(WAYS.items(), (4, 2), (True, False)):
        case = Case(2, 256, 4, key_heads, 64, 256, torch.bfloat16, torch.device("cuda:0"))
        ours = graph(attention_peers.PEERS[name].make(case), case, gradients)
        same = ours == graph(public(backend), case, gradients)
        operators = [target for target, _ in ours if "_scaled_dot_product_" in target]
        print(json.dumps({"name": name, "gradients": gradients, "operators": operators, "same": same}), flush=True)


if __name__ == "__main__":
    main()
