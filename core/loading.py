"""Loading a backend's library, in the process of a child or in the one that children are forked from."""

from __future__ import annotations

import gc
import importlib
from types import ModuleType


def load(module: str) -> ModuleType:
    """Import it and what it needs; in a fork it is there already."""
    gc.disable()  # a library makes very many objects, all of which stay: looking through them is a tenth of its import
    loaded = importlib.import_module(module)
    gc.freeze()
    gc.enable()
    return loaded
