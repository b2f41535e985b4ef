"""Researchers by name.

A researcher is made by a factory that is named as "module:attribute"; the built-in ones are names for such places,
and anybody's own one is given as the place itself: `--researcher my_package.ideas:Mine`. What the factory returns
implements `core.contract.Researcher`. Its module is imported when the researcher is made, so listing names is cheap.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
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
    "claude": Entry(
        "researchers.claude:Claude",
        "Claude through its API; costs money, and needs ANTHROPIC_API_KEY",
    ),
    "claude-code": Entry("researchers.command:ClaudeCode", "Claude Code with your subscription; its own limits"),
    "codex": Entry("researchers.command:Codex", "OpenAI's Codex CLI with your login"),
    "aider": Entry("researchers.command:Aider", "aider with the key of any provider"),
    "gemini": Entry("researchers.command:Gemini", "Google's Gemini CLI with your login"),
    "command": Entry("researchers.command:Command", "any other coding agent or script, by --command"),
}


def names() -> list[str]:
    return list(BUILT_IN)


def make(name: str, **options: Any) -> Researcher:
    """The researcher of this name or place, or a team of several, `A+B`; each gets the options that it takes.

    UserError with the known names, or naming an option that none takes.
    """
    if "+" in name:
        from researchers.turns import Turns

        parts = [part.strip() for part in name.split("+")]
        return Turns([make(part, **given) for part, given in zip(parts, deal(parts, options), strict=True)])
    factory = _factory(name)
    (taken,) = deal([name], options)
    try:
        inspect.signature(factory).bind(**taken)
    except TypeError as error:
        raise UserError(f"researcher {name}: {error}", "correct its options") from None
    researcher: Researcher = factory(**taken)
    return researcher


def deal(names: Sequence[str], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each of these researchers gets of the options: those that it takes. UserError for one that none takes."""
    takes = [_takes(_factory(name)) for name in names]
    for option in options:
        if not any(taken(option) for taken in takes):
            spelled = f"--{option.replace('_', '-')}"
            raise UserError(f"{spelled} does not apply to researcher {'+'.join(names)}", f"leave {spelled} out")
    return [{option: value for option, value in options.items() if taken(option)} for taken in takes]


def _takes(factory: Callable[..., Any]) -> Callable[[str], bool]:
    parameters = inspect.signature(factory).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return lambda option: takes_all or option in parameters


def _factory(name: str) -> Callable[..., Any]:
    place = BUILT_IN[name].place if name in BUILT_IN else name
    module_name, _, attribute = place.partition(":")
    if not attribute:
        raise UserError(
            f"there is no researcher {name!r}", f"known are: {', '.join(names())}; or give module:attribute"
        )
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"researcher {name}: {error}", "check the place that was given as module:attribute") from error
    return factory
