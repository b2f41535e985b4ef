"""What stands in for FlashAttention 3 in upstream's model: for each window of its layers the fastest at hand.

Imports torch and nothing of ours: `bench --upstream` runs a copy of it in upstream's own environment
(benchmarks/upstream_side.py), `benchmarks.gpu` calls it from ours (benchmarks/upstream_attention.py). All candidates
get q and k that are turned and normed, as upstream's model hands them over: q, k, v (B, T, H, D) -> (B, T, H, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

MASKED = "SDPA with a dense mask"  # where nothing else can do it, as on a CPU
FLASH3_CARDS = range(80, 91)  # its package is built for sm_80, whose code sm_86 and sm_89 run, too, and for sm_90

Plain = Callable[[Tensor, Tensor, Tensor], Tensor]
Row = dict[str, Any]


class Case(Protocol):
    """What is known of the attention that is asked for."""

    @property
    def length(self) -> int: ...  # T

    @property
    def window(self) -> int: ...  # tokens seen before a query

    @property
    def device(self) -> torch.device: ...


# --- the fastest --------------------------------------------------------------------------------


def fastest(
    case: Case,
    candidates: Mapping[str, Callable[[Any], Plain]],
    why_not: Callable[[str], str],  # a candidate's name -> "" where it can do the case
    milliseconds: Callable[[Plain], float],  # forward and backward
) -> tuple[str, Plain, list[Row]]:
    """Name and function of the fastest that can do the case, and a row of each: its time, or why it has none."""
    times: dict[str, float] = {}
    made: dict[str, Plain] = {}
    rows: list[Row] = []
    for name, make in candidates.items():
        why = why_not(name)
        if not why:
            try:
                made[name] = make(case)
                times[name] = milliseconds(made[name])
            except Exception as error:  # noqa: BLE001 - the packages', Triton's and the driver's share no base but this
                why = f"failed when timed: {said(error)}"
        told: Row = {"window": case.window, "attention": name}
        rows.append(told | ({"not measured": why} if why else {"attention_ms": times[name]}))
    if not times:
        return MASKED, masked(case), rows
    best = min(times, key=lambda name: times[name])
    return best, made[best], rows


def call_of(made: Mapping[int, Plain]) -> Callable[..., Tensor]:
    """window -> function, as one function of FlashAttention 3's signature. ValueError for a window that it lacks."""

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
        T = q.size(1)
        window = T if window_size[0] < 0 else min(window_size[0], T)
        if window not in made:
            raise ValueError(f"upstream asks for a window of {window}; known are {sorted(made)}, those of its pattern")
        return made[window](q, k, v)

    return call


def named(names: Mapping[int, str]) -> str:
    """ "fa3", or "fa3 over 1024, cudnn over 2048" where the windows differ."""
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{name} over {window}" for window, name in names.items())


def told(rows: Iterable[Row]) -> str:
    """ "over 1024: fa3 0.52 ms, flex 0.93 ms; over 2048: ...; flash knows no windows", for people."""
    times: dict[int, list[str]] = {}
    others: dict[str, None] = {}
    for row in rows:
        if "attention_ms" in row:
            times.setdefault(row["window"], []).append(f"{row['attention']} {row['attention_ms']:.3g} ms")
        else:
            others[f"{row['attention']}: {row['not measured']}"] = None
    return "; ".join([*(f"over {window}: {', '.join(found)}" for window, found in times.items()), *others])


def said(error: Exception) -> str:
    """An error's kind and its first line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


# --- the candidates -----------------------------------------------------------------------------


def flash3(package: Any, case: Case) -> Plain:
    """package: kernels/attention_flash.py, whose operators torch.compile takes into one graph with upstream's model
    whatever FlashAttention 3's version."""
    package.load()
    return lambda q, k, v: package.flash3(q, k, v, case.window)


def sdpa(backend: SDPBackend, case: Case) -> Plain:
    """One of PyTorch's own, which know no windows."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def flex(case: Case) -> Plain:
    """FlexAttention, its mask made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j <= window)

    compiled: Any = torch.compile(flex_attention, dynamic=False)  # not compiled it would build all scores
    window = min(case.window, case.length)
    mask = create_block_mask(seen, None, None, case.length, case.length, device=case.device)  # type: ignore[arg-type]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask)
        return y.transpose(1, 2)

    return run


def masked(case: Case) -> Plain:
    """Scores of size T^2."""
    return lambda q, k, v: windowed_sdpa(q, k, v, True, (case.window, 0))


def windowed_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """FlashAttention 3's signature, (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    T, back = q.size(2), window_size[0]
    if back >= T or back < 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    seen = (distance >= 0) & (distance <= back)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
