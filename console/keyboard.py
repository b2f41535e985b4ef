"""The keyboard while a line is redrawn: nothing that is typed is echoed into it, and single keys can steer."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Protocol

POLL = 0.2  # seconds between two looks at whether it is over


class _Source(Protocol):
    """A terminal's input."""

    def open(self) -> None: ...

    def close(self) -> None:
        """As it was before; what was typed and not read is dropped: a shell would run it."""

    def read(self) -> str | None:
        """What was typed within `POLL`, "" for nothing; None when nothing will ever come again."""


class Keyboard:
    """Entered, it takes what is typed at standard input's terminal; without one it does nothing.

    `on_key` is called, in a thread of its own, with each character that was typed by itself: pasted text and arrow keys
    come several characters at a time and steer nothing. Ctrl-C and Ctrl-Z stay what they are."""

    def __init__(self, on_key: Callable[[str], None] = lambda key: None) -> None:
        self.on_key = on_key
        self._source: _Source | None = _source()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="keyboard", daemon=True)

    @property
    def is_there(self) -> bool:
        return self._source is not None

    def __enter__(self) -> Keyboard:
        if self._source is not None:
            self._source.open()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._source is not None:
            self._over.set()
            self._thread.join()
            self._source.close()

    def _listen(self) -> None:
        while self._source is not None and not self._over.is_set():
            typed = self._source.read()
            if typed is None:
                return
            if len(typed) == 1:
                self.on_key(typed)


def _source() -> _Source | None:
    try:
        if not sys.stdin.isatty():
            return None
    except (AttributeError, ValueError):  # there is none, or it is closed
        return None
    return _terminal()


if sys.platform == "win32":
    import msvcrt

    class _Console:
        """Windows echoes what is typed only to a program that reads lines; it keeps it for the shell, which runs it."""

        def open(self) -> None:
            pass

        def close(self) -> None:
            while msvcrt.kbhit():
                msvcrt.getwch()

        def read(self) -> str | None:
            typed, until = "", time.monotonic() + POLL
            while not typed and time.monotonic() < until:
                while msvcrt.kbhit():
                    typed += msvcrt.getwch()
                time.sleep(POLL / 4)
            return typed

    def _terminal() -> _Source:
        return _Console()

else:
    import select
    import termios

    LEAVES = (signal.SIGTSTP, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)  # by default they end or stop a process

    class _Terminal:
        """A POSIX terminal: echo and the editing of lines are off while it is open, also across Ctrl-Z and `fg`, and on
        again however the process ends, SIGKILL left out. One in the background is left alone: it is the shell's."""

        def __init__(self, fd: int) -> None:
            self._fd = fd
            self._before: list[Any] | None = None
            self._handlers: dict[int, Any] = {}

        def open(self) -> None:
            self._take()
            if threading.current_thread() is not threading.main_thread():
                return
            wanted = [n for n in LEAVES if signal.getsignal(n) == signal.SIG_DFL]
            self._handlers = {n: signal.signal(n, self._leave) for n in wanted}
            self._handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, lambda *_: self._take())

        def close(self) -> None:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers = {}
            self._give_back()

        def read(self) -> str | None:
            try:
                if not select.select([self._fd], [], [], POLL)[0]:
                    return ""
                if self._before is None or not self._in_front():  # reading would stop a process in the background
                    time.sleep(POLL)
                    return ""
                typed = os.read(self._fd, 1024)
            except OSError:  # the terminal is gone
                return None
            return typed.decode("utf-8", "replace") if typed else None

        def _in_front(self) -> bool:
            try:
                return os.tcgetpgrp(self._fd) == os.getpgrp()
            except OSError:
                return False

        def _take(self) -> None:
            if self._before is not None or not self._in_front():
                return
            with suppress(termios.error):
                before = termios.tcgetattr(self._fd)
                now = [*before[:6], [*before[6]]]
                now[3] &= ~(termios.ECHO | termios.ICANON)  # not ISIG: Ctrl-C is a signal still
                now[6][termios.VMIN], now[6][termios.VTIME] = 1, 0
                termios.tcsetattr(self._fd, termios.TCSANOW, now)
                self._before = before

        def _give_back(self) -> None:
            before, self._before = self._before, None
            if before is not None and self._in_front():
                with suppress(termios.error):
                    termios.tcsetattr(self._fd, termios.TCSANOW, before)
                    termios.tcflush(self._fd, termios.TCIFLUSH)

        def _leave(self, number: int, _: FrameType | None) -> None:
            """What the signal does by default, with the terminal as it was."""
            self._give_back()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            if number in self._handlers:  # stopped, and gone on
                signal.signal(number, self._leave)

    def _terminal() -> _Source:
        return _Terminal(sys.stdin.fileno())
