"""torch.compile for a recipe's forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion


def compiled(function: Callable[..., Tensor], whole: bool) -> Callable[..., Tensor]:
    """`function` compiled for the shapes it is called with. whole: as one graph, or an error."""
    if TorchVersion(torch.__version__) < "2.13":
        _name_operators_only()
    found: Callable[..., Tensor] = torch.compile(function, dynamic=False, fullgraph=whole)
    return found


def _name_operators_only() -> None:
    """Of an operator that is met for the first time, torch before 2.13 writes out all that its arguments are computed
    from, for a message that is not shown. With two paths through each layer that doubles with every layer: for the
    loss behind eight of them it was not done after 500 s. Here the message names the operator."""
    from torch._inductor import exc

    def operator_str(target: Any, args: list[Any], kwargs: dict[str, Any]) -> str:
        return f"  target: {target} of {len(args)} arguments"

    exc.OperatorIssue.operator_str = staticmethod(operator_str)  # type: ignore[method-assign]
