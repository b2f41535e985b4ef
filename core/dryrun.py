"""Whether a candidate runs at all, found out in seconds and before any budget is spent on it.

A sandboxed child imports it, builds, makes one step on random tokens, takes logits, and its weights there and back. It
sees no text, keeps nothing, and runs at the lowest priority. It does use the device: so nobody calls it while a clock
runs. Where the device is a card it starts from a copy of the best's compile caches, and torch.compile does nothing in
it: compiling the whole graph for two rows would take minutes in which the card waits. What cannot be compiled is found
in the experiment's warm-up, before its clock starts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from core import referee
from core.child import SMALLER
from core.errors import UserError
from core.gap import Stopped
from core.quoting import TAIL, quote
from core.recipe import constants, replace
from core.settings import Settings

ROWS = 2  # of text in the one step; the recipe's own batch only takes longer
NICE = 19  # the lowest priority there is
LOG_LINES = 20
LOG_CHARACTERS = 2000


def dry_build(
    source: bytes,
    settings: Settings,
    workdir: Path,
    *,
    nice: int = NICE,
    stop: threading.Event | None = None,
    caches: Path | None = None,
    short: Callable[[], str] = lambda: "",
) -> str:
    """Why `source` does not run, with the end of its log as a quotation; "" if it does. `workdir` is made and is the
    caller's to remove; `caches` are compile caches to start from, of which each child gets a copy. `short` says, after
    a want of memory, why others are to blame for it ("": they are not); then nothing is known of the candidate.

    Raises `Stopped` after a stop, and `UserError` when sandbox or backend fail, which is not the candidate's fault.
    """
    small = smaller(source, settings)
    try:
        _try(small, settings, workdir, nice, stop, caches)
        return ""
    except referee.RecipeFailed as failed:
        if failed.out_of_memory and short():
            return ""
        if small == source:
            return told(failed)
    try:  # a recipe may need its batch as it is: only what fails so is refused
        _try(source, settings, workdir, nice, stop, caches)
        return ""
    except referee.RecipeFailed as failed:
        return "" if failed.out_of_memory and short() else told(failed)


def _try(
    source: bytes, settings: Settings, workdir: Path, nice: int, stop: threading.Event | None, caches: Path | None
) -> None:
    try:
        referee.dry_build(source, settings, workdir, nice=nice, stop=stop, caches=caches)
    except referee.RecipeFailed as failed:
        if failed.status == "stopped":
            raise Stopped from None
        raise


def told(failed: referee.RecipeFailed) -> str:
    log = quote(failed.log_tail, LOG_LINES, LOG_CHARACTERS)
    action = f"; {SMALLER}" if failed.out_of_memory else ""
    return f"it does not run ({failed.status}): {failed.reason}{action}" + (f"{TAIL}{log}" if log else "")


def smaller(source: bytes, settings: Settings) -> bytes:
    """The same file with a batch of ROWS rows, where it has the constants that say so. Lines stay in place."""
    try:
        text = source.decode("utf-8")
        known = constants(text)
        wanted = {"TOTAL_BATCH_SIZE": ROWS * settings.sequence_len, "DEVICE_BATCH_SIZE": ROWS}
        values = {
            name: value
            for name, value in wanted.items()
            if name in known and isinstance(known[name].value, int) and known[name].value > value
        }
        return replace(text, values).encode("utf-8") if values else source
    except (UserError, UnicodeDecodeError):  # no Python at all: the child says so
        return source
