"""Researchers by name. Built-ins and additions come in by the same door:

    @researchers.register("mine", "one line for the help")
    def make_mine(**options) -> core.contract.Researcher: ...

A factory imports what it needs when it is called, so that listing names stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.contract import Researcher
from core.errors import UserError

Factory = Callable[..., Researcher]


@dataclass(frozen=True)
class Entry:
    name: str
    summary: str
    factory: Factory


_registry: dict[str, Entry] = {}


def register(name: str, summary: str) -> Callable[[Factory], Factory]:
    """Decorator of a factory. A name can be taken once."""

    def add(factory: Factory) -> Factory:
        if name in _registry:
            raise UserError(f"there is a researcher {name!r} already", "register another name")
        _registry[name] = Entry(name, summary, factory)
        return factory

    return add


def names() -> list[str]:
    return sorted(_registry)


def entries() -> list[Entry]:
    return [_registry[name] for name in names()]


def make(name: str, **options: Any) -> Researcher:
    """The researcher of this name; UserError with the known names, or naming an option that it does not take."""
    entry = _registry.get(name)
    if entry is None:
        raise UserError(f"there is no researcher {name!r}", f"known are: {', '.join(names())}")
    try:
        return entry.factory(**options)
    except TypeError as error:
        raise UserError(f"researcher {name}: {error}", "leave the option out") from error


@register("search", "built in and offline: varies the constants within their `# search:` ranges, and the model's shape")
def _search(seed: int = 42) -> Researcher:
    from researchers.search import Search

    return Search(seed=seed)
