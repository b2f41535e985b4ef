"""Recipes that cheat, in MLX's children: the same kinds as tests/test_tamper.py, and none may be kept either.

A recipe of tests/tamper that knows nothing of torch attacks what all backends share (processes, files, channel, clock,
handover), and is run as it stands, over the honest MLX model. One that does has a translation of the same name in
tests/tamper/mlx, which inherits what it does not declare (KIND, EXPECT, CAUGHT_BY, LINT) from the one it translates.
Whatever the lint says is asserted without running anything; all are then judged with the lint off, where processes,
sandbox, clock, scorer and auditor hold alone.

The rest of the module shows that the test can fail: the honest recipe is scored and audited by the same harness, and
cheats that nobody audits are scored far better than it (`test_it_would_gain_if_nobody_looked`).
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tamper import FOLDER, KNOWN, RECIPES, SECRET, commonest_successors, learnt, look_at_logs, must_hold

from core import guard
from core.data import Dataset
from core.outcome import Outcome, Request
from core.settings import Settings

pytest.importorskip("mlx.core")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="MLX's build for Linux is what runs here"),
]

TRANSLATED = {p.stem for p in (FOLDER / "mlx").glob("*.py")} - {"common"}
COMMON = (FOLDER / "mlx" / "common.py").read_text("utf-8")
LEARNS_FOR = int(re.search(r"^STEPS = (\d+)", COMMON, re.M)[1])  # type: ignore[index]
TORCH = re.compile(r"^(import|from) torch|^from common import .*\b(torch|nn|F|Net|knowing|next_token)\b", re.M)
SHARED = {name for name in RECIPES if not TORCH.search((FOLDER / f"{name}.py").read_text("utf-8"))}
CHEATS = sorted(SHARED | TRANSLATED)

# Cheats that gain where there is no audit, each at another place: in the mask, between calls, in the device's
# arithmetic, on the channel. Without `audit` and the lint nothing else stands between them and the record.
GAINS = ["future_shifted", "memory_two_passes", "evaluator_patched", "wire_forged_sender", "distribution_functions"]


@dataclass(frozen=True)
class Cheat:
    source: str
    expect: frozenset[str]
    caught_by: tuple[str, ...]
    lint: str


def whole(text: str) -> str:
    """A recipe is one file: the honest MLX model, and the hideouts, in the place of the lines that import them."""
    for name, shared in (("common", COMMON), ("hideouts", (FOLDER / "hideouts.py").read_text("utf-8"))):
        text = re.sub(rf"^from {name} import .*$", lambda _, s=shared: s, text, flags=re.M)  # type: ignore[misc]
    return text


def declared(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        name = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(node, ast.Assign) and isinstance(name, ast.Name) and name.id in KNOWN:
            found[name.id] = ast.literal_eval(node.value)
    return found


def read(name: str, dataset: Dataset) -> Cheat:
    shared, own = FOLDER / f"{name}.py", FOLDER / "mlx" / f"{name}.py"
    said = declared(shared) | declared(own)
    source = whole((own if own.exists() else shared).read_text("utf-8"))
    if "@BIGRAMS@" in source:
        source = source.replace("@BIGRAMS@", commonest_successors(dataset))
    source = source.replace("@NOISE@", np.random.default_rng(0).bytes(20_000).hex())
    return Cheat(source, frozenset(said["EXPECT"]), tuple(said["CAUGHT_BY"]), said["LINT"])


Judge = Callable[..., Outcome]


@pytest.fixture(scope="module")
def judge(dataset: Dataset, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Run an MLX source as a candidate that would be kept, the lint off."""
    limits = replace(
        settings, backend="mlx", budget=1.0, warmup_cap=15.0, memory_limit=2 * 2**30, eval_tokens=8192,
        audit_points=1024,
    )  # fmt: skip

    def run(source: str, changed: dict[str, Any] | None = None, **given: Any) -> Outcome:
        workdir = tmp_path_factory.mktemp("work")
        fields: dict[str, Any] = {"lint": False, "would_keep": lambda bpb: True, **given}
        request = Request(
            source=source.encode(), settings=replace(limits, **(changed or {})), dataset=dataset, seed=settings.seed,
            experiment="1", workdir=workdir, **fields,
        )  # fmt: skip
        outcome = learnt(request, LEARNS_FOR)
        look_at_logs(workdir)
        return outcome

    return run


@pytest.fixture(scope="module")
def honest(judge: Judge) -> Outcome:
    """The MLX recipe that all of them start from; the lint has nothing against it."""
    outcome = judge(COMMON, lint=True)
    assert outcome.status == "scored" and outcome.audited, f"{outcome.reason}\n{outcome.log_tail}"
    return outcome


def test_the_honest_recipe_passes_the_same_harness(honest: Outcome) -> None:
    assert honest.val_bpb is not None and 1.0 < honest.val_bpb < 3.5
    assert honest.audit["points"] >= 1024
    assert honest.steps >= LEARNS_FOR


@pytest.mark.parametrize("name", CHEATS)
def test_the_lint_says_it(name: str, dataset: Dataset) -> None:
    """What the lint finds is what the referee answers with, before it starts anything (test_tamper.py shows that)."""
    cheat = read(name, dataset)
    findings = [str(f) for f in guard.check(cheat.source.encode())]
    assert any(cheat.lint in f for f in findings) if cheat.lint else findings == [], findings


@pytest.mark.parametrize("name", CHEATS)
def test_the_wall_holds_without_the_lint(
    name: str,
    dataset: Dataset,
    judge: Judge,
    honest: Outcome,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", SECRET)
    (home / "secret.txt").write_text(SECRET)
    before = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in dataset.path.iterdir()}
    cheat = read(name, dataset)
    changed = {"warmup_cap": 4.0} if name.startswith("hang_") else {}
    if name == "memory_eaten":  # on a busy machine a second is not enough to eat it all
        changed = {"budget": 8.0}
    outcome = judge(cheat.source, changed)
    if name in ("state_between_runs", "cache_poisoned"):  # whoever comes after finds nothing
        outcome = judge(cheat.source, caches=outcome.caches)
    if name == "smuggled_late":  # against itself without the table
        honest = judge(cheat.source.replace("KNOWS = True", "KNOWS = False"))
        assert honest.status == "scored"
    must_hold(outcome, honest, cheat.expect, cheat.caught_by)
    assert before == {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in dataset.path.iterdir()}
    assert not list(Path("/dev/shm").glob("autoresearch-tamper*"))


@pytest.mark.parametrize("name", GAINS)
def test_it_would_gain_if_nobody_looked(name: str, dataset: Dataset, judge: Judge, honest: Outcome) -> None:
    """The same recipe without an audit: it is scored, and by more than a tenth of a bit better than the honest one."""
    outcome = judge(read(name, dataset).source, audit="never")
    assert outcome.status == "scored" and not outcome.audited, outcome.reason
    assert outcome.val_bpb is not None and honest.val_bpb is not None
    assert outcome.val_bpb < honest.val_bpb - 0.1, (outcome.val_bpb, honest.val_bpb)


def test_every_recipe_is_run_in_mlx_and_the_table_is_complete() -> None:
    assert set(RECIPES) <= set(CHEATS)
    table = (FOLDER / "README.md").read_text("utf-8")
    assert not [name for name in TRANSLATED if f"`{name}`" not in table]
