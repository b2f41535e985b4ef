"""init, and the part of `run` that makes a lab: backend, profile, data, recipe, settings."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from console import places
from console.output import Screen
from console.words import computed_by, count, duration, plural, size
from core.contract import Choice
from core.errors import DataError, UserError

if TYPE_CHECKING:
    import prepare
    from console.upstream import Import
    from core.data import Dataset
    from core.hardware import Hardware
    from core.lab import Lab
    from core.settings import Profile, Settings

OWN_PROGRAM = "program.md"
DRIVING = "## For an agent that drives this lab"  # where the second part of it begins
FEW_STEPS = 200
BASELINE = 1  # the number of a lab's first experiment
READINGS = 3  # timings of one recipe, beside others on the card, before the last is taken for what it is
WITHOUT_TRITON = "torch: triton "  # how a recipe says why it goes without, on a card (kernels/portable.py)
AMPERE = (8, 0)  # the first compute capability that multiplies bfloat16


@dataclass(frozen=True)
class Wishes:
    """What was asked for on the command line; None: whatever fits this machine."""

    backend: str | None = None
    data: str | None = None
    text: Path | None = None
    vocab: int | None = None
    profile: str | None = None
    budget: float | None = None
    source: Path | None = None  # an upstream clone
    tag: str | None = None
    verdict: str | None = None  # "statistical" or "simple"
    min_delta: float | None = None  # bpb

    def given(self) -> list[str]:
        """The options that were used, as they are written."""
        names = {"source": "from"}
        return [
            f"--{names.get(f.name, f.name.replace('_', '-'))}"
            for f in fields(self)
            if getattr(self, f.name) is not None
        ]


@dataclass(frozen=True)
class Plan:
    """Everything that a new lab is made from, before anything is written."""

    folder: Path
    tag: str
    hardware: Hardware
    choice: Choice
    profile: Profile
    budget: float
    verdict: Literal["statistical", "simple"]
    min_delta: float


def init_verb(screen: Screen, given: str | None, **options: Any) -> None:
    lab, taken = make(screen, given, Wishes(**options))
    screen.document({"lab": places.about(lab), "settings": _settings(lab), "imported": taken and taken.to_json()})
    screen.say(f"made lab {lab.tag}: {places.spelled(lab.path)}")
    screen.say(f"  {places.scale(lab)}")
    screen.say(f"  recipe {places.spelled(lab.path / 'train.py')}, strategy {places.spelled(lab.path / 'program.md')}")
    screen.say(f"next: autoresearch run {places.spelled(lab.path)}")


def _settings(lab: Lab) -> dict[str, Any]:
    import json

    loaded: dict[str, Any] = json.loads(lab.settings.to_json())
    return loaded


def make(screen: Screen, given: str | None, wishes: Wishes) -> tuple[Lab, Import | None]:
    """A new lab: says what is chosen and why, prepares missing data. Raises `UserError` before anything is written."""
    import backends
    from core import guard
    from core.lab import Lab

    chosen = plan(given, wishes)
    backend = backends.load(chosen.choice.value)
    recipe = backends.fit(backend.recipe(), chosen.profile)
    guard.require(recipe)
    taken = _take_over(screen, wishes.source, recipe) if wishes.source else None
    if taken:
        recipe = _replace(recipe, taken.constants)
    screen.say(f"backend {chosen.choice.value}: {chosen.choice.reason}")
    screen.say(f"profile {chosen.profile.name}: {chosen.profile.reason}")
    for remark in backend.remarks(chosen.hardware):
        screen.say(f"  {remark}")
    dataset = ready_data(screen, wishes, chosen.profile)
    with _folder("fit-") as folder:
        compiled = folder / "caches"
        keep_shape = bool(taken and taken.constants)
        recipe, settings = _fitted(screen, chosen, dataset, recipe, keep_shape, compiled)
        lab = Lab.create(
            chosen.folder,
            recipe=recipe,
            program=_program(taken.program) if taken and taken.program else _template(),
            settings=settings,
            message=_message(chosen, taken),
            history=taken.history if taken else None,
        )
        if compiled.is_dir():
            lab.products.keep(BASELINE, None, compiled)
    return lab, taken


@contextmanager
def _folder(prefix: str) -> Iterator[Path]:
    """A folder for now, beside the records."""
    from core import paths

    place = paths.home() / "tmp"
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def plan(given: str | None, wishes: Wishes) -> Plan:
    """Checks all that can be checked without data."""
    import backends
    from core import hardware as machines
    from core.settings import Settings

    if wishes.data and wishes.text:
        raise UserError("--data and --text were both given", "choose one of them")
    folder, tag = places.new_folder(given, wishes.tag)
    hardware = machines.probe()
    choice = machines.choose(hardware, wishes.backend)
    if choice.value == "cpu" and find_spec("torch") is None:  # on a Mac `pip install -e .` brings MLX alone
        fact = f"the backend cpu ({choice.reason}) needs PyTorch, which is not installed"
        raise UserError(fact, machines.torch_for_cpu(hardware))
    profile = backends.load(choice.value).profile(hardware, wishes.profile)
    rule: Literal["statistical", "simple"] = "simple" if wishes.verdict == "simple" else "statistical"
    usual = 0.0 if rule == "simple" else Settings.min_delta  # upstream's rule keeps whatever is lower
    least = usual if wishes.min_delta is None else wishes.min_delta
    return Plan(folder, tag, hardware, choice, profile, wishes.budget or profile.budget, rule, least)


def _fitted(
    screen: Screen, chosen: Plan, dataset: Dataset, recipe: bytes, keep_shape: bool, compiled: Path
) -> tuple[bytes, Settings]:
    """Time the recipe on this machine, and make it smaller or larger where its steps would be too few or too many.

    `keep_shape`: the constants were asked for, so that they are only told about. `compiled`: where what one timing
    compiles is left for the next, and for the baseline.
    """
    import backends
    from console import fitting

    backend = backends.load(chosen.choice.value)
    profile = replace(chosen.profile, budget=chosen.budget, vocab_size=dataset.vocab_size)
    settings = _lock(chosen, dataset, _first_dtype(chosen))
    slow = "; it is compiled first, which takes a minute or two" if settings.device.startswith("cuda") else ""
    screen.say(f"fitting: timing the recipe on this machine{slow} ...")
    measure = _Timing(screen, compiled)
    facts = measure(recipe, settings)
    if facts["dtype"] != settings.dtype:
        settings = replace(settings, dtype=facts["dtype"])
        facts = measure(recipe, settings)
    fits = not keep_shape and not fitting.shared(facts)
    scaled = fitted = backend.scale(profile, facts["seconds_per_step"]) if fits else profile
    if scaled.constants != profile.constants:
        screen.say(f"  {scaled.reason}")
    seconds = facts["seconds_per_step"] if scaled.constants == profile.constants else None
    if not keep_shape and (ways := backend.plans(scaled, chosen.hardware)):
        timed = facts if seconds is not None else None
        way, seconds = _way(screen, chosen, scaled, ways, settings, measure, timed)
        fitted = replace(scaled, constants={**scaled.constants, **way})
    if fitted.constants != profile.constants:
        recipe = backends.fit(backend.recipe(), fitted)
    params = facts["params"] if scaled.constants == profile.constants else None
    if line := _size_line(chosen.budget, seconds, params):
        screen.say(f"  {line}")
    screen.say(f"  compute in {settings.dtype}: {facts['dtype_reason']}")
    if chosen.verdict == "statistical" and not settings.probe:
        screen.say("  early stopping is off: Windows cannot pause a process")
    if by := computed_by(facts["describe"]):
        screen.say("  " + "; ".join(f"{what}: {name}" for what, name in by.items()))
    if by.get("kernels", "").startswith(WITHOUT_TRITON):
        screen.say("  that is slower than with Triton: `autoresearch doctor` says what it lacks")
    return recipe, settings


def _size_line(budget: float, seconds: float | None, params: int | None) -> str:
    """Of what was timed as it will run: steps of so many `seconds` in the budget, and parameters; None: not known."""
    steps = None if seconds is None else budget / seconds
    known = [f"about {count(steps)} steps in {duration(budget)}"] if steps is not None else []
    known += [f"{count(params)} parameters"] if params is not None else []
    few = "; that is few: a smaller model or batch would learn more" if steps is not None and steps < FEW_STEPS else ""
    return ", ".join(known) + few


def _first_dtype(chosen: Plan) -> str:
    """What the first timing computes in; the device then says what is best. It has to run: without Triton's products
    PyTorch has no attention in bfloat16 for a card before Ampere."""
    import backends

    hardware, name = chosen.hardware, chosen.choice.value
    if backends.device_name(name, hardware) != "cpu":
        old_card = bool(hardware.gpus) and hardware.gpus[0].capability < AMPERE
        return "float16" if old_card else "bfloat16"
    fast = {"avx512_bf16", "amx_bf16"} & set(hardware.flags)
    return "bfloat16" if fast and name == "cpu" else "float32"


def _way(
    screen: Screen,
    chosen: Plan,
    fitted: Profile,
    ways: list[dict[str, Any]],
    settings: Settings,
    timing: Callable[[bytes, Settings], dict[str, Any]],
    timed: dict[str, Any] | None,
) -> tuple[dict[str, Any], float | None]:
    """The constants of the fastest way for the batch through the device's memory, and seconds of its step where they
    are known. `timed`: what the timing of the profile as it is found, where there was one."""
    import backends
    from console import fitting
    from core.versions import versions

    backend = backends.load(chosen.choice.value)
    moving = ways[0].keys()
    shape = {k: v for k, v in fitted.constants.items() if k not in moving}
    shape |= {"vocab": fitted.vocab_size, "context": fitted.sequence_len, "dtype": settings.dtype}
    known_as = fitting.key(chosen.hardware, versions(settings), shape)

    def measure(constants: Mapping[str, Any]) -> dict[str, Any]:
        tried = replace(fitted, constants={**fitted.constants, **constants})
        if timed is not None and tried.constants == fitted.constants:
            return timed  # it takes as long to compile as any other
        screen.say(f"  timing {fitting.told(constants)} ...")
        return timing(backends.fit(backend.recipe(), tried), settings)

    return fitting.choose(ways, measure, screen.say, known_as)


class _Timing:
    """Recipes timed on this machine, each again where others used the card meanwhile; the last reading may be disturbed
    all the same. That they may be too slow is said once, and from then on each is timed once: a card that others use
    all the time would be timed for half an hour."""

    def __init__(self, screen: Screen, compiled: Path) -> None:
        self._screen, self._compiled = screen, compiled
        self._told = False
        self._readings = READINGS

    def __call__(self, recipe: bytes, settings: Settings) -> dict[str, Any]:
        from console import fitting
        from core import locks

        with locks.hold_device(settings.device):
            for reading in range(1, self._readings + 1):
                _wait_for_card(self._screen, settings.device)
                facts = _timed(recipe, settings, self._compiled)
                if not (shared := fitting.shared(facts)) or reading == self._readings:
                    break
                self._screen.say(f"  {shared}: timed again")
        if not self._told:
            self._tell(shared, facts)
        return facts

    def _tell(self, shared: str, facts: Mapping[str, Any]) -> None:
        from core import verdict

        if shared:
            self._readings = 1
            lines = [
                f"{shared}, in each of {READINGS} timings: the model is not fitted by them;",
                "make the lab again when the card is left alone and cool, or choose the constants yourself",
            ]
        elif disturbed := verdict.taint(facts["health"]):
            lines = [
                f"{disturbed}: this machine is measured slower than it is, and the model may be too small;",
                "end what else is running and make the lab again, or choose the constants yourself",
            ]
        else:
            return
        self._told = True
        for line in lines:
            self._screen.say(f"  {line}")


def _timed(recipe: bytes, settings: Settings, compiled: Path) -> dict[str, Any]:
    from core import referee

    with _folder("timing-") as workdir:
        try:
            return referee.measure(recipe, settings, workdir, seconds=1.0, compiled=compiled)
        except referee.RecipeFailed as failed:
            raise UserError(
                f"the recipe does not run on this machine ({failed.status}): {failed.reason}", "autoresearch doctor"
            ) from None


def _wait_for_card(screen: Screen, device: str) -> None:
    """As before an experiment: what is timed beside a game makes every later budget too small."""
    if device.startswith("cuda"):
        from core import gpuwatch, nvml

        gpuwatch.require_free(device, nvml.Nvml(), lambda text: screen.say(f"  {text}"), threading.Event())


def _lock(chosen: Plan, dataset: Dataset, dtype: str) -> Settings:
    import backends
    from core import freezing
    from core.settings import Settings

    return Settings(
        backend=chosen.choice.value,
        profile=chosen.profile.name,
        data=dataset.path.name,
        data_sha256=dataset.sha256,
        vocab_size=dataset.vocab_size,
        sequence_len=chosen.profile.sequence_len,
        bos_id=dataset.bos_id,
        budget=chosen.budget,
        eval_tokens=chosen.profile.eval_tokens,
        dtype=dtype,
        device=backends.device_name(chosen.choice.value, chosen.hardware),
        warmup_cap=chosen.profile.warmup_cap,
        logits_bytes=chosen.profile.logits_bytes,
        verdict=chosen.verdict,
        min_delta=chosen.min_delta,
        probe=chosen.verdict == "statistical" and freezing.possible(),
    )


def _message(chosen: Plan, taken: Import | None) -> str:
    first = f"The {chosen.choice.value} recipe, fitted by profile {chosen.profile.name}"
    return f"{first}, with the constants of {taken.path.name}" if taken and taken.constants else first


def _template() -> str:
    from core.paths import project_root

    return (project_root() / OWN_PROGRAM).read_text(encoding="utf-8")


def _program(upstreams: str) -> str:
    """Upstream's strategy, and after it how a lab is driven here, where its commands would do harm."""
    ours = _template()
    driving = ours[ours.index(DRIVING) :]
    note = "The text above came with the imported clone. Where it and this part differ, this part holds."
    return f"{upstreams.rstrip()}\n\n# How this lab is driven\n\n{note}\n\n{driving}"


def _replace(recipe: bytes, constants: Mapping[str, Any]) -> bytes:
    from core.recipe import replace as replace_constants

    return replace_constants(recipe.decode("utf-8"), constants).encode("utf-8")


def _take_over(screen: Screen, folder: Path, recipe: bytes) -> Import:
    from console import upstream
    from core.recipe import constants

    ours = {name: c.value for name, c in constants(recipe.decode("utf-8")).items()}
    taken = upstream.read(folder.expanduser(), ours)
    for line in told(taken):
        screen.say(line)
    return taken


def told(taken: Import) -> list[str]:
    """What was taken over and what was not, for people."""
    carried = ", ".join(f"{name} = {value!r}" for name, value in taken.constants.items())
    lines = [f"from {taken.path}:", f"  carried over: {carried or 'no constant differs'}"]
    if taken.unknown:
        lines.append("  not carried, our recipe has no such constant: " + ", ".join(taken.unknown))
    if taken.mismatched:
        lines.append("  not carried, another kind of value: " + ", ".join(taken.mismatched))
    if taken.unread:
        lines.append("  not carried, not a plain value: " + ", ".join(taken.unread))
    if taken.not_carried:
        lines.append(f"  not carried, code: {', '.join(taken.not_carried)}")
    if taken.history:
        lines.append(f"  history for researchers, never a score: {plural(len(taken.history), 'result')} of results.tsv")
    lines.append(
        "  program.md is kept; how a lab is driven here follows in it"
        if taken.program
        else "  it has no program.md: ours is used"
    )
    return lines


# --- data --------------------------------------------------------------------------------------


def ready_data(screen: Screen, wishes: Wishes, profile: Profile) -> Dataset:
    """The data set of the wishes or of the profile; told with size, place and time before it is fetched."""
    import prepare
    from core.data import Dataset
    from core.paths import data_root

    if wishes.data and (data_root() / wishes.data / "manifest.json").is_file():
        return Dataset.open(data_root() / wishes.data, verify="quick")
    if wishes.data and (Path(wishes.data).expanduser() / "manifest.json").is_file():
        raise DataError(f"{wishes.data} lies outside {data_root()}", "give the folder's name, of a data set in there")
    name = wishes.data or profile.data
    vocab = wishes.vocab or profile.vocab_size
    if wishes.text:
        screen.say(f"data: {wishes.text}, vocabulary {vocab}")
        with _progress(screen) as how:
            return prepare.prepare(None, text=wishes.text.expanduser(), vocab_size=vocab, **how)
    if (found := prepare.locate(name, vocab)) is not None:
        screen.say(f"data: {found.name}, prepared before")
    else:
        _announce(screen, prepare.known().get(name), vocab)
    try:
        with _progress(screen) as how:
            return prepare.prepare(name, vocab_size=vocab, **how)
    except DataError as error:
        if name == "kjv":
            raise
        instead = "--data kjv or --text PATH"  # other sets are fetched, too
        action = error.action.replace(prepare.WITHOUT_NETWORK, instead)
        if instead not in action:
            action = f"{action}, or choose {instead}".lstrip(", ")
        raise DataError(error.fact, action) from error


@contextmanager
def _progress(screen: Screen) -> Iterator[dict[str, Any]]:
    """How `prepare` tells what it does: in lines, and with a bar where somebody watches."""
    import prepare

    if not screen.interactive:
        yield {"progress": lambda line: screen.say(f"  {line}")}
        return
    with prepare.Show(screen.console) as show:
        yield {"progress": lambda line: show.say(f"  {line}"), "meter": show.meter}


def _announce(screen: Screen, source: prepare.Source | None, vocab: int) -> None:
    from core.paths import data_root

    if source is None:
        return  # prepare names the known ones
    download = f"{source.download / 1e9:.1f} GB from {source.place}" if source.download else source.place
    screen.say(f"data: {source.name}, {source.about}")
    screen.say(f"  to be prepared now: {download}; {source.minutes}; vocabulary {vocab}; into {data_root()}")


def passes_line(tokens: int, per_second: float | None, budget: float) -> str:
    """How often one budget goes over the training text; more than four times is worth saying."""
    if not per_second:
        return ""
    passes = per_second * budget / tokens
    text = f"{count(per_second * budget)} tokens in a budget, {passes:.2g} passes over the text"
    return f"{text}: more than 4, so it learns by heart; more text would help" if passes > 4 else text


def free_disk(folder: Path) -> str:
    import shutil

    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return size(shutil.disk_usage(there).free)


def told_budget(profile: Profile, budget: float) -> str:
    return duration(budget) if budget == profile.budget else f"{duration(budget)} (profile: {duration(profile.budget)})"
