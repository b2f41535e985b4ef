"""Private copies of compile caches: files come along, nothing that could lead elsewhere does."""

from __future__ import annotations

import json
import os
import shutil
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


def test_triton_finds_a_kernel_in_a_copy_without_looking_at_where_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lists hold whole paths. Another child's folder can be seen and not read, and opening it ended the child."""
    knobs = pytest.importorskip("triton.knobs")
    from triton.runtime.cache import FileCacheManager

    made, copy = tmp_path / "made", tmp_path / "copy"
    monkeypatch.setattr(knobs.cache, "dir", str(made / "triton"))
    manager = FileCacheManager("KEY")
    names = ("norm.json", "norm.cubin")
    manager.put_group("norm.json", {name: manager.put(name.encode(), name) for name in names})
    caches.copy(made, copy)
    monkeypatch.setattr(knobs.cache, "dir", str(copy / "triton"))
    found = FileCacheManager("KEY").get_group("norm.json")
    assert found == {name: str(copy / "triton" / "KEY" / name) for name in names}
    shutil.rmtree(made)
    assert FileCacheManager("KEY").get_group("norm.json") == found


@pytest.mark.parametrize(
    "written",
    [b"", b"[]", b"{", b'{"child_paths": 1}', b'{"other": {}}', b"\xff\xfe", b'{"child_paths": {"": "/etc/passwd"}}'],
)
def test_what_is_no_list_of_tritons_is_an_empty_one(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "__grp__norm.json").write_bytes(written)
    caches.copy(tmp_path / "a", tmp_path / "b")
    assert not json.loads((tmp_path / "b" / "__grp__norm.json").read_bytes()).get("child_paths")


def test_a_list_names_nothing_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    group = {"../../up": "/etc/passwd", "/etc/shadow": "x", "norm.cubin": "/elsewhere/other"}
    (tmp_path / "a" / "__grp__norm.json").write_text(json.dumps({"child_paths": group}))
    caches.copy(tmp_path / "a", tmp_path / "b")
    found = json.loads((tmp_path / "b" / "__grp__norm.json").read_bytes())["child_paths"]
    assert found == {name: str(tmp_path / "b" / name) for name in ("up", "shadow", "norm.cubin")}


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
