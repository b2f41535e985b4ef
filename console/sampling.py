"""sample: the best model writes. Its recipe runs in the sandbox; only logits come out of it."""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from console import places
from console.output import Screen
from console.words import bpb, duration
from core.errors import UserError

if TYPE_CHECKING:
    from core.lab import Lab
    from core.ledger import Experiment
    from core.tokenizer import Tokenizer


def sample_verb(
    screen: Screen, given: str | None, prompt: str, tokens: int, temperature: float, seed: int, beside: bool
) -> None:
    """`beside`: although something is measured on the device, which is then slower."""
    from core import locks

    lab = places.find(screen, given)
    best = lab.best()
    weights = lab.best_weights()
    if best is None:
        raise UserError(f"lab {lab.tag} has no trained best yet", "autoresearch run")
    if weights is None:
        fact = f"the weights of #{best.number} are not there any more: only those of the latest best are kept"
        raise UserError(
            fact, "autoresearch train --out DIR makes them again, for use elsewhere; or `autoresearch run` goes on"
        )
    with nullcontext() if beside else locks.hold_device(lab.settings.device):
        _write(screen, lab, best, weights, prompt, tokens, temperature, seed)


def _write(
    screen: Screen, lab: Lab, best: Experiment, weights: Path, prompt: str, tokens: int, temperature: float, seed: int
) -> None:
    from core import referee

    tokenizer = lab.dataset().tokenizer()
    start = tokenizer.encode(prompt)
    screen.say(f"#{best.number}, {bpb(best.val_bpb)} ({places.scale(lab)})")
    screen.say()
    began = time.monotonic()
    found: list[int] = []
    writer = Writer(screen, tokenizer, start)
    folder = lab.record / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="sample-", dir=folder) as workdir:
            text = [tokenizer.bos_id, *start]
            for token in referee.sample(
                lab.best_source(), weights, lab.settings, text, tokens, temperature, seed, Path(workdir)
            ):
                if token == tokenizer.bos_id:
                    break
                found.append(token)
                writer.add(token)
        writer.end()
    except referee.RecipeFailed as failed:
        raise UserError(f"the best recipe could not be sampled: {failed.reason}", "autoresearch doctor") from None
    seconds = time.monotonic() - began
    screen.document({"lab": places.about(lab), "experiment": best.number, "prompt": prompt,
                     "text": tokenizer.decode(found), "tokens": len(found), "seconds": seconds})  # fmt: skip
    end = "" if len(found) == tokens else ", the document ended"
    screen.say(f"\n\n{len(found)} tokens in {duration(seconds)}{end}")


class Writer:
    """Prints tokens as they come, each character once it is whole."""

    def __init__(self, screen: Screen, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._screen, self._tokenizer = screen, tokenizer
        self._ids, self._shown = list(prompt), 0
        self._print()

    def add(self, token: int) -> None:
        self._ids.append(token)
        self._print()

    def end(self) -> None:
        """Also a character that was not finished, as the whole text has it."""
        self._print(whole_only=False)

    def _print(self, whole_only: bool = True) -> None:
        text = self._tokenizer.decode(self._ids)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}") if whole_only else text  # the first bytes of a character
        if not self._screen.as_json and len(whole) > self._shown:
            print(whole[self._shown :], end="", flush=True)
            self._shown = len(whole)
