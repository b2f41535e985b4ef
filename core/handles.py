"""A socket and open files for a child, where the channel cannot carry descriptors: Windows.

There the referee duplicates each handle into the child's process and sends the number that it has there, so a child
can open nothing before the message that hands it over. The note with which the child makes its end of the channel
comes on standard input.

On POSIX `Postbox` does what Windows' kernel does, by a unix socket beside the channel, so that all the rest of this
way (the note, a TCP channel, numbers in place of descriptors) runs in the tests, end to end.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Protocol

POSTBOX = "AUTORESEARCH_POSTBOX"  # the child's variable with the descriptor of its postbox; POSIX only
WITHIN = 10.0  # seconds for what takes microseconds
FILE_GENERIC_READ = 0x120089
ELSEWHERE = "handles are duplicated on Windows only"


class Giver(Protocol):
    """The referee's side, for one child. Both raise `OSError` when the child is gone."""

    def share(self, sock: socket.socket) -> bytes:
        """A note by which the child, and no other process, makes its own socket of `sock`. One line at most."""
        ...

    def give(self, fd: int) -> int:
        """Open the file behind `fd` in the child, to be read. Returns the number by which the child takes it."""
        ...


class Taker(Protocol):
    """The child's side."""

    def socket(self, note: bytes) -> socket.socket: ...

    def take(self, number: int) -> int:
        """A descriptor of the file that came as `number`; each can be taken once."""
        ...


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a TCP connection on the loopback address.

    Before Python 3.12.4 `socket.socketpair()` may return an end that another process has connected to (CVE-2024-3219),
    so each end is asked whether the other is its peer. Small messages are not held back (TCP_NODELAY).
    """
    with socket.create_server(("127.0.0.1", 0), backlog=1) as server:
        ours = socket.create_connection(server.getsockname()[:2], timeout=WITHIN)
        server.settimeout(WITHIN)
        theirs, _ = server.accept()
    if ours.getsockname() != theirs.getpeername() or theirs.getsockname() != ours.getpeername():
        ours.close()
        theirs.close()
        raise ConnectionError("another process has connected to the channel that was being made; try again")
    for end in (ours, theirs):
        end.setblocking(True)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


def own_socket() -> tuple[socket.socket, Taker]:
    """In a child: the channel that the note on standard input tells of. Nothing is read from there afterwards."""
    taker: Taker = WindowsTaker() if sys.platform == "win32" else Postbox.inherited()
    note = bytes.fromhex(sys.stdin.readline())
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return taker.socket(note), taker


class WindowsGiver:
    """`process`: a handle of the child's process with the right to duplicate handles into it."""

    def __init__(self, pid: int, process: int) -> None:
        self._pid = pid
        self._process = process

    def share(self, sock: socket.socket) -> bytes:
        if sys.platform != "win32":
            raise OSError(ELSEWHERE)
        return sock.share(self._pid)

    def give(self, fd: int) -> int:
        if sys.platform != "win32":
            raise OSError(ELSEWHERE)
        import _winapi
        import msvcrt

        here, handle = _winapi.GetCurrentProcess(), msvcrt.get_osfhandle(fd)
        return _winapi.DuplicateHandle(here, handle, self._process, FILE_GENERIC_READ, False, 0)


class WindowsTaker:
    def socket(self, note: bytes) -> socket.socket:
        if sys.platform != "win32":
            raise OSError(ELSEWHERE)
        return socket.fromshare(note)

    def take(self, number: int) -> int:
        if sys.platform != "win32":
            raise OSError(ELSEWHERE)
        import msvcrt

        return msvcrt.open_osfhandle(number, os.O_RDONLY | os.O_BINARY)


class Postbox:
    """Both sides on POSIX: an end of a unix socket pair. Descriptors come in the order in which they were given; what
    is given and not taken fills the socket after 70 or more."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._end.settimeout(WITHIN)
        self._given = 0

    @classmethod
    def inherited(cls) -> Postbox:
        """The child's side."""
        return cls(socket.socket(fileno=int(os.environ[POSTBOX])))

    def close(self) -> None:
        self._end.close()

    def share(self, sock: socket.socket) -> bytes:
        return str(self.give(sock.fileno())).encode()

    def give(self, fd: int) -> int:
        socket.send_fds(self._end, [b"f"], [fd])  # type: ignore[attr-defined]  # for mypy on Windows
        self._given += 1
        return self._given

    def socket(self, note: bytes) -> socket.socket:
        return socket.socket(fileno=self.take(int(note)))

    def take(self, number: int) -> int:
        self._given += 1
        if number != self._given:
            raise OSError(f"file {number} of the postbox was asked for, and {self._given} is the next")
        _, fds, _, _ = socket.recv_fds(self._end, 1, 1)  # type: ignore[attr-defined]  # for mypy on Windows
        if not fds:
            raise OSError("nothing came with the postbox's message")
        return int(fds[0])
