"""The edits of a recipe that kernels/README.md tells, made as it tells them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from core.paths import project_root

SECTIONS = ("first", "second", "loss")
HEADINGS = {
    "first": "The first half written out",
    "second": "The second half written out",
    "loss": "Another loss",
    "mlx": "The recipe of `mlx`",
}


def blocks(section: str) -> list[str]:
    """The Python code below a heading."""
    text = (project_root() / "kernels" / "README.md").read_text("utf-8")
    (below,) = re.findall(rf"^## {HEADINGS[section]}\n(.*?)(?=^## )", text, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```$", below, re.M | re.S)


def recipe(backend: str, sections: Sequence[str] = SECTIONS) -> str:
    """The shipped train.py with these parts written out."""
    source = (project_root() / "backends" / backend / "train.py").read_text("utf-8")
    for section in sections:
        source = globals()[f"_{section}"](source, backend, *blocks(section))
    return source


def put(source: str, pattern: str, new: str) -> str:
    """`new` in the place of the one match."""
    assert len(re.findall(pattern, source, re.M)) == 1, pattern
    return re.sub(pattern, lambda _: new, source, flags=re.M)


def _first(source: str, backend: str, half: str, cuda: str, rtx: str) -> str:
    source = put(source, r"^        by = .*\n        x, attended = attend\(.*\n", half)
    return put(source, r"^    def layer\(", f"{cuda if backend == 'cuda' else rtx}\n    def layer(")


def _second(source: str, backend: str, half: str) -> str:
    return put(source, r"^        return feed\(.*\n", half)


def _loss(source: str, backend: str, ending: str) -> str:
    source = put(source, r"^        return (portable\.)?softcapped_loss\(.*\n", ending)
    imported = "from torch.utils.checkpoint import checkpoint\n"
    if imported in source:
        return source
    return put(source, r"^from torch import Tensor\n", f"from torch import Tensor\n{imported}")
