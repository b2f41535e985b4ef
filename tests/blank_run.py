"""A whole experiment of the cuda recipe in the sandbox, on a blank card: JSON of how it ended.

The card's numbers are zeros, which scoring refuses; all that comes before it is as on a card. With the argument
"uniform" they are what makes a uniform guess of them, whose score is audited. The sandbox gives its children an
environment of their own, to which what makes the card is added here.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import gpu_run
from benchmarks.gpu import Order
from core import landlock, sandbox

CARD = {name: os.environ[name] for name in os.environ if name.startswith("BLANK_CARD")} | {
    name: os.environ[name] for name in ("LD_PRELOAD", "LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH")
}
given_environment, given_rules = sandbox.environment, sandbox.Policy.rules


def rules(policy: sandbox.Policy) -> list[tuple[str, int]]:
    return [*given_rules(policy), (CARD["TRITON_LIBCUDA_PATH"], landlock.READ | landlock.EXECUTE)]


def main() -> None:
    sandbox.environment = lambda *places: given_environment(*places) | CARD
    sandbox.Policy.rules = rules
    gpu_run.SECONDS = 3.0
    order = replace(Order(), rows=4, tokens=2**14, context=512, depth=2, heads=2)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTORESEARCH_HOME"] = folder
        data = gpu_run.data(order, Path(folder))
        if sys.argv[1:] == ["uniform"]:
            CARD["BLANK_CARD_VALUE"] = repr(math.log(data.vocab_size))
        outcome = gpu_run.experiment(order, data, Path(folder) / "work")
    found = {"status": outcome.status, "reason": outcome.reason, "log": outcome.log_tail[-2000:]}
    found |= {"steps": outcome.steps, "points": outcome.audit.get("points")}
    print(json.dumps(found | {"device": outcome.describe.get("rows_reason", "")}))


if __name__ == "__main__":
    main()
