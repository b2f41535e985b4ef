"""Definitions out of a peer's train.py, without running its training."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from core.errors import UserError

PEER_NAMES = ("MATRIX_LR", "EMBEDDING_LR", "UNEMBEDDING_LR", "SCALAR_LR", "WEIGHT_DECAY", "ADAM_BETAS")


def rates(peer: Mapping[str, Any]) -> dict[str, Any]:
    """A peer's constants under the names that its optimizer takes them by."""
    return {name.lower(): peer[name] for name in PEER_NAMES}


def definitions(path: Path) -> ast.Module:
    """The part of an upstream train.py that defines: imports, classes, functions and plain constants.

    What needs a GPU or prepared data is left out: the probe of the card, the kernel's download, the training loop.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist", "--peer takes the folder of an upstream clone")
    body: list[ast.stmt] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module in ("kernels", "prepare"):
            continue
        if isinstance(node, ast.Assign):
            calls = any(isinstance(part, ast.Call) for part in ast.walk(node))
            names = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
            if calls or names:  # not a plain constant
                continue
        if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef | ast.Assign):
            body.append(node)
    return ast.Module(body, [])


def load_peer(path: Path, given: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """The names that `definitions` defines.

    `given`: names that stand for what is left out; `wanted`: names that must then be there.
    """
    module = definitions(path)
    namespace: dict[str, Any] = {"__name__": "peer", **given}
    sys.modules["peer"] = SimpleNamespace(__dict__=namespace)  # type: ignore[assignment]  # for dataclasses
    exec(compile(module, str(path), "exec"), namespace)
    missing = [name for name in wanted if name not in namespace]
    if missing:
        raise UserError(f"{path} does not define {', '.join(missing)}", "--peer takes an upstream clone or fork")
    return namespace


def windowed_sdpa(q: Any, k: Any, v: Any, causal: bool, window_size: tuple[int, int]) -> Any:
    """FlashAttention 3's signature, (B, T, H, D), computed by scaled_dot_product_attention."""
    import torch
    import torch.nn.functional as F

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    T, back = q.size(2), window_size[0]
    if back >= T or back < 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & (distance <= back)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
