"""The part of the data that decisions never see: scored right, audited like the rest, and by nobody's choice."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn import functional as F

from core import evaluate


def bpb_by_hand(source: str, outcome, dataset, settings, part: str) -> float:
    """Of the weights that were handed over, in this process."""
    made: dict = {}
    exec(source, made)
    spec = SimpleNamespace(vocab_size=settings.vocab_size, bos_id=settings.bos_id, seed=settings.seed)
    training = made["build"](spec)
    training.load_weights(load_file(outcome.weights))
    rows = torch.from_numpy(dataset.rows(part, settings.sequence_len, settings.eval_tokens).astype(np.int64))
    nats = F.cross_entropy(training.logits(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    targets = rows[:, 1:].numpy()
    return evaluate.bpb(*evaluate.totals(nats.numpy().reshape(targets.shape), targets, dataset.token_bytes))


@pytest.mark.slow
def test_the_holdout_is_scored_beside_the_validation_text(run_recipe, tiny_recipe, dataset, settings):
    outcome = run_recipe(tiny_recipe, holdout=True, audit="auto", would_keep=lambda bpb: False)
    assert (outcome.status, outcome.audited) == ("scored", False)
    for part, found in (("val", outcome.val_bpb), ("holdout", outcome.holdout_bpb)):
        assert found == pytest.approx(bpb_by_hand(tiny_recipe, outcome, dataset, settings, part), abs=1e-4)
    assert outcome.holdout_bpb != outcome.val_bpb
    assert outcome.audit["holdout"]["points"] >= 256  # although the validation score was not audited
    text = dataset.rows("val", settings.sequence_len, settings.eval_tokens)[:, 1:]
    assert outcome.scored_tokens == int((dataset.token_bytes[text] > 0).sum())  # of validation alone
    assert {"holdout scoring", "holdout audit", "scoring"} <= outcome.timings.keys()


def told_apart(dataset, settings) -> list[tuple[int, ...]]:
    """Threes of neighbouring tokens by which rows of the holdout can be known: they stand in no validation row."""

    def of(part: str) -> list[set[tuple[int, ...]]]:
        rows = dataset.rows(part, settings.sequence_len, settings.eval_tokens).tolist()
        return [set(zip(row, row[1:], row[2:])) for row in rows]

    held, val = of("holdout"), of("val")
    only = set().union(*held) - set().union(*val)
    chosen: list[tuple[int, ...]] = []
    left = [row & only for row in held]
    while any(left) and len(chosen) < 100:
        best = max(only, key=lambda three: sum(three in row for row in left))
        chosen.append(best)
        left = [row for row in left if best not in row]
    return chosen


@pytest.mark.slow
def test_a_recipe_that_cheats_in_the_holdout_alone_is_caught(run_recipe, tiny_recipe, dataset, settings):
    threes = told_apart(dataset, settings)
    v = settings.vocab_size
    cheat = (
        tiny_recipe.replace(
            "        return self.model(tokens)\n",
            "        x = self.model(tokens)\n"
            "        v, t = self.spec.vocab_size, tokens.long()\n"
            "        keys = (t[:, :-2] * v + t[:, 1:-1]) * v + t[:, 2:]\n"
            "        known = torch.isin(keys, torch.tensor(KNOWN)).any(1)\n"
            "        ahead = F.one_hot(t[:, 1:], v).float() * 9\n"
            "        x[known, :-1] += ahead[known]\n"
            "        return x\n",
        )
        + f"\n\nKNOWN = {[(a * v + b) * v + c for a, b, c in threes]}\n"
    )
    outcomes = (run_recipe(cheat, holdout=True) for _ in range(3))  # an audit's made-up futures can hold one by chance
    outcome = next(o for o in outcomes if o.audited)  # the validation text does not show it
    assert (outcome.status, outcome.val_bpb, outcome.holdout_bpb) == ("invalid", None, None)
    assert "uses the future" in outcome.reason
