"""Weights as a safetensors file: written by a child, checked by the referee, read by another child.

The format (huggingface/safetensors): header length (uint64), a JSON header name -> {dtype, shape, data_offsets},
then the arrays' bytes. It is read here without the library because the writer is a child that is not trusted and
because the file is handed over as a descriptor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core import files

HEADER_LIMIT = 8 * 2**20  # bytes
NAMES = {
    "F32": "<f4",
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
}
CODES = {dtype: name for name, dtype in NAMES.items()}
CHUNK = 2**22  # values looked at in one go


class WeightsError(ValueError):
    """What a recipe hands over as its weights, or the file of them, is not usable."""


def prepare(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `weights()` returned, as contiguous little-endian arrays. `WeightsError` names what is not accepted."""
    if not isinstance(weights, Mapping):
        raise WeightsError(f"weights() returned {type(weights).__name__}, not a dict of arrays")
    ready = {}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise WeightsError(f"weights() maps {name!r} to {type(value).__name__}; names to numpy arrays are accepted")
        array = np.ascontiguousarray(value).reshape(value.shape)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        if array.dtype.str not in CODES:
            raise WeightsError(f"weight `{name}` is {value.dtype}; float32 and integers are accepted")
        ready[name] = array
    return ready


def size(weights: Mapping[str, np.ndarray]) -> int:
    """Bytes of all arrays."""
    return sum(a.nbytes for a in weights.values())


def count(weights: Mapping[str, np.ndarray]) -> int:
    """Parameters: the floating-point values."""
    return sum(a.size for a in weights.values() if a.dtype.kind == "f")


def digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and values, whatever the order."""
    whole = hashlib.sha256()
    for name in sorted(weights):
        array = weights[name]
        whole.update(repr((name, array.dtype.str, array.shape)).encode())
        whole.update(_raw(array))
    return whole.hexdigest()


def file_digest(fd: int) -> str:
    """SHA-256 of the whole file behind `fd`."""
    with _mapped(fd) as content:
        return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def _mapped(fd: int) -> Iterator[mmap.mmap | bytes]:
    """What is behind `fd`, whatever position it stands at: a child may have the same one, and move it."""
    if os.fstat(fd).st_size == 0:  # cannot be mapped
        yield b""
        return
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as content:
        yield content


def write(path: Path, weights: Mapping[str, np.ndarray]) -> int:
    """Write prepared weights; the file must not exist. Returns its size in bytes."""
    listed: dict[str, Any] = {}
    at = 0
    for name, array in weights.items():
        listed[name] = {
            "dtype": CODES[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    header = json.dumps(listed).encode()
    header += b" " * (-len(header) % 8)  # arrays start aligned
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for array in weights.values():
            file.write(_raw(array))
    return 8 + len(header) + at


def open_untrusted(path: Path, most: int) -> int:
    """A read-only descriptor of a regular file of at most `most` bytes that a child wrote; no link is followed."""
    if not hasattr(os, "O_NOFOLLOW") and files.is_link(path):  # the child has ended, so it stays what it is
        raise WeightsError("the weights are not a regular file")
    try:
        fd = os.open(
            path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
    except OSError as error:
        raise WeightsError(f"the weights cannot be read: {error.strerror}") from error
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        os.close(fd)
        raise WeightsError("the weights are not a regular file")
    if facts.st_size > most:
        os.close(fd)
        raise WeightsError(f"the weights take {facts.st_size} bytes of at most {most}")
    return fd


def read(fd: int) -> dict[str, np.ndarray]:
    """Arrays of the file behind `fd`, mapped and read-only. `WeightsError` on anything but a well-formed file."""
    total = os.fstat(fd).st_size
    with _mapped(fd) as content:
        head = content[: 8 + HEADER_LIMIT]
    if len(head) < 8:
        raise WeightsError(f"the weights' file has {total} bytes and no header")
    (length,) = struct.unpack("<Q", head[:8])
    if length > min(HEADER_LIMIT, total - 8):
        raise WeightsError(f"the weights' header claims {length} bytes of {total}")
    try:
        listed = json.loads(head[8 : 8 + length].decode())
    except (ValueError, RecursionError) as error:
        raise WeightsError("the weights' header is not JSON") from error
    if not isinstance(listed, dict):
        raise WeightsError("the weights' header is not an object")
    listed.pop("__metadata__", None)
    body = total - 8 - length
    mapped = np.empty(0, np.uint8)
    if body:
        mapped = np.frombuffer(mmap.mmap(fd, total, access=mmap.ACCESS_READ), np.uint8, body, 8 + length)
    return {name: _array(name, entry, mapped) for name, entry in listed.items()}


def check(weights: Mapping[str, np.ndarray]) -> None:
    """Every value finite; `WeightsError` names the array and how many are not."""
    for name, array in weights.items():
        if array.dtype.kind != "f":
            continue
        flat = array.reshape(-1)
        bad = sum(int(np.count_nonzero(~np.isfinite(flat[i : i + CHUNK]))) for i in range(0, flat.size, CHUNK))
        if bad:
            raise WeightsError(f"weight `{name[:80]}` has {bad} of {array.size} values that are not finite")


def _raw(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.nbytes else memoryview(b"")


def _array(name: str, entry: Any, mapped: np.ndarray) -> np.ndarray:
    try:
        dtype, shape, (start, end) = np.dtype(NAMES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
        well_formed = (
            len(shape) <= 16
            and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)
            and isinstance(start, int)
            and isinstance(end, int)
            and 0 <= start <= end <= mapped.size
            and end - start == math.prod(shape) * dtype.itemsize
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"the weights' entry for `{name[:80]}` is not understood") from error
    if not well_formed:
        raise WeightsError(f"the weights' entry for `{name[:80]}` does not fit the file")
    part = mapped[start:end]
    if start % dtype.itemsize:
        part = part.copy()
    return part.view(dtype).reshape(shape)
