"""Private copies of compile caches.

A cache is code that later runs, and it is written by a child that is not trusted; it may even still be writing
while its folder is copied. So a copy follows no link, takes regular files with one name only, opens every folder
through the descriptor of the one above it, and stops at a size. Windows knows no such descriptors; what is a link is
left out there by a look before it is opened, and a child that swaps it just then is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path, PurePath

from core import paths
from core.files import is_link

KERNELS = "kernels"
MOST_BYTES = 4 * 2**30
MOST_FILES = 200_000
GROUP = "__grp__"  # how Triton's lists of a kernel's files begin
GROUP_BYTES = 2**16  # of such a list, which has a dozen names


@lru_cache(maxsize=8)
def kernels_tag(root: Path | None = None) -> str:
    """16 hex digits over the code of our operators, a part of every key of torch.compile's caches.

    There a graph holds an operator (torch.library) by its name alone: after a change of what its backward does the old
    one would be found again.
    """
    digest = hashlib.sha256()
    for file in sorted(((root or paths.project_root()) / KERNELS).glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def environment(caches: Path) -> dict[str, str]:
    """What makes torch.compile and Triton keep beneath `caches` what they compile, and find it there again: all of it
    counts in their keys, so whoever compiles for children has to have the same."""
    return {
        "XDG_CACHE_HOME": str(caches / "xdg"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        # A graph with its backward is found again also where a layer has a backward of its own.
        "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD": "1",
        "TORCH_COMPILE_CACHE_KEY_TAG": kernels_tag(),
        # Kernels that are found again ready to be launched remember where they were made, and write what they timed
        # there: into a folder of another child.
        "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0",
        "PYTHONHASHSEED": "0",  # equal code from equal recipes
    }


def copy(source: Path, target: Path) -> int:
    """Copy the regular files below `source` into `target` (made if missing). Returns how many bytes.

    What is not copied (links, devices, files beyond the limits) is only a cache miss for whoever reads the copy.
    Triton's lists of files name them by their whole paths: in the copy they name the copies.
    """
    target = target.absolute()
    target.mkdir(parents=True, exist_ok=True)
    copied = files = 0
    for inside, names, open_file in _folders(source):
        for name in names:
            if files >= MOST_FILES or copied >= MOST_BYTES:
                return copied
            copied += _copy_file(name, open_file, target / inside, MOST_BYTES - copied)
            files += 1
    return copied


Folder = tuple[Path, list[str], Callable[[str], int]]


def _folders(source: Path) -> Iterator[Folder]:
    """Each folder: its path below `source`, its files' names, and what opens one of them without following a link."""
    if not hasattr(os, "fwalk"):
        for folder, below, names in os.walk(source):
            here = Path(folder)
            below[:] = [name for name in below if not is_link(here / name)]
            yield here.relative_to(source), names, partial(_open_by_path, here)
        return
    for folder, _, names, descriptor in os.fwalk(source, follow_symlinks=False):  # type: ignore[attr-defined]  # POSIX
        yield Path(folder).relative_to(source), names, partial(_open_beside, descriptor)


def _open_beside(folder: int, name: str) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # type: ignore[attr-defined]  # POSIX
    return os.open(name, flags, dir_fd=folder)


def _open_by_path(folder: Path, name: str) -> int:
    path = folder / name
    if is_link(path) or not path.is_file():
        raise OSError(f"{path} is not a plain file")
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def is_empty(folder: Path) -> bool:
    """Whether there is no file below `folder`."""
    return not any(names for _, _, names in os.walk(folder))


def _copy_file(name: str, open_file: Callable[[str], int], target: Path, most: int) -> int:
    try:
        fd = open_file(name)
    except OSError:
        return 0  # a link, or gone meanwhile
    with os.fdopen(fd, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1 or facts.st_size > most:
            return 0
        target.mkdir(parents=True, exist_ok=True)
        copied = 0
        with (target / name).open("wb") as out:
            if name.startswith(GROUP) and name.endswith(".json"):
                copied = out.write(_moved(file.read(GROUP_BYTES), target))
            else:
                while copied < facts.st_size and (data := file.read(min(2**20, facts.st_size - copied))):
                    copied += out.write(data)
        (target / name).chmod(0o600 | (facts.st_mode & 0o100))
        return copied


def _moved(group: bytes, folder: Path) -> bytes:
    """Triton's list of the files of a kernel, for the folder that these lie in now; an empty one where it is none.

    As they were written the paths are those of another child, which this one must not read: it would end there.
    """
    try:
        names = [PurePath(str(name)).name for name in json.loads(group)["child_paths"]]
    except (ValueError, TypeError, KeyError):
        return b"{}"  # Triton compiles anew
    return json.dumps({"child_paths": {name: str(folder / name) for name in names if name}}).encode()
