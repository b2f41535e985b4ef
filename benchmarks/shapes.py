"""What both sides of a comparison train, and what a side is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.errors import UserError


@dataclass(frozen=True)
class Shapes:
    """What both sides train. The defaults are those of the published figures."""

    depth: int = 4
    dim: int = 128
    head_dim: int = 128
    context: int = 256
    vocab: int = 8192
    tokens: int = 4096  # of one optimizer step
    window_pattern: str = "SSSL"
    steps: int = 20

    def constants(self) -> dict[str, Any]:
        """As a recipe of ours spells them."""
        return {
            "DEPTH": self.depth,
            "ASPECT_RATIO": -(-self.dim // self.depth),
            "HEAD_DIM": self.head_dim,
            "WINDOW_PATTERN": self.window_pattern,
            "TOTAL_BATCH_SIZE": self.tokens,
            "DEVICE_BATCH_SIZE": self.tokens // self.context,
        }

    def require_dim(self, found: int) -> None:
        """UserError where a recipe had to round the dim up to whole heads."""
        if found != self.dim:
            raise UserError(f"a model of dim {self.dim} has no whole heads of {self.head_dim}", "give another --dim")


@dataclass(frozen=True)
class Side:
    """A model that can be stepped. Tokens come as (B, T + 1) integers of numpy."""

    step: Callable[[Any], float]  # tokens -> loss; all work is done when it returns
    peak_memory: Callable[[], int]
    note: str = ""  # what differs from the side as it is published
    split: Callable[[Any], dict[str, float]] | None = None  # the same, with seconds of each part
