"""Upstream as a peer of a bench: its model and optimizer on the bench's weights and batches, in a process of its own.

It runs in the clone's own environment where that has one (`.venv`), else in this one's packages without our folders:
neither side can lend the other anything. What runs there is a copy of `upstream_side.py` with the three files beside it
that put the fastest attention at hand in the place of what upstream downloads; they import nothing of ours.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import peers, sides
from benchmarks.side import Order
from core.errors import UserError
from core.paths import project_root

HERE, KERNELS = Path(__file__).parent, project_root() / "kernels"
COPIED = {
    "side.py": HERE / "upstream_side.py",
    "at_hand.py": HERE / "at_hand.py",
    "attention_flash.py": KERNELS / "attention_flash.py",
    "measured.py": KERNELS / "measured.py",
}
PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LD_LIBRARY_PATH", "CC", "CXX",
             "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "SYSTEMROOT", "HF_HOME", "HF_HUB_CACHE", "KERNELS_CACHE",
             "XDG_CACHE_HOME")  # fmt: skip
NEEDED = (
    "GPT",
    "GPTConfig",
    "get_lr_multiplier",
    "get_muon_momentum",
    "get_weight_decay",
    *peers.PEER_NAMES,
)


def definitions(folder: Path) -> str:
    """What the clone's train.py defines, as source. UserError where it is no clone of upstream."""
    module = peers.definitions(folder / "train.py")
    named = {node.name for node in module.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for node in module.body:
        if isinstance(node, ast.Assign):
            named |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    missing = [name for name in NEEDED if name not in named]
    if missing:
        raise UserError(
            f"{folder / 'train.py'} does not define {', '.join(missing)}",
            "--upstream takes a clone of karpathy/autoresearch",
        )
    return ast.unparse(module)


def own_attention(folder: Path) -> str:
    """The lines of the clone's train.py that fetch its attention, `fa3`, and those that they need, as source; "" where
    there are none."""
    wanted, found = {"fa3"}, list[ast.stmt]()
    for node in reversed(ast.parse((folder / "train.py").read_text(encoding="utf-8")).body):
        if _bound(node) & wanted:
            found.insert(0, node)
            wanted |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return ast.unparse(ast.Module(found, []))


def _bound(node: ast.stmt) -> set[str]:
    """The names that an import or an assignment gives to something."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(name.asname or name.name).split(".")[0] for name in node.names}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def interpreter(folder: Path) -> Path:
    """The clone's own Python where it has an environment, else this one."""
    own = [folder / ".venv" / "bin" / "python", folder / ".venv" / "Scripts" / "python.exe"]
    return next((python for python in own if python.is_file()), Path(sys.executable))


def ask(order: Order, caches: Path, told: sides.Told) -> dict[str, Any]:
    """The answer of upstream's side to a `start`."""
    return sides.listen(*_call(order, caches), told, sides.LIMIT)


def start(order: Order, caches: Path, told: sides.Told) -> sides.Side:
    """Upstream's side, which takes turns."""
    return sides.Side(*_call(order, caches), told)


FOLDERS = ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")


def _call(order: Order, caches: Path) -> tuple[list[str], dict[str, str], Path]:
    """Command, environment and working directory."""
    folder = Path(order.recipe)
    place = Path(order.folder) / "upstream"
    place.mkdir(exist_ok=True)
    (place / "definitions.py").write_text(definitions(folder), encoding="utf-8")
    (place / "own_attention.py").write_text(own_attention(folder), encoding="utf-8")
    for name, file in COPIED.items():
        shutil.copyfile(file, place / name)  # run from there: ours is then no folder of its path
    given = {**asdict(order), "definitions": str(place / "definitions.py"), "ours": str(project_root())}
    command = [str(interpreter(folder)), "-I", str(place / "side.py"), json.dumps(given)]
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    folders = sides.cache_folders(caches)  # and none of what children need for theirs: it makes launches dearer
    return command, environment | {name: folders[name] for name in FOLDERS}, place
