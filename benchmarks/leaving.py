"""How a child that has told all it was asked for ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave() -> NoReturn:
    """End this process at once and well.

    Python, torch's compilers and the driver would take seconds to clear up for nobody; and now and then torch ends in
    abort() while it does, after a backward on a card, which would lose what was told.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
