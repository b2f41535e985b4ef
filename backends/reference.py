"""Proof that a backend computes the reference model: one seeded checkpoint, and the numbers that have to come out.

    python -m backends.reference                 # every backend whose library is installed here
    python -m backends.reference --backend mlx

The numbers (`reference.json`) are the CPU recipe's in float32, which the tests hold against a float64 reference. They
let a machine without PyTorch, such as a Mac, prove what it computes. Each array is told by its root mean square and by
its projections on random directions: a wrong entry moves them all.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np

import backends
from core.contract import Device, Spec, Training
from core.errors import UserError
from core.recipe import replace

NUMBERS = Path(__file__).with_name("reference.json")
LIBRARIES = {"cpu": "torch", "cuda": "torch", "rtx": "torch", "mlx": "mlx.core"}
VOCAB, CONTEXT, ROWS = 97, 150, 4  # no multiples of a tile; longer than one block of queries
CONSTANTS = {
    "DEPTH": 4,
    "ASPECT_RATIO": 16,
    "HEAD_DIM": 32,
    "WINDOW_PATTERN": "SSSL",
    "TOTAL_BATCH_SIZE": ROWS * CONTEXT,
    "DEVICE_BATCH_SIZE": 8,
    "WEIGHT_DECAY": 0.2,
}
PROGRESS = 0.7  # at which the step is taken: within the warm-down
DIRECTIONS = 3
# Largest share of an array's size by which two float32 backends differ. A step moves weights by signs of numbers that
# may be nearly zero (Adam's first, cautious decay), so noise decides some of its entries.
TOLERANCE = {"logits": 2e-5, "loss": 2e-5, "gradient": 1e-4, "step": 2e-2}
_SPREAD = {"wte": 1.0, "value_embeds": 0.5, "lm_head": 0.5, "ve_gate": 0.3, "c_proj": 0.1}  # std, else 0.2


@dataclass(frozen=True)
class Check:
    """One array of a backend against the reference."""

    name: str  # "gradient of lm_head.weight"
    difference: float  # the largest of rms and projections, as a share of the reference's rms
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN


def checkpoint(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Seeded float32 weights of these shapes; none is zero or one, as many are at the start of training."""
    rng = np.random.default_rng(5)
    found = {}
    for name, shape in sorted(shapes.items()):
        std = next((s for part, s in _SPREAD.items() if part in name), 0.2)
        found[name] = rng.normal(0.5 if len(shape) == 1 else 0.0, std, shape).astype(np.float32)
    return found


def rows() -> np.ndarray:
    """(ROWS, CONTEXT + 1) seeded tokens."""
    return np.random.default_rng(6).integers(0, VOCAB, (ROWS, CONTEXT + 1), dtype=np.int32)


def training(recipe: bytes, device: Device, dtype: str = "float32") -> Training:
    """A recipe at the reference's shapes, with the checkpoint loaded."""
    source = replace(recipe.decode("utf-8"), CONSTANTS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.py"
        file.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"reference_recipe_{file.parent.name}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # torch.compile looks it up by its name, each recipe by one of its own
        spec.loader.exec_module(module)
    made: Training = module.build(Spec(VOCAB, CONTEXT, VOCAB - 1, device.name, dtype, 1, 0))
    made.load_weights(checkpoint({name: w.shape for name, w in made.weights().items()}))
    return made


def compute(backend: str) -> dict[str, np.ndarray]:
    """What a backend's shipped recipe computes. Loads its library."""
    loaded = backends.load(backend)
    return computed(loaded.recipe(), loaded.open_device())


def computed(recipe: bytes, device: Device, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Logits, loss, gradients and the change of every weight in one optimizer step."""
    with exact(dtype):
        return _computed(training(recipe, device, dtype), device)


@contextmanager
def exact(dtype: str) -> Iterator[None]:
    """float32 products as such. A card's device has torch round their factors to TF32, by a thousandth, for speed."""
    torch = sys.modules.get("torch")
    if torch is None or dtype != "float32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _computed(made: Training, device: Device) -> dict[str, np.ndarray]:
    tokens = rows()
    found = {"logits": device.to_numpy(made.logits(device.from_numpy(tokens[:, :-1])))}
    gradients: Mapping[str, np.ndarray] = made.gradients(device.from_numpy(tokens))  # type: ignore[attr-defined]
    found.update({f"gradient of {name}": g for name, g in gradients.items()})
    before = made.weights()
    found["loss"] = np.reshape(device.to_numpy(made.step(_Once(device, tokens), PROGRESS)), (1,))
    found.update({f"step of {name}": after - before[name] for name, after in made.weights().items()})
    return found


class _Once:
    """`contract.Batches` of the given rows."""

    def __init__(self, device: Device, tokens: np.ndarray) -> None:
        self._device, self._tokens = device, tokens

    def next(self, rows: int, length: int) -> Any:
        assert (rows, length + 1) == self._tokens.shape
        return self._device.from_numpy(self._tokens)


def numbers(array: np.ndarray) -> list[float]:
    """Root mean square, then the projections on DIRECTIONS seeded directions, each of the size of the former."""
    x = np.asarray(array, dtype=np.float64).ravel()
    directions = np.random.default_rng(x.size).standard_normal((DIRECTIONS, x.size))
    return [float(np.sqrt(np.mean(x * x))), *(float(p) for p in directions @ x / np.sqrt(x.size))]


def compare(found: Mapping[str, np.ndarray], wanted: Mapping[str, list[float]]) -> Iterator[Check]:
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())
        raise UserError(f"{len(odd)} arrays are missing or unknown: {', '.join(odd[:4])}", "compare equal versions")
    for name, expected in wanted.items():
        size = max(expected[0], 1e-30)
        difference = max(abs(a - b) for a, b in zip(numbers(found[name]), expected, strict=True)) / size
        yield Check(name, difference, TOLERANCE[name.split()[0]])


def reference() -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads(NUMBERS.read_text(encoding="utf-8"))
    return found


def _installed(backend: str) -> ModuleType | None:
    try:
        return importlib.import_module(LIBRARIES[backend])
    except ImportError:
        return None


@click.command(help="PASS or FAIL of each backend against the shipped reference numbers.")
@click.option("--backend", type=click.Choice(list(LIBRARIES)), help="Default: all whose library is installed.")
@click.option("--write", is_flag=True, help="Make the numbers again, by the CPU recipe.")
@click.option("--json", "as_json", is_flag=True)
def main(backend: str | None, write: bool, as_json: bool) -> None:
    if write:
        made = {name: numbers(array) for name, array in compute("cpu").items()}
        NUMBERS.write_text(json.dumps(made, indent=0) + "\n", encoding="utf-8")
        return
    if backend and not _installed(backend):
        raise click.ClickException(f"{LIBRARIES[backend]} is not installed: pip install -e '.[{backend}]'")
    chosen = [backend] if backend else [name for name in backends.names() if _installed(name)]
    checks = {}
    for name in chosen:
        try:
            checks[name] = list(compare(compute(name), reference()))
        except UserError as error:  # no such device here
            if backend:
                raise click.ClickException(f"{error.fact}; {error.action}") from None
            click.echo(f"SKIP  {name:<5} {error.fact}", err=as_json)
    if as_json:
        told = {n: {c.name: {"difference": c.difference, "passed": c.passed} for c in cs} for n, cs in checks.items()}
        click.echo(json.dumps(told, indent=1))
    for name, found in checks.items():
        for kind, tolerance in () if as_json else TOLERANCE.items():
            of_kind = [c for c in found if c.name.startswith(kind)]
            worst = max(of_kind, key=lambda c: (not c.passed, c.difference))
            verdict = "PASS" if worst.passed else "FAIL"
            click.echo(
                f"{verdict}  {name:<5} {kind:<9} {len(of_kind):>3} arrays, "
                f"largest difference {worst.difference:.1e} of {tolerance:g} ({worst.name})"
            )
    if not all(c.passed for found in checks.values() for c in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
