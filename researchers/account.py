"""What answers cost, and the cap on it: prices from a file, tokens where a price is not known.

A request is asked for only when its worst case still fits under the cap: the cap stops before, not after.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from core.contract import Unavailable
from core.errors import UserError

PRICES = Path(__file__).with_name("prices.json")
LONG_PROMPT = 100_000  # tokens, above which some models have other prices
FEWEST_CHARACTERS = 2.0  # a token of code or English has, at the least; for the worst case
CHARACTERS = 3.2  # and usually, for estimates
LEAST_OUTPUT = 4096  # tokens without which an answer is not worth asking for
UNPRICED_TOKENS = 2_000_000  # cap where neither a price nor a cap in tokens is known
KINDS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer. `write_1h`: those of `cache_write` that are kept for an hour."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    write_1h: int = 0

    @property
    def total(self) -> int:
        return self.input + self.output + self.cache_read + self.cache_write

    @property
    def prompt(self) -> int:
        return self.total - self.output


@lru_cache(maxsize=1)
def price_table() -> Mapping[str, Any]:
    """The file as it is: `source`, `date`, `models`."""
    table: dict[str, Any] = json.loads(PRICES.read_text(encoding="utf-8"))
    return table


def price_of(model: str) -> Mapping[str, Any] | None:
    """The entry of this model; of its undated name where it carries a date (`claude-x-20260101`)."""
    models = price_table()["models"]
    name, _, date = model.rpartition("-")
    undated = name if len(date) == 8 and date.isdigit() else model
    return models.get(model) or models.get(undated)


def dollars(model: str, usage: Usage) -> float | None:
    """None where the price is not known."""
    price = price_of(model)
    if price is None:
        return None
    p = price.get("above_100k", price) if usage.prompt > LONG_PROMPT else price
    short = usage.cache_write - usage.write_1h
    cost = (
        usage.input * p["input"]
        + usage.output * p["output"]
        + usage.cache_read * p["cache_read"]
        + short * p["cache_write"]
        + usage.write_1h * p["cache_write_1h"]
    )
    return float(cost) / 1e6


@dataclass
class Account:
    """Of one run and one model. `max_cost` in US dollars, `max_tokens` of all kinds together; None: no such cap."""

    model: str
    max_cost: float | None
    max_tokens: int | None
    usd: float = 0.0
    tokens: int = 0
    answers: int = 0
    reserved: list[tuple[int, int]] = field(default_factory=list)  # (prompt, output) tokens of what is in flight

    def __post_init__(self) -> None:
        if self.max_cost is not None and not math.isfinite(self.max_cost):
            raise UserError(f"--max-cost {self.max_cost} is no sum of money", "give US dollars: --max-cost 5")
        if self.max_tokens is None and price_of(self.model) is None:
            self.max_tokens = UNPRICED_TOKENS

    def reserve(self, characters: int, wanted: int) -> int:
        """How many tokens the answer to a prompt of so many characters may have, `wanted` at most; they count as
        spent until `settle`. Raises `Unavailable` when what is left is too little to ask."""
        prompt = math.ceil(characters / FEWEST_CHARACTERS)
        allowed = min(wanted, self._room(prompt))
        if allowed < min(wanted, LEAST_OUTPUT):
            raise Unavailable(f"the cap is reached: {self.said()}, and another answer could go beyond it", final=True)
        self.reserved.append((prompt, allowed))
        return allowed

    def _room(self, prompt: int) -> int:
        """Output tokens that fit under both caps."""
        room = math.inf
        if self.max_tokens is not None:
            room = self.max_tokens - self.tokens - sum(p + o for p, o in self.reserved) - prompt
        if self.max_cost is not None and price_of(self.model) is not None:
            left = self.max_cost - self.usd - sum(self._worst(p, o) for p, o in self.reserved) - self._worst(prompt, 0)
            room = min(room, left / (self._worst(prompt, 1) - self._worst(prompt, 0)))
        return int(max(0, min(room, 10**9)))

    def _worst(self, prompt: int, output: int) -> float:
        return dollars(self.model, Usage(output=output, cache_write=prompt, write_1h=prompt)) or 0.0

    def release(self) -> None:
        """What was in flight is over. What it took comes by `settle`."""
        self.reserved.clear()

    def settle(self, usage: Usage) -> dict[str, Any]:
        """Count an answer. Returns it as the ledger keeps it."""
        usd = dollars(self.model, usage)
        self.usd += usd or 0.0
        self.tokens += usage.total
        self.answers += 1
        counts = (usage.input, usage.output, usage.cache_read, usage.cache_write)
        return {"model": self.model, **dict(zip(KINDS, counts, strict=True)), "usd": usd}

    def lost(self, prompt: int = 0, output: int = 0) -> None:
        """What may be billed though it never came counts against the caps: characters of a prompt, tokens of output."""
        usage = Usage(input=math.ceil(prompt / CHARACTERS), output=max(0, output))
        self.usd += dollars(self.model, usage) or 0.0
        self.tokens += usage.total

    def said(self) -> str:
        """'$1.23 of $5.00 and 120k tokens are spent'."""
        cost = f"${self.usd:.2f}" + (f" of ${self.max_cost:.2f}" if self.max_cost is not None else "")
        tokens = f"{self.tokens:,}" + (f" of {self.max_tokens:,}" if self.max_tokens is not None else "") + " tokens"
        known = price_of(self.model) is not None
        return f"{cost} and {tokens} are spent" if known else f"{tokens} are spent (no price known for {self.model})"
