"""Runs a command on a blank card: python -m benchmarks.blank_card CARD -- COMMAND ..."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.blank_card import CARDS, environment
from core.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blank_card", description=__doc__)
    parser.add_argument("card", choices=list(CARDS))
    parser.add_argument("--caches", type=Path, help="folder of what is compiled; by default beside the library")
    parser.add_argument("command", nargs="+", help="what is run, after --")
    given = parser.parse_args()
    try:
        made = environment(CARDS[given.card], given.caches)
    except UserError as error:
        sys.exit(str(error))
    os.execvpe(given.command[0], given.command, made)


if __name__ == "__main__":
    main()
