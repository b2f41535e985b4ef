"""The settings that are locked when a lab is made, and the profile that they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

WARMUP_CAP = 90.0  # seconds for import, build, compilation and warm-up, outside the clock
LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Profile:
    """What a machine class starts from. `constants` replace those of the same names in the recipe."""

    name: str
    backend: str
    data: str  # a name that `prepare` knows
    vocab_size: int
    sequence_len: int
    budget: float  # seconds of training
    eval_tokens: int  # at least so many validation tokens are scored (or all there are)
    constants: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""  # why this profile fits this machine
    warmup_cap: float = WARMUP_CAP
    logits_bytes: int = LOGITS_BYTES  # of one scoring batch; more where a card has room: few rows leave it idle


@dataclass(frozen=True)
class Settings:
    """Everything that makes two scores of one lab comparable. Locked: kept outside the lab, hashed."""

    backend: str
    profile: str
    data: str  # folder name of the prepared data set under the home's data/
    data_sha256: str  # of its manifest, which holds the hashes of shards and tokenizer
    vocab_size: int
    sequence_len: int
    bos_id: int
    budget: float  # seconds of training
    eval_tokens: int
    dtype: str
    device: str
    seed: int = 42
    warmup_cap: float = WARMUP_CAP
    min_delta: float = 0.001  # bpb by which a candidate must be better to be kept; 0: whatever is lower
    memory_limit: int = 0  # bytes for one child process; 0: what the machine has
    logits_bytes: int = LOGITS_BYTES  # that one scoring batch of logits takes in float32
    audit_points: int = 1024
    # What follows came later: the defaults are what a lab was made with that does not name it.
    verdict: Literal["simple", "statistical"] = "simple"  # the rule that keeps: one run and `min_delta`, or several
    probe: bool = False  # whether hopeless runs are stopped early

    def rows(self) -> int:
        """Rows of one scoring batch: as many as the logits' memory budget allows, 1 to 64."""
        return max(1, min(64, self.logits_bytes // (self.sequence_len * self.vocab_size * 4)))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in json.loads(text).items() if k in known})

    def sha256(self) -> str:
        return locked_hash(self.to_json())


def locked_hash(text: str) -> str:
    """Of settings as JSON, whatever fields they have: those of an older program keep their hash."""
    return hashlib.sha256(json.dumps(json.loads(text), indent=1, sort_keys=True).encode()).hexdigest()
