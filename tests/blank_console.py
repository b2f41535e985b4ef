"""The console on a blank card, whose children in the sandbox see it too: arguments are the command line's.

The sandbox gives its children an environment of their own, to which what makes the card is added here, and the folders
of its library and of who shares it to what they may read. The card's numbers are `BLANK_CARD_VALUE`: where that is the
logarithm of the vocabulary, a scorer's losses are what its logits, all alike, give. Of each child they are lower by a
chance of so little that the audit lets it pass: else no experiment were better than another.

Shapes are small, one way through the card is timed, a busy or lost card is looked at often, and neither what else this
machine does nor how fast steps come counts as anything.
"""

from __future__ import annotations

import math
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import backends
import cli
from console import fitting
from core import gpuwatch, health, landlock, referee, sandbox, session, steady

CARD = {name: os.environ[name] for name in os.environ if name.startswith(("BLANK_CARD", "TORCHDYNAMO"))} | {
    name: os.environ[name] for name in ("LD_PRELOAD", "LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH")
}
LUCK = 8e-4  # nats
SMALL = {"DEPTH": 2, "TOTAL_BATCH_SIZE": 2**13, "DEVICE_BATCH_SIZE": 4}
given_environment, given_rules = sandbox.environment, sandbox.Policy.rules
given_profile, given_wait = backends.Backend.profile, gpuwatch.wait
given_phase = referee._Experiment.phase


def environment(*places: Path) -> dict[str, str]:
    lucky = float(CARD["BLANK_CARD_VALUE"]) - LUCK * random.random()
    return given_environment(*places) | CARD | {"BLANK_CARD_VALUE": repr(lucky)}


def rules(policy: sandbox.Policy) -> list[tuple[str, int]]:
    shared = str(Path(CARD["BLANK_CARD_SHARED"]).parent)
    library = (CARD["TRITON_LIBCUDA_PATH"], landlock.READ | landlock.EXECUTE)
    return [*given_rules(policy), library, (shared, landlock.WRITE)]


def profile(backend: backends.Backend, hardware: Any, name: str | None = None) -> Any:
    found = given_profile(backend, hardware, name)
    small = SMALL | ({"ATTENTION": "triton"} if backend.name == "cuda" else {})  # the others take a minute to be timed
    return replace(found, sequence_len=512, eval_tokens=2**14, constants={**found.constants, **small})


def phase(run: Any, name: str) -> None:
    given_phase(run, name)
    while (gates := os.environ.get("BLANK_CONSOLE_GATES")) and (Path(gates) / name).exists():
        time.sleep(0.05)


def main() -> None:
    sandbox.environment, sandbox.Policy.rules = environment, rules
    backends.Backend.profile = profile
    gpuwatch.wait = lambda stop, seconds: given_wait(stop, min(seconds, 0.5))
    referee._Experiment.phase = phase
    health._busy_seconds = lambda: 0.0
    steady.SLOWER = math.inf
    fitting.TRIED = 1
    session.TRIED_AGAIN = (1.0, 3.0)
    cli.main()


if __name__ == "__main__":
    main()
