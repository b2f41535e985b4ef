"""How much memory a training of the RTX recipe takes at its worst moment, before it is tried. Imports no torch.

    peak = weights and moments + gradients + what the layers keep for backward + what is on its way

N rows x context tokens go through at once, C channels, L layers, V vocabulary entries, s bytes of the compute dtype,
M = 12 L C^2 weights in matrices, E = (2 + layers with value embeddings) V C in embeddings.

- float32 weights, AdamW's two moments and Muon's one, gradients: 4 (M + E) + 8 E + 4 M + 4 (M + E)
- kept, per token: 10 C s a layer (x, q, k, v, attention's result, z, and y of 4 C); 6 C s without the MLP's y; C s when
  whole layers are made again. Beside the layers x0, the last state, its gradient. tests/test_rtx_memory.py counts them.
- the matrices in the compute dtype, s M, as they are kept with the layers
- on its way, at most one of: gradients of one layer's tensors in backward, logits of a part of the rows, Muon's copies
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RECOMPUTES = ("nothing", "hidden", "layer")  # from the fastest to the leanest
KEPT = {"nothing": 10, "hidden": 6, "layer": 1}  # channels a layer keeps per token, over C
LOGITS = 64 * 2**20  # bytes of logits in both paths
ROW_BYTES = 4 * 2**22  # of one float32 tensor of a part of the rows, without Triton
MUON_COPIES = 7.0  # float32 tensors of the largest stack that Muon's step has beside it, without Triton


@dataclass(frozen=True)
class Shape:
    """What of a recipe's constants, vocabulary and context decides about memory."""

    depth: int
    dim: int
    heads: int
    vocab: int
    context: int
    itemsize: int  # bytes of the compute dtype

    @classmethod
    def of(cls, constants: Mapping[str, Any], vocab: int, context: int, itemsize: int = 2) -> Shape:
        heads = math.ceil(constants["DEPTH"] * constants["ASPECT_RATIO"] / constants["HEAD_DIM"])
        return cls(constants["DEPTH"], heads * constants["HEAD_DIM"], heads, vocab, context, itemsize)

    @property
    def value_embeddings(self) -> int:
        return (self.depth + 1) // 2

    @property
    def matrices(self) -> int:
        return 12 * self.depth * self.dim**2

    @property
    def embeddings(self) -> int:
        return (2 + self.value_embeddings) * self.vocab * self.dim

    def kept_per_token(self, recompute: str) -> float:
        """Bytes that one token keeps from forward to backward."""
        lse = 0 if recompute == "layer" else 4 * self.heads * self.depth
        layers = KEPT[recompute] * self.depth * self.dim * self.itemsize
        return (
            layers + lse + 2 * self.dim * self.itemsize + 24
        )  # x0 and the loss's gradient; tokens, targets, positions


@dataclass(frozen=True)
class Plan:
    """How a batch goes through the model, and the bytes that it takes at its worst moment."""

    rows: int  # at once
    recompute: str
    peak: int

    def constants(self) -> dict[str, Any]:
        return {"DEVICE_BATCH_SIZE": self.rows, "RECOMPUTE": self.recompute}


def peak(shape: Shape, rows: int, recompute: str, batch: int, fused: bool = True) -> int:
    """Bytes at the worst moment of a step of `batch` tokens. `fused`: with Triton's kernels."""
    tokens, s = min(rows * shape.context, batch), shape.itemsize
    always = 8 * (shape.matrices + shape.embeddings) + 4 * shape.embeddings
    gradients = 4 * (shape.matrices + shape.embeddings)
    held = gradients if batch > tokens else 0  # those of earlier rows
    kept = tokens * shape.kept_per_token(recompute) + s * shape.matrices
    width = tokens * shape.dim * s  # one tensor of the stream
    table = shape.vocab * shape.dim
    logits = kept + held + (4 + s) * table + min(LOGITS, 16 * tokens * shape.vocab) + width
    backward = kept + max(held, 4 * table) + tokens * on_the_way(shape, recompute)
    first_layer = gradients + 3 * width + (tokens * on_the_way(shape, recompute) + s * shape.matrices / shape.depth)
    first_layer += 8 * table + KEPT[recompute] * width + min(ROW_BYTES, 4 * tokens * shape.dim)
    embedding = gradients + 8 * table + 5 * min(ROW_BYTES, 4 * tokens * shape.dim) + 4 * width
    optimizer = gradients + muon(shape, fused)
    return int(always + max(logits, backward, first_layer, embedding, optimizer))


def on_the_way(shape: Shape, recompute: str) -> float:
    """Bytes per token of one layer's backward beside what is kept: dh and dq, dk, dv with their sources."""
    again = {"nothing": 0, "hidden": 4, "layer": 9}[recompute]
    return (again + 9) * shape.dim * shape.itemsize


def muon(shape: Shape, fused: bool) -> float:
    """Bytes that the step of the largest stack of matrices needs: all c_q, c_k, c_v and c_proj, or all of the MLP's."""
    stack = 4 * shape.depth * shape.dim**2
    return stack * (4 * MUON_COPIES if not fused else 4 * shape.itemsize)
