"""Whether kernels/attention_cores.py calls what PyTorch takes for scaled_dot_product_attention where sdpa_kernel names
the way, forward and backward, in a child that has a blank card: JSON, one line a case.

Traced, not run: cuDNN is not stood in for.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.leaving import leave
from kernels.attention_cores import CORES

WAYS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SCALE, T = 0.125, 256

Both = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]  # dy, q, k, v -> y, dq, dk, dv


def ours(name: str) -> Both:
    def run(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        y, kept = CORES[name].forward(q, k, v, T, SCALE)
        return y, *CORES[name].backward(dy, q, k, v, y, kept, T, SCALE, (q, k, v))

    return run


def public(name: str) -> Both:
    def run(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        given = [x.transpose(1, 2) for x in leaves]
        with sdpa_kernel(WAYS[name]):
            y = F.scaled_dot_product_attention(*given, is_causal=True, scale=SCALE, enable_gqa=q.size(2) != k.size(2))
        return y.transpose(1, 2), *torch.autograd.grad(y, leaves, dy.transpose(1, 2))

    return run


def calls(run: Both, key_heads: int) -> list[tuple[str, str]]:
    """Attention's operators, and all that each is given."""
    shapes = [(2, T, heads, 64) for heads in (4, 4, key_heads, key_heads)]
    given = [torch.empty(shape, dtype=torch.bfloat16, device="cuda:0") for shape in shapes]
    traced = make_fx(run, tracing_mode="fake")(*given)
    nodes = [node for node in traced.graph.nodes if "_scaled_dot_product_" in str(node.target)]
    return [
        (str(n.target), f"{[_told(a) for a in n.args]} { {k: _told(a) for k, a in n.kwargs.items()} }") for n in nodes
    ]


def _told(given: Any) -> Any:
    """Of a tensor where it comes from, but for views and copies, and how it lies."""
    if not isinstance(given, Node):
        return given
    value, source = given.meta["val"], given
    while any(word in str(source.target) for word in ("transpose", "clone", "detach", "contiguous", "alias")):
        source = source.args[0]
    came = f"{source.args[0].target}[{source.args[1]}]" if "getitem" in str(source.target) else str(source.target)
    return came, tuple(value.shape), value.stride(), str(value.dtype)


def main() -> None:
    for name, key_heads in itertools.product(WAYS, (4, 2)):
        found, wanted = (calls(run(name), key_heads) for run in (ours, public))
        told = {"name": name, "key heads": key_heads, "operators": [operator for operator, _ in found]}
        print(
            json.dumps(told | {"ours": [text for _, text in found], "public": [text for _, text in wanted]}), flush=True
        )


if __name__ == "__main__":
    main()
    leave()
