"""Pinned memory: tokens to a card and losses from it, without stopping the host. Needs torch and numpy alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


class PinnedSlots:
    """Copies tokens to the card without stopping the host: pinned buffers in turn, each free when its copy is done.

    One buffer alone would be written again while the card still reads it.
    """

    def __init__(self, device: torch.device, slots: int = 2) -> None:
        self._device = device
        self._slots: list[tuple[torch.Tensor, torch.cuda.Event] | None] = [None] * slots
        self._turn = 0

    def send(self, x: np.ndarray) -> torch.Tensor:
        """Integers of any shape -> int64 on the device."""
        self._turn = (self._turn + 1) % len(self._slots)
        slot = self._slots[self._turn]
        if slot is None or slot[0].numel() < x.size:
            slot = (torch.empty(x.size, dtype=torch.int32, device="cpu", pin_memory=True), torch.cuda.Event())
            self._slots[self._turn] = slot
        else:
            slot[1].synchronize()
        buffer, event = slot
        staged = buffer[: x.size].view(x.shape)
        staged.numpy()[...] = x
        found = staged.to(self._device, non_blocking=True).long()
        event.record()
        return found


def later(x: torch.Tensor) -> Callable[[], np.ndarray]:
    """What `x` is when the work that was sent to the card so far is done; the answer waits for that work only.

    The copy is queued behind the step that makes `x` and before the next one, which may write into `x` again. Read
    by `.cpu()` when the next step is queued, it would lie behind all of that, and the card would run out of work.
    """
    x = x.detach()
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    if x.device.type != "cuda":
        found = x.numpy().copy()
        return lambda: found
    # On the host by name: a recipe may have set another device as torch's default.
    buffer, event = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True), torch.cuda.Event()
    buffer.copy_(x, non_blocking=True)
    event.record()

    def read() -> np.ndarray:
        event.synchronize()
        return buffer.numpy()

    return read
