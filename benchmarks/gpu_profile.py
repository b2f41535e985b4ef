"""Where the time of a whole step goes, kernel by kernel, as the card itself tells: for `benchmarks.gpu`.

A ratio of two steps says which is faster. This says why, and what to work on: a card may not be at hand again for long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from benchmarks import blank_card
from benchmarks.gpu_correctness import first_line

Row = dict[str, Any]
STEPS = 2
SHOWN = 24  # kernels, those that take the most
NAME = 140  # letters of a kernel's name


def kernels(device: str, step: Callable[[], object]) -> Iterator[Row]:
    """A row of all kernels, copies and memsets of a step together, then one of each kind; what has no card has none.

    The rest of a step's milliseconds is what the card waited for Python, or for memory to be handed out.
    """
    if not device.startswith("cuda") or blank_card.within():  # which has no CUPTI
        return
    from torch.profiler import ProfilerActivity, profile

    try:
        step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
        averages = found.key_averages()
    except Exception as error:  # noqa: BLE001 - the profiler's, the driver's and Triton's share no base but this
        yield {"kernel": "all", "not measured": first_line(error)}
        return
    yield from told(averages)


def whole(device: str, step: Callable[[], object]) -> Row:
    """{"kernels_ms": of a step}, without what the card waited for; empty where that is not known."""
    first = next(kernels(device, step), {})
    return {"kernels_ms": first["ms_a_step"]} if "ms_a_step" in first else {}


def told(averages: Iterable[Any]) -> Iterator[Row]:
    """averages: the profiler's, of `STEPS` steps."""
    ran = [e for e in averages if e.self_device_time_total > 0]
    if not ran:
        yield {"kernel": "all", "not measured": "the profiler saw no kernel"}
        return
    ran.sort(key=lambda e: -e.self_device_time_total)
    whole = sum(e.self_device_time_total for e in ran)
    yield {"kernel": "all", "ms_a_step": whole / 1e3 / STEPS, "calls_a_step": sum(e.count for e in ran) / STEPS}
    for e in ran[:SHOWN]:
        row: Row = {"kernel": e.key[:NAME], "ms_a_step": e.self_device_time_total / 1e3 / STEPS}
        yield row | {"calls_a_step": e.count / STEPS, "share": e.self_device_time_total / whole}
