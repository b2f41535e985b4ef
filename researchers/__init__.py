"""Researchers by name.

A researcher is made by a factory that is named as "module:attribute"; the built-in ones are names for such places,
and anybody's own one is given as the place itself: `--researcher my_package.ideas:Mine`. What the factory returns
implements `core.contract.Researcher`. Its module is imported when the researcher is made, so listing names is cheap.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.contract import Researcher
from core.errors import UserError


@dataclass(frozen=True)
class Entry:
    place: str  # "module:attribute" of a class or function that returns a Researcher
    summary: str


BUILT_IN: Mapping[str, Entry] = {
    "search": Entry(
        "researchers.search:Search",
        "offline, no key: tries the constants within their `# search:` ranges, and the model's shape",
    ),
}


def names() -> list[str]:
    return list(BUILT_IN)


def make(name: str, **options: Any) -> Researcher:
    """The researcher of this name or place, or a team of several, `A+B` (without options of their own).

    UserError with the known names, or naming an option it does not take.
    """
    if "+" in name:
        from researchers.turns import Turns

        return Turns([make(part.strip()) for part in name.split("+")])
    place = BUILT_IN[name].place if name in BUILT_IN else name
    module_name, _, attribute = place.partition(":")
    if not attribute:
        raise UserError(
            f"there is no researcher {name!r}", f"known are: {', '.join(names())}; or give module:attribute"
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"researcher {name}: {error}", "check the place that was given as module:attribute") from error
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise UserError(f"researcher {name}: {error}", "correct its options") from None
    researcher: Researcher = factory(**options)
    return researcher
