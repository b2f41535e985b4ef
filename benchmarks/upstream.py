"""Upstream as a peer of a bench: its model and optimizer on the bench's weights and batches, in a process of its own.

It runs in the clone's own environment where that has one (`.venv`), else in this one's packages without our folders:
neither side can lend the other anything. What runs there is `upstream_side.py`, which imports nothing of ours.
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

SCRIPT = Path(__file__).with_name("upstream_side.py")
PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LD_LIBRARY_PATH", "CC", "CXX",
             "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "SYSTEMROOT")  # fmt: skip
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
    shutil.copyfile(SCRIPT, place / "side.py")  # run from there: ours is then no folder of its path
    given = {**asdict(order), "definitions": str(place / "definitions.py"), "ours": str(project_root())}
    command = [str(interpreter(folder)), "-I", str(place / "side.py"), json.dumps(given)]
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    folders = sides.cache_folders(caches)  # and none of what children need for theirs: it makes launches dearer
    return command, environment | {name: folders[name] for name in FOLDERS}, place
