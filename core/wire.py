"""Messages between the referee and its children: JSON, raw arrays and open files over a socket pair.

A message is a fixed prefix, a JSON header and the bytes of its arrays, one after another:

    prefix  "ARW1", header bytes (uint32), array bytes (uint64), files (uint32); little endian
    header  {"kind": str, "fields": {...}, "arrays": [[name, dtype, [sizes]], ...], "files": [number, ...]}

Open files travel beside the bytes, as descriptors of a unix socket. Where there is none (Windows) they are opened in
the child's process first, and the header's `files` are the numbers that they have there (`core/handles.py`).

A child is not trusted once a recipe is loaded in it, so whoever receives names the most that it accepts;
everything beyond is a `ProtocolError` before memory is taken for it. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np

from core.handles import Giver, Taker, own_socket

MAGIC = b"ARW1"
PREFIX = struct.Struct("<4sIQI")
HEADER_LIMIT = 2**20  # bytes of JSON in one message
ARRAYS_LIMIT = 16 * 2**20  # bytes of arrays that a receiver accepts unless it says more
FDS_LIMIT = 4096  # descriptors in one message
FDS_PER_CALL = 200  # the kernel takes 253 in one sendmsg (SCM_MAX_FD)
SLICE = 0.1  # seconds between two looks at `watch` while waiting
CHUNK = 2**20  # bytes in one system call
CHANNEL = "AUTORESEARCH_CHANNEL"  # the child's variable: the descriptor of its end, or NOTED
NOTED = "noted"  # a note on standard input tells what the channel is
# epoll would make a descriptor for every wait; select() knows no number above 1023, but on Windows, which has no poll.
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)
DTYPES = frozenset(["|b1", "|u1", "<u2", "<u4", "<i4", "<i8", "<f4", "<f8"])


class ChannelClosed(ConnectionError):
    """The other side is gone."""


class ChannelTimeout(TimeoutError):
    """The other side did not answer, or did not read, in time. A later `receive` goes on where this one stopped."""


class ProtocolError(ValueError):
    """What came is not a message, or is one that the receiver does not accept."""


@dataclass(frozen=True)
class Message:
    """One received message. The getters check what the sender claims; a wrong claim is a `ProtocolError`."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    fds: Sequence[int] = ()

    def number(self, name: str, low: float = 0.0, high: float = 1e18) -> float:
        """A finite number in [low, high]."""
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._wrong(name, "a number")
        if not (low <= value <= high):
            self._wrong(name, f"between {low:g} and {high:g}")
        return float(value)

    def integer(self, name: str, low: int = 0, high: int = 2**62) -> int:
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not (low <= value <= high):
            self._wrong(name, f"an integer between {low} and {high}")
        return value

    def text(self, name: str, limit: int = 4096) -> str:
        """A string, cut to `limit` characters, with control characters other than newlines taken out."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            self._wrong(name, "a string")
        return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in value[:limit])

    def flag(self, name: str) -> bool:
        value = self.fields.get(name)
        if not isinstance(value, bool):
            self._wrong(name, "true or false")
        return value

    def array(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        value = self.arrays.get(name)
        if value is None:
            self._wrong(name, "an array")
        if value.dtype.str != dtype or value.shape != shape:
            raise ProtocolError(
                f"`{name}` of `{self.kind}` is {value.dtype.str} {value.shape}, and must be {dtype} {shape}"
            )
        return value

    def _wrong(self, name: str, wanted: str) -> NoReturn:
        raise ProtocolError(
            f"`{name}` of message `{self.kind}` must be {wanted}, got {str(self.fields.get(name))[:80]!r}"
        )


class Channel:
    """One end of a socket pair. Not for several threads at once.

    `watch` is called while it waits, every SLICE seconds, and may raise to end the wait. With `take_fds` false
    (the referee's end) descriptors that come along are closed by the kernel. `giver` (the referee's end) and `taker`
    (the child's) are for a socket that carries none.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        take_fds: bool = False,
        watch: Callable[[], None] | None = None,
        giver: Giver | None = None,
        taker: Taker | None = None,
    ) -> None:
        self._sock = sock
        self._sock.setblocking(False)
        self._take_fds = take_fds and taker is None
        self._watch = watch
        self._giver = giver
        self._taker = taker
        self._prefix = bytearray()
        self._header: bytearray | None = None
        self._arrays: bytearray | None = None
        self._fds: list[int] = []

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    # --- sending -----------------------------------------------------------------------------------

    def send(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
        fds: Sequence[int] = (),
        timeout: float = 60.0,
    ) -> None:
        """Send one message. Numbers in `fields` must be finite."""
        packed = {name: _little_endian(a) for name, a in (arrays or {}).items()}
        listed = [[name, a.dtype.str, list(a.shape)] for name, a in packed.items()]
        said: dict[str, Any] = {"kind": kind, "fields": dict(fields or {}), "arrays": listed}
        if self._giver is not None:
            said["files"] = self._give(self._giver, fds)
        header = json.dumps(said, allow_nan=False, separators=(",", ":")).encode()
        if len(header) > HEADER_LIMIT:
            raise ProtocolError(f"a header of {len(header)} bytes; at most {HEADER_LIMIT} are accepted")
        size = sum(a.nbytes for a in packed.values())
        deadline = time.monotonic() + timeout
        beside = list(fds) if self._giver is None else []
        self._write(PREFIX.pack(MAGIC, len(header), size, len(fds)) + header, deadline, beside)
        for a in packed.values():
            if a.nbytes:
                self._write(a.reshape(-1).view(np.uint8).data, deadline, [])

    def _give(self, giver: Giver, fds: Sequence[int]) -> list[int]:
        try:
            return [giver.give(fd) for fd in fds]
        except OSError as error:
            raise ChannelClosed(f"no file can be handed over ({error.strerror or error})") from error

    def _write(self, data: bytes | memoryview, deadline: float, fds: list[int]) -> None:
        view = memoryview(data)
        while view:
            group = fds[:FDS_PER_CALL]
            # While descriptors are left, one byte goes with each group of them.
            part = view[:1] if len(fds) > FDS_PER_CALL else view[:CHUNK]
            try:
                sent = _send_fds(self._sock, part, group) if group else self._sock.send(part)
            except (BlockingIOError, InterruptedError):
                self._wait(selectors.EVENT_WRITE, deadline)
                continue
            except OSError as error:
                raise ChannelClosed(f"the other side is gone ({error.strerror})") from error
            view = view[sent:]
            del fds[: len(group)]

    # --- receiving ---------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None, arrays_limit: int = ARRAYS_LIMIT) -> Message:
        """The next message, after at most `timeout` seconds (None: as long as it takes)."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._fill(self._prefix, PREFIX.size, deadline)
        magic, header_size, arrays_size, fd_count = PREFIX.unpack(self._prefix)
        if magic != MAGIC:
            raise ProtocolError(f"not a message: it starts with {bytes(self._prefix[:8])!r}")
        if header_size > HEADER_LIMIT or arrays_size > arrays_limit or fd_count > FDS_LIMIT:
            raise ProtocolError(
                f"a message of {header_size} + {arrays_size} bytes and {fd_count} descriptors; at most "
                f"{HEADER_LIMIT} + {arrays_limit} and {FDS_LIMIT} are accepted"
            )
        if self._header is None:
            self._header = bytearray()
        self._fill(self._header, header_size, deadline)
        if self._arrays is None:
            self._arrays = bytearray()
        self._fill(self._arrays, arrays_size, deadline)
        header, payload, fds = self._header, self._arrays, self._fds
        self._prefix, self._header, self._arrays, self._fds = bytearray(), None, None, []
        if self._take_fds and len(fds) != fd_count:
            close_all(fds)
            raise ProtocolError(f"{fd_count} descriptors were announced and {len(fds)} came")
        message, numbers = _parse(header, payload, fds)
        return message if self._taker is None else replace(message, fds=self._take(self._taker, numbers, fd_count))

    def _take(self, taker: Taker, numbers: Any, count: int) -> list[int]:
        if not _are_sizes(numbers, FDS_LIMIT) or len(numbers) != count:
            raise ProtocolError(f"{count} files were announced, and their numbers are {str(numbers)[:80]}")
        taken: list[int] = []
        try:
            for number in numbers:
                taken.append(taker.take(number))
        except OSError as error:
            close_all(taken)
            raise ProtocolError(f"file {number} did not come: {error}") from error
        return taken

    def _fill(self, buffer: bytearray, size: int, deadline: float) -> None:
        while len(buffer) < size:
            want = min(size - len(buffer), CHUNK)
            try:
                data = self._read(want)
            except (BlockingIOError, InterruptedError):
                self._wait(selectors.EVENT_READ, deadline)
                continue
            except OSError as error:
                raise ChannelClosed(f"the other side is gone ({error.strerror})") from error
            if not data:
                raise ChannelClosed("the other side closed the channel")
            buffer += data
            # A sender that never pauses must not keep the watcher from looking.
            if time.monotonic() > deadline:
                raise ChannelTimeout("a message did not end in time")

    def _read(self, size: int) -> bytes:
        if not self._take_fds:
            return self._sock.recv(size)
        data, fds, _, _ = socket.recv_fds(self._sock, size, FDS_PER_CALL)  # type: ignore[attr-defined]  # POSIX
        self._fds += fds
        return data

    def _wait(self, event: int, deadline: float) -> None:
        if self._watch is not None:
            self._watch()
        left = deadline - time.monotonic()
        if left <= 0:
            raise ChannelTimeout("no answer in time")
        with Selector() as selector:
            selector.register(self._sock, event)
            # Without a watcher and without a deadline there is nothing to wake up for.
            selector.select(None if self._watch is None and math.isinf(left) else min(SLICE, left))


def own_channel() -> Channel:
    """In a child: its end of the channel to the referee."""
    named = os.environ[CHANNEL]
    if named != NOTED:
        return Channel(socket.socket(fileno=int(named)), take_fds=True)
    sock, taker = own_socket()
    return Channel(sock, taker=taker)


def _send_fds(sock: socket.socket, part: memoryview, fds: list[int]) -> int:
    """Bytes sent, with all of the descriptors. On POSIX; elsewhere a channel has a giver."""
    return int(socket.send_fds(sock, [part], fds))  # type: ignore[attr-defined]


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _little_endian(a: np.ndarray) -> np.ndarray:
    a = np.asarray(a)
    packed = a.astype(a.dtype.newbyteorder("<"), order="C", copy=False)
    if packed.dtype.str not in DTYPES:
        raise ProtocolError(f"arrays of {a.dtype} are not sent")
    return packed


def _parse(header: bytearray, payload: bytearray, fds: list[int]) -> tuple[Message, Any]:
    """The message, and what its `files` are, unchecked."""
    try:
        parsed = json.loads(bytes(header).decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the header is not JSON: {str(error)[:120]}") from error
    if not isinstance(parsed, dict):
        raise ProtocolError("the header is not an object")
    kind, fields, listed = parsed.get("kind"), parsed.get("fields"), parsed.get("arrays")
    if not isinstance(kind, str) or not isinstance(fields, dict) or not isinstance(listed, list):
        raise ProtocolError("the header must hold `kind`, `fields` and `arrays`")
    return Message(kind[:40], fields, _unpack(listed, payload), fds), parsed.get("files", [])


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _unpack(listed: list[Any], payload: bytearray) -> dict[str, np.ndarray]:
    """Arrays that together take up the payload exactly."""
    arrays: dict[str, np.ndarray] = {}
    at = 0
    for entry in listed:
        if not (isinstance(entry, list) and len(entry) == 3):
            raise ProtocolError("an array is announced as [name, dtype, sizes]")
        name, dtype, sizes = entry
        if not isinstance(name, str) or name in arrays or dtype not in DTYPES or not _are_sizes(sizes):
            raise ProtocolError(f"not an array that is accepted: {str(entry)[:120]}")
        count = math.prod(sizes)
        size = count * np.dtype(dtype).itemsize
        if size > len(payload) - at:
            raise ProtocolError(f"array `{name[:40]}` of {size} bytes, but {len(payload) - at} are left")
        arrays[name] = np.frombuffer(payload, dtype, count, at).reshape(sizes)
        at += size
    if at != len(payload):
        raise ProtocolError(f"{len(payload)} bytes of arrays, {at} of them announced")
    return arrays


def _are_sizes(sizes: Any, most: int = 8) -> bool:
    return (
        isinstance(sizes, list)
        and len(sizes) <= most
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**40 for n in sizes)
    )
