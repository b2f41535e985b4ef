"""Scoring weights on the validation text, and auditing the score, each with a child of its own.

Shapes: N rows, B rows in a batch, T targets in a row, V vocabulary entries (see core/evaluate.py).
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from core import evaluate, trees
from core.child import Ended, OutOfMemory, Place, Worker
from core.data import Dataset
from core.evaluate import AuditBatch
from core.wire import ProtocolError

Part = Literal["train", "val", "holdout"]


class OutOfMemoryLate(Ended):
    """Memory ended where as much had fitted before: others took it, or the recipe more of it. Text has been shown, so
    no other batch size follows."""

    def __init__(self, reason: str) -> None:
        super().__init__("crash", reason)


@dataclass(frozen=True)
class Text:
    """The rows that are scored, and what their targets count for."""

    rows: np.ndarray  # (N, T+1) int32
    counted: np.ndarray  # (N, T) bool: targets that have bytes
    token_bytes: np.ndarray  # (V,)
    unigram_nats: np.ndarray  # (V,)
    size: int  # B
    part: Part

    @classmethod
    def of(cls, dataset: Dataset, place: Place, part: Part = "val", tokens: int = 0) -> Text:
        """At least `tokens` of a part, by default as many as the settings say are scored. `DataError` where the part is
        shorter than a row."""
        settings = place.settings
        wanted = tokens or settings.eval_tokens
        rows = np.ascontiguousarray(dataset.rows(part, settings.sequence_len, wanted), np.int32)
        counted = dataset.token_bytes[rows[:, 1:]] > 0
        return cls(rows, counted, dataset.token_bytes, dataset.unigram_nats, min(settings.rows(), len(rows)), part)

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    def halved(self) -> Text:
        """The same rows in batches of half the size: the metric is a sum, so the score means the same."""
        return replace(self, size=max(1, self.size // 2))


@dataclass(frozen=True)
class Score:
    nats: np.ndarray  # (N, T) float32
    total_nats: float
    total_bytes: int
    tokens: int  # targets that count

    @property
    def bpb(self) -> float:
        return evaluate.bpb(self.total_nats, self.total_bytes)


def limit(place: Place) -> float:
    """Seconds that scoring, or the audit, may take in all, however long the training was."""
    return place.settings.warmup_cap + place.settings.budget


def prepare(worker: Worker, doing: str) -> bool:
    """Wait until the child has built. Returns whether it compiled something."""
    return worker.expect("warm", worker.place.settings.warmup_cap, f"{doing}: import, build and warm-up").flag(
        "compiled"
    )


def give_weights(worker: Worker, weights: int) -> None:
    """Hand over the checked weights as a descriptor of the child's own, and wait until they are loaded."""
    os.lseek(weights, 0, os.SEEK_SET)  # off Linux the position is shared, and the last child left it
    fd = os.open(f"/proc/self/fd/{weights}", os.O_RDONLY) if trees.LINUX else os.dup(weights)
    try:
        worker.send("weights", fds=[fd])
    finally:
        os.close(fd)
    worker.expect("loaded", worker.place.settings.warmup_cap, "load_weights()")


# --- scoring -----------------------------------------------------------------------------------------


def fill_memory(worker: Worker, text: Text, seconds: float, rng: np.random.Generator) -> None:
    """One batch of random tokens, whose losses are thrown away. Raises `OutOfMemory` where the batch is too large.

    A child that has seen text must not get another batch size by failing: it could choose, with each size, another
    of several models, and fail until the best one is scored. So memory has to end here, where there is no text.
    """
    shape = (text.size, text.rows.shape[1])
    tokens = rng.integers(0, text.vocab_size, shape).astype(text.rows.dtype)
    worker.send("score", arrays={"tokens": tokens})
    worker.expect("scored", seconds, "logits() of random tokens, before the score", 4 * tokens.size)


def score(worker: Worker, text: Text, seconds: float, rng: np.random.Generator) -> Score:
    """Losses of all rows in random order, in batches of one shape; the last is filled with random tokens."""
    deadline = time.monotonic() + seconds
    count, length = len(text.rows), text.rows.shape[1] - 1
    found = np.full((count, length), np.nan, np.float32)
    for done, index in enumerate(evaluate.batches(count, text.size, rng)):
        tokens = evaluate.take(text.rows, index, text.vocab_size, rng)
        worker.send("score", arrays={"tokens": tokens})
        doing = f"logits() for the score (row {min(done * text.size, count)} of {count})"
        try:
            message = worker.expect("scored", max(0.1, deadline - time.monotonic()), doing, 4 * tokens.size)
        except OutOfMemory as end:
            raise OutOfMemoryLate(f"{end.reason}; a batch of {text.size} random rows did fit before") from None
        try:
            nats = message.array("nats", "<f4", (text.size, length))
        except ProtocolError as error:
            raise worker.broke(error) from None
        real = index >= 0
        try:
            evaluate.check_scored(nats[real])
        except ValueError as error:
            raise Ended("invalid", f"in the score: {error}") from None
        found[index[real]] = nats[real]
    total_nats, total_bytes = evaluate.totals(found, text.rows[:, 1:], text.token_bytes)
    return Score(found, total_nats, total_bytes, int(text.counted.sum()))


# --- auditing ----------------------------------------------------------------------------------------


class Auditor:
    """Asks a child for logits at single positions. Every answer is checked by `core.evaluate`."""

    def __init__(
        self, worker: Worker, text: Text, scored: np.ndarray, seconds: float, rng: np.random.Generator
    ) -> None:
        self._worker = worker
        self._text = text
        self._rng = rng
        self._deadline = time.monotonic() + seconds
        self._scored = scored  # (N, T) nats
        chance = evaluate.chances(text.counted, scored, text.unigram_nats[text.rows[:, 1:]])
        self.plan = evaluate.plan_audit(text.counted, chance, text.size, worker.place.settings.audit_points, rng)

    def check_untrained(self) -> dict[str, float]:
        """Before it has the weights, it must know no more of the text than token frequencies tell.

        The batches are the first of the plan, so they show nothing that the same rows would not show later.
        """
        count = math.ceil(evaluate.UNTRAINED_POINTS / self._text.size)
        plan = self.plan[:count]
        targets = np.concatenate([self._text.rows[b.rows, b.positions + 1][b.rows >= 0] for b in plan])
        answers = [a[b.rows >= 0] for a, b in zip(self._ask(plan), plan, strict=True)]
        untrained = self._nats(np.concatenate(answers), targets)
        unigram = self._text.unigram_nats[targets].astype(np.float64)
        weights = np.concatenate([b.weights[b.rows >= 0] for b in plan])
        if problem := evaluate.untrained_problem(untrained, unigram, weights):
            raise Ended("invalid", problem)
        return {"untrained_nats": float(untrained.mean()), "unigram_nats": float(unigram.mean())}

    def check_score(self) -> dict[str, float]:
        """Compare what was scored with what the weights give without the future; facts for the record."""
        answers = self._ask(self.plan)
        try:
            findings = evaluate.find(self.plan, answers, self._text.rows, self._scored)
        except ValueError as error:
            raise Ended("invalid", f"in the audit: {error}") from None
        verdict = evaluate.judge(findings)
        if verdict.problem:
            raise Ended("invalid", f"{self._cause(findings, verdict)}: {verdict.problem}")
        return verdict.facts

    def _cause(self, findings: evaluate.Findings, verdict: evaluate.AuditVerdict) -> str:
        """What the recipe does, found by showing the most suspect rows whole, twice.

        Other answers the second time: it is not a function of the tokens. Answers near the score, which those without
        the future were not: it comes from the tokens behind the position. The verdict does not depend on this.
        """
        rows: dict[int, int] = {}
        for k in verdict.suspects:
            rows.setdefault(int(findings.rows[k]), k)
        chosen = list(rows.values())[: self._text.size]
        index = np.full(self._text.size, -1, np.int64)
        positions = np.zeros(self._text.size, np.int64)
        index[: len(chosen)], positions[: len(chosen)] = findings.rows[chosen], findings.positions[chosen]
        whole = evaluate.take(self._text.rows, index, self._text.vocab_size, self._rng)
        inputs, real = np.ascontiguousarray(whole[:, :-1]), index >= 0
        targets = self._text.rows[index[real], positions[real] + 1]
        first, second = (self._nats(self._answer(inputs, positions)[real], targets) for _ in range(2))
        if np.abs(first - second).max() > evaluate.LEAST:
            return "remembers earlier calls (the same tokens get another answer when they are asked again)"
        was, audited = findings.scored[chosen], findings.audited[chosen]
        nearer = np.abs(first - was) < 0.5 * np.abs(audited - was)
        if verdict.future or nearer.mean() > 0.5:
            return "uses the future"
        return "reports other losses than its logits give, remembers earlier calls, or learns while it is scored"

    def _ask(self, plan: list[AuditBatch]) -> list[np.ndarray]:
        """(B, V) float32 logits for each batch; every call draws other random tokens."""
        text = self._text
        return [
            self._answer(evaluate.audit_inputs(batch, text.rows, text.vocab_size, self._rng), batch.positions)
            for batch in plan
        ]

    def _answer(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        shape = (self._text.size, self._text.vocab_size)
        self._worker.send("logits", arrays={"tokens": tokens, "positions": positions})
        left = max(0.1, self._deadline - time.monotonic())
        message = self._worker.expect("answered", left, "logits() for the audit", 4 * shape[0] * shape[1])
        try:
            return message.array("logits", "<f4", shape)
        except ProtocolError as error:
            raise self._worker.broke(error) from None

    def _nats(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        try:
            return evaluate.nats(logits, targets)
        except ValueError as error:
            raise Ended("invalid", f"in the audit: {error}") from None


def audit(
    worker: Worker, text: Text, weights: int, scored: Score, seconds: float, rng: np.random.Generator
) -> dict[str, Any]:
    """The whole audit with a child that has built. `Ended` with what was caught; else facts for the record."""
    auditor = Auditor(worker, text, scored.nats, seconds, rng)
    facts = auditor.check_untrained()
    give_weights(worker, weights)
    return {**facts, **auditor.check_score()}
