"""Text that somebody else wrote (a recipe's log, an error, a description), on its way to a researcher: as data.

A recipe can print what it likes, also sentences that look like instructions. What is passed on is bounded, has no
control characters, and every line of it carries a mark, so that it cannot be taken for anything but a quotation.
"""

from __future__ import annotations

from core.outcome import printable

MARK = "| "
TAIL = "\nThe end of its log:\n"  # between the reason of a failure and the quotation of its log
LINES = 50
WIDTH = 240  # characters of a line
CHARACTERS = 6000  # of a whole quotation


def quote(text: str, lines: int = LINES, characters: int = CHARACTERS) -> str:
    """The last `lines` lines, each with the mark, `characters` at most; what is left out is counted."""
    found = [line.rstrip()[:WIDTH] for line in printable(text.replace("\t", "    ")).split("\n")]
    while found and not found[-1]:
        found.pop()
    kept: list[str] = []
    size = 0
    for line in reversed(found[-lines:]):
        size += len(MARK) + len(line) + 1
        if size > characters:
            break
        kept.append(f"{MARK}{line}")
    left_out = len(found) - len(kept)
    return "\n".join([*([f"{MARK}({left_out} lines before)"] if left_out else []), *reversed(kept)])


def unquoted(text: str) -> str:
    """A quotation without its marks, for a person's eyes."""
    return "\n".join(line.removeprefix(MARK) for line in text.splitlines())


def one_line(text: str, characters: int = 200) -> str:
    """The same for a text that stands within a line: blanks joined, cut at `characters`."""
    joined = " ".join(printable(text).split())
    return joined if len(joined) <= characters else joined[: characters - 1] + "…"
