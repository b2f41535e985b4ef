"""Who may import whom, what may be loaded, and a few rules that hold for every file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_windows_imports import ELSEWHERE

ROOT = Path(__file__).resolve().parent.parent
OURS = {"cli", "prepare", "console", "core", "backends", "kernels", "researchers", "benchmarks"}
HEAVY = {"torch", "mlx", "anthropic", "triton", "transformers", "jax", "tensorflow"}

# folder or file -> what it may import of ours; `prepare` is the data's command line and stands beside core
MAY_IMPORT = {
    "core": {"core"},
    "kernels": {"kernels"},
    "backends": {"core", "backends", "kernels"},
    "researchers": {"core", "researchers"},
    "benchmarks": {"core", "backends", "kernels", "researchers", "benchmarks", "prepare", "console"},
    "console": {"core", "backends", "researchers", "console", "prepare"},
    "prepare": {"core"},
    "cli": {"core", "backends", "researchers", "console", "prepare", "benchmarks"},
}


def files(top: str) -> list[Path]:
    if (ROOT / f"{top}.py").is_file():
        return [ROOT / f"{top}.py"]
    return sorted((ROOT / top).rglob("*.py"))


SOURCES = [path for top in sorted(OURS) for path in files(top)]
EVERY = SOURCES + sorted((ROOT / "tests").rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Full dotted names of every import in the file, also of those within functions; relative ones resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_imports_go_one_way(path):
    top = path.relative_to(ROOT).with_suffix("").parts[0]
    for name, line in imported(path):
        first = name.split(".")[0]
        if first in OURS:
            assert first in MAY_IMPORT[top], f"{names(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", files("core"), ids=names)
def test_core_imports_no_framework(path):
    for name, line in imported(path):
        assert name.split(".")[0] not in HEAVY, f"{names(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "backends").glob("*/train.py")), ids=names)
def test_recipes_import_only_the_contract_and_kernels(path):
    for name, line in imported(path):
        if name.split(".")[0] in OURS:
            allowed = name.startswith(("core.contract.", "kernels.")) or name == "core.contract"
            assert allowed, f"{names(path)}:{line} imports {name}"


def test_kernels_import_only_what_they_are_written_for():
    allowed = sys.stdlib_module_names | {
        "torch",
        "triton",
        "mlx",
        "numpy",
        "kernels",
    }  # numpy: tokens come in its arrays
    for path in files("kernels"):
        for name, line in imported(path):
            assert name.split(".")[0] in allowed, f"{names(path)}:{line} imports {name}"


def test_nothing_imports_the_command_line():
    for path in SOURCES:
        if path.name != "cli.py":
            assert "cli" not in {name.split(".")[0] for name, _ in imported(path)}, names(path)


def test_nothing_heavy_is_loaded_by_core_and_what_stands_on_it():
    """Every module of core, the names of backends and researchers, and the command line, in one fresh process."""
    absent = ELSEWHERE if sys.platform == "win32" else set()
    here = [p.relative_to(ROOT) for p in files("core")]
    modules = [".".join(p.with_suffix("").parts) for p in here if p.as_posix() not in absent]
    modules = [m.removesuffix(".__init__") for m in modules] + ["backends", "researchers", "researchers.search", "cli"]
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += f"print(sorted({HEAVY!r} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", EVERY, ids=names)
def test_files_are_short_and_know_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 600
    found = re.search(r"(?<![\w.~*])/(?:home|Users|work|opt/ar)/[\w.-]+", text)
    if found and path.parent.name != "tests" and "tests" not in path.parts:  # tests make up such paths
        pytest.fail(f"an absolute path of one machine: {found.group(0)}")


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_no_catch_all_and_no_assert_for_users(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
            reraises = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
            broad = caught & {"everything", "BaseException", "Exception"}
            assert not broad or reraises or _explained(path, node.lineno), f"{names(path)}:{node.lineno}"


def _explained(path: Path, line: int) -> bool:
    """A broad handler needs its reason on the line: the linter's mark with words behind it."""
    text = path.read_text(encoding="utf-8").splitlines()[line - 1]
    return bool(re.search(r"#.*\bBLE001\b.*\w{3,}", text))
