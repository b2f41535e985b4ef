"""Messages over a socket pair: what is sent arrives, and nothing else is accepted."""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from core import handles, wire
from core.wire import Channel, ChannelClosed, ChannelTimeout, Message, ProtocolError

Pair = tuple[Channel, Channel]


def pair(**options: bool) -> Pair:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(one), Channel(other, **options)


def noted_pair() -> tuple[Channel, Channel, handles.Postbox, handles.Postbox]:
    """The way of Windows: TCP, and files by number."""
    one, other = handles.pair()
    giver, taker = (handles.Postbox(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
    return Channel(one, giver=giver), Channel(other, taker=taker), giver, taker


@pytest.fixture(params=["descriptors", "noted"])
def channels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Each test by both ways: as on POSIX, and as on Windows, which waits by select()."""
    if request.param == "descriptors":
        ends, boxes = pair(take_fds=True), []
    else:
        monkeypatch.setattr(wire, "Selector", selectors.SelectSelector)
        *ends, giver, taker = noted_pair()
        boxes = [giver, taker]
    yield tuple(ends)
    for end in [*ends, *boxes]:
        end.close()


def raw() -> tuple[socket.socket, Channel]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return one, Channel(other)


def frame(header: object, payload: bytes = b"", *, size: int | None = None, fds: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<4sIQI", b"ARW1", len(text), len(payload) if size is None else size, fds) + text + payload


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
arrays = st.sampled_from(["|b1", "|u1", "<u2", "<u4", "<i4", "<i8", "<f4", "<f8"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
)


@settings(deadline=None)
@given(
    st.text(max_size=20), st.dictionaries(st.text(), plain, max_size=4), st.dictionaries(st.text(), arrays, max_size=4)
)
def test_what_is_sent_arrives(kind: str, fields: dict, given_arrays: dict) -> None:
    left, right = pair()
    left.send(kind, fields, given_arrays)
    message = right.receive(5)
    assert (message.kind, message.fields, list(message.arrays)) == (kind, fields, list(given_arrays))
    for name, array in given_arrays.items():
        got = message.arrays[name]
        assert got.dtype == array.dtype and got.shape == array.shape
        assert got.tobytes() == array.tobytes()
    left.close()
    right.close()


def test_messages_larger_than_the_sockets_buffer_and_not_contiguous(channels: Pair) -> None:
    left, right = channels
    big = np.arange(3_000_000, dtype=np.int64).reshape(1000, 3000).T[::2]
    thread = threading.Thread(target=left.send, args=("big", {}, {"a": big}))
    thread.start()
    message = right.receive(20, arrays_limit=2**26)
    thread.join()
    np.testing.assert_array_equal(message.arrays["a"], big)


def test_descriptors_come_along_however_many(channels: Pair, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    left, right = channels
    (tmp_path / "text").write_text("here")
    many = 450 if request.node.callspec.params["channels"] == "descriptors" else 30
    fds = [os.open(tmp_path / "text", os.O_RDONLY) for _ in range(many)]
    left.send("files", {"n": 1}, {"a": np.ones(3)}, fds)
    left.send("next")
    wire.close_all(fds)
    message = right.receive(5)
    assert len(message.fds) == many
    assert {os.pread(fd, 10, 0) for fd in message.fds} == {b"here"}
    wire.close_all(message.fds)
    assert right.receive(5).kind == "next"


def test_a_receiver_that_takes_no_descriptors_gets_none(tmp_path: Path) -> None:
    left, right = pair()
    before = len(list(Path("/dev/fd").iterdir()))
    fd = os.open(tmp_path, os.O_RDONLY)
    left.send("files", fds=[fd] * 3)
    os.close(fd)
    assert list(right.receive(5).fds) == []
    assert len(list(Path("/dev/fd").iterdir())) == before


@pytest.mark.parametrize("files", ["[]", "[1,1]", "[2]", "[-1]", "[true]", "null", "{}", '["1"]'])
def test_a_child_takes_no_other_files_than_were_given(files: str, tmp_path: Path) -> None:
    left, right, giver, _ = noted_pair()
    fd = os.open(tmp_path, os.O_RDONLY)
    giver.give(fd)
    os.close(fd)
    text = b'{"kind":"x","fields":{},"arrays":[],"files":%s}' % files.encode()
    left._sock.sendall(struct.pack("<4sIQI", b"ARW1", len(text), 0, 1) + text)
    with pytest.raises(ProtocolError):
        right.receive(5)
    for end in (left, right):
        end.close()


def test_a_file_for_a_child_that_has_gone(tmp_path: Path) -> None:
    left, _, _, taker = noted_pair()
    taker.close()
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(ChannelClosed, match="no file can be handed over"):
        left.send("file", fds=[fd])
    os.close(fd)


def test_timeout_in_the_middle_of_a_message_loses_nothing() -> None:
    sock, channel = raw()
    data = frame({"kind": "slow", "fields": {}, "arrays": [["a", "<f4", [2]]]}, b"\0" * 8)
    for byte in data[:-1]:
        sock.send(bytes([byte]))
        with pytest.raises(ChannelTimeout):
            channel.receive(0)
    sock.send(data[-1:])
    assert channel.receive(1).kind == "slow"


def test_dribbling_does_not_extend_the_time() -> None:
    sock, channel = raw()
    data = frame({"kind": "x" * 3000, "fields": {}, "arrays": []})
    done = threading.Event()

    def dribble() -> None:
        for byte in data:
            if done.wait(0.002):
                return
            sock.send(bytes([byte]))

    thread = threading.Thread(target=dribble)
    thread.start()
    with pytest.raises(ChannelTimeout):
        channel.receive(0.3)
    done.set()
    thread.join()


def test_closing_and_not_reading(channels: Pair) -> None:
    left, right = channels
    with pytest.raises(ChannelTimeout):
        left.send("big", {}, {"a": np.zeros(10**7)}, timeout=0.3)
    right.close()
    with pytest.raises(ChannelClosed):
        left.send("more")
    with pytest.raises(ChannelClosed):
        left.receive(1)


def test_the_watcher_ends_a_wait_in_both_directions() -> None:
    def stop() -> None:
        raise InterruptedError

    one, other = socket.socketpair()
    channel = Channel(one, watch=stop)
    with pytest.raises(InterruptedError):
        channel.receive(60)
    with pytest.raises(InterruptedError):
        channel.send("big", {}, {"a": np.zeros(10**7)}, timeout=60)
    other.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        frame(b"not json"),
        frame(b"[" * 100_000),
        frame(b"\xff\xfe"),
        frame([]),
        frame({"kind": 3, "fields": {}, "arrays": []}),
        frame({"kind": "x", "fields": [], "arrays": []}),
        frame(b'{"kind":"x","fields":{"loss":NaN},"arrays":[]}'),
        frame(b'{"kind":"x","fields":{"n":' + b"9" * 5000 + b'},"arrays":[]}'),
        frame({"kind": "x", "fields": {}, "arrays": [["a", "<f4", [2]]]}, b"\0" * 4),
        frame({"kind": "x", "fields": {}, "arrays": [["a", "<f4", [1]]]}, b"\0" * 8),
        frame({"kind": "x", "fields": {}, "arrays": [["a", "|O", [1]]]}, b"\0" * 8),
        frame({"kind": "x", "fields": {}, "arrays": [["a", "<f4", [-1]]]}),
        frame({"kind": "x", "fields": {}, "arrays": [["a", "<f4", [2**39, 2**39, 2**39]]]}),
        frame({"kind": "x", "fields": {}, "arrays": [["a", "<f4", [True]]]}, b"\0" * 4),
        frame({"kind": "x", "fields": {}, "arrays": [["a", "<f4", [0]], ["a", "<f4", [0]]]}),
        frame({"kind": "x", "fields": {}, "arrays": ["a"]}),
        frame({"kind": "x", "fields": {}, "arrays": []}, size=2**40),
        frame({"kind": "x", "fields": {}, "arrays": []}, fds=2**31),
        struct.pack("<4sIQI", b"ARW1", 2**31, 0, 0),
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    sock, channel = raw()
    sock.sendall(data)
    with pytest.raises(ProtocolError):
        channel.receive(5)


@settings(deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_end_in_an_error_of_ours(data: bytes, framed: bool) -> None:
    sock, channel = raw()
    sock.sendall(frame(data) if framed else data)
    sock.close()
    with pytest.raises((ProtocolError, ChannelClosed)):
        channel.receive(5)
    channel.close()


def test_what_cannot_be_sent(channels: Pair) -> None:
    left, _ = channels
    for array in (np.array([object()]), np.zeros(2, np.complex64), np.array(["a"])):
        with pytest.raises(ProtocolError):
            left.send("x", {}, {"a": array})
    with pytest.raises(ValueError, match="JSON"):
        left.send("x", {"loss": float("nan")})
    with pytest.raises(ProtocolError):
        left.send("x", {"text": "a" * 2**21})


def test_getters_check_what_is_claimed() -> None:
    message = Message("m", {"n": 3, "x": 1.5, "t": "a\x1b[2Jb", "yes": True}, {"a": np.zeros((2, 3), "<f4")})
    assert message.integer("n") == 3 and message.number("x") == 1.5 and message.number("n") == 3.0
    assert message.flag("yes") is True
    assert "\x1b" not in message.text("t")
    assert message.array("a", "<f4", (2, 3)).shape == (2, 3)
    wrong = [
        lambda: message.integer("x"),
        lambda: message.integer("yes"),
        lambda: message.integer("n", 4),
        lambda: message.number("t"),
        lambda: message.number("missing"),
        lambda: message.number("x", 2.0),
        lambda: message.text("n"),
        lambda: message.flag("n"),
        lambda: message.array("a", "<f8", (2, 3)),
        lambda: message.array("a", "<f4", (3, 2)),
        lambda: message.array("b", "<f4", (3, 2)),
    ]
    for claim in wrong:
        with pytest.raises(ProtocolError):
            claim()


def test_a_huge_claim_takes_no_memory() -> None:
    sock, channel = raw()
    sock.sendall(struct.pack("<4sIQI", b"ARW1", 2, 2**62, 0) + b"{}")
    began = time.monotonic()
    with pytest.raises(ProtocolError, match="accepted"):
        channel.receive(60)
    assert time.monotonic() - began < 30
