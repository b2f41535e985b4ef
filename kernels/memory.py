"""How many rows go through a model at once: measured on the card before the clock starts, not computed.

A recipe may be changed into any model, so no formula of ours knows what it needs. The bytes of a forward and backward
are a fixed part and one that grows with the rows; two small trials tell both. The smallest do not: some buffers, such
as the logits of kernels/softcapped_loss.py, still grow at one and two rows and no more after.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.errors import out_of_memory

TRIALS = ((2, 4), (1, 2))  # rows; the second where the first ones find no room
SPARE = 0.08  # of what is free: fragmentation, the optimizer's temporaries, what a compiled graph holds beyond ours


def rows_within(wanted: int, free: float, trials: dict[int, float]) -> int:
    """The largest of wanted, wanted/2, wanted/4, ... rows (1 at least) whose bytes lie within `free`.

    trials: rows -> bytes at the worst moment, for two numbers of rows.
    """
    if wanted < 1 or len(trials) != 2:
        raise ValueError(f"one row or more and two trials wanted, not {wanted} and {len(trials)}")
    (few, low), (many, high) = sorted(trials.items())
    each = max(0.0, (high - low) / (many - few))
    fixed = max(0.0, low - few * each)
    rows = wanted
    while rows > 1 and fixed + rows * each > free * (1 - SPARE):
        rows = -(-rows // 2)
    return rows


def fitted_rows(trial: Callable[[int], object], wanted: int, device: torch.device) -> tuple[int, str]:
    """(rows, why) for the card's memory that nobody else holds. `trial(rows)` does a forward and a backward.

    What PyTorch's allocator keeps for itself counts as free, so that a second build finds what the first one found.
    """
    trials: dict[int, float] = {}
    for pair in TRIALS:
        try:
            trial(pair[0])  # libraries take their workspaces at the first call; a size more would be compiled for, too
            trials = {rows: _most_bytes(trial, rows, device) for rows in pair}
            break
        except RuntimeError as error:
            if pair == TRIALS[-1] or not out_of_memory(error):
                raise
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    rows = rows_within(wanted, free, trials)
    (few, low), (many, high) = trials.items()
    each = (high - low) / (many - few) / 2**20
    why = f"{each:.0f} MiB a row of {free / 2**30:.1f} GiB free" + (f"; {wanted} were wanted" if rows < wanted else "")
    return rows, why


def _most_bytes(trial: Callable[[int], object], rows: int, device: torch.device) -> float:
    """Beyond what is held before and after."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    trial(rows)
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - before)
