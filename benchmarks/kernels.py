"""The Triton kernels by themselves.

    python -m benchmarks.kernels --compile-only                   # registers, spills, shared memory: needs no card
    python -m benchmarks.kernels --compile-only --target 90 --kernel attention
    python -m benchmarks.kernels --out results                    # on a card: speed against every peer installed

Without `--compile-only` it is the kernels' part of `benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

SECTIONS = ("facts", "correctness", "attention", "mlp", "head", "muon", "fp8")


def main(arguments: Sequence[str] | None = None) -> None:
    """What the kernels need of a card, or how fast they are on this one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=main.__doc__)
    parser.add_argument(
        "--compile-only", action="store_true", help="compile all for every target; exit 1 on spills or too much memory"
    )
    parser.add_argument("--target", type=int, action="append", default=[], help="compute capability; default: all")
    parser.add_argument("--kernel", default="", help="only those whose label contains this")
    parser.add_argument("--json", action="store_true", help="with --compile-only: one JSON object a line")
    parser.add_argument("--out", type=Path, help="folder for results.json and results.md of a card")
    given = parser.parse_args(arguments)
    if given.compile_only:
        try:
            sys.exit(compile_all(given.target, given.kernel, given.json))
        except FileNotFoundError as error:
            sys.exit(str(error))
    if find_spec("torch") is None:
        sys.exit("PyTorch is not installed, and it is what runs these kernels; see autoresearch doctor")
    import torch

    from benchmarks import gpu

    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU that torch can use; give --compile-only, or see autoresearch doctor")
    if given.out is None:
        sys.exit("give --out DIR for the results, or --compile-only")
    sys.exit(gpu.measure(gpu.Order(), SECTIONS, given.out))


def compile_all(targets: Sequence[int], kernel: str, as_json: bool) -> int:
    """Prints a line for each case; the exit status. `FileNotFoundError` where nothing reads a binary."""
    if find_spec("triton") is None:
        sys.exit("Triton is not installed, and it is what compiles these kernels; see autoresearch doctor")
    import triton

    from benchmarks.compile_cases import cases, missing
    from kernels.targets import TARGETS

    if unknown := sorted(set(targets) - set(TARGETS)):
        sys.exit(f"no target {unknown[0]}; known are: {', '.join(map(str, TARGETS))}")
    wrong = count = 0
    if not as_json:
        print(f"Triton {triton.__version__}: registers a thread, spilled bytes a thread, shared bytes a block")
    for one in targets or TARGETS:
        for case in (c for c in cases(one) if kernel in c.label):
            found = case.compile()
            notes = found.problems() + ([f"no {case.expected}"] if missing(case, found) else [])
            wrong, count = wrong + bool(notes), count + 1
            row = {k: v for k, v in asdict(found).items() if k != "ptx"}
            if as_json:
                print(json.dumps({"label": case.label, **row, "problems": notes}))
            else:
                print(
                    f"sm_{one:<4}{case.label:38}{case.warps:3} warps {case.stages} stages "
                    f"{found.registers:4} {found.spills:5} {found.shared:7}  {'; '.join(notes)}".rstrip()
                )
    if not count:
        sys.exit(f"no kernel's label contains {kernel!r}")
    return int(wrong > 0)


if __name__ == "__main__":
    main()
