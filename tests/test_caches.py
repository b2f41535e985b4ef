"""Private copies of compile caches: files come along, nothing that could lead elsewhere does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core import caches


@pytest.fixture(params=["fwalk", "no fwalk"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test twice: as on POSIX, and as on Windows, whose folders have no descriptors."""
    if request.param == "no fwalk":
        monkeypatch.delattr(os, "fwalk")


def test_files_come_along_with_their_right_to_be_run(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inductor" / "ab").mkdir(parents=True)
    (source / "inductor" / "ab" / "kernel.so").write_bytes(b"x" * 3_000_000)
    (source / "inductor" / "ab" / "kernel.so").chmod(0o755)
    (source / "top").write_text("t")
    assert caches.copy(source, target) == 3_000_001
    assert (target / "inductor" / "ab" / "kernel.so").read_bytes() == b"x" * 3_000_000
    assert os.access(target / "inductor" / "ab" / "kernel.so", os.X_OK)
    assert (target / "top").stat().st_mode & 0o777 == 0o600
    assert not caches.is_empty(target)


def test_nothing_leads_out(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "text").write_text("hidden")
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "file-link").symlink_to(secret / "text")
    (source / "folder-link").symlink_to(secret)
    os.link(secret / "text", source / "second-name")
    os.mkfifo(source / "fifo")
    assert caches.copy(source, target) == 0
    assert caches.is_empty(target)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(10):
        (source / str(i)).write_bytes(b"x" * 100)
    monkeypatch.setattr(caches, "MOST_BYTES", 350)
    assert caches.copy(source, tmp_path / "by bytes") <= 350
    monkeypatch.setattr(caches, "MOST_FILES", 2)
    assert caches.copy(source, tmp_path / "by number") <= 200


def test_an_empty_cache(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert caches.is_empty(tmp_path / "a")
    assert caches.copy(tmp_path / "a", tmp_path / "c") == 0
    assert caches.is_empty(tmp_path / "missing")
