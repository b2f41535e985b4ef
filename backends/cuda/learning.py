"""With which constants an H100 learns most in five minutes: those that change no launch and no shape.

Upstream's own night of 125 experiments on one ended with them (its branch exp/H100/mar8). A module of its own, as
`benchmarks.gpu` takes them to machines where little more than torch is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEARNING: Mapping[str, Any] = {
    "WARMDOWN_RATIO": 0.75,
    "FINAL_LR_FRAC": 0.05,
    "EMBEDDING_LR": 0.9,
    "UNEMBEDDING_LR": 0.005,
    "EMBEDDING_DECAY": 0.001,
    "VALUE_DECAY": 0.003,
    "UNEMBEDDING_DECAY": 0.01,
    "MOMENTUM_STEPS": 200,
    "INIT_SCALE": 0.68,
    "X0_INIT": 0.05,
    "ROPE_BASE": 200_000.0,
}
