"""Entry point of the referee's children: `python -m backends.worker ROLE BACKEND`, in the sandbox.

Roles: `trainer` trains; `warm-up` only does what comes before the clock, so that the trainer can be a process that the
recipe has never been in; `scorer`, `auditor` and `prober` answer with losses and logits; `measure` times steps; `dry`
tries a recipe out. All of them load the backend's library first, then wait for the recipe's bytes on the channel.

Once the recipe is imported it shares this interpreter and could change any of it. So nothing that is said from here
is believed by the referee alone (core/referee.py); what is checked here is checked for good error messages.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import math
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from core import loading
from core import weights as weight_files
from core.clock import Budget, StepTimes
from core.contract import Device, Spec, Training
from core.errors import DeviceFull, UserError
from core.windows import under_wsl
from core.wire import Channel, ChannelClosed, Message, close_all, own_channel
from kernels.errors import out_of_memory, plain, refused_by_wsl

PROGRESS_EVERY = 1.0  # seconds between two messages of progress
WARMUP = (0.0, 0.5, 1.0)  # progress at which a step is tried before the clock starts
# Loaded when something is compiled for the device; without one of them a warm-up has nothing to do.
PHASED = ("torch._inductor.compile_fx", "triton.compiler.compiler")  # another phase of a schedule may compile anew
COMPILERS = (*PHASED, "mlx.core")
DESCRIBE_ENTRIES = 64


class RecipeError(Exception):
    """The recipe failed, or gave what it must not give. `status`: "crash", "invalid", or "memory" where it ran out."""

    def __init__(self, status: str, reason: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(reason)


def main() -> None:
    role, backend = sys.argv[1:3]
    channel = own_channel()
    device_module = loading.load(f"backends.{backend}.device")
    roles = {
        "trainer": train, "warm-up": rehearse, "scorer": answer, "auditor": answer, "prober": answer,
        "measure": measure, "dry": dry,
    }  # fmt: skip
    try:
        channel.send("ready")
        device = opened(channel, device_module)
        begin = channel.receive()
        try:
            roles[role](channel, device, begin)
        except RecipeError as error:
            channel.send("failed", {"status": error.status, "reason": error.reason})
    except ChannelClosed:
        sys.exit(3)  # the referee is gone, or has heard enough


def opened(channel: Channel, device_module: ModuleType) -> Device:
    """The device, when the referee asks for it: before it sends the recipe, so that what is wrong here is not its."""
    channel.receive()
    try:
        device: Device = device_module.open_device()
    except UserError as error:
        told = {"status": "backend", "reason": error.fact[:400], "action": error.action[:400]}
        channel.send("failed", told | ({"needed": error.needed} if isinstance(error, DeviceFull) else {}))
        raise ChannelClosed("no device") from None
    channel.send("opened")
    return device


# --- calling the recipe --------------------------------------------------------------------------------


def call(doing: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call into the recipe; whatever it raises becomes a `RecipeError` that says in what."""
    try:
        return function(*arguments)
    except RecipeError:
        raise
    except ChannelClosed:
        raise
    except BaseException as error:  # noqa: BLE001 - a recipe may raise anything, SystemExit included
        print(_recipe_traceback(error), file=sys.stderr, flush=True)
        status = "memory" if out_of_memory(error) or (under_wsl() and refused_by_wsl(error)) else "crash"
        raise RecipeError(status, f"{doing}: {describe_error(error)}") from None


def describe_error(error: BaseException) -> str:
    """Type, message and the line of train.py, in one line."""
    text = plain(str(error))
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "train.py"]
    if isinstance(error, SyntaxError) and error.lineno:
        lines = [error.lineno]
    at = f" (train.py, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {text[:400]}{at}" if text else f"{type(error).__name__}{at}"


def _recipe_traceback(error: BaseException) -> str:
    """The traceback from the first frame of train.py on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != "train.py" and frames.tb_next is not None:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def compile_apart(source: bytes) -> None:
    """What torch.compile keeps for a recipe with operators of its own (torch.library) is for this text alone: in its
    keys an operator is a name, and a changed backward behind the same name would not be seen."""
    if b"library" in source and "torch" in sys.modules:
        config: Any = importlib.import_module("torch.compiler.config")
        config.cache_key_tag = f"{config.cache_key_tag} {hashlib.sha256(source).hexdigest()}"


def load_recipe(source: bytes) -> ModuleType:
    """The module `train`, from exactly these bytes. They also lie in the scratch folder, which is the working
    directory, so that tracebacks, `inspect.getsource` and kernels' compilers find the lines."""
    compile_apart(source)
    Path("train.py").write_bytes(source)
    module = ModuleType("train")
    module.__file__ = "train.py"
    sys.modules["train"] = module

    def run() -> None:
        exec(compile(source, "train.py", "exec"), module.__dict__)

    call("import", run)
    if not callable(getattr(module, "build", None)):
        raise RecipeError("crash", "train.py has no function build(spec)")
    return module


def build(module: ModuleType, spec: Spec) -> Training:
    training: Training = call("build", module.build, spec)
    return training


def weights_of(training: Training) -> dict[str, np.ndarray]:
    found = call("weights()", training.weights)
    try:
        return weight_files.prepare(found)
    except weight_files.WeightsError as error:
        raise RecipeError("crash", str(error)) from None


def later(device: Device, step: int, loss: Any) -> Callable[[], Any]:
    """Asked before the next step is sent to the device; what `read_loss` takes once it is."""
    read: Callable[[], Any] = call(f"loss of step {step}", device.later, loss)
    return read


def read_loss(step: int, read: Callable[[], Any]) -> float:
    """The loss of a step as a finite number; else the run ends here."""
    value = call(f"loss of step {step}", read)
    if np.size(value) != 1:
        raise RecipeError("crash", f"step {step} returned an array of shape {np.shape(value)}, not one loss")
    number = float(np.reshape(value, ()))
    if not math.isfinite(number):
        raise RecipeError("crash", f"loss is {number} at step {step}")
    return number


def compiled() -> bool:
    return any(name in sys.modules for name in COMPILERS)


def spec_of(begin: Message) -> Spec:
    return Spec(**begin.fields["spec"])


class RandomBatches:
    """`contract.Batches` of uniformly random tokens: nothing can be learned from them."""

    def __init__(self, device: Device, spec: Spec) -> None:
        self._device = device
        self._vocab_size = spec.vocab_size
        self._random = np.random.default_rng(0)
        self.served = 0  # targets

    def next(self, rows: int, length: int) -> Any:
        self.served += rows * length
        tokens = self._random.integers(0, self._vocab_size, (rows, length + 1), dtype=np.int32)
        return self._device.from_numpy(tokens)


def described(training: Training) -> dict[str, Any]:
    """What `describe()` says, as far as it is plain JSON."""
    found = call("describe()", training.describe)
    if not isinstance(found, Mapping):
        return {}
    plain: dict[str, Any] = {}
    for name, value in list(found.items())[:DESCRIBE_ENTRIES]:
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, float) and not math.isfinite(value):
            continue
        if isinstance(value, (str, bool, int, float)):
            plain[str(name)[:80]] = value[:400] if isinstance(value, str) else value
    return plain


# --- trainer -------------------------------------------------------------------------------------------


def train(channel: Channel, device: Device, begin: Message) -> None:
    spec = spec_of(begin)
    source = begin.arrays["source"].tobytes()
    if begin.flag("rehearsed"):  # in another process: even the import is on the clock here
        digest, start = begin.text("weights", 64), channel.receive()
        module = load_recipe(source)
    else:
        module = load_recipe(source)
        digest = before_the_clock(channel, device, module, spec, begin.flag("measure_peak"))
        start = channel.receive()
    run(channel, device, module, spec, digest, start)


def rehearse(channel: Channel, device: Device, begin: Message) -> None:
    module = load_recipe(begin.arrays["source"].tobytes())
    before_the_clock(channel, device, module, spec_of(begin), begin.flag("measure_peak"))
    wait_for_end(channel)


def before_the_clock(channel: Channel, device: Device, module: ModuleType, spec: Spec, measure_peak: bool) -> str:
    """Build, and compile by steps on random tokens, thrown away after. Returns the digest of the built weights."""
    training = build(module, spec)
    untrained = weights_of(training)
    digest = weight_files.digest(untrained)
    facts = {
        "params": weight_files.count(untrained),
        "weights_bytes": weight_files.size(untrained),
        "weights": digest,
        "describe": described(training),
    }
    del untrained
    channel.send("built", facts)
    warm_up(device, training, RandomBatches(device, spec))
    del training
    gc.collect()
    channel.send("warm", {"compiled": compiled(), **device_facts(device, measure_peak)})
    return digest


def warm_up(device: Device, training: Training, batches: RandomBatches) -> None:
    """Steps whose weights are thrown away: compile for every phase of the schedules. One step is enough where nothing
    is compiled, and for MLX, whose schedules come in as arrays; more of them would be practice off the clock. Two
    losses are never waited for together, as in the training."""
    for progress in WARMUP:
        loss = call(f"warm-up step at progress {progress:g}", training.step, batches, progress)
        call("warm-up", device.to_numpy, loss)
        if not any(name in sys.modules for name in PHASED):
            break
    device.fence()


def device_facts(device: Device, measure_peak: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"dtype": device.dtype.value, "dtype_reason": device.dtype.reason[:400]}
    if measure_peak:
        peak = device.peak()
        facts |= {"peak_flops": float(peak.flops_per_second), "peak_source": peak.source[:400]}
    return facts


def run(channel: Channel, device: Device, module: ModuleType, spec: Spec, digest: str, start: Message) -> None:
    """The part that is on the clock: build again, train, hand over."""
    from core.stream import TokenStream

    budget = Budget(start.number("budget"), start.number("started"))
    training = build(module, spec)
    again = weights_of(training)
    if weight_files.digest(again) != digest:
        raise RecipeError(
            "invalid", f"two builds from seed {spec.seed} have different weights; build() must depend on spec only"
        )
    del again
    gc.collect()
    gc.freeze()  # what lives now lives to the end, and need not be looked through again
    stream = TokenStream(start.fds, start.text("token_dtype"), spec.seed, device.from_numpy)
    close_all(start.fds)
    loop = Loop(channel, device, training, stream, budget, start.fields["looks"])
    loop.run()
    device.fence()
    channel.send("trained", loop.facts())
    stream.close()
    handed = weights_of(training)
    size = weight_files.write(Path("weights.safetensors"), handed)
    channel.send("handed", {"bytes": size, "peak_memory": int(device.memory().peak), "describe": described(training)})
    wait_for_end(channel)


class Loop:
    """Steps until no further one would end within the budget.

    The loss of step k is read when step k+1 is queued, and waits for step k alone (`Device.later`): the device always
    has work queued, and a loss that is not finite ends the run two steps later at most.
    """

    def __init__(
        self,
        channel: Channel,
        device: Device,
        training: Training,
        stream: Any,
        budget: Budget,
        looks: Sequence[float] = (),
    ) -> None:
        """`looks`: shares of the budget at which the referee wants to look at the weights."""
        self._channel = channel
        self._device = device
        self._training = training
        self._stream = stream
        self._budget = budget
        self._looks = looks
        self._looked = 0  # how many of the looks are behind
        self._times = StepTimes()
        self._pending: deque[tuple[int, Callable[[], Any]]] = deque()
        self._step = 0
        self._read = (0, math.nan, 0)  # step, loss, tokens served when it was read
        self._said = -math.inf

    def run(self) -> None:
        mark = time.perf_counter()  # monotonic() ticks every 16 ms on Windows
        while self._has_room():
            self._step += 1
            loss = call(f"step {self._step}", self._training.step, self._stream, self._budget.progress())
            self._pending.append((self._step, later(self._device, self._step, loss)))
            if len(self._pending) > 1:
                self._read_oldest()
            now = time.perf_counter()
            self._times.add(now - mark)
            mark = now
            self._tell(now)
            if (due := sum(share <= self._budget.progress() for share in self._looks)) > self._looked:
                self._looked = due
                self._be_looked_at(due - 1)
                mark = time.perf_counter()
        self._read_all()

    def _be_looked_at(self, index: int) -> None:
        """Hand over the weights so far, then wait: the referee stops this process meanwhile, and the clock with it."""
        self._read_all()
        self._device.fence()
        weights = weights_of(self._training)
        weight_files.write(Path(f"look-{index}.safetensors"), weights)
        self._channel.send("look", {"index": index})
        self._budget.pause(self._channel.receive().number("paused"))

    def facts(self) -> dict[str, Any]:
        _, loss, _ = self._read
        return {
            "steps": self._step,
            "tokens": int(self._stream.served),
            "passes": float(self._stream.passes),
            "loss": loss if math.isfinite(loss) else None,
            "median_step": self._times.median(),
            "seconds": self._budget.elapsed(),
        }

    def _has_room(self) -> bool:
        """Whether one more step fits. Near the end all that is queued is waited for, so that it is known exactly."""
        if self._times.fits(self._budget.left(), steps=3):
            return True
        self._read_all()
        return self._times.fits(self._budget.left())

    def _read_oldest(self) -> None:
        step, read = self._pending.popleft()
        self._read = (step, read_loss(step, read), int(self._stream.served))

    def _read_all(self) -> None:
        while self._pending:
            self._read_oldest()

    def _tell(self, now: float) -> None:
        step, loss, tokens = self._read
        if step and now - self._said >= PROGRESS_EVERY:
            self._said = now
            self._channel.send("progress", {"step": step, "loss": loss, "tokens": tokens})


def wait_for_end(channel: Channel) -> None:
    """Until the referee ends this process."""
    channel.receive()


# --- scorer and auditor ----------------------------------------------------------------------------------


def answer(channel: Channel, device: Device, begin: Message) -> None:
    """Build, compile for the scoring shape if asked to, then answer requests until the channel closes."""
    spec = spec_of(begin)
    training = build(load_recipe(begin.arrays["source"].tobytes()), spec)
    if begin.flag("warm"):
        tokens = np.random.default_rng(0).integers(
            0, spec.vocab_size, (begin.integer("rows"), spec.sequence_len), np.int32
        )
        call("warm-up", device.to_numpy, logits_of(device, training, spec, tokens)[0, 0])
    channel.send("warm", {"compiled": compiled()})
    while True:
        message = channel.receive(arrays_limit=2**30)
        if message.kind == "weights":
            load(training, message)
            channel.send("loaded")
        elif message.kind == "score":
            channel.send("scored", arrays={"nats": score(device, training, spec, message.arrays["tokens"])})
        elif message.kind == "logits":
            found = logits_at(device, training, spec, message.arrays["tokens"], message.arrays["positions"])
            channel.send("answered", arrays={"logits": found})


def load(training: Training, message: Message) -> None:
    """The weights of the descriptor that came along, each as an array of the recipe's own."""
    mapped = weight_files.read(message.fds[0])
    close_all(message.fds)
    call("load_weights()", training.load_weights, {name: np.array(array) for name, array in mapped.items()})


def logits_of(device: Device, training: Training, spec: Spec, tokens: np.ndarray) -> Any:
    """(B, T) tokens -> (B, T, V) on the device, the shape checked."""
    found = call("logits()", training.logits, device.from_numpy(tokens))
    wanted = (*tokens.shape, spec.vocab_size)
    shape = tuple(getattr(found, "shape", ()))
    if shape != wanted:
        raise RecipeError(
            "invalid", f"logits() gives shape {shape}; it must be {wanted}: rows, tokens, vocabulary entries"
        )
    return found


def score(device: Device, training: Training, spec: Spec, tokens: np.ndarray) -> np.ndarray:
    """(B, T+1) tokens -> (B, T) float32 nats of every target."""
    logits = logits_of(device, training, spec, np.ascontiguousarray(tokens[:, :-1]))
    try:
        return np.asarray(device.nats(logits, tokens[:, 1:]), np.float32)
    except ValueError as error:
        raise RecipeError("invalid", f"logits(): {error}") from None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise RecipeError("memory", f"losses from logits: {describe_error(error)}") from None


def logits_at(device: Device, training: Training, spec: Spec, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(B, T) tokens, (B,) positions -> (B, V) float32 logits there."""
    logits = logits_of(device, training, spec, tokens)
    picked = [device.to_numpy(logits[row, int(position)]) for row, position in enumerate(positions)]
    return np.stack(picked).astype(np.float32)


# --- trying out ------------------------------------------------------------------------------------------


def measure(channel: Channel, device: Device, begin: Message) -> None:
    """Seconds per step on random tokens, the warm-up apart."""
    spec = spec_of(begin)
    began = time.monotonic()
    training = build(load_recipe(begin.arrays["source"].tobytes()), spec)
    weights = weights_of(training)
    batches = RandomBatches(device, spec)
    warm_up(device, training, batches)
    warm = time.monotonic() - began
    channel.send("warm")  # from here on the card is watched
    batches.served = 0
    seconds, steps = begin.number("seconds"), 0
    start = time.perf_counter()
    times = []
    while steps < 3 or time.perf_counter() - start < seconds:
        mark = time.perf_counter()
        steps += 1
        read_loss(steps, later(device, steps, call(f"step {steps}", training.step, batches, 0.5)))
        times.append(time.perf_counter() - mark)
    facts = {
        "seconds_per_step": sorted(times)[len(times) // 4],  # what else runs here only ever makes steps slower
        "steps": steps,
        "tokens_per_step": batches.served / steps,
        "warmup": warm,
        "compiled": compiled(),
        "params": weight_files.count(weights),
        "peak_memory": int(device.memory().peak),
        "describe": described(training),
    }
    channel.send("measured", facts | device_facts(device, True))


def dry(channel: Channel, device: Device, begin: Message) -> None:
    """Import, build, one step, the logits of one row, weights there and back."""
    spec = spec_of(begin)
    training = build(load_recipe(begin.arrays["source"].tobytes()), spec)
    loss = call("step", training.step, RandomBatches(device, spec), 0.0)
    value = read_loss(1, later(device, 1, loss))
    weights = weights_of(training)
    call("load_weights()", training.load_weights, weights)
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, (1, spec.sequence_len + 1), np.int32)
    score(device, training, spec, tokens)
    channel.send("tried", {"loss": value, "params": weight_files.count(weights), "describe": described(training)})


if __name__ == "__main__":
    main()
