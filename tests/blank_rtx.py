"""What tests/test_blank_card.py looks at of the rtx recipe, in a child that has a blank card: JSON, one line a case.

A case is [constants, vocabulary, context, dtype]: two steps of the recipe with them, the second one measured. Where a
case does not say what multiplies in the MLP it is Triton's: what is chosen by time would differ from run to run.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import blank_card
from benchmarks.leaving import leave
from core.contract import Spec
from core.recipe import replace

TRAIN = Path(__file__).resolve().parent.parent / "backends" / "rtx" / "train.py"


class OnCard:
    def next(self, rows: int, length: int) -> torch.Tensor:
        return torch.zeros(rows, length + 1, dtype=torch.int64, device="cuda:0")


def measured(constants: dict[str, Any], vocab: int, context: int, dtype: str) -> dict[str, Any]:
    module = ModuleType("train")
    source = replace(TRAIN.read_text(encoding="utf-8"), {"MLP": "triton"} | constants)
    exec(compile(source, "train.py", "exec"), module.__dict__)
    training = module.build(Spec(vocab, context, 0, "cuda:0", dtype, 42, 0))
    training.step(OnCard(), 0.0)
    failed = torch.cuda.memory_stats()["num_ooms"]
    torch.cuda.reset_peak_memory_stats()
    blank_card.reset()
    training.step(OnCard(), 0.5)
    counts = blank_card.counts()
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "out of memory": failed,
        "steps": training.steps,
        **{kind: counts.names(kind) for kind in blank_card.KINDS},
        **training.describe(),
    }


def main() -> None:
    torch.cuda.set_device(0)
    for case in json.loads(sys.argv[1]):
        print(json.dumps(measured(*case)), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_accumulated_memory_stats()


if __name__ == "__main__":
    main()
    leave()
