"""What a recipe, a device and a researcher must offer: the training step and its surroundings, in types.

Shapes: B rows, T tokens of context, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Spec:
    """Everything that a recipe is told. `build(spec)` must depend on nothing else."""

    vocab_size: int
    sequence_len: int  # T of the rows that will be scored; training may use other lengths
    bos_id: int
    device: str  # as the backend's library names it: "cpu", "cuda:0", "gpu"
    dtype: str  # compute dtype that the device chose: "float32", "bfloat16" or "float16"
    seed: int
    memory_limit: int  # bytes that the process may use


class Batches(Protocol):
    """The training text, endless and shuffled by the seed."""

    def next(self, rows: int, length: int) -> Any:
        """Integers (rows, length + 1) on the device: inputs `[:, :-1]`, targets `[:, 1:]`."""


class Training(Protocol):
    """What `build(spec)` of a recipe returns."""

    def step(self, batches: Batches, progress: float) -> Any:
        """One optimizer step. `progress` is the used share of the budget, 0..1.

        Returns the mean loss (nats/token) as a device scalar that has not been read.
        """

    def logits(self, tokens: Any) -> Any:
        """(B, T) integers -> (B, T, V). Pure and causal; never sees targets."""

    def weights(self) -> Mapping[str, np.ndarray]:
        """All that `logits` depends on, as float32 or integer arrays, matrices as (out, in).

        Asked for at the end, and a few times on the way where hopeless runs are stopped early: it changes nothing.
        """

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Inverse of `weights`."""

    def describe(self) -> Mapping[str, Any]:
        """For display only: `depth`, `flops_per_token`, `tokens_per_step`, ..."""


class Recipe(Protocol):
    """The module that `train.py` is."""

    def build(self, spec: Spec) -> Training: ...


@dataclass(frozen=True)
class Choice:
    """A setting that was chosen by the program, and why."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Memory:
    """Bytes in use now, at the worst moment of this process, and at most allowed (0: unknown)."""

    used: int
    peak: int
    limit: int


@dataclass(frozen=True)
class Peak:
    """Dense FLOP/s of the device in the compute dtype, and where the figure comes from ("measured: ...")."""

    flops_per_second: float
    source: str


@runtime_checkable
class Device(Protocol):
    """One per backend, made by `backends/<name>/device.py: open_device()`. Trusted code."""

    name: str  # what Spec.device says
    dtype: Choice  # "float32", "bfloat16" or "float16"

    def fence(self) -> None:
        """Return when all work that was sent to the device is done."""

    def memory(self) -> Memory: ...

    def peak(self) -> Peak: ...

    def to_numpy(self, x: Any) -> np.ndarray:
        """Any device array -> numpy; bfloat16 becomes float32."""

    def later(self, x: Any) -> Callable[[], np.ndarray]:
        """Asked right after the work that makes `x` was sent to the device: what `to_numpy` gives of `x` as that work
        leaves it. The answer, when it is called, waits for that work and for none that was sent after it."""

    def from_numpy(self, x: np.ndarray) -> Any:
        """Integers (B, T) -> the integer array that recipes take as tokens, on the device."""

    def nats(self, logits: Any, targets: np.ndarray) -> np.ndarray:
        """(B, T, V) logits, (B, T) targets -> (B, T) float32 nats of each target.

        A float32 log-softmax over exactly V columns. Raises `ValueError` on another shape and
        on a value that is not finite. `core.evaluate.nats` is the reference.
        """


# --- researchers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """A candidate: the whole new `train.py`, and one line that says what was changed and why."""

    source: bytes
    description: str
    detail: dict[str, Any] = field(default_factory=dict)  # JSON; kept in the record with the experiment


@dataclass(frozen=True)
class Past:
    """One decided experiment, as researchers see it."""

    number: int
    status: str  # keep, simplify, discard, crash, timeout, invalid
    val_bpb: float | None
    description: str
    source: bytes
    reason: str
    log_tail: str
    detail: Mapping[str, Any]
    facts: Mapping[str, Any]  # steps, tokens, peak memory, params, seconds
    tainted: bool = False  # something disturbed the measurement: the score may be worse than it should be
    best_before: float | None = None  # the score that it had to beat
    parent: int | None = None  # the experiment that it started from
    undone: bool = False  # it was kept, and a person took it back
    fingerprint: str = ""  # of `source` (core.recipe.fingerprint), where it is known


def no_objection(source: bytes) -> str:
    """For views of a lab that nobody can try anything in."""
    return ""


def never() -> bool:
    """For views of a lab that nobody stops."""
    return False


def free_of_charge(usage: Mapping[str, Any]) -> None:
    """For views of a lab that keeps no account."""


@dataclass(frozen=True)
class View:
    """What a researcher may see of a lab at the moment of a proposal."""

    program: str  # program.md, read again each time
    best_source: bytes
    best_bpb: float | None
    past: Sequence[Past]  # oldest first
    device: Mapping[str, Any]
    settings: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]] = ()  # results of an earlier project, never a score
    notes: Sequence[str] = ()  # proposals that were refused since the last experiment, and why
    check: Callable[[bytes], str] = no_objection  # why this source would not be run; "" if it would. Takes seconds
    spend: Callable[[Mapping[str, Any]], None] = free_of_charge  # puts what an answer cost on the lab's account
    stopped: Callable[[], bool] = never  # is the run over? Whoever starts processes looks now and then, and ends them
    lab: str = ""  # the lab's folder, for whoever starts processes: to keep them out of it
    importable: str = ""  # what the best imports functions of, described (kernels/README.md); "" where it imports none


class Researcher(Protocol):
    """Whoever proposes the next candidate. Holds no state that cannot be rebuilt from `view.past`.

    With a true attribute `thinks_ahead` it is asked while an experiment runs, in another thread, and does not see that
    experiment's result; without, or with a false one, only when the result is there.
    """

    name: str

    def propose(self, view: View) -> Proposal:
        """Raises `Exhausted` when nothing is left that was not tried, and `Unavailable`."""


@runtime_checkable
class Team(Protocol):
    """A researcher that is made of several: the loop asks whose turn it is, and then that one. A proposal's
    `detail["by"]` is the name of who made it."""

    name: str
    members: Sequence[Researcher]

    def turn(self, view: View, able: Sequence[Researcher]) -> Researcher:
        """One of `able`, those of the members that can answer now; at least one. A function of the view alone."""


class Exhausted(Exception):
    """A researcher has no further idea; the message says what it went through."""


class Unavailable(Exception):
    """A researcher cannot answer now. The loop waits, or goes on with another one; the night does not end.

    `retry_after`: seconds after which it is worth asking again, as far as known. `final`: asking again is of no use
    before a person has done something (an expired key, no credit, a spent cap), which the message says.
    """

    def __init__(self, reason: str, retry_after: float | None = None, final: bool = False) -> None:
        self.reason = reason
        self.retry_after = retry_after
        self.final = final
        super().__init__(reason)
