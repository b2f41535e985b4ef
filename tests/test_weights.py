"""The weights' file: the library reads what we write, we read what the library writes, and no damage passes."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from core import weights
from core.weights import WeightsError

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12).filter(
    lambda n: n != "__metadata__"
)
dtypes = st.sampled_from(["<f4", "|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8"])
arrays = dtypes.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)))
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def equal(left: dict, right: dict) -> None:
    assert set(left) == set(right)
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
        assert left[name].tobytes() == right[name].tobytes()


@unhurried
@given(st.dictionaries(names, arrays, max_size=5))
def test_there_and_back(tmp_path: Path, given_arrays: dict) -> None:
    path = tmp_path / "w"
    path.unlink(missing_ok=True)
    ready = weights.prepare(given_arrays)
    assert weights.write(path, ready) == path.stat().st_size
    with opened(path) as fd:
        found = weights.read(fd)
    equal(found, given_arrays)
    assert weights.digest(found) == weights.digest(dict(reversed(ready.items())))
    if given_arrays:
        equal(load_file(path), given_arrays)


@unhurried
@given(st.dictionaries(names.filter(bool), arrays, min_size=1, max_size=5))
def test_what_the_library_writes(tmp_path: Path, given_arrays: dict) -> None:
    save_file(given_arrays, tmp_path / "w", metadata={"format": "pt"})
    with opened(tmp_path / "w") as fd:
        equal(weights.read(fd), given_arrays)


def test_layout_and_byte_order_do_not_matter() -> None:
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    same = [{"a": a}, {"a": np.asfortranarray(a)}, {"a": a.astype(">f4")}, {"a": np.repeat(a, 2, 1)[:, ::2]}]
    assert len({weights.digest(weights.prepare(w)) for w in same}) == 1
    other = [{"b": a}, {"a": a.T}, {"a": a.reshape(12)}, {"a": a.view(np.int32)}, {"a": a + 1}]
    assert len({weights.digest(weights.prepare(w)) for w in [*same, *other]}) == 6


@pytest.mark.parametrize(
    "bad",
    [None, [1], {1: np.zeros(2)}, {"a": [0.0]}, {"a": np.zeros(2)}, {"a": np.zeros(2, "c8")}, {"a": np.array([{}])}],
)
def test_what_weights_must_not_return(bad: object) -> None:
    with pytest.raises(WeightsError):
        weights.prepare(bad)  # type: ignore[arg-type]


def test_count_and_size() -> None:
    given_arrays = {"w": np.zeros((3, 4), np.float32), "steps": np.array(7)}
    assert (weights.count(given_arrays), weights.size(given_arrays)) == (12, 56)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(bad: float) -> None:
    fine = {"a": np.zeros((5, 5), np.float32), "n": np.array([2**62])}
    weights.check(fine)
    fine["a"][3, 3] = bad
    with pytest.raises(WeightsError, match="`a` has 1 of 25"):
        weights.check(fine)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b"[]",
        b"[" * 50_000,
        {"a": 1},
        {"a": {}},
        entry(dtype="F64"),
        entry(dtype=None),
        entry(shape=[3]),
        entry(shape=[-2]),
        entry(shape=["2"]),
        entry(shape=[True, 2]),
        entry(shape=[1] * 40),
        entry(shape=2),
        entry(offsets=[0, 16], shape=[4]),
        entry(offsets=[-8, 0]),
        entry(offsets=[8, 0]),
        entry(offsets=[0.0, 8.0]),
        entry(offsets=[0]),
        entry(shape=[2**40, 2**40], offsets=[0, 8]),
    ],
)
def test_damaged_headers(header: object, tmp_path: Path) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with opened(tmp_path / "w") as fd, pytest.raises(WeightsError):
        weights.read(fd)


@unhurried
@given(st.binary(max_size=120))
def test_any_bytes_end_in_an_error_of_ours(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "w").write_bytes(data)
    with opened(tmp_path / "w") as fd:
        try:
            assert weights.read(fd) == {}
        except WeightsError:
            pass


@pytest.mark.parametrize("flag", [True, False])
def test_only_regular_files_of_bounded_size_are_opened(tmp_path: Path, monkeypatch, flag: bool) -> None:
    """Also where no flag keeps a link from being followed (Windows)."""
    if not flag:
        monkeypatch.delattr(os, "O_NOFOLLOW")
    real = tmp_path / "real"
    real.write_bytes(b"12345678")
    os.close(weights.open_untrusted(real, 8))
    (tmp_path / "link").symlink_to(real)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, words in [
        ("link", "cannot be read" if flag else "regular"),
        ("fifo", "regular"),
        ("folder", "regular"),
        ("none", "cannot be read"),
    ]:
        with pytest.raises(WeightsError, match=words):
            weights.open_untrusted(tmp_path / name, 8)
    with pytest.raises(WeightsError, match="8 bytes of at most 7"):
        weights.open_untrusted(real, 7)


def test_where_a_descriptor_stands_does_not_matter(tmp_path: Path) -> None:
    """On Windows and macOS a child has the same open file as the referee, and may move its position."""
    given_arrays = {"a": np.arange(6, dtype="<f4")}
    weights.write(tmp_path / "w", given_arrays)
    with opened(tmp_path / "w") as fd:
        digest = weights.file_digest(fd)
        os.lseek(fd, 13, os.SEEK_SET)
        assert weights.file_digest(fd) == digest
        equal(weights.read(fd), given_arrays)
