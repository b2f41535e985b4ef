"""Experiments through the public door, with real processes: what an honest recipe gets, and how each failure ends."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from edits import (
    BUILD,
    CHANNEL,
    HANDED,
    LOGITS,
    OS,
    STEP,
    Edit,
    before,
    changed,
    check_clean,
    forged,
    in_step,
    instead,
    left_behind,
    trained_in_weights,
)

from core import weights
from core.child import BackendFailed, Place, Worker
from core.data import Dataset
from core.errors import DeviceFull, UserError
from core.health import Watch
from core.outcome import Event, Outcome, Request
from core.paths import project_root
from core.referee import RecipeFailed, dry_build, execute, measure, sample
from core.settings import Settings
from core.wire import Message

Run = Callable[..., Outcome]


# --- an honest recipe ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def honest(dataset: Dataset, settings: Settings, tiny_recipe: str, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """One experiment, looked at by several tests: outcome, events, work folder."""
    workdir = tmp_path_factory.mktemp("honest")
    events: list[Event] = []
    request = Request(tiny_recipe.encode(), settings, dataset, settings.seed, "1", workdir, audit="always")
    return execute(request, events.append), events, workdir


def test_an_honest_recipe_is_scored_and_audited(honest: tuple, settings: Settings, dataset: Dataset) -> None:
    outcome, _, workdir = honest
    assert (outcome.status, outcome.reason, outcome.audited) == ("scored", "", True)
    uniform = settings.eval_tokens * np.log(settings.vocab_size) / np.log(2) / outcome.total_bytes
    assert 1.0 < outcome.val_bpb < uniform
    assert outcome.val_bpb == pytest.approx(outcome.total_nats / outcome.total_bytes / np.log(2))
    assert outcome.steps > 5 and outcome.tokens == outcome.steps * 16 * 64
    assert outcome.passes == pytest.approx(outcome.tokens / dataset.part("train").tokens, rel=0.01)
    assert outcome.training_seconds == pytest.approx(settings.budget, abs=0.5)
    assert outcome.params == 3 * 512 * 32 + 512
    assert outcome.audit["points"] >= settings.audit_points
    assert outcome.audit["largest"] < 1e-3
    assert outcome.describe["depth"] == 1
    assert outcome.peak_memory > 10**7
    assert set(outcome.timings) >= {"startup", "warmup", "training", "handover", "scoring", "audit", "total"}
    assert outcome.versions["numpy"] == np.__version__
    check_clean(workdir)


def test_the_score_is_that_of_the_weights(honest: tuple, settings: Settings, dataset: Dataset) -> None:
    """Computed again in numpy from the exported file and the validation text, with nothing of the worker."""
    outcome, _, _ = honest
    fd = os.open(outcome.weights, os.O_RDONLY)
    w = {name: array.astype(np.float64) for name, array in weights.read(fd).items()}
    os.close(fd)
    rows = dataset.rows("val", settings.sequence_len, settings.eval_tokens).astype(np.int64)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    before = np.concatenate([np.full((len(rows), 1), settings.bos_id), tokens[:, :-1]], 1)
    logits = np.tanh(w["embed"][tokens] + w["before"][before]) @ w["head"].T + w["bias"]
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    nats = log_sum - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    sizes = dataset.token_bytes[targets]
    assert outcome.scored_tokens == (sizes > 0).sum()
    assert outcome.val_bpb == pytest.approx(nats[sizes > 0].sum() / sizes.sum() / np.log(2), abs=1e-5)


def test_events_and_curve(honest: tuple) -> None:
    outcome, events, _ = honest
    phases = [e.data["phase"] for e in events if e.kind == "phase"]
    assert phases == ["start", "warm-up", "train", "score", "audit"]
    progress = [e.data for e in events if e.kind == "progress"]
    assert progress and all(0 <= p["fraction"] <= 1 and p["tokens_per_second"] >= 0 for p in progress)
    assert outcome.curve[-1][1] == outcome.steps
    assert outcome.curve[-1][3] < outcome.curve[0][3], "the loss falls"


def test_outcomes_survive_json(honest: tuple) -> None:
    outcome, _, _ = honest
    assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome


def test_sampling_continues_a_text(
    honest: tuple, tiny_recipe: str, settings: Settings, dataset: Dataset, tmp_path: Path
) -> None:
    outcome, _, _ = honest
    prompt = dataset.tokenizer().encode("And God said")

    def continued(temperature: float, seed: int) -> list[int]:
        source = tiny_recipe.encode()
        return list(sample(source, outcome.weights, settings, prompt, 12, temperature, seed, tmp_path / "sample"))

    greedy = continued(0.0, 1)
    assert len(greedy) == 12 and all(0 <= t < settings.vocab_size for t in greedy)
    assert greedy == continued(0.0, 2)
    assert continued(1.0, 1) != greedy
    assert left_behind() == []


@pytest.mark.slow
def test_compile_caches_are_kept_and_found_again(
    run_recipe: Run, tiny_recipe: str, settings: Settings, tmp_path: Path
) -> None:
    source = changed(
        tiny_recipe,
        (
            "        self.steps = 0\n",
            "        self.steps = 0\n        self.bent = torch.compile(lambda x: torch.tanh(x))\n",
        ),
        ("torch.tanh(p", "self.bent(p"),
    )
    patient = dataclasses.replace(settings, warmup_cap=200.0, budget=1.0)
    first = run_recipe(source, settings=patient, audit="never", workdir=tmp_path / "first")
    assert first.status == "scored" and first.describe["compiled"], first.reason
    assert first.caches is not None
    assert [p.name for p in (tmp_path / "first").glob("caches*")] == [first.caches.name]
    again = run_recipe(source, settings=patient, audit="never", workdir=tmp_path / "again", caches=first.caches)
    assert again.status == "scored" and again.caches is not None
    kernels = [{p.relative_to(o.caches) for p in o.caches.rglob("*.so")} for o in (first, again)]
    assert kernels[0] and kernels[0] == kernels[1], "nothing was compiled again"


# --- budgets -------------------------------------------------------------------------------------------


def test_a_budget_of_ones_own_and_no_audit(run_recipe: Run, tiny_recipe: str, tmp_path: Path) -> None:
    outcome = run_recipe(tiny_recipe, budget=1.0, audit="never")
    assert (outcome.status, outcome.audited) == ("scored", False)
    assert outcome.training_seconds == pytest.approx(1.0, abs=0.5)
    asked: list[float] = []
    again = run_recipe(tiny_recipe, budget=1.0, audit="auto", would_keep=lambda bpb: asked.append(bpb) or False)
    assert asked == [again.val_bpb] and not again.audited
    check_clean(tmp_path / "work")


def scored_as(value: float) -> Edit:
    """Replace the trusted code that turns logits into losses."""
    rows = "np.full((len(tokens), spec.sequence_len), VALUE, np.float32)".replace("VALUE", str(value))
    return before(LOGITS, f"sys.modules['__main__'].score = lambda device, training, spec, tokens: {rows}")


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    status: str
    words: str  # in the reason
    edits: tuple[Edit, ...]
    cap: float = 60.0  # seconds, outside the training
    memory: int = 0
    lint: bool = False


HURRY = 4.0  # seconds: more than it takes to build
FULL = '{"steps": 9, "tokens": 9, "passes": 1, "loss": 1.0, "median_step": 0.1}'
NOISY_WEIGHTS = "return {n: p.detach().numpy() * (np.nan if self.steps > 9 else 1) for n, p in self.params.items()}"
NAN_AT_17 = "return loss.detach() * (float('nan') if self.steps == 17 else 1)"
KNOWING = "return self.model(tokens) + 4 * F.one_hot(F.pad(tokens[:, 1:], (0, 1)), self.spec.vocab_size)"
FORGETTING = "self.calls = getattr(self, 'calls', 0) + 1; return self.model(tokens) * (1 + 0.03 * self.calls)"

CASES = [
    # The recipe is wrong.
    Case("syntax", "crash", "import: SyntaxError", ((BUILD, "def build(spec:\n"),)),
    Case("import", "crash", "ZeroDivisionError: division by zero (train.py, line 7)", (("= 32\n", "= 32 / 0\n"),)),
    Case("no build", "crash", "no function build", ((BUILD, "def make(spec):\n"),)),
    Case("build", "crash", "build: ValueError: no", ((BUILD, BUILD + "    raise ValueError('no')\n"),)),
    Case("step", "crash", "step 5: KeyError: 0 (train.py, line", (in_step("{}[0]"),)),
    Case("nan", "crash", "loss is nan at step 17", (("return loss.detach()", NAN_AT_17),)),
    Case("exit", "crash", "step 5: SystemExit", (in_step("raise SystemExit(0)"),)),
    Case("loss shape", "crash", "shape (2,)", (("return loss.detach()", "return loss.detach().repeat(2)"),)),
    Case("columns", "invalid", "it must be", (instead(LOGITS, "return F.pad(self.model(tokens), (0, 8))"),)),
    Case("nan logits", "invalid", "finite", (instead(LOGITS, "return self.model(tokens) * float('nan')"),)),
    Case("nan weights", "invalid", "not finite", (instead(HANDED, NOISY_WEIGHTS),)),
    Case("no weights", "crash", "weights() returned list", (instead(HANDED, "return [1, 2]"),)),
    Case("unseeded", "invalid", "two builds", (("torch.manual_seed(spec.seed)", "torch.seed()"),)),
    Case("lint", "invalid", "os", (OS,), lint=True),
    # It does not come back.
    Case(
        "hang import",
        "timeout",
        "import and build took more than 4 s",
        (("= 32\n", "= 32\nwhile True: pass\n"),),
        HURRY,
    ),
    Case("hang build", "timeout", "took more than 4 s", ((BUILD, BUILD + "    while True: pass\n"),), HURRY),
    Case("slow build", "timeout", "no step was made: the 2 s of the", (OS, (BUILD, BUILD + "    time.sleep(2.02)\n"))),
    Case("hang step", "timeout", "training (2 s budget)", (in_step("while True: pass"),)),
    Case("sleep", "timeout", "training (2 s budget)", (OS, in_step("time.sleep(60)"))),
    Case("hang logits", "timeout", "logits() of random tokens", (before(LOGITS, "while True: pass"),), HURRY),
    Case("hang weights", "timeout", "weights()", (OS, trained_in_weights("time.sleep(60)"))),
    Case("late weights", "timeout", "weights()", (OS, trained_in_weights("time.sleep(1.5)"))),
    # It dies.
    Case("os._exit", "crash", "exit status 0", (OS, in_step("os._exit(0)"))),
    Case("os._exit 125", "crash", "exit status 125", (OS, in_step("os._exit(125)"))),
    Case("segfault", "crash", "SIGSEGV", (in_step("import ctypes; ctypes.string_at(0)"),)),
    Case("memory", "crash", "memory", (in_step("self.hog = [bytearray(2**26) for _ in range(64)]"),), memory=2**30),
    # It talks to the referee.
    Case("closed", "invalid", "closed its channel", (OS, in_step(f"os.close({CHANNEL}); time.sleep(60)"))),
    Case("garbage", "invalid", "broke its protocol", (OS, in_step(f"os.write({CHANNEL}, b'val_bpb: 0.5 ' * 9)"))),
    Case("huge", "invalid", "broke its protocol", (OS, in_step(f"os.write({CHANNEL}, b'ARW1' + b'x' * 16)"))),
    Case("trained early", "timeout", "weights()", (OS, forged("trained", FULL))),
    Case("wrong fields", "invalid", "`steps`", (OS, forged("trained", '{"steps": "many"}'))),
    Case("wrong message", "invalid", "came instead", (OS, forged("scored", "{}"))),
    Case("own status", "invalid", "status 'scored'", (OS, forged("failed", '{"status": "scored", "reason": "0.5"}'))),
    # It knows what it cannot know, or says so.
    Case("future", "invalid", "uses the future: at row", (instead(LOGITS, KNOWING),)),
    Case("memory of calls", "invalid", "remembers earlier calls", (instead(LOGITS, FORGETTING),)),
    Case("lying", "invalid", "other losses than its logits give", (OS, scored_as(0.5))),
    Case("negative", "invalid", "do not sum to 1", (OS, scored_as(-0.5))),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_how_it_ends(case: Case, run_recipe: Run, tiny_recipe: str, settings: Settings, tmp_path: Path) -> None:
    source = changed(tiny_recipe, *case.edits)
    limits = dataclasses.replace(settings, warmup_cap=case.cap, memory_limit=case.memory)
    outcome = run_recipe(source, settings=limits, lint=case.lint)
    assert outcome.status == case.status, outcome.reason
    assert case.words in outcome.reason
    assert outcome.val_bpb is None and outcome.weights is None
    check_clean(tmp_path / "work")


def test_the_log_shows_the_recipes_own_lines(run_recipe: Run, tiny_recipe: str) -> None:
    source = changed(tiny_recipe, before(STEP, "print('about to fail')\n{}['gone']"))
    outcome = run_recipe(source)
    assert "about to fail" in outcome.log_tail
    assert "{}['gone']" in outcome.log_tail and "KeyError: 'gone'" in outcome.log_tail
    assert "worker.py" not in outcome.log_tail


def test_prints_without_end_cost_little(run_recipe: Run, tiny_recipe: str, tmp_path: Path) -> None:
    source = changed(tiny_recipe, before(STEP, "print('x' * 100_000)"))
    outcome = run_recipe(source)
    assert outcome.status == "scored", outcome.reason
    assert sum(p.stat().st_size for p in (tmp_path / "work").glob("*.log")) < 8 * 2**20
    assert len(outcome.log_tail.splitlines()) <= 50


def test_forks_end_with_it(run_recipe: Run, tiny_recipe: str, tmp_path: Path) -> None:
    child = in_step("if os.fork() == 0: os.setsid(); time.sleep(600)")
    outcome = run_recipe(changed(tiny_recipe, OS, child), lint=False)
    assert outcome.status == "scored", outcome.reason
    check_clean(tmp_path / "work")


def test_an_exiting_recipe_whose_child_holds_the_channel(run_recipe: Run, tiny_recipe: str, tmp_path: Path) -> None:
    child = in_step("os.fork() and os._exit(7)\ntime.sleep(600)")
    outcome = run_recipe(changed(tiny_recipe, OS, child), lint=False)
    assert outcome.status in ("crash", "timeout"), outcome.reason
    check_clean(tmp_path / "work")


@pytest.mark.parametrize("moment", ["warm-up", "train", "audit"])
def test_stop_ends_it_soon(moment: str, run_recipe: Run, tiny_recipe: str, settings: Settings, tmp_path: Path) -> None:
    stop = threading.Event()
    stopped_at = []

    def on_event(event: Event) -> None:
        if event.data.get("phase") == moment:
            stop.set()
            stopped_at.append(time.monotonic())

    outcome = run_recipe(tiny_recipe, on_event, stop, settings=dataclasses.replace(settings, budget=2.0))
    assert outcome.status == "stopped" and outcome.val_bpb is None
    assert stopped_at
    check_clean(tmp_path / "work")


RUNNER = """
import sys
from pathlib import Path
from core.data import Dataset
from core.outcome import Request
from core.referee import execute
from core.settings import Settings
data, settings, recipe, workdir = map(Path, sys.argv[1:])
request = Request(recipe.read_bytes(), Settings.from_json(settings.read_text()), Dataset.open(data), 42, "1", workdir)
execute(request, lambda event: print(event.data.get("phase"), flush=True))
"""


@pytest.mark.parametrize("moment", ["warm-up", "train"])
def test_a_killed_referee_takes_its_children_along(
    moment: str, dataset: Dataset, settings: Settings, tiny_recipe: str, tmp_path: Path
) -> None:
    (tmp_path / "settings").write_text(dataclasses.replace(settings, budget=60.0).to_json())
    (tmp_path / "recipe").write_text(tiny_recipe)
    command = [
        sys.executable,
        "-c",
        RUNNER,
        dataset.path,
        tmp_path / "settings",
        tmp_path / "recipe",
        tmp_path / "work",
    ]
    referee = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=project_root())
    assert referee.stdout is not None
    assert any(line.strip() == moment for line in referee.stdout)
    children = psutil.Process(referee.pid).children(recursive=True)
    assert len(children) >= 3
    referee.kill()
    referee.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


# --- smaller questions ---------------------------------------------------------------------------------


def test_measure(tiny_recipe: str, settings: Settings, tmp_path: Path) -> None:
    found = measure(tiny_recipe.encode(), settings, tmp_path, seconds=0.3)
    assert found["seconds_per_step"] > 0 and found["tokens_per_step"] == 1024 and found["steps"] >= 3
    assert found["params"] == 3 * 512 * 32 + 512 and found["compiled"] is False and found["peak_flops"] > 0
    with pytest.raises(RecipeFailed, match="KeyError"):
        measure(changed(tiny_recipe, before(STEP, "{}[0]")).encode(), settings, tmp_path)
    assert left_behind() == []


def test_what_a_timing_compiles_is_there_for_the_next(tiny_recipe: str, settings: Settings, tmp_path: Path) -> None:
    """A model that is fitted to a card is compiled several times, and the baseline is one of them."""
    leave = "import os, pathlib\np = pathlib.Path(os.environ['XDG_CACHE_HOME'])\np.mkdir(exist_ok=True)\n"
    count = "(p / f'made-{len(list(p.iterdir()))}').write_text('code')\n"
    compiled = tmp_path / "compiled"
    for made in ({"made-0"}, {"made-0", "made-1"}):
        measure(f"{leave}{count}{tiny_recipe}".encode(), settings, tmp_path / "work", seconds=0.1, compiled=compiled)
        assert {file.name for file in (compiled / "xdg").iterdir()} == made


def test_a_timing_watches_its_card_from_the_end_of_the_warm_up(
    tiny_recipe: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, what we take of it ourselves would look like somebody else's where nobody tells them apart."""
    begun: list[tuple[str, float, bool]] = []

    class Card(Watch):
        def __init__(self, pid: int, device: str = "", every: float = 2.0) -> None:
            super().__init__(pid, device)
            begun.append((device, every, any(tmp_path.glob("*/scratch/built"))))

        def report(self) -> dict[str, Any]:
            return {"card": {"tainted": "a game"}, "tainted": "a game"}

    monkeypatch.setattr("core.referee.Watch", Card)
    recipe = changed(tiny_recipe, (BUILD, f"{BUILD}    open('built', 'w').close()\n"))
    found = measure(recipe.encode(), settings, tmp_path, seconds=0.4)
    assert begun == [("cpu", 0.1, True)] and found["health"]["tainted"] == "a game"
    dry_build(tiny_recipe.encode(), settings, tmp_path)
    assert begun[1][:2] == ("", 2.0)


def test_a_card_that_is_full_is_told_apart_from_one_that_does_not_work(settings: Settings, tmp_path: Path) -> None:
    worker = Worker("scorer", Place(settings, tmp_path))
    try:
        worker.get_ready()
        fields = {"status": "backend", "reason": "only 0.2 GiB are free", "action": "close it"}
        with pytest.raises(DeviceFull) as full:
            raise worker._failed(Message("failed", {**fields, "needed": 2**30}))
        with pytest.raises(BackendFailed):
            raise worker._failed(Message("failed", fields))
        assert full.value.needed == 2**30
    finally:
        worker.close()


def test_dry_build(tiny_recipe: str, settings: Settings, tmp_path: Path) -> None:
    found = dry_build(tiny_recipe.encode(), settings, tmp_path)
    assert found["loss"] == pytest.approx(np.log(512), rel=0.05) and found["describe"]["depth"] == 1
    with pytest.raises(RecipeFailed, match="it must be") as caught:
        dry_build(
            changed(tiny_recipe, (LOGITS, "        return self.model(tokens)[:, :-1]\n")).encode(), settings, tmp_path
        )
    assert caught.value.status == "invalid"


def test_a_backend_that_does_not_load_is_no_fault_of_the_recipe(
    run_recipe: Run, tiny_recipe: str, settings: Settings
) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        run_recipe(tiny_recipe, settings=dataclasses.replace(settings, backend="nowhere"))
    assert left_behind() == []
