"""How a process is started that the terminal does not end: it ends by itself, or with whoever holds its input."""

from __future__ import annotations

import sys
from typing import Any

CREATE_NEW_PROCESS_GROUP, CREATE_NO_WINDOW = 0x200, 0x8000000


def apart() -> dict[str, Any]:
    """Options of `subprocess.Popen`.

    On Windows `start_new_session` means nothing. A group of its own gets no Ctrl-C, and a console of its own, which is
    not shown, also serves what the process starts: without any console each of these would open a window.
    """
    if sys.platform == "win32":
        return {"creationflags": CREATE_NEW_PROCESS_GROUP | CREATE_NO_WINDOW}
    return {"start_new_session": True}
