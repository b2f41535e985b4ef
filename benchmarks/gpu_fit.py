"""How many rows `benchmarks.gpu` sends through a model at once, so that all of its sections fit into a card.

Tokens of a step stay: with fewer rows at once a step has more parts, on both sides, and their ratio stands. What is
needed was measured on a blank card (docs/benchmarks.md) with the order's own model, as PyTorch's allocator takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import Order

MIB = 2**20


@dataclass(frozen=True)
class Need:
    """MiB of a card, beside the driver's context."""

    who: str
    fixed: float  # weights, moments and what else has no rows
    a_row: float  # of 2,048 tokens

    def of(self, rows: int) -> float:
        return self.fixed + self.a_row * rows


UPSTREAM = Need("upstream", 700, 384)  # took 3,450 MiB at 8 rows, 48,844 at 128
OURS = Need("the greediest of ours", 700, 190)  # our step took 23,394 at 128; a float64 reference of `fp8` 160 a row


def fit(order: Order, free: int) -> dict[str, Any]:
    """The row that says how many fit into so many free bytes: the order's own, or a half, a quarter, an eighth of them.

    One at least: what does not fit then says so where it is measured.
    """
    need, rows = UPSTREAM if order.upstream else OURS, order.rows
    while rows > 1 and need.of(rows) * MIB > free:
        rows //= 2
    row = {"rows_at_once": rows, "of": order.rows, "free_mib": free / MIB, "needed_mib": need.of(rows)}
    if rows == order.rows:
        return row
    parts = order.tokens // (rows * order.context)
    why = f"{need.who} needs {need.of(order.rows):,.0f} MiB at {order.rows} rows"
    return row | {"fitted": f"{why}; {rows} rows in {parts} parts are as many tokens a step, on both sides"}
