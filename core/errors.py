"""Errors that a user can act on. Everything else is a bug and may show a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake or a condition outside the program: fact with its number, and what to do next.

    The command line prints it as one line and exits with 1.
    """

    def __init__(self, fact: str, action: str = "") -> None:
        self.fact = fact
        self.action = action
        super().__init__(f"{fact}; {action}" if action else fact)


class Busy(UserError):
    """Somebody else holds what is asked for (a lab, a device); names the holder's pid."""


class Transient(UserError):
    """The machine could not at that moment, being too slow or too busy; the same again a little later may work."""

    def at_last(self) -> str:
        """What to do when it did not."""
        return f"end what else uses the machine, then `autoresearch run` goes on: nothing is lost ({self.action})"


class CardGone(Transient):
    """The driver no longer tells of a graphics card: it has failed, or was taken out. It may come back by itself."""

    def at_last(self) -> str:
        return self.action


class DiskFull(Transient):
    """Others have filled the disk that experiments write to. They may give room back: other programs' files come and
    go."""

    def at_last(self) -> str:
        return self.action


class DeviceFull(UserError):
    """Others hold so much of a card's memory that no work can begin on it; with `needed` free bytes it could."""

    def __init__(self, fact: str, action: str, needed: int) -> None:
        self.needed = needed
        super().__init__(fact, action)


class DataError(UserError):
    """Prepared data or its source is missing, damaged or unusable."""


class LabError(UserError):
    """A lab is missing, damaged, or not of the kind that was asked for."""
