"""How much memory a training of the RTX recipe takes at its worst moment, before it is tried. Imports no torch.

    peak = weights and moments + gradients + what the layers keep for backward + what is on its way

N rows x context tokens go through at once, C channels, L layers, V vocabulary entries, s bytes of the compute dtype,
M = 12 L C^2 weights in matrices, E = (2 + layers with value embeddings) V C in embeddings.

- float32 weights, AdamW's two moments and Muon's one, gradients: 4 (M + E) + 8 E + 4 M + 4 (M + E)
- kept, per token: 10 C s a layer (x, q, k, v, attention's result, z, and y of 4 C); 6 C s without the MLP's y; C s when
  the whole layer is made again. Of attention three float32 a head, too. Beside the layers the last state and its norm.
- the matrices in the compute dtype, s M, as they are kept with the layers; one layer's where it is made again
- on its way, at most one of: the logits of a part of the rows; the backward of a layer, with the gradients that the
  layers behind it have left and those of earlier rows; the gradients that are put together; Muon's copies

What is made again differs by layer: the worst moment mostly is the last layer's backward, before which all layers hold
what they keep, and what a first layer needs on its way comes when the others are gone.

tests/test_blank_card.py holds it against what PyTorch's allocator hands out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RECOMPUTES = ("nothing", "hidden", "layer")  # from the fastest to the leanest
KEPT = {"nothing": 10, "hidden": 6, "layer": 1}  # channels a layer keeps per token, over C
# Widths of the stream in the MLP's backward, beside what is kept: the gradients of its output, its input and
# attention's result, dh of 4 C, and one to spare. Where y is made again it is there beside dh, before two of these;
# with a whole layer q, k, v, attention's result and z are, too.
ON_THE_WAY = {"nothing": 8, "hidden": 10, "layer": 15}
# Without Triton's attention dq, dk and dv are there beside the one tensor that they are put together in.
ON_THE_WAY_SLICED = {"nothing": 9, "hidden": 10, "layer": 15}
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

    def layer_per_token(self, recompute: str) -> float:
        """Bytes that a token keeps from forward to backward in one layer. x0 is the first layer's x."""
        return KEPT[recompute] * self.dim * self.itemsize + (0 if recompute == "layer" else 12 * self.heads)

    def kept_per_token(self, recompute: str, more: int = 0) -> float:
        """In all layers; and the last state, the loss's gradient, tokens, targets and positions."""
        layers = sum(self.layer_per_token(how) for how in made_again(recompute, more, self.depth))
        return layers + 2 * self.dim * self.itemsize + 24

    def matrices_of_layer(self) -> int:
        """Bytes in the compute dtype."""
        return self.itemsize * 12 * self.dim**2

    def kept(self, tokens: int, layers: Sequence[str]) -> float:
        """Bytes that layers keep of which each makes that again, and their matrices where these are not made again."""
        matrices = self.matrices_of_layer() * sum(how != "layer" for how in layers)
        return tokens * sum(map(self.layer_per_token, layers)) + matrices + 24 * tokens


@dataclass(frozen=True)
class Plan:
    """How a batch goes through the model, and the bytes that it takes at its worst moment."""

    rows: int  # at once
    recompute: str
    more: int  # of the first layers, which go one step further
    peak: int

    def constants(self) -> dict[str, Any]:
        return {"DEVICE_BATCH_SIZE": self.rows, "RECOMPUTE": self.recompute, "RECOMPUTE_MORE": self.more}


def made_again(recompute: str, more: int, depth: int) -> list[str]:
    """What each layer makes again, as the recipe says it in RECOMPUTE and RECOMPUTE_MORE."""
    step = RECOMPUTES.index(recompute)
    return [RECOMPUTES[min(step + (i < more), len(RECOMPUTES) - 1)] for i in range(depth)]


def ways(depth: int) -> list[tuple[str, int]]:
    """All pairs of RECOMPUTE and RECOMPUTE_MORE, from the fastest to the leanest: one layer further each."""
    *further, leanest = RECOMPUTES
    return [(recompute, more) for recompute in further for more in range(depth)] + [(leanest, 0)]


def peak(shape: Shape, rows: int, recompute: str, batch: int, fused: bool = True, more: int = 0) -> int:
    """Bytes at the worst moment of a step of `batch` tokens. `fused`: with Triton's kernels; where it has products for
    no tensor core (Turing), `False` is near."""
    tokens, s = min(rows * shape.context, batch), shape.itemsize
    layers = made_again(recompute, more, shape.depth)
    always = 8 * (shape.matrices + shape.embeddings) + 4 * shape.embeddings
    gradients = 4 * (shape.matrices + shape.embeddings)
    held = gradients if batch > tokens else 0  # those of earlier rows
    width = tokens * shape.dim * s  # one tensor of the stream
    part = min(ROW_BYTES, 4 * tokens * shape.dim)
    table = 4 * shape.vocab * shape.dim
    kept = shape.kept(tokens, layers)
    logits = held + kept + 3 * width + (4 + s) * table / 4 + min(LOGITS, 16 * tokens * shape.vocab)
    widths = ON_THE_WAY if fused else ON_THE_WAY_SLICED
    backward = max(_backward(shape, tokens, layers[: i + 1], widths, bool(held)) for i in range(shape.depth))
    # Each matrix has its gradient then, and those of one shape are copied into one stack: a third of all, if earlier
    # rows have left theirs or not. The last embedding's is summed up in float32 by parts of the rows.
    together = held + 4 * shape.matrices * 4 / 3 + (2 if held else 1 + shape.value_embeddings) * table + 2 * width
    embedding = gradients + 2 * table + 5 * part + 4 * width
    optimizer = gradients + muon(shape, fused)
    return int(always + max(logits, held + backward, together, embedding, optimizer))


def _backward(shape: Shape, tokens: int, layers: Sequence[str], widths: Mapping[str, int], held: bool) -> float:
    """Bytes of the backward of the last of these first layers: what they keep, and gradients of it and those behind.

    The gradient of an embedding joins that of earlier rows at once, where there is one; those of matrices wait.
    """
    behind = shape.depth - len(layers)
    tables = 1 if held else 1 + (behind + 1) // 2  # of the head and the value embeddings
    gradients = 4 * (behind + 1) * 12 * shape.dim**2 + 4 * tables * shape.vocab * shape.dim
    width = tokens * shape.dim * shape.itemsize
    on_the_way = widths[layers[-1]] + (1 if behind else 0)  # x0's gradient, once there is one
    again = shape.matrices_of_layer() if layers[-1] == "layer" else 0
    return shape.kept(tokens, layers) + gradients + width * on_the_way + again


def muon(shape: Shape, fused: bool) -> float:
    """Bytes that the step of the largest stack of matrices needs: all c_q, c_k, c_v and c_proj, or all of the MLP's."""
    stack = 4 * shape.depth * shape.dim**2
    return stack * (4 * MUON_COPIES if not fused else 4 * shape.itemsize)
