"""First Python code inside the sandbox: sets the import path, then runs what was asked for.

Started as `python -s -S core/inside.py JSON -m module ARGS...` (or `-c code`, or a script; `fork MODULE FD` loads
this module and does each of the others in forks, see core/forking.py). `-S` keeps `.pth` files
and `sitecustomize` out. The import path becomes: three packages of the project, the standard library, and of each
package folder only the listed names, so that a package which must not be read is one that is not installed.
"""

# ruff: noqa: PTH108, PTH118
# pathlib is not loaded: this runs before every child's work.
from __future__ import annotations

import sys

if sys.path and sys.path[0].endswith("core"):
    del sys.path[0]  # Python 3.10 puts this script's own folder first

import errno
import json
import os
import runpy
import shutil
import signal
from collections.abc import Callable
from importlib import machinery, util
from types import CodeType
from typing import Any


class Listed(machinery.FileFinder):
    """Finds the listed top-level names in one package folder and no other."""

    names: frozenset[str] = frozenset()

    def find_spec(self, fullname: str, target: Any = None) -> machinery.ModuleSpec | None:
        return super().find_spec(fullname, target) if fullname in self.names else None


class Project:
    """Finds this project's packages that a child may use, before all others of these names."""

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> machinery.ModuleSpec | None:
        if fullname not in ("core", "backends", "kernels"):
            return None
        folder = os.path.join(self.root, fullname)
        first = os.path.join(folder, "__init__.py")
        return util.spec_from_file_location(fullname, first, submodule_search_locations=[folder])


def show_packages(folders: list[str], names: frozenset[str]) -> None:
    loaders: list[tuple[Any, list[str]]] = [
        (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
        (machinery.SourceFileLoader, machinery.SOURCE_SUFFIXES),
        (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
    ]

    def hook(path: str) -> Listed:
        if path not in folders:
            raise ImportError(path)
        finder = Listed(path, *loaders)
        finder.names = names
        return finder

    sys.path_hooks.insert(0, hook)  # type: ignore[arg-type]
    sys.path_importer_cache.clear()
    sys.path.extend(folders)


def copy_across_folders() -> None:
    """Landlock's first ABI refuses every rename from one folder to another, which compile caches are made by."""
    os.replace = os.rename = Copying(os.replace)  # type: ignore[assignment]


class Copying:
    """No function: pathlib of Python 3.10 keeps os.rename in a class, where a function becomes a method."""

    def __init__(self, rename: Callable[..., None]) -> None:
        self.rename = rename

    def __call__(self, src: Any, dst: Any, **options: Any) -> None:
        try:
            self.rename(src, dst, **options)
        except OSError as problem:
            if problem.errno != errno.EXDEV or options:
                raise
            beside = f"{os.fspath(dst)}.{os.getpid()}.moving"
            shutil.copyfile(src, beside)
            self.rename(beside, dst)
            os.unlink(src)


def forked(module: str, descriptor: str) -> list[str]:
    """In each fork: what it is to do."""
    from core import landlock

    landlock.die_with_parent(signal.SIGKILL)  # which may be before the library is there, and the channel is listened to
    from core import forking, loading

    loading.load(module)
    return forking.serve(int(descriptor))


def main() -> None:
    setup = json.loads(sys.argv[1])
    # Before Python 3.14 it is `site` that finds a virtual environment, and `-S` keeps it from that. What asks sysconfig
    # where packages lie has to hear it all the same: on Windows Triton's compiler is looked for there.
    sys.prefix = sys.exec_prefix = setup["prefix"]
    # `-S` on a system Python, or PYTHONPATH, may have put package folders there already.
    sys.path[:] = [p for p in sys.path if p and not p.endswith("-packages") and p != setup["root"]]
    sys.meta_path.insert(0, Project(setup["root"]))  # type: ignore[arg-type]
    show_packages(setup["folders"], frozenset(setup["names"]))
    kind, rest = sys.argv[2], sys.argv[3:]
    if setup["abi"] == 1:
        copy_across_folders()  # before anything is loaded that keeps os.rename
    if kind == "fork":
        kind, *rest = forked(*rest)
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        code: CodeType = compile(rest[0], "<string>", "exec")
        exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
