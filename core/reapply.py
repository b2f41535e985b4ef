"""An edit that was made to one best, made to a newer one."""

from __future__ import annotations

from core.errors import UserError
from core.gitstore import GitStore
from core.recipe import constants, replace


def reapply(git: GitStore, base: bytes, edited: bytes, best: bytes) -> bytes | None:
    """`best` with what `edited` changed of `base`; None where it does not fit.

    A merge by git, which refuses edits of neighbouring lines. Constants are such lines, and stand for themselves: an
    edit that only sets constants fits wherever the newer best has not set the same ones.
    """
    merged = git.merge(base, edited, best)
    return merged if merged is not None else _constants(base, edited, best)


def _constants(base: bytes, edited: bytes, best: bytes) -> bytes | None:
    try:
        old, new, now = (source.decode("utf-8") for source in (base, edited, best))
        before, after, here = constants(old), constants(new), constants(now)
        changed = {n: c.value for n, c in after.items() if n in before and repr(before[n].value) != repr(c.value)}
        fits = all(n in here and repr(here[n].value) == repr(before[n].value) for n in changed)
        if not changed or not fits or replace(old, changed) != new:
            return None
        return replace(now, changed).encode("utf-8")
    except (UserError, UnicodeDecodeError):  # no Python, or a value that cannot be written down
        return None
