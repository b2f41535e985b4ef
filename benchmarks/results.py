"""What `autoresearch bench` writes and reads: one JSON file for one machine, which can be sent to someone.

A file holds the work (what was computed, and a hash of it), the machine (hardware and software, no names of users,
hosts or folders) and one entry for each backend. Repeated measurements are kept as they came, one figure a repeat, so
that whoever compares two files can say what is noise. Units: seconds, bytes, FLOP/s, bytes/s, joules; shares are 0..1.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from core.errors import UserError

KIND = "autoresearch-bench"
SCHEMA = 2  # counted up when a field changes its meaning or goes; a new field with a default needs no new number
LARGEST = 32 * 2**20  # bytes of a result file
NIGHT = 8 * 3600.0  # seconds
EXPERIMENT = 300.0  # seconds of training in the experiment that a night is counted in

Status = Literal["measured", "different", "crashed", "unavailable"]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Repeats = Annotated[list[Number], Field(min_length=1)]  # one figure for each repeat, in their order
Curve = list[tuple[Number, Count, Count, Number]]  # (seconds, step, tokens, loss)


@dataclass(frozen=True)
class Work:
    """What every backend computes; two files are comparable where all of it is equal."""

    profile: str  # "tiny", "small", "gpu"
    version: int  # of the bench's own rules: what is timed, and how
    data: str  # name of the text
    text: str  # SHA-256 of the tokens of training and validation, in order
    tokenizer: str  # SHA-256 of the merge table
    reference: str  # SHA-256 of the reference numbers that parity is held against
    vocab_size: int
    context: int
    batch_tokens: int  # of one optimizer step
    micro_rows: int  # rows that go through the model at once
    model: Mapping[str, str | int | float]  # constants of the recipe, upstream's names
    params: int
    fixed_steps: int  # after so many the loss is compared
    scored_tokens: int  # of validation text, at least
    budget: Number  # seconds of training for val_bpb

    def id(self) -> str:
        """16 hex digits over all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Accelerator:
    """A GPU, or the part of a chip that computes."""

    name: str  # "NVIDIA H100 80GB HBM3"
    memory: Count
    architecture: str = ""


@dataclass(frozen=True)
class Machine:
    """Hardware and software, without anything that names a person, a host or a folder."""

    label: str  # one line for people: "AMD EPYC, 2 cores, 24 GiB"
    os: str  # "linux"
    release: str
    machine: str  # "x86_64"
    cpu: str
    flags: list[str]  # instruction sets that matter
    cores: int
    threads: int
    memory: Count
    accelerators: list[Accelerator]
    container: bool
    wsl: bool
    software: Mapping[str, str]  # python, autoresearch, torch, mlx, triton, numpy, driver; only what is there
    code: str  # 16 hex digits over benchmarks, recipes and devices that were run

    def id(self) -> str:
        """12 hex digits: equal for one machine with the same software."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Parity:
    """One kind of array, of one backend, against the shipped reference or another backend."""

    kind: Literal["logits", "loss", "gradient", "step"]
    dtype: str  # that it was computed in: "float32", then the dtype that is timed
    against: str  # "reference", or a backend's name
    arrays: Count
    worst: str  # "gradient of lm_head.weight"
    difference: float | None  # of the worst, as a share of the reference's rms; None: not finite
    tolerance: Number
    passed: bool


@dataclass(frozen=True)
class Peak:
    """What this device reached there and then, in the dtype that is timed."""

    flops: Number  # FLOP/s of a large matrix product: the best of all that were measured
    flops_source: str
    bandwidth: Number  # bytes/s of passes over far more than the caches hold, read and written: `sustained` over rounds
    bandwidth_source: str
    flops_rounds: list[Number] = field(default_factory=list)  # the fastest of each round, as in `Speed.rounds`
    bandwidth_rounds: list[Number] = field(default_factory=list)


@dataclass(frozen=True)
class Speed:
    """Training steps on the bench's text. In a round every backend takes one turn of a second or two, so figures of
    the same round share the machine's state; their ratio is what backends of one file are compared by."""

    step_seconds: Repeats  # mean step of each round
    rounds: list[Count]  # the number of each of these rounds; a backend that crashed is missing in the later ones
    steps: Count  # timed in one round
    batch_tokens: Count
    scoring_rates: list[Number]  # tokens/s from tokens to losses, of each round; empty for a peer
    startup_seconds: Repeats  # from the start of a process until library and device are there; they alternate too
    build_seconds: Repeats  # the recipe: import and weights, of each process that took turns
    compile_seconds: Repeats  # its first steps beyond what such steps take later: compiling and warming up
    peak_memory: Repeats  # bytes after its first steps, process or device, whichever the backend trains in

    def tokens_per_second(self) -> list[float]:
        return [self.batch_tokens / s for s in self.step_seconds]

    def median(self) -> float:
        """Tokens per second."""
        return self.batch_tokens / statistics.median(self.step_seconds)


@dataclass(frozen=True)
class Fixed:
    """The same weights on the same batches for a fixed number of steps."""

    steps: Count
    loss: Number  # nats/token, mean of the last tenth of the steps
    curve: Curve


@dataclass(frozen=True)
class Score:
    """One budgeted experiment through trainer and scorer."""

    seed: int
    val_bpb: float | None  # None: it did not end with a score
    reason: str  # why not
    steps: Count
    tokens: Count
    training_seconds: Number
    scoring_seconds: Number
    total_seconds: Number
    scored_tokens: Count
    curve: Curve


@dataclass(frozen=True)
class Energy:
    """Of the timed steps. `joules_per_token` is None where the machine does not tell, and `source` says why."""

    joules_per_token: float | None
    watts: float | None
    source: str  # "NVML: the whole card", "RAPL: package-0", "not told: no RAPL counter is readable"


@dataclass(frozen=True)
class BackendResult:
    """One backend, or upstream as a peer. What was not reached is None."""

    name: str  # "cpu", "mlx", "cuda", "rtx", "upstream"
    status: Status
    reason: str = ""  # of every status but "measured", for people
    recipe: str = "shipped"  # "its own" (upstream), or 12 hex digits of the SHA-256 of another train.py
    departs: list[str] = field(default_factory=list)  # with "different": "the sliding window is dropped", ...
    device: str = ""
    dtype: str = ""
    dtype_reason: str = ""
    attention: str = ""  # of upstream: what each window of its layers got, and what was timed for that
    parity: list[Parity] = field(default_factory=list)
    flops_per_token: Number = 0.0
    peak: Peak | None = None
    speed: Speed | None = None
    fixed: Fixed | None = None
    scores: list[Score] = field(default_factory=list)
    energy: Energy | None = None

    def mfu(self) -> float | None:
        """Share of the measured peak of matrix products."""
        if self.speed is None or self.peak is None or not self.peak.flops:
            return None
        return self.flops_per_token * self.speed.median() / self.peak.flops

    def bpbs(self) -> list[float]:
        return [s.val_bpb for s in self.scores if s.val_bpb is not None]

    def scoring_seconds(self) -> float | None:
        found = [s.scoring_seconds for s in self.scores if s.val_bpb is not None]
        return statistics.median(found) if found else None

    def experiments_per_night(self) -> float | None:
        """Experiments of five minutes in eight hours, with the overhead (start, compiling, scoring) measured here."""
        found = [s.total_seconds - s.training_seconds for s in self.scores if s.val_bpb is not None]
        return NIGHT / (EXPERIMENT + statistics.median(found)) if found else None


@dataclass(frozen=True)
class KernelResult:
    """One part of the model, one way of computing it, one direction."""

    kernel: str  # "attention, window 128", "mlp", "head", "optimizer"
    way: str  # "ours", "sdpa", "torch.compile", ...
    backend: str
    direction: Literal["forward", "backward", "both", "step"]  # both: forward and backward; step: of an optimizer
    dtype: str
    shape: str  # "B 16, T 256, H 2, D 64"
    seconds: list[Number]  # of each call; those of all ways of one part took turns. Empty: not measured, see `note`
    flops: Number  # of one call
    bytes: Number  # that one call must move at least
    error: float | None  # rms against the float64 reference, as a share; None: not finite
    tolerance: Number
    passed: bool
    note: str = ""
    ours: bool = False  # a way of this project's; the others are peers
    inputs: int = 0  # sets of inputs that took turns, so that none lay in a cache

    def flops_per_second(self) -> float:
        return self.flops / statistics.median(self.seconds)

    def bytes_per_second(self) -> float:
        return self.bytes / statistics.median(self.seconds)


@dataclass(frozen=True)
class Result:
    """One file."""

    work: Work
    work_id: str
    machine: Machine
    created: str  # "2026-11-28", UTC
    quick: bool
    seconds: Number  # that all of it took
    backends: list[BackendResult] = field(default_factory=list)
    kernels: list[KernelResult] = field(default_factory=list)
    kernel_peaks: Mapping[str, Peak] = field(default_factory=dict)  # backend/dtype -> what the kernels are held against
    notes: list[str] = field(default_factory=list)  # what to know when reading it: a busy machine, battery, ...
    kind: str = KIND
    schema: int = SCHEMA

    def measured(self) -> list[BackendResult]:
        return [b for b in self.backends if b.status == "measured"]


def sustained(rates: Sequence[float]) -> float:
    """What is reached in three of four: the first quartile. Memory bandwidth of a virtual machine is of two kinds, as
    its host puts its processors on one die's link to memory or on two, and a median is of one kind or the other."""
    return float(np.quantile(rates, 0.25))


# --- files -------------------------------------------------------------------------------------


def plain(result: Result) -> dict[str, Any]:
    """The result as JSON's own types."""
    found: dict[str, Any] = _finite(asdict(result))
    return found


def dumps(result: Result) -> str:
    return json.dumps(plain(result), indent=1, ensure_ascii=True) + "\n"


def reserve(path: Path, chosen_by_user: bool) -> Path:
    """A place for a new result that can be written to, known before minutes of work. UserError where it cannot, or
    where a file that the user named exists; a name of our own is counted up instead."""
    path = path.expanduser().absolute()
    if chosen_by_user and path.exists():
        raise UserError(f"{path} exists", "name another file with --out, or remove it")
    tried = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(2, 1000))
    while path.exists():
        path = next(tried)
    probe = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", "name another place with --out") from None
    return path


def save(result: Result, path: Path) -> None:
    """Write whole or not at all: a file of this name stays as it was where the new one cannot be written."""
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(dumps(result), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        why = "no space is left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        raise UserError(
            f"{path} cannot be written: {why}", "free some space, or name another file with --out"
        ) from None


def load(path: Path) -> Result:
    """A result file; UserError where it is damaged, something else, or of another schema."""
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= LARGEST else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "give the file of a result") from None
    if size > LARGEST:
        raise UserError(f"{path} has {size:,} bytes; a result has {LARGEST:,} at most", "give the file of a result")
    try:
        found = json.loads(data)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}", "copy it again, or run `autoresearch bench` again") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(f"{path} is no result of `autoresearch bench`", "give a file that it wrote")
    if found.get("schema") != SCHEMA:
        newer = isinstance(found.get("schema"), int) and found["schema"] > SCHEMA
        action = "update autoresearch" if newer else "run the bench again with this version"
        raise UserError(f"{path} is of schema {found.get('schema')}, this version reads {SCHEMA}", action)
    return parse(found, str(path))


def parse(found: Mapping[str, Any], name: str) -> Result:
    """The checked result; UserError names the field that is wrong."""
    try:
        result: Result = TypeAdapter(Result).validate_python(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        fact = f"{name} is damaged: {where}: {first['msg']} ({error.error_count()} in all)"
        raise UserError(fact, "copy it again, or run `autoresearch bench` again") from None
    if result.work.id() != result.work_id:
        raise UserError(
            f"{name} was changed: its work has the hash {result.work.id()}, it says {result.work_id}",
            "ask for the file as the bench wrote it",
        )
    return result


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: both become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
