"""What experiments leave in a lab's record beside the ledger: the best's weights and caches, logs, scratch folders.

best/<n>.safetensors   weights of the best, experiment n; nobody else's are kept
caches/<n>/            its compile caches, which the next candidates start from
logs/<n>-*.log         of the last experiments
work/<n>/              what a running experiment writes; empty between experiments
tmp/                   scratch of `train` and `sample`
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from core import caches as cache_files
from core.files import remove, replace_open, sync_folder, tree_bytes

LOGS_KEPT = 300  # experiments
LEFT_BEHIND = 3600.0  # seconds after which scratch in tmp/ that nothing wrote to counts as left by a dead process


class Products:
    """The folders of one record."""

    def __init__(self, record: Path) -> None:
        self.record = record
        self._caches_change = threading.Lock()  # whoever tries a proposal out copies them in another thread

    def workdir(self, number: int) -> Path:
        return self.record / "work" / str(number)

    def scratch(self) -> Path:
        """A folder of that kind for what is no experiment."""
        work = self.record / "work"
        work.mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="try-", dir=work))

    def weights(self, number: int) -> Path | None:
        file = self.record / "best" / f"{number}.safetensors"
        return file if file.is_file() else None

    def caches(self, number: int) -> Path | None:
        folder = self.record / "caches" / str(number)
        return folder if folder.is_dir() else None

    def copy_caches(self, number: int, target: Path) -> Path | None:
        """A copy of them in `target`, whole even where another best is kept meanwhile; None where there are none."""
        with self._caches_change:
            found = self.caches(number)
            if found is None:
                return None
            cache_files.copy(found, target)
            return target

    def compiled_before(self, number: int, caches: Path | None) -> Path | None:
        """What the experiment's run before this one compiled (`caches`, in its work folder, which the next run clears)
        or, where it left nothing, one before that; None where there was none. It goes with the work folder."""
        kept = self.workdir(number).with_name(f"{number}.caches")
        if caches is not None and caches.parent == self.workdir(number) and caches.is_dir():
            with suppress(OSError):  # something holds a file of them: what they save is compiled again
                remove(kept)
                replace_open(caches, kept)
        return kept if kept.is_dir() else None

    def keep(self, number: int, weights: Path | None, caches: Path | None) -> None:
        """Weights and caches of experiment `number` become those of the best. Again and again with the same end."""
        self._keep("best", weights, f"{number}.safetensors")
        with self._caches_change:
            self._keep("caches", caches, str(number))

    def _keep(self, folder: str, product: Path | None, name: str) -> None:
        place = self.record / folder
        place.mkdir(exist_ok=True)
        if product is not None and product.exists():
            if product.is_file():
                _sync(product)
            remove(place / name)
            replace_open(product, place / name)
            sync_folder(place)
        if (place / name).exists():
            self._only(place, name)

    def forget_others(self, number: int | None) -> None:
        """Weights that are not those of the best go: after an undo the old best's."""
        self._only(self.record / "best", f"{number}.safetensors")

    def keep_logs(self, number: int) -> None:
        """The children's logs, each capped by the sandbox; the oldest experiments' go."""
        logs = self.record / "logs"
        logs.mkdir(exist_ok=True)
        for log in self.workdir(number).glob("*.log"):
            shutil.copyfile(log, logs / f"{number:06d}-{log.name}")
        for old in sorted(logs.glob("[0-9]*.log"))[: -4 * LOGS_KEPT]:
            old.unlink(missing_ok=True)

    def clear_work(self, numbers: set[int] | None = None, but: Collection[int] = ()) -> None:
        """Scratch folders of these experiments; of all when None, but for those of `but`."""
        for folder in _entries(self.record / "work"):
            number = folder.name.partition(".")[0]
            chosen = numbers is None or number in {str(n) for n in numbers}
            if chosen and number not in {str(n) for n in but}:
                remove(folder)

    def freeable(self, best: int | None) -> list[tuple[Path, int]]:
        """(path, bytes) of everything that only takes room. Caches are made again when they are needed."""
        found = [f for f in _entries(self.record / "best") if f.name != f"{best}.safetensors"]
        for name in ("caches", "work", "logs"):
            found += _entries(self.record / name)
        found += [f for f in _entries(self.record / "tmp") if time.time() - _last_written(f) > LEFT_BEHIND]
        return [(f, tree_bytes(f)) for f in found]

    def _only(self, folder: Path, name: str) -> None:
        for old in _entries(folder):
            if old.name != name:
                remove(old)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _last_written(path: Path) -> float:
    """Unix time of the newest change in a file or folder."""
    return max((f.lstat().st_mtime for f in (path, *path.rglob("*")) if f.exists()), default=0.0)


def _sync(file: Path) -> None:
    with file.open("r+b") as opened:  # Windows puts on disk only what may be written
        os.fsync(opened.fileno())
