"""How a card ran while something was measured on it: its clock, its heat, and whether others used it, as NVML tells."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
EVERY = 0.5  # seconds between two looks


def watch(device: str) -> Callable[[], Row]:
    """Begins to look at the card; what is returned ends that and tells, in a row. Empty where no card is; where NVML
    cannot be asked it says what is missing."""
    if not device.startswith("cuda"):
        return dict
    try:
        from core.gpuwatch import Watch
        from core.nvml import Nvml
    except ModuleNotFoundError as error:
        missing = {"card": device, "not measured": f"{error.name} is not installed"}
        return lambda: missing
    seen = Watch(device, lambda: [os.getpid()], Nvml(), EVERY)
    return lambda: {"card": device} | told(seen.report())


def told(found: Row) -> Row:
    """Of what a watch reports that which says whether times can be compared with others."""
    if found.get("error"):
        return {"not measured": found["error"]}
    clock, limit = found["clock_mhz"], found["power_limit_w"]
    row = {
        "clock_mhz": f"{clock[0]} to {clock[1]}" if clock else None,
        "temperature_c": found["temperature_c"],
        "power_limit_w": limit[1] if limit else None,
        "slowed": found["slowed"],  # share of the looks at which heat or a power brake held it back
        "others_busy": found["others_busy"],
        "looks": found["looks"],
    }
    return {name: value for name, value in row.items() if value is not None}
